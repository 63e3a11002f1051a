//! The driver's side of a virtio queue, written from the specification: it fills rings in the guest's memory, rightly
//! or as wrongly as it is told.

#![allow(clippy::little_endian_bytes, reason = "virtio is little-endian, unlike VHD")]

use vhd_vmm::memory::Memory;

/// More descriptors follow.
pub const NEXT: u16 = 1;
/// The device writes here.
pub const WRITE: u16 = 2;
/// It is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Request types of a block device.
pub mod kind {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush.
    pub const FLUSH: u32 = 4;
    /// Tell the serial.
    pub const GET_ID: u32 = 8;
    /// Discard.
    pub const DISCARD: u32 = 11;
    /// Write zeroes.
    pub const WRITE_ZEROES: u32 = 13;
}

/// One descriptor: address, bytes, flags, the next one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Where.
    pub address: u64,
    /// How long.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next, with [`NEXT`].
    pub next: u16,
}

impl Descriptor {
    fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        for (index, byte) in self.address.to_le_bytes().into_iter().chain(self.len.to_le_bytes()).enumerate() {
            bytes[index] = byte;
        }
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Bytes of the guest's memory that a ring takes.
pub const RING_BYTES: u64 = 0x4000;

/// A queue as its driver sees it.
#[derive(Clone, Debug)]
pub struct Ring {
    memory: Memory,
    /// Where the ring begins: descriptors, then available ones, then used ones.
    pub base: u64,
    /// Entries.
    pub size: u16,
    /// The next place in the available ring.
    pub avail: u16,
    /// Used entries that were looked at.
    pub seen: u16,
    next_descriptor: u16,
    next_data: u64,
}

impl Ring {
    /// A ring of `size` entries at `base`; data is put behind it, up to 1 MiB.
    #[must_use]
    pub fn new(memory: &Memory, base: u64, size: u16) -> Self {
        let ring = Self { memory: memory.clone(), base, size, avail: 0, seen: 0, next_descriptor: 0, next_data: 0 };
        memory.write(base, &[0; RING_BYTES as usize]).unwrap();
        ring
    }

    /// Address of the descriptors.
    #[must_use]
    pub fn descriptors(&self) -> u64 {
        self.base
    }

    /// Address of the available ring.
    #[must_use]
    pub fn available(&self) -> u64 {
        self.base + 0x1000
    }

    /// Address of the used ring.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.base + 0x2000
    }

    /// Room for data in the guest's memory.
    pub fn room(&mut self, len: u64) -> u64 {
        if self.next_data + len > 1 << 20 {
            self.next_data = 0;
        }
        let address = self.base + RING_BYTES + self.next_data;
        self.next_data += len.next_multiple_of(16);
        address
    }

    /// Writes a descriptor.
    pub fn set(&self, table: u64, index: u16, descriptor: Descriptor) {
        self.memory.write(table + u64::from(index) * 16, &descriptor.to_bytes()).unwrap();
    }

    /// Links pieces (address, bytes, whether the device writes them) in the ring's own table. Returns the head.
    pub fn chain(&mut self, pieces: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor;
        for (index, &(address, len, write)) in pieces.iter().enumerate() {
            let at = self.next_descriptor;
            self.next_descriptor = (at + 1) % self.size;
            let next = if index + 1 < pieces.len() { NEXT } else { 0 };
            let flags = next | if write { WRITE } else { 0 };
            self.set(self.descriptors(), at, Descriptor { address, len, flags, next: self.next_descriptor });
        }
        head
    }

    /// Links pieces in a table apart. Returns the head.
    pub fn indirect(&mut self, pieces: &[(u64, u32, bool)]) -> u16 {
        let bytes = pieces.len() as u32 * 16;
        let table = self.room(u64::from(bytes));
        for (index, &(address, len, write)) in pieces.iter().enumerate() {
            let next = if index + 1 < pieces.len() { NEXT } else { 0 };
            let flags = next | if write { WRITE } else { 0 };
            self.set(table, index as u16, Descriptor { address, len, flags, next: index as u16 + 1 });
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % self.size;
        self.set(self.descriptors(), head, Descriptor { address: table, len: bytes, flags: INDIRECT, next: 0 });
        head
    }

    /// Makes a chain available.
    pub fn offer(&mut self, head: u16) {
        let slot = self.available() + 4 + u64::from(self.avail % self.size) * 2;
        self.memory.write(slot, &head.to_le_bytes()).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.memory.write(self.available() + 2, &self.avail.to_le_bytes()).unwrap();
    }

    /// Where the driver wants to be told next, with event indices.
    pub fn set_used_event(&self, index: u16) {
        self.memory.write(self.available() + 4 + u64::from(self.size) * 2, &index.to_le_bytes()).unwrap();
    }

    /// Where the device wants to be told next, with event indices.
    #[must_use]
    pub fn avail_event(&self) -> u16 {
        self.number(self.used() + 4 + u64::from(self.size) * 8)
    }

    /// Whether the device asks not to be told, without event indices.
    #[must_use]
    pub fn wants_no_notification(&self) -> bool {
        self.number(self.used()) & 1 != 0
    }

    /// Entries that the device has used in all, modulo 65536.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.number(self.used() + 2)
    }

    /// The next chain that the device has used, and the bytes that it says it wrote.
    pub fn next_used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.seen {
            return None;
        }
        let mut entry = [0; 8];
        let slot = self.used() + 4 + u64::from(self.seen % self.size) * 8;
        self.memory.read(slot, &mut entry).unwrap();
        self.seen = self.seen.wrapping_add(1);
        let number = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        Some((number(0) as u16, number(4)))
    }

    fn number(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read(address, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// Writes the header of a block request; returns its address.
    pub fn header(&mut self, kind: u32, sector: u64) -> u64 {
        let address = self.room(16);
        let bytes: Vec<u8> = kind.to_le_bytes().into_iter().chain([0; 4]).chain(sector.to_le_bytes()).collect();
        self.memory.write(address, &bytes).unwrap();
        address
    }

    /// Puts bytes into the guest's memory; returns their address.
    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        let address = self.room(bytes.len() as u64);
        self.memory.write(address, bytes).unwrap();
        address
    }

    /// Bytes of the guest's memory.
    #[must_use]
    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(address, &mut bytes).unwrap();
        bytes
    }
}
