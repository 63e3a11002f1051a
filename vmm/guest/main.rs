//! The test guest: speaks on the serial port and drives virtio disks, from ring 3, where a software KVM is fast.
//!
//! Its command line says what to do: `do=WHAT` and numbers. What it finds it prints; at the end it turns the machine off.

#![no_std]
#![no_main]
#![allow(missing_docs, static_mut_refs, unsafe_op_in_unsafe_fn, reason = "a program for bare metal, with one thread")]

mod cpus;
mod disk;

use core::arch::{asm, global_asm};
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use disk::{Disk, Shape};

global_asm!(include_str!("start.s"), options(att_syntax));

unsafe extern "C" {
    static zero_page: u64;
}

pub fn out8(port: u16, value: u8) {
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack)) }
}

pub fn in8(port: u16) -> u8 {
    let value: u8;
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack)) }
    value
}

pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            out8(0x3F8, byte);
        }
        Ok(())
    }
}

#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => { $crate::say_line(format_args!($($arg)*)) };
}

/// A line is one CPU's.
pub fn say_line(line: fmt::Arguments<'_>) {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    while TAKEN.swap(true, Ordering::SeqCst) {
        core::hint::spin_loop();
    }
    let _ = Serial.write_fmt(format_args!("{line}\n"));
    TAKEN.store(false, Ordering::SeqCst);
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    say!("PANIC {}", info);
    off()
}

pub fn off() -> ! {
    loop {
        out8(0x600, 5 << 2 | 1 << 5);
    }
}

fn command_line() -> &'static str {
    unsafe {
        let address = *((zero_page + 0x228) as *const u32) as *const u8;
        let mut len = 0;
        while *address.add(len) != 0 {
            len += 1;
        }
        core::str::from_utf8_unchecked(core::slice::from_raw_parts(address, len))
    }
}

/// The value of `name=value`.
pub fn word(name: &str) -> Option<&'static str> {
    command_line().split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

pub fn number(name: &str, usual: u64) -> u64 {
    word(name).and_then(|text| text.parse().ok()).unwrap_or(usual)
}

pub fn wait_for_byte() -> u8 {
    while in8(0x3FD) & 1 == 0 {}
    in8(0x3F8)
}

/// Fills a sector so that each byte depends on where and when it was written.
pub fn pattern(buffer: &mut [u64], sector: u64, round: u64) {
    let mut state = sector.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ round.wrapping_mul(0xD1B5_4A32_D192_ED03) ^ 0xABCD;
    for word in buffer {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state;
    }
}

#[unsafe(no_mangle)]
extern "C" fn main() -> ! {
    say!("guest: {}", command_line());
    match word("do") {
        Some("hello") => {}
        Some("echo") => loop {
            let byte = wait_for_byte();
            if byte == b'q' {
                break;
            }
            out8(0x3F8, byte.wrapping_add(1));
        },
        Some("clock") => {
            let read = |register| {
                out8(0x70, register);
                in8(0x71)
            };
            say!("year {:x}{:02x}", read(0x32), read(9));
        }
        Some("reset") => out8(0x64, 0xFE),
        Some("fault") => match number("how", 0) {
            0 => unsafe { asm!("ud2") },
            how => cpus::fault(how),
        },
        Some("flood") => loop {
            say!("a line that says nothing, again and again, for as long as somebody listens");
        },
        Some("storm") => storm(),
        Some("requests") => requests(),
        Some("spin") => loop {
            core::hint::spin_loop();
        },
        Some("cpus") => cpus::run(disks()),
        Some("verify") => verify(),
        Some("fill") => fill(),
        Some("pair") => pair(),
        Some("errors") => errors(),
        Some("button") => button(),
        Some("break") => break_it(),
        other => say!("what is {:?}?", other),
    }
    say!("guest: done");
    off()
}

/// Waits for the power button: the old interrupt controller shows its line also to who takes no interrupts.
fn button() {
    out8(0x20, 0x0A);
    say!("waiting");
    while in8(0x20) & 1 << 3 == 0 {}
    say!("pressed");
}

fn disks() -> impl Iterator<Item = Disk> {
    (0..number("disks", 1)).map(|index| Disk::open(index, number("queues", 1) as u16))
}

/// Writes rounds of patterns to places all over each disk, and reads them back, on all queues in turn.
fn verify() {
    let rounds = number("rounds", 2);
    for disk in disks() {
        let places = number("places", 64);
        let step = disk.sectors / places;
        for round in 0..rounds {
            for place in 0..places {
                let mut queue = disk.queue((place % u64::from(disk.queues)) as usize);
                pattern(queue.data(8), place * step, round);
                expect(queue.write(place * step, 8), 0, "write");
                if place % 16 == 0 {
                    expect(queue.flush(), 0, "flush");
                }
            }
            for place in 0..places {
                let mut queue = disk.queue(((place + 1) % u64::from(disk.queues)) as usize);
                expect(queue.read(place * step, 8), 0, "read");
                check(queue.data(8), place * step, round);
            }
        }
        let mut queue = disk.queue(0);
        expect(queue.zero(0, 8, true), 0, "discard");
        expect(queue.read(0, 8), 0, "read");
        if queue.data(8).iter().any(|word| *word != 0) {
            say!("WRONG: what was discarded is not zero");
        }
        expect(queue.flush(), 0, "flush");
        say!("disk of {} sectors: {} rounds are right", disk.sectors, rounds);
    }
}

pub fn check(found: &[u64], sector: u64, round: u64) {
    let mut wanted = [0; 512];
    pattern(&mut wanted, sector, round);
    if *found != wanted {
        say!("WRONG: sector {} in round {}", sector, round);
    }
}

pub fn expect(status: u8, wanted: u8, what: &str) {
    if status != wanted {
        say!("WRONG: {} answered {}, not {}", what, status, wanted);
    }
}

/// Writes the disk from its start, a flush after each write, and says how far it is; then reads all of it.
fn fill() {
    let sectors = number("sectors", 1024);
    for disk in disks() {
        let mut queue = disk.queue(0);
        let mut failed = 0;
        for sector in (0..sectors).step_by(8) {
            pattern(queue.data(8), sector, 0);
            failed += u64::from(queue.write(sector, 8) != 0);
            failed += u64::from(queue.flush() != 0);
            if sector % 64 == 0 {
                say!("flushed {}", sector + 8);
            }
        }
        for sector in (0..sectors).step_by(8) {
            expect(queue.read(sector, 8), 0, "read");
            if failed == 0 {
                check(queue.data(8), sector, 0);
            }
        }
        say!("filled {}, {} failed", sectors, failed);
    }
    // Until it is told from outside.
    while number("stay", 0) == 1 {
        core::hint::spin_loop();
    }
}

/// Writes the same number to two disks for ever, the first one first.
fn pair() {
    let disks = [Disk::open(0, 1), Disk::open(1, 1)];
    for count in 1_u64.. {
        for disk in &disks {
            let mut queue = disk.queue(0);
            queue.data(1)[0] = count;
            expect(queue.write(0, 1), 0, "write");
            expect(queue.flush(), 0, "flush");
        }
        if count % 16 == 0 {
            say!("count {}", count);
        }
    }
}

/// So many reads, all over the disk.
fn requests() {
    let disk = Disk::open(0, 1);
    let mut queue = disk.queue(0);
    let mut place = 1_u64;
    for _ in 0..number("requests", 1000) {
        place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        expect(queue.read((place >> 20) % (disk.sectors / 8) * 8, 8), 0, "read");
    }
}

/// Kicks without requests, also queues that are not there; then the disk works as ever.
fn storm() {
    let disk = Disk::open(0, 1);
    for round in 0..number("kicks", 2000) {
        disk.kick(0);
        disk.kick((round * 7919) as u32);
    }
    expect(disk.queue(0).write(0, 8), 0, "write");
    say!("the storm is over");
}

/// What can't be done is answered so.
fn errors() {
    let disk = Disk::open(0, 1);
    let (mut queue, sectors) = (disk.queue(0), disk.sectors);
    for shape in [Shape::Plain, Shape::Indirect, Shape::Pieces] {
        queue.shape = shape;
        expect(queue.read(sectors, 1), 1, "a read past the end");
        expect(queue.write(sectors - 1, 2), 1, "a write past the end");
        expect(queue.zero(sectors - 1, 2, false), 1, "zeroes past the end");
        expect(queue.zero(0, u32::MAX, true), 1, "a discard of too much");
        expect(queue.request(1, 0, 100, false), 1, "a part of a sector");
        expect(queue.request(99, 0, 0, false), 2, "a request that is none");
        expect(queue.request(8, 0, 20, true), 0, "the serial");
        expect(queue.flush(), 0, "flush");
        let writes = number("read_only", 0) as u8;
        expect(queue.write(0, 1), writes, "write");
        expect(queue.zero(0, 1, true), writes, "discard");
        expect(queue.read(0, 1), 0, "read");
    }
    say!("errors are right");
}

/// A ring that makes no sense, again and again: the device says that it needs a reset, and works after one.
fn break_it() {
    for _ in 0..number("times", 1) {
        break_once();
    }
    say!("the device failed and works again");
}

fn break_once() {
    let disk = Disk::open(0, 1);
    disk.break_ring();
    let mut waited = 0_u64;
    while disk.status() & 64 == 0 {
        waited += 1;
        if waited > 1 << 24 {
            say!("WRONG: the device did not fail");
            return;
        }
    }
    let disk = Disk::open(0, 1);
    expect(disk.queue(0).read(0, 1), 0, "read");
}
