//! Goal: a driver that goes by the specification sets a disk up through its registers, and one that does not breaks
//! nothing but its own device.
//!
//! Method: registers are read and written as a guest would; requests are served by the device's own threads, and the
//! interrupt is the event counter that KVM would listen to.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that can't go on fails here")]

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vhd_core::Disk;
use vhd_core::chain::{Chain, Layer};
use vhd_core::image::{Image, OpenOptions};
use vhd_testkit::fault::{Fault, FaultStorage, Plan};
use vhd_testkit::fixture::{FixtureSpec, Kind, Layout};
use vhd_testkit::rings::{Ring, kind};
use vhd_vmm::memory::Memory;
use vhd_vmm::virtio::block::{Block, BlockOptions, Stall};
use vhd_vmm::virtio::mmio::Registers;
use vhd_vmm::virtio::workers::{StallObserver, Workers};

const MEMORY: u64 = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

struct Stalls(Mutex<Sender<(usize, String)>>);

impl StallObserver for Stalls {
    fn stalled(&self, disk: usize, stall: Stall) {
        self.0.lock().unwrap().send((disk, stall.0.to_string())).unwrap();
    }
}

struct Guest {
    memory: Memory,
    registers: Registers,
    storage: Arc<FaultStorage>,
    stalls: Receiver<(usize, String)>,
}

impl Guest {
    fn new(queues: u16) -> Self {
        let spec = FixtureSpec { block_size: 4096, ..FixtureSpec::new(Kind::Dynamic, Layout::Windows8, 1 << 20) };
        let storage = Arc::new(FaultStorage::new(spec.to_bytes().0, None));
        let options = OpenOptions { writable: true, background_flush: None, ..OpenOptions::default() };
        let image = Image::open(Arc::clone(&storage) as _, Path::new("disk.vhd"), &options).unwrap();
        let disk = Disk::new(Chain::of(Layer::Image(image)));
        let block = Arc::new(Block::new(disk, &BlockOptions { queues, ..Default::default() }));
        let memory = Memory::new(MEMORY).unwrap();
        let (sender, stalls) = channel();
        let workers = Workers::start(3, block, memory.clone(), Arc::new(Stalls(Mutex::new(sender))), true).unwrap();
        Self { registers: Registers::new(workers), memory, storage, stalls }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.registers.read(offset, &mut bytes);
        u32::from_ne_bytes(bytes)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.registers.write(offset, &value.to_ne_bytes());
    }

    fn offered(&mut self) -> u64 {
        self.write(0x14, 0);
        let low = self.read(0x10);
        self.write(0x14, 1);
        u64::from(self.read(0x10)) << 32 | u64::from(low)
    }

    /// As the specification has it, section 3.1.1.
    fn initialise(&mut self, features: u64, rings: &[&Ring]) -> u32 {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.write(0x24, 0);
        self.write(0x20, features as u32);
        self.write(0x24, 1);
        self.write(0x20, (features >> 32) as u32);
        self.write(0x70, 11);
        for (index, ring) in rings.iter().enumerate() {
            self.write(0x30, index as u32);
            assert_eq!((self.read(0x44), self.read(0x34)), (0, 256));
            self.write(0x38, u32::from(ring.size));
            for (register, address) in [(0x80, ring.descriptors()), (0x90, ring.available()), (0xA0, ring.used())] {
                self.write(register, address as u32);
                self.write(register + 4, (address >> 32) as u32);
            }
            self.write(0x44, 1);
        }
        self.write(0x70, 15);
        self.read(0x70)
    }

    fn wait(&self, what: &str, done: impl Fn() -> bool) {
        let begin = Instant::now();
        while !done() {
            assert!(begin.elapsed() < PATIENCE, "{what} did not happen");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn interrupt(&self) -> u64 {
        self.wait("an interrupt", || self.read(0x60) != 0);
        self.registers.workers().line().interrupt.read().unwrap_or(0)
    }
}

fn offer_write(ring: &mut Ring, sector: u64, fill: u8) -> u64 {
    let header = ring.header(kind::OUT, sector);
    let data = ring.put(&[fill; 512]);
    let status = ring.put(&[0xFF]);
    let head = ring.chain(&[(header, 16, false), (data, 512, false), (status, 1, true)]);
    ring.offer(head);
    status
}

#[test]
fn the_device_says_what_it_is() {
    let mut guest = Guest::new(2);
    assert_eq!([0, 4, 8].map(|at| guest.read(at)), [0x7472_6976, 2, 2]);
    guest.write(0x30, 1);
    assert_eq!(guest.read(0x34), 256);
    guest.write(0x30, 2);
    assert_eq!(guest.read(0x34), 0, "there is no third queue");
    assert_eq!((guest.read(0x100), guest.read(0x104)), (2048, 0), "sectors");
    assert_ne!(guest.offered() & 1 << 32, 0);
    let mut odd = [0xEE; 2];
    guest.registers.read(0, &mut odd);
    assert_eq!(odd, [0, 0]);
    guest.registers.read(0x122, &mut odd);
    assert_eq!(odd, [2, 0], "queues");
}

#[test]
fn requests_are_served_when_the_driver_is_ready_and_interrupt_it() {
    let mut guest = Guest::new(2);
    let mut rings = [0x1_0000, 0x20_0000].map(|base| Ring::new(&guest.memory, base, 16));
    let features = guest.offered() & !(1 << 29);
    assert_eq!(guest.initialise(features, &[&rings[0], &rings[1]]), 15);
    for (index, ring) in rings.iter_mut().enumerate() {
        let status = offer_write(ring, index as u64 * 7, 0x41);
        guest.write(0x50, index as u32);
        assert_eq!(guest.interrupt(), 1);
        assert_eq!(guest.read(0x60), 1);
        guest.write(0x64, 1);
        assert_eq!(guest.read(0x60), 0);
        assert_eq!(ring.get(status, 1), [0]);
    }
    // A queue that is in use stays as it is, and one that is not there is nobody's.
    guest.write(0x44, 0);
    assert_eq!(guest.read(0x44), 1);
    guest.write(0x50, 77);
    // After a reset there is nothing.
    guest.write(0x70, 0);
    assert_eq!((guest.read(0x70), guest.read(0x44)), (0, 0));
    offer_write(&mut rings[0], 0, 1);
    guest.write(0x50, 0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rings[0].used_index(), 1);
}

#[test]
fn features_that_were_not_offered_are_not_agreed_upon() {
    for features in [0, 1 << 32 | 1 << 40, 1 << 32 | 1] {
        let mut guest = Guest::new(1);
        let ring = Ring::new(&guest.memory, 0x1_0000, 16);
        assert_eq!(guest.initialise(features, &[&ring]), 3, "{features:#x}");
    }
}

#[test]
fn a_broken_ring_fails_the_device_until_it_is_reset() {
    let mut guest = Guest::new(1);
    let mut ring = Ring::new(&guest.memory, 0x1_0000, 16);
    let features = guest.offered();
    guest.initialise(features, &[&ring]);
    ring.offer(200);
    guest.write(0x50, 0);
    guest.wait("a failure", || guest.read(0x70) & 64 != 0);
    assert_eq!(guest.interrupt(), 1);
    assert_eq!(guest.read(0x60), 2, "a change of configuration");
    let mut ring = Ring::new(&guest.memory, 0x1_0000, 16);
    assert_eq!(guest.initialise(features, &[&ring]), 15);
    let status = offer_write(&mut ring, 0, 9);
    guest.write(0x50, 0);
    guest.interrupt();
    assert_eq!(ring.get(status, 1), [0]);
}

#[test]
fn queues_outside_of_memory_fail_the_device() {
    let mut guest = Guest::new(1);
    let mut outside = Ring::new(&guest.memory, 0x1_0000, 16);
    outside.base = MEMORY;
    let features = guest.offered();
    guest.initialise(features, &[&outside]);
    guest.write(0x50, 0);
    guest.wait("a failure", || guest.read(0x70) & 64 != 0);
}

#[test]
fn a_pause_holds_requests_back_and_a_stalled_one_is_tried_again() {
    let mut guest = Guest::new(1);
    let mut ring = Ring::new(&guest.memory, 0x1_0000, 16);
    let features = guest.offered() & !(1 << 29);
    guest.initialise(features, &[&ring]);
    guest.registers.pause();
    let status = offer_write(&mut ring, 0, 9);
    guest.write(0x50, 0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(ring.used_index(), 0);
    guest.registers.resume();
    guest.interrupt();
    assert_eq!((ring.used_index(), ring.get(status, 1)), (1, vec![0]));
    guest.write(0x64, 1);

    guest.storage.plan(Plan { fault: Fault::EnospcAnywhere, at: 1, for_ever: true });
    let status = offer_write(&mut ring, 9, 9);
    guest.write(0x50, 0);
    let (disk, why) = guest.stalls.recv_timeout(PATIENCE).unwrap();
    assert!(disk == 3 && why.contains("disk.vhd"), "{why}");
    guest.registers.pause();
    guest.storage.heal();
    guest.registers.resume();
    guest.interrupt();
    assert_eq!((ring.used_index(), ring.get(status, 1)), (2, vec![0]));
}
