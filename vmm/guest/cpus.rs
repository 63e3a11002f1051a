//! Several CPUs that drive disks at once.

use core::ptr::{addr_of, write_volatile};
use core::sync::atomic::{AtomicU64, Ordering};

use crate::disk::{Disk, Shape};
use crate::{check, expect, number, pattern, say};

/// Where another CPU begins: its number is in the interrupt that starts it.
const START: u64 = 0x8000;
const INTERRUPTS: u64 = 0xFEE0_0000;
const MAX_CPUS: usize = 8;
const MAX_DISKS: usize = 4;

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
    static mut other_stack: u64;
    static mut other_fault: u32;
    static mut task_access: u8;
}

#[repr(align(16))]
#[allow(dead_code, reason = "only its address is used")]
struct Stack([u8; 0x8000]);

static mut STACKS: [Stack; MAX_CPUS] = [const { Stack([0; 0x8000]) }; MAX_CPUS];
static mut DISKS: [Option<Disk>; MAX_DISKS] = [const { None }; MAX_DISKS];
/// CPUs that have begun, and that have done their part.
static BEGUN: AtomicU64 = AtomicU64::new(1);
static DONE: AtomicU64 = AtomicU64::new(0);

/// Starts the CPU of this number, and waits until it runs.
fn start_cpu(cpu: u64) {
    unsafe {
        let len = addr_of!(trampoline_end) as usize - addr_of!(trampoline) as usize;
        core::ptr::copy_nonoverlapping(addr_of!(trampoline), START as *mut u8, len);
        other_stack = addr_of!(STACKS[cpu as usize]) as u64 + size_of::<Stack>() as u64;
        // The task segment is all CPUs' own: it says that it is taken.
        task_access = 0x89;
        let send = |what: u32| {
            write_volatile((INTERRUPTS + 0x310) as *mut u32, (cpu as u32) << 24);
            write_volatile((INTERRUPTS + 0x300) as *mut u32, what);
        };
        send(0x4500);
        send(0x4600 | (START >> 12) as u32);
    }
    while BEGUN.load(Ordering::SeqCst) <= cpu {
        core::hint::spin_loop();
    }
}

/// Has a second CPU do what it can't go on from, as a kernel would: 1 is an instruction that nobody emulates, 2 a jump to
/// nowhere, 3 page tables that are none.
pub fn fault(how: u64) {
    unsafe { other_fault = how as u32 };
    start_cpu(1);
}

#[unsafe(no_mangle)]
extern "C" fn other_main() -> ! {
    let cpu = BEGUN.fetch_add(1, Ordering::SeqCst);
    work(cpu);
    loop {
        core::hint::spin_loop();
    }
}

/// All CPUs write, zero, discard and read their own places of each disk, on all its queues.
pub fn run(disks: impl Iterator<Item = Disk>) {
    let slots = unsafe { &mut *(&raw mut DISKS) };
    let mut count = 0;
    for (slot, disk) in slots.iter_mut().zip(disks) {
        *slot = Some(disk);
        count += 1;
    }
    let cpus = number("cpus", 1);
    (1..cpus).for_each(start_cpu);
    work(0);
    while DONE.load(Ordering::SeqCst) < cpus {
        core::hint::spin_loop();
    }
    for disk in slots.iter().flatten() {
        expect(disk.queue(0).flush(), 0, "flush");
    }
    say!("{} CPUs are done with {} disks", BEGUN.load(Ordering::SeqCst), count);
}

fn work(cpu: u64) {
    let (cpus, rounds, places) = (number("cpus", 1), number("rounds", 3), number("places", 48));
    let disks = unsafe { &*(&raw const DISKS) };
    for round in 0..rounds {
        for disk in disks.iter().flatten() {
            let step = disk.sectors / places;
            let own = || (cpu..places).step_by(cpus as usize);
            // Not all begin where a block of a file system would.
            let sector = |place: u64| place * step + place % 7;
            for place in own() {
                let mut queue = disk.queue((place % u64::from(disk.queues)) as usize);
                queue.shape = [Shape::Plain, Shape::Indirect, Shape::Pieces][(place % 3) as usize];
                match (place + round) % 4 {
                    0 => expect(queue.zero(sector(place), 8, false), 0, "write zeroes"),
                    1 => expect(queue.zero(sector(place), 8, true), 0, "discard"),
                    _ => {
                        pattern(queue.data(8), sector(place), round);
                        expect(queue.write(sector(place), 8), 0, "write");
                    }
                }
                if place % 8 == cpu {
                    expect(queue.flush(), 0, "flush");
                }
            }
            for place in own() {
                let mut queue = disk.queue(((place + 1) % u64::from(disk.queues)) as usize);
                queue.shape = [Shape::Plain, Shape::Pieces, Shape::Indirect][(place % 3) as usize];
                queue.data(8).fill(0xEEEE);
                expect(queue.read(sector(place), 8), 0, "read");
                if (place + round) % 4 > 1 {
                    check(queue.data(8), sector(place), round);
                } else if queue.data(8).iter().any(|word| *word != 0) {
                    say!("WRONG: sector {} is not zero in round {}", sector(place), round);
                }
            }
        }
    }
    DONE.fetch_add(1, Ordering::SeqCst);
}
