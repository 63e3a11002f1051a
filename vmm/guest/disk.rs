//! A virtio block driver that waits for each request. Several CPUs may use one disk, each of its queues by one at a time.

use core::ptr::{read_volatile, write_volatile};
use core::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};

const REGISTERS: u64 = 0xD000_0000;
const MEMORY: u64 = 0x80_0000;
/// Memory for each disk: rings first, a buffer for each queue behind them.
const PER_DISK: u64 = 0x8_0000;
const RING: u64 = 0x4000;
const BUFFERS: u64 = 0x4_0000;
/// A request's data at most.
const BUFFER: u64 = 0x1_0000;
const QUEUE_SIZE: u16 = 8;
const MAX_QUEUES: usize = 4;

pub struct Disk {
    index: u64,
    pub sectors: u64,
    pub queues: u16,
    taken: [AtomicBool; MAX_QUEUES],
    next: [AtomicU16; MAX_QUEUES],
}

/// How a request is laid out.
#[derive(Clone, Copy, PartialEq)]
pub enum Shape {
    /// Header, data, status.
    Plain,
    /// The same in a table of its own.
    Indirect,
    /// In such a table, with the data in three pieces.
    Pieces,
}

/// A queue that nobody else uses as long as this is there.
pub struct Queue<'a> {
    disk: &'a Disk,
    number: usize,
    pub shape: Shape,
}

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        self.disk.taken[self.number].store(false, Ordering::SeqCst);
    }
}

impl Disk {
    pub fn open(index: u64, queues: u16) -> Self {
        let mut disk = Self { index, sectors: 0, queues, taken: Default::default(), next: Default::default() };
        assert!(disk.get(0) == 0x7472_6976 && disk.get(8) == 2, "no disk {index}");
        disk.set(0x70, 0);
        disk.set(0x70, 3);
        disk.set(0x14, 1);
        assert!(disk.get(0x10) & 1 != 0);
        // Version 1, flush, indirect descriptors; discard and write zeroes where they are offered; no event index.
        disk.set(0x14, 0);
        let optional = disk.get(0x10) & (1 << 13 | 1 << 14);
        disk.set(0x24, 0);
        disk.set(0x20, 1 << 9 | 1 << 28 | optional);
        disk.set(0x24, 1);
        disk.set(0x20, 1);
        disk.set(0x70, 11);
        assert!(disk.get(0x70) & 8 != 0, "features were refused");
        for queue in 0..queues {
            disk.set(0x30, u32::from(queue));
            disk.set(0x38, u32::from(QUEUE_SIZE));
            let ring = disk.ring(queue as usize);
            for offset in (0..RING).step_by(8) {
                unsafe { write_volatile((ring + offset) as *mut u64, 0) };
            }
            for (register, offset) in [(0x80, 0), (0x90, 0x1000), (0xA0, 0x2000)] {
                disk.set(register, (ring + offset) as u32);
                disk.set(register + 4, 0);
            }
            disk.set(0x44, 1);
        }
        disk.set(0x70, 15);
        disk.sectors = u64::from(disk.get(0x100)) | u64::from(disk.get(0x104)) << 32;
        disk
    }

    fn get(&self, register: u64) -> u32 {
        unsafe { read_volatile((REGISTERS + self.index * 0x1000 + register) as *const u32) }
    }

    fn set(&self, register: u64, value: u32) {
        unsafe { write_volatile((REGISTERS + self.index * 0x1000 + register) as *mut u32, value) }
    }

    pub fn status(&self) -> u32 {
        self.get(0x70)
    }

    /// Kicks a queue, or one that is not there, without a request.
    pub fn kick(&self, queue: u32) {
        self.set(0x50, queue);
    }

    fn ring(&self, queue: usize) -> u64 {
        MEMORY + self.index * PER_DISK + queue as u64 * RING
    }

    /// Takes a queue, once nobody else uses it.
    pub fn queue(&self, number: usize) -> Queue<'_> {
        while self.taken[number].swap(true, Ordering::SeqCst) {
            core::hint::spin_loop();
        }
        Queue { disk: self, number, shape: Shape::Plain }
    }

    /// Offers a chain that begins nowhere.
    pub fn break_ring(&self) {
        self.queue(0).offer(999);
    }
}

impl Queue<'_> {
    fn buffer(&self) -> u64 {
        MEMORY + self.disk.index * PER_DISK + BUFFERS + self.number as u64 * BUFFER
    }

    /// The buffer of requests, so many sectors of it.
    pub fn data(&mut self, sectors: usize) -> &mut [u64] {
        unsafe { core::slice::from_raw_parts_mut(self.buffer() as *mut u64, sectors * 64) }
    }

    pub fn read(&mut self, sector: u64, sectors: u32) -> u8 {
        self.request(0, sector, sectors * 512, true)
    }

    pub fn write(&mut self, sector: u64, sectors: u32) -> u8 {
        self.request(1, sector, sectors * 512, false)
    }

    pub fn flush(&mut self) -> u8 {
        self.request(4, 0, 0, false)
    }

    pub fn zero(&mut self, sector: u64, sectors: u32, discard: bool) -> u8 {
        let data = self.data(1);
        (data[0], data[1]) = (sector, u64::from(sectors));
        self.request(if discard { 11 } else { 13 }, 0, 16, false)
    }

    /// Asks, waits, and tells the status.
    pub fn request(&mut self, kind: u32, sector: u64, len: u32, device_writes: bool) -> u8 {
        let ring = self.disk.ring(self.number);
        let (header, status, table) = (ring + 0x3000, ring + 0x3010, ring + 0x3100);
        let buffer = self.buffer();
        let mut pieces = [(0, 0, 0); 6];
        let mut count = 0;
        let mut piece = |address: u64, len: u32, flags: u64| {
            pieces[count] = (address, len, flags);
            count += 1;
        };
        piece(header, 16, 0);
        let writes = if device_writes { 2 } else { 0 };
        if self.shape == Shape::Pieces && len >= 1024 {
            piece(buffer, 100, writes);
            piece(buffer + 100, 412 + 200, writes);
            piece(buffer + 712, len - 712, writes);
        } else if len > 0 {
            piece(buffer, len, writes);
        }
        piece(status, 1, 2);
        unsafe {
            write_volatile(header as *mut u64, u64::from(kind));
            write_volatile((header + 8) as *mut u64, sector);
            write_volatile(status as *mut u8, 0xEE);
            let put = |at: u64, (address, len, flags): (u64, u32, u64), next: u64| {
                write_volatile(at as *mut u64, address);
                write_volatile((at + 8) as *mut u64, u64::from(len) | flags << 32 | next << 48);
            };
            let place = if self.shape == Shape::Plain { ring } else { table };
            for (index, &(address, len, flags)) in pieces[..count].iter().enumerate() {
                let more = u64::from(index + 1 < count);
                put(place + index as u64 * 16, (address, len, flags | more), index as u64 + 1);
            }
            if place == table {
                put(ring, (table, count as u32 * 16, 4), 0);
            }
            self.offer(0);
            let used = (ring + 0x2002) as *const u16;
            while read_volatile(used) != self.disk.next[self.number].load(Ordering::Relaxed) {
                core::hint::spin_loop();
            }
            fence(Ordering::SeqCst);
            read_volatile(status as *const u8)
        }
    }

    fn offer(&mut self, head: u16) {
        let ring = self.disk.ring(self.number);
        let next = self.disk.next[self.number].fetch_add(1, Ordering::Relaxed);
        unsafe {
            write_volatile((ring + 0x1004 + u64::from(next % QUEUE_SIZE) * 2) as *mut u16, head);
            fence(Ordering::SeqCst);
            write_volatile((ring + 0x1002) as *mut u16, next.wrapping_add(1));
        }
        fence(Ordering::SeqCst);
        self.disk.kick(self.number as u32);
    }
}
