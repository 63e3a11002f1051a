//! Goal: a virtual hard disk does what a virtio block driver asks, and no request harms the monitor.
//!
//! Method: a driver of the test kit's fills rings in memory that no machine runs on, and the device serves them. Each
//! request type, status, and way of laying a request out is tried; contents are compared with what was written.
//! It would fail if a status, a length or an interrupt were wrong, or a malformed request got past the checks.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that can't go on fails here")]

use std::cell::Cell;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhd_core::Disk;
use vhd_core::block::{BlockDevice, Capabilities, Extent, SharedBytes, ZeroMode};
use vhd_core::chain::{Chain, Layer};
use vhd_core::image::{Image, OpenOptions};
use vhd_testkit::fault::{Fault, FaultStorage, Plan};
use vhd_testkit::fixture::{FixtureSpec, Kind, Layout};
use vhd_testkit::rings::{Descriptor, INDIRECT, NEXT, Ring, WRITE, kind};
use vhd_vmm::memory::{Memory, Segment};
use vhd_vmm::virtio::block::{Block, BlockOptions, Broken, Geometry, Policies, Policy, QueueOwner, Served};
use virtio_queue::{Queue, QueueT};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const SIZE: u64 = 1 << 20;
const MEMORY: u64 = 8 << 20;

#[derive(Default)]
struct Owner {
    interrupts: Cell<usize>,
    requests: Cell<Option<usize>>,
}

impl QueueOwner for Owner {
    fn stopped(&self) -> bool {
        match self.requests.get() {
            Some(0) => true,
            Some(left) => {
                self.requests.set(Some(left - 1));
                false
            }
            None => false,
        }
    }

    fn used(&self) {
        self.interrupts.set(self.interrupts.get() + 1);
    }
}

/// A device, one queue, and its driver.
struct Bench {
    memory: Memory,
    storage: Arc<FaultStorage>,
    block: Block,
    queue: Queue,
    ring: Ring,
    owner: Owner,
}

fn queue_of(ring: &Ring) -> Queue {
    let mut queue = Queue::new(256).unwrap();
    queue.set_size(ring.size);
    queue.set_desc_table_address(Some(ring.descriptors() as u32), None);
    queue.set_avail_ring_address(Some(ring.available() as u32), None);
    queue.set_used_ring_address(Some(ring.used() as u32), None);
    queue.set_ready(true);
    queue
}

fn disk(writable: bool) -> (Arc<FaultStorage>, Disk) {
    let spec = FixtureSpec { block_size: 64 << 10, ..FixtureSpec::new(Kind::Dynamic, Layout::Windows8, SIZE) };
    let storage = Arc::new(FaultStorage::new(spec.to_bytes().0, None));
    let options = OpenOptions { writable, background_flush: None, ..OpenOptions::default() };
    let image = Image::open(Arc::clone(&storage) as _, Path::new("disk.vhd"), &options).unwrap();
    (storage, Disk::new(Chain::of(Layer::Image(image))))
}

impl Bench {
    fn new(options: &BlockOptions) -> Self {
        let memory = Memory::new(MEMORY).unwrap();
        let (storage, disk) = disk(true);
        let block = Block::new(disk, options);
        // Flush was agreed to.
        block.set_features(u64::MAX);
        let ring = Ring::new(&memory, 0x1_0000, 64);
        Self { queue: queue_of(&ring), memory, storage, block, ring, owner: Owner::default() }
    }

    fn serve(&mut self) -> Result<Served, Broken> {
        self.block.serve(&self.memory, &mut self.queue, &self.owner)
    }

    /// Offers a request and has it served: its status, and the bytes that the device says it wrote.
    fn ask(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
        let status = self.offer(kind, sector, data);
        assert!(matches!(self.serve().unwrap(), Served::Answered));
        let (_, written) = self.ring.next_used().unwrap();
        (self.ring.get(status, 1)[0], written)
    }

    fn offer(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> u64 {
        let header = self.ring.header(kind, sector);
        let status = self.ring.put(&[0xFF]);
        let pieces = [&[(header, 16, false)], data, &[(status, 1, true)]].concat();
        let head = self.ring.chain(&pieces);
        self.ring.offer(head);
        status
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        let data = self.ring.put(bytes);
        self.ask(kind::OUT, sector, &[(data, bytes.len() as u32, false)]).0
    }

    fn read(&mut self, sector: u64, len: u32) -> Vec<u8> {
        let data = self.ring.put(&vec![0xEE; len as usize]);
        assert_eq!(self.ask(kind::IN, sector, &[(data, len, true)]), (OK, len + 1));
        self.ring.get(data, len as usize)
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let bytes = ranges.iter().flat_map(|(sector, sectors, flags)| {
            sector.to_ne_bytes().into_iter().chain(sectors.to_ne_bytes()).chain(flags.to_ne_bytes())
        });
        let bytes: Vec<u8> = bytes.collect();
        let data = self.ring.put(&bytes);
        self.ask(kind, 0, &[(data, bytes.len() as u32, false)]).0
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at / 512) as u8 ^ seed ^ at as u8).collect()
}

#[test]
fn what_was_written_is_read() {
    let mut bench = Bench::new(&BlockOptions::default());
    let bytes = pattern(8192, 3);
    assert_eq!(bench.write(126, &bytes), OK);
    assert_eq!(bench.read(126, 8192), bytes);
    assert_eq!(bench.read(0, 1024), [0; 1024]);
    assert_eq!(bench.ask(kind::FLUSH, 0, &[]), (OK, 1));
    // The disk has it, too.
    let mut held = vec![0; 8192];
    bench.block.disk().read_at(&mut held, 126 * 512).unwrap();
    assert_eq!(held, bytes);
}

#[test]
fn data_may_be_in_many_pieces_and_the_header_too() {
    let mut bench = Bench::new(&BlockOptions::default());
    let bytes = pattern(1024, 9);
    let header = bench.ring.header(kind::OUT, 5);
    let data = bench.ring.put(&bytes);
    let status = bench.ring.put(&[0xFF]);
    let pieces = [
        (header, 3, false),
        (header + 3, 13, false),
        (data, 1, false),
        (data + 1, 700, false),
        (data + 701, 323, false),
        (status, 1, true),
    ];
    let head = bench.ring.indirect(&pieces);
    bench.ring.offer(head);
    bench.serve().unwrap();
    assert_eq!((bench.ring.next_used(), bench.ring.get(status, 1)), (Some((head, 1)), vec![OK]));
    assert_eq!(bench.read(5, 1024), bytes);
    // The status may share a descriptor with the data.
    let header = bench.ring.header(kind::IN, 5);
    let data = bench.ring.put(&[0xEE; 1025]);
    let head = bench.ring.chain(&[(header, 16, false), (data, 1025, true)]);
    bench.ring.offer(head);
    bench.serve().unwrap();
    assert_eq!(bench.ring.next_used(), Some((head, 1025)));
    assert_eq!(bench.ring.get(data, 1025), [&bytes[..], &[OK]].concat());
}

#[test]
fn a_read_into_pieces_that_share_bytes_is_done_piece_by_piece() {
    let mut bench = Bench::new(&BlockOptions::default());
    let bytes = pattern(1024, 7);
    assert_eq!(bench.write(9, &bytes), OK);
    let data = bench.ring.put(&[0xEE; 1024]);
    // The second begins in the middle of the first, the third is the first again, in part.
    let pieces = [(data, 300, true), (data + 200, 700, true), (data, 24, true)];
    assert_eq!(bench.ask(kind::IN, 9, &pieces), (OK, 1025));
    let mut expected = [&bytes[..200], &bytes[300..1000], &[0xEE; 124]].concat();
    expected[..24].copy_from_slice(&bytes[1000..]);
    assert_eq!(bench.ring.get(data, 1024), expected);
}

#[test]
fn discard_and_write_zeroes_make_zeros() {
    let mut bench = Bench::new(&BlockOptions::default());
    assert_eq!(bench.write(0, &pattern(65536, 1)), OK);
    assert_eq!(bench.ranges(kind::DISCARD, &[(0, 8, 0), (16, 1, 0)]), OK);
    let bytes = bench.read(0, 65536);
    assert!(bytes[..4096].iter().chain(&bytes[8192..8704]).all(|byte| *byte == 0));
    assert_eq!(bytes[4096..8192], pattern(65536, 1)[4096..8192]);
    assert_eq!(bench.ranges(kind::WRITE_ZEROES, &[(9, 2, 1)]), OK);
    assert_eq!(bench.ranges(kind::WRITE_ZEROES, &[(12, 1, 0)]), OK);
    let bytes = bench.read(0, 65536);
    assert!(bytes[9 * 512..11 * 512].iter().chain(&bytes[12 * 512..13 * 512]).all(|byte| *byte == 0));
    assert_eq!(bytes[11 * 512..12 * 512], pattern(65536, 1)[11 * 512..12 * 512]);
    // Flags that are not known, and too much or too little.
    assert_eq!(bench.ranges(kind::DISCARD, &[(0, 1, 1)]), UNSUPP);
    assert_eq!(bench.ranges(kind::WRITE_ZEROES, &[(0, 1, 2)]), UNSUPP);
    assert_eq!(bench.ranges(kind::DISCARD, &[(SIZE / 512, 1, 0)]), IOERR);
    assert_eq!(bench.ranges(kind::DISCARD, &[(u64::MAX, 1, 0)]), IOERR);
    assert_eq!(bench.ranges(kind::DISCARD, &[(0, u32::MAX, 0)]), IOERR);
    assert_eq!(bench.ranges(kind::DISCARD, &[(0, 1, 0); 17]), IOERR);
    // Nothing of a list is done when a range of it is wrong.
    assert_eq!(bench.ranges(kind::DISCARD, &[(11, 1, 0), (SIZE / 512, 1, 0)]), IOERR);
    assert_eq!(bench.read(11, 512), pattern(65536, 1)[11 * 512..12 * 512]);
}

#[test]
fn the_serial_is_told() {
    let mut bench = Bench::new(&BlockOptions { serial: "a serial of more than twenty".into(), ..Default::default() });
    let data = bench.ring.put(&[0xEE; 20]);
    assert_eq!(bench.ask(kind::GET_ID, 0, &[(data, 20, true)]), (OK, 21));
    assert_eq!(bench.ring.get(data, 20), b"a serial of more tha");
    assert_eq!(bench.ask(kind::GET_ID, 0, &[(data, 19, true)]).0, IOERR);
}

#[test]
fn a_read_only_disk_refuses_writes_only() {
    let mut bench = Bench::new(&BlockOptions { read_only: true, ..Default::default() });
    assert_eq!(bench.write(0, &[1; 512]), IOERR);
    assert_eq!(bench.ranges(kind::DISCARD, &[(0, 1, 0)]), IOERR);
    assert_eq!(bench.read(0, 512), [0; 512]);
    assert_ne!(bench.block.features() & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    assert_eq!(bench.block.features() & (1 << 13 | 1 << 14), 0, "discard and write zeroes");
}

#[test]
fn requests_that_make_no_sense_are_answered() {
    let mut bench = Bench::new(&BlockOptions::default());
    let data = bench.ring.put(&[1; 1024]);
    let sectors = SIZE / 512;
    for (kind, sector, pieces, answer) in [
        (99, 0, vec![], UNSUPP),
        (kind::IN, sectors, vec![(data, 512, true)], IOERR),
        (kind::IN, sectors - 1, vec![(data, 1024, true)], IOERR),
        (kind::IN, u64::MAX, vec![(data, 512, true)], IOERR),
        (kind::IN, u64::MAX / 512, vec![(data, 512, true)], IOERR),
        (kind::IN, 0, vec![(data, 511, true)], IOERR),
        (kind::IN, 0, vec![], IOERR),
        (kind::IN, 0, vec![(data, 512, false)], IOERR),
        (kind::IN, 0, vec![(data, 512, false), (data, 512, true)], IOERR),
        (kind::IN, 0, vec![(data, 512, true), (data, 512, false)], IOERR),
        (kind::IN, 0, vec![(MEMORY - 256, 512, true)], IOERR),
        (kind::IN, 0, vec![(u64::MAX - 255, 512, true)], IOERR),
        (kind::IN, 0, vec![(0, u32::MAX - 511, true)], IOERR),
        (kind::OUT, sectors, vec![(data, 512, false)], IOERR),
        (kind::OUT, 0, vec![(MEMORY, 512, false)], IOERR),
        (kind::OUT, 0, vec![(data, 100, false)], IOERR),
        (kind::OUT, 0, vec![(data, 512, true)], IOERR),
        (kind::FLUSH, 0, vec![(data, 512, false)], IOERR),
        (kind::DISCARD, 0, vec![(data, 15, false)], IOERR),
        (kind::DISCARD, 0, vec![(data, 16, true)], IOERR),
        (kind::WRITE_ZEROES, 0, vec![], IOERR),
    ] {
        assert_eq!(bench.ask(kind, sector, &pieces).0, answer, "{kind} {sector} {pieces:x?}");
    }
    assert_eq!(bench.read(0, 1024), [0; 1024]);
    // A header that is too short.
    let header = bench.ring.header(kind::FLUSH, 0);
    let status = bench.ring.put(&[0xFF]);
    let head = bench.ring.chain(&[(header, 15, false), (status, 1, true)]);
    bench.ring.offer(head);
    bench.serve().unwrap();
    assert_eq!(bench.ring.get(status, 1), [IOERR]);
    // More memory in all than a request may have, though each byte is there.
    bench.ring.next_used();
    let large = (0, 1 << 20, true);
    let header = bench.ring.header(kind::IN, 0);
    let head = bench.ring.indirect(&[vec![(header, 16, false)], vec![large; 65], vec![(status, 1, true)]].concat());
    bench.ring.put(&[0]);
    bench.ring.offer(head);
    bench.serve().unwrap();
    assert_eq!(bench.ring.get(status, 1), [IOERR]);
}

#[test]
fn a_request_without_a_place_for_its_status_breaks_the_device() {
    let long = vec![(0x10, 16, false); 300];
    for pieces in
        [vec![(0x10, 16, false)], vec![(0x10, 16, false), (MEMORY, 1, true)], vec![(0x10, 16, false), (0x10, 0, true)], long]
    {
        let mut bench = Bench::new(&BlockOptions::default());
        let head = bench.ring.indirect(&pieces);
        bench.ring.offer(head);
        assert!(bench.serve().is_err(), "{pieces:x?}");
    }
}

#[test]
fn rings_that_are_wrong_break_the_device_or_are_answered_and_end() {
    // A loop of descriptors, read-only and writable ones.
    for flags in [NEXT, NEXT | WRITE] {
        let mut bench = Bench::new(&BlockOptions::default());
        bench.ring.set(bench.ring.descriptors(), 0, Descriptor { address: 0x100, len: 16, flags, next: 0 });
        bench.ring.offer(0);
        let served = bench.serve();
        assert_eq!(served.is_err(), flags == NEXT, "a loop that may be written has a place for the status");
    }
    // A table within a table, one that is not whole, one of nothing, a head out of range, an index far ahead.
    let mut bench = Bench::new(&BlockOptions::default());
    bench.ring.set(0x8000, 0, Descriptor { address: 0x8000, len: 16, flags: INDIRECT, next: 0 });
    for table in [(0x8000, 16), (0x8000, 17), (0x8000, 0), (MEMORY - 8, 16), (u64::MAX - 8, 16)] {
        let mut bench = Bench::new(&BlockOptions::default());
        let descriptor = Descriptor { address: table.0, len: table.1, flags: INDIRECT, next: 0 };
        bench.ring.set(bench.ring.descriptors(), 0, descriptor);
        bench.ring.offer(0);
        assert!(bench.serve().is_err(), "{table:x?}");
    }
    bench.ring.offer(bench.ring.size);
    assert!(bench.serve().is_err());
    let mut bench = Bench::new(&BlockOptions::default());
    bench.ring.avail = 100;
    bench.ring.offer(0);
    assert!(bench.serve().is_err(), "101 requests in a ring of 64");
    // A queue outside of memory.
    let mut bench = Bench::new(&BlockOptions::default());
    bench.queue.set_used_ring_address(Some(MEMORY as u32), None);
    assert!(bench.serve().is_err());
}

#[test]
fn the_driver_is_told_once_for_each_request_or_as_its_event_index_says() {
    let mut bench = Bench::new(&BlockOptions::default());
    for _ in 0..3 {
        bench.offer(kind::FLUSH, 0, &[]);
    }
    bench.serve().unwrap();
    assert_eq!(bench.owner.interrupts.get(), 3);
    bench.serve().unwrap();
    assert_eq!(bench.owner.interrupts.get(), 3, "nothing to tell");
    assert!(!bench.ring.wants_no_notification());

    let mut bench = Bench::new(&BlockOptions::default());
    bench.queue.set_event_idx(true);
    bench.ring.set_used_event(2);
    for _ in 0..5 {
        bench.offer(kind::FLUSH, 0, &[]);
    }
    bench.serve().unwrap();
    assert_eq!(bench.owner.interrupts.get(), 1, "for the third only");
    assert_eq!(bench.ring.avail_event(), 5, "the device wants to know of the sixth");
}

#[test]
fn a_queue_stops_between_requests_when_it_is_told() {
    let mut bench = Bench::new(&BlockOptions::default());
    for _ in 0..4 {
        bench.offer(kind::FLUSH, 0, &[]);
    }
    bench.owner.requests.set(Some(2));
    bench.serve().unwrap();
    assert_eq!(bench.ring.used_index(), 2);
    bench.owner.requests.set(None);
    bench.serve().unwrap();
    assert_eq!(bench.ring.used_index(), 4);
}

#[test]
fn a_full_host_keeps_the_request_until_there_is_room() {
    let mut bench = Bench::new(&BlockOptions::default());
    bench.storage.plan(Plan { fault: Fault::Enospc, at: 1, for_ever: true });
    let bytes = pattern(512, 7);
    let data = bench.ring.put(&bytes);
    let status = bench.offer(kind::OUT, 40, &[(data, 512, false)]);
    for _ in 0..2 {
        let served = bench.serve().unwrap();
        assert!(matches!(served, Served::Stalled(_)), "{served:?}");
        assert_eq!((bench.ring.used_index(), bench.ring.get(status, 1)[0]), (0, 0xFF));
    }
    bench.storage.heal();
    assert!(matches!(bench.serve().unwrap(), Served::Answered));
    assert_eq!((bench.ring.used_index(), bench.ring.get(status, 1)[0]), (1, OK));
    assert_eq!(bench.ring.next_used().unwrap().1, 1);
    assert_eq!(bench.read(40, 512), bytes);
}

#[test]
fn failures_are_reported_or_kept_as_the_policy_says() {
    use Policy::{Pause, Report};
    for (fault, on_error, on_no_space, kept) in [
        (Fault::Enospc, Report, Report, false),
        (Fault::Enospc, Report, Pause, true),
        (Fault::Eio, Report, Pause, false),
        (Fault::Eio, Pause, Report, true),
    ] {
        let mut bench = Bench::new(&BlockOptions { policies: Policies { on_error, on_no_space }, ..Default::default() });
        bench.storage.plan(Plan { fault, at: 1, for_ever: true });
        let data = bench.ring.put(&[1; 512]);
        let status = bench.offer(kind::OUT, 40, &[(data, 512, false)]);
        let served = bench.serve().unwrap();
        assert_eq!(matches!(served, Served::Stalled(_)), kept, "{fault:?} {served:?}");
        assert_eq!(bench.ring.get(status, 1)[0], if kept { 0xFF } else { IOERR });
    }
    // What the guest does wrong is no failure of the host.
    let mut bench =
        Bench::new(&BlockOptions { policies: Policies { on_error: Pause, on_no_space: Pause }, ..Default::default() });
    let data = bench.ring.put(&[1; 512]);
    assert_eq!(bench.ask(kind::OUT, SIZE / 512, &[(data, 512, false)]).0, IOERR);
}

#[test]
fn a_driver_that_does_not_flush_has_its_writes_durable() {
    let bench = &mut Bench::new(&BlockOptions::default());
    bench.block.set_features(0);
    assert_eq!(bench.write(3, &[5; 512]), OK);
    // A flush now has nothing left to do: it makes no calls that could fail.
    bench.storage.plan(Plan { fault: Fault::Eio, at: 1, for_ever: true });
    bench.block.disk().flush().unwrap();
    bench.storage.heal();
    bench.block.set_features(u64::MAX);
    assert_eq!(bench.write(SIZE / 512 - 1, &[5; 512]), OK);
    bench.storage.plan(Plan { fault: Fault::Eio, at: 1, for_ever: true });
    assert!(bench.block.disk().flush().is_err(), "the flush had nothing to do");
}

#[test]
fn several_queues_write_at_once() {
    let memory = Memory::new(MEMORY).unwrap();
    let (_, disk) = disk(true);
    let block = Block::new(disk, &BlockOptions { queues: 4, ..Default::default() });
    block.set_features(u64::MAX);
    std::thread::scope(|scope| {
        for number in 0..4_u64 {
            let (block, memory) = (&block, &memory);
            scope.spawn(move || {
                let mut ring = Ring::new(memory, 0x10_0000 + number * 0x18_0000, 64);
                let mut queue = queue_of(&ring);
                let owner = Owner::default();
                for round in 0..100_u64 {
                    let bytes = pattern(1024, (number * 50 + round) as u8);
                    let data = ring.put(&bytes);
                    let status = ring.put(&[0xFF]);
                    let header = ring.header(kind::OUT, number * 2 + round % 16 * 100);
                    let head = ring.chain(&[(header, 16, false), (data, 1024, false), (status, 1, true)]);
                    ring.offer(head);
                    block.serve(memory, &mut queue, &owner).unwrap();
                    assert_eq!(ring.get(status, 1), [OK]);
                    let header = ring.header(kind::IN, number * 2 + round % 16 * 100);
                    let back = ring.put(&[0; 1024]);
                    let head = ring.chain(&[(header, 16, false), (back, 1024, true), (status, 1, true)]);
                    ring.offer(head);
                    block.serve(memory, &mut queue, &owner).unwrap();
                    assert_eq!(ring.get(back, 1024), bytes);
                }
            });
        }
    });
}

#[test]
fn the_configuration_says_what_the_disk_is() {
    let geometry = Geometry { cylinders: 30, heads: 4, sectors: 17 };
    let bench = Bench::new(&BlockOptions { queues: 4, geometry: Some(geometry), ..Default::default() });
    let mut space = [0xEE; 64];
    bench.block.read_config(0, &mut space);
    let number = |at: usize, len: usize| space[at..at + len].iter().rev().fold(0_u64, |n, byte| n << 8 | u64::from(*byte));
    assert_eq!(number(0, 8), SIZE / 512, "capacity");
    assert_eq!((number(16, 2), number(18, 1), number(19, 1)), (30, 4, 17), "geometry");
    assert_eq!((number(20, 4), number(24, 1)), (512, 3), "blocks");
    assert_eq!(number(34, 2), 4, "queues");
    assert_eq!(space[60..], [0; 4], "past the end");
    let mut far = [0xEE; 4];
    bench.block.read_config(u64::MAX, &mut far);
    assert_eq!(far, [0; 4]);
    let wanted = [1, 2, 4, 6, 9, 10, 12, 13, 14, 28, 29, 32];
    assert_eq!(bench.block.features(), wanted.iter().map(|bit| 1_u64 << bit).sum::<u64>());
}

/// A disk that reads and writes the very memory that it is to fill, as other queues' threads may at any time.
struct Within {
    memory: Memory,
    segments: Vec<Segment>,
}

impl BlockDevice for Within {
    fn capabilities(&self) -> Capabilities {
        Capabilities { size: SIZE, read_only: false, discard_granularity: 4096, layers: 1 }
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], _offset: u64) -> vhd_core::Result<()> {
        bufs.iter_mut().for_each(|buf| buf.fill(0x11));
        Ok(())
    }

    fn read_shared_at(&self, to: &dyn SharedBytes, offset: u64) -> vhd_core::Result<()> {
        let again = self.memory.run_of(&self.segments).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0x22; 4096], 0).unwrap();
        again.read_from(file.as_fd(), 0, 0..again.len()).unwrap();
        to.put(0, &[0x33; 8]).unwrap();
        self.memory.write(self.segments[0].address + 8, &[0x44; 8]).unwrap();
        let mut seen = [0; 24];
        again.get(0, &mut seen).unwrap();
        assert!(seen[..8] == [0x33; 8] && seen[8..16] == [0x44; 8] && seen[16..] == [0x22; 8]);
        let rest = vec![0x11; to.len() as usize - 24];
        to.put(24, &rest).map_err(|error| vhd_core::Error::io(error, "memory"))?;
        assert_eq!(offset, 0);
        Ok(())
    }

    fn write_vectored_at(&self, _bufs: &[IoSlice<'_>], _offset: u64) -> vhd_core::Result<()> {
        Ok(())
    }

    fn flush(&self) -> vhd_core::Result<()> {
        Ok(())
    }

    fn zero(&self, _range: Range<u64>, _mode: ZeroMode) -> vhd_core::Result<()> {
        Ok(())
    }

    fn extents(&self, _range: Range<u64>, _visit: &mut dyn FnMut(Extent) -> vhd_core::Result<()>) -> vhd_core::Result<()> {
        Ok(())
    }

    fn layer_path(&self, _depth: usize) -> Option<PathBuf> {
        None
    }

    fn close(&self) -> vhd_core::Result<()> {
        Ok(())
    }
}

#[test]
fn a_disk_may_use_the_memory_that_it_is_to_fill() {
    let memory = Memory::new(MEMORY).unwrap();
    let segments = vec![Segment { address: 0x10_0000, len: 512 }];
    let disk = Disk::new(Within { memory: memory.clone(), segments: segments.clone() });
    disk.read_shared_at(&memory.run_of(&segments).unwrap(), 0).unwrap();
    let mut found = [0; 32];
    memory.read(0x10_0000, &mut found).unwrap();
    assert!(found[..8] == [0x33; 8] && found[8..16] == [0x44; 8] && found[16..24] == [0x22; 8] && found[24..] == [0x11; 8]);
}
