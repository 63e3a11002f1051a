//! A virtio block driver that waits for each request.

use core::ptr::{read_volatile, write_volatile};
use core::sync::atomic::{Ordering, fence};

const REGISTERS: u64 = 0xD000_0000;
const MEMORY: u64 = 0x80_0000;
/// Memory for each disk.
const PER_DISK: u64 = 0x8_0000;
const QUEUE_SIZE: u16 = 8;

pub struct Disk {
    index: u64,
    pub sectors: u64,
    pub queues: u16,
    next: [u16; 4],
}

impl Disk {
    pub fn open(index: u64, queues: u16) -> Self {
        let mut disk = Self { index, sectors: 0, queues, next: [0; 4] };
        assert!(disk.get(0) == 0x7472_6976 && disk.get(8) == 2, "no disk {index}");
        disk.set(0x70, 0);
        disk.set(0x70, 3);
        disk.set(0x14, 1);
        assert!(disk.get(0x10) & 1 != 0);
        // Version 1, flush, discard, write zeroes; no event index.
        disk.set(0x24, 0);
        disk.set(0x20, 1 << 9 | 1 << 13 | 1 << 14);
        disk.set(0x24, 1);
        disk.set(0x20, 1);
        disk.set(0x70, 11);
        assert!(disk.get(0x70) & 8 != 0, "features were refused");
        for queue in 0..queues {
            disk.set(0x30, u32::from(queue));
            disk.set(0x38, u32::from(QUEUE_SIZE));
            let ring = disk.ring(queue as usize);
            for offset in (0..0x4000).step_by(8) {
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

    fn ring(&self, queue: usize) -> u64 {
        MEMORY + self.index * PER_DISK + queue as u64 * 0x4000
    }

    fn buffer(&self) -> u64 {
        MEMORY + self.index * PER_DISK + 0x4_0000
    }

    /// The buffer of requests, so many sectors of it.
    pub fn data(&mut self, sectors: usize) -> &mut [u64] {
        unsafe { core::slice::from_raw_parts_mut(self.buffer() as *mut u64, sectors * 64) }
    }

    pub fn read(&mut self, queue: usize, sector: u64, sectors: u32) -> u8 {
        self.request(queue, 0, sector, sectors * 512, true)
    }

    pub fn write(&mut self, queue: usize, sector: u64, sectors: u32) -> u8 {
        self.request(queue, 1, sector, sectors * 512, false)
    }

    pub fn flush(&mut self, queue: usize) -> u8 {
        self.request(queue, 4, 0, 0, false)
    }

    pub fn zero(&mut self, queue: usize, sector: u64, sectors: u32, discard: bool) -> u8 {
        let data = self.data(1);
        (data[0], data[1]) = (sector, u64::from(sectors));
        self.request(queue, if discard { 11 } else { 13 }, 0, 16, false)
    }

    /// Asks, waits, and tells the status.
    pub fn request(&mut self, queue: usize, kind: u32, sector: u64, len: u32, device_writes: bool) -> u8 {
        let ring = self.ring(queue);
        let (header, status) = (ring + 0x3000, ring + 0x3010);
        let buffer = self.buffer();
        unsafe {
            write_volatile(header as *mut u64, u64::from(kind));
            write_volatile((header + 8) as *mut u64, sector);
            write_volatile(status as *mut u8, 0xEE);
            let put = |index: u64, address: u64, len: u32, flags: u64| {
                write_volatile((ring + index * 16) as *mut u64, address);
                write_volatile((ring + index * 16 + 8) as *mut u64, u64::from(len) | flags << 32 | (index + 1) << 48);
            };
            put(0, header, 16, 1);
            let mut last = 1;
            if len > 0 {
                put(1, buffer, len, 1 | if device_writes { 2 } else { 0 });
                last = 2;
            }
            put(last, status, 1, 2);
            self.offer(queue, 0);
            let used = (ring + 0x2002) as *const u16;
            while read_volatile(used) != self.next[queue] {}
            fence(Ordering::SeqCst);
            read_volatile(status as *const u8)
        }
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let ring = self.ring(queue);
        let next = self.next[queue];
        unsafe {
            write_volatile((ring + 0x1004 + u64::from(next % QUEUE_SIZE) * 2) as *mut u16, head);
            fence(Ordering::SeqCst);
            self.next[queue] = next.wrapping_add(1);
            write_volatile((ring + 0x1002) as *mut u16, self.next[queue]);
        }
        fence(Ordering::SeqCst);
        self.set(0x50, queue as u32);
    }

    /// Offers a chain that begins nowhere.
    pub fn break_ring(&mut self) {
        self.offer(0, 999);
    }
}
