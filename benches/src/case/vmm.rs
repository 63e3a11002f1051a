//! What a guest's requests cost the host: the device alone, and through KVM.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_gettime};
use vhd_core::block::{BlockDevice, Capabilities, Extent, ExtentState, SharedBytes, ZeroMode};
use vhd_core::chain::Chain;
use vhd_core::{Disk, Error, ErrorKind};
use vhd_testkit::rings::{Ring, kind};
use vhd_vmm::memory::Memory;
use vhd_vmm::virtio::block::{Block, BlockOptions, QueueOwner};
use virtio_queue::{Queue, QueueT};

use super::Place;
use super::files::{Random, new_dynamic, open};
use crate::measure::{Row, Sample, Subject, Unit, alternate};
use crate::process::{run, vhd};

const SIZE: u64 = 256 << 20;
/// Where the guest's rings and the data of requests are.
const RINGS: u64 = 1 << 20;
const DATA: u64 = 4 << 20;
const QUEUE_SIZE: u16 = 256;
/// Where the data of blocks begins in a small image, at least.
const FIRST_DATA: u64 = 8 << 10;

/// A driver that polls.
struct Polling;

impl QueueOwner for Polling {
    fn stopped(&self) -> bool {
        false
    }

    fn used(&self) {}
}

/// A device with one queue, and its driver.
struct Device {
    memory: Memory,
    block: Block,
    queue: Queue,
    ring: Ring,
    random: Random,
}

/// Requests of one sort.
#[derive(Clone, Copy)]
struct Work {
    kind: u32,
    bytes: u32,
    depth: u64,
    total: u64,
}

impl Device {
    fn new(disk: Disk) -> Result<Self> {
        let memory = Memory::new(16 << 20)?;
        let block = Block::new(disk, &BlockOptions::default());
        block.set_features(u64::MAX);
        let ring = Ring::new(&memory, RINGS, QUEUE_SIZE);
        let mut queue = Queue::new(QUEUE_SIZE)?;
        queue.set_size(QUEUE_SIZE);
        queue.set_desc_table_address(Some(ring.descriptors() as u32), None);
        queue.set_avail_ring_address(Some(ring.available() as u32), None);
        queue.set_used_ring_address(Some(ring.used() as u32), None);
        queue.set_ready(true);
        Ok(Self { memory, block, queue, ring, random: Random(3) })
    }

    /// Processor seconds of the serving thread for each request, at places `shift` sectors further on than multiples of
    /// their length. What the driver needs does not count.
    fn serve(&mut self, work: Work, shift: u64) -> Result<Sample> {
        let mut busy = 0.0;
        for _ in 0..work.total / work.depth {
            let mut statuses = Vec::new();
            for number in 0..work.depth {
                let sector = self.random.below(SIZE / u64::from(work.bytes) - 1) * u64::from(work.bytes) / 512 + shift;
                let (header, status) = (self.ring.header(work.kind, sector), self.ring.put(&[0xFF]));
                let data = DATA + number * u64::from(work.bytes);
                let pieces = [(header, 16, false), (data, work.bytes, work.kind == kind::IN), (status, 1, true)];
                let head = self.ring.chain(&pieces);
                self.ring.offer(head);
                statuses.push(status);
            }
            let began = processor()?;
            self.block.serve(&self.memory, &mut self.queue, &Polling)?;
            busy += processor()? - began;
            if statuses.iter().any(|status| self.ring.get(*status, 1) != [0]) {
                bail!("a request failed");
            }
        }
        Ok(Sample::of(busy / work.total as f64))
    }
}

/// Bytes of an image's file as a disk, whatever they mean there: nothing but reads of the pages that the dynamic disk reads.
struct Bare(File);

impl BlockDevice for Bare {
    fn capabilities(&self) -> Capabilities {
        Capabilities { size: SIZE, read_only: true, discard_granularity: 4096, layers: 1 }
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> vhd_core::Result<()> {
        let mut at = FIRST_DATA + offset;
        for buf in bufs {
            self.0.read_exact_at(buf, at).map_err(|error| Error::io(error, "can't be read"))?;
            at += buf.len() as u64;
        }
        Ok(())
    }

    fn read_shared_at(&self, to: &dyn SharedBytes, offset: u64) -> vhd_core::Result<()> {
        let read = to.read_from(self.0.as_fd(), FIRST_DATA + offset, 0..to.len());
        read.map_err(|error| Error::io(error, "can't be read"))
    }

    fn write_vectored_at(&self, _bufs: &[IoSlice<'_>], _offset: u64) -> vhd_core::Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "is only read"))
    }

    fn flush(&self) -> vhd_core::Result<()> {
        Ok(())
    }

    fn zero(&self, _range: Range<u64>, _mode: ZeroMode) -> vhd_core::Result<()> {
        Err(Error::new(ErrorKind::ReadOnly, "is only read"))
    }

    fn extents(&self, range: Range<u64>, visit: &mut dyn FnMut(Extent) -> vhd_core::Result<()>) -> vhd_core::Result<()> {
        visit(Extent { range, state: ExtentState::Data, depth: 0, offset: None })
    }

    fn layer_path(&self, _depth: usize) -> Option<PathBuf> {
        None
    }

    fn close(&self) -> vhd_core::Result<()> {
        Ok(())
    }
}

/// Processor seconds of this thread so far.
fn processor() -> Result<f64> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(time.tv_sec() as f64 + time.tv_nsec() as f64 * 1e-9)
}

/// Fills disks by turns: who comes first gets other pages of the host, and they may be slower to read.
fn filled(disks: &[&Disk]) -> Result<()> {
    let noise = Random(1).bytes(1 << 20);
    for mib in 0..SIZE >> 20 {
        disks.iter().try_for_each(|disk| disk.write_at(&noise, mib << 20))?;
    }
    Ok(disks.iter().try_for_each(|disk| disk.flush())?)
}

/// The device alone, on a dynamic disk against a raw file. Besides, on the raw file 4 KiB further on, as the blocks of a dynamic
/// disk begin on pages, and on nothing larger; and on the bytes of the image's file: what they differ by is the host's doing.
pub fn device(place: &Place) -> Result<Vec<Row>> {
    let (image, raw) = (place.memory.join("device.vhd"), place.memory.join("device.img"));
    new_dynamic(&image, SIZE, 1)?;
    let file = OpenOptions::new().create(true).truncate(true).write(true).open(&raw)?;
    file.set_len(SIZE)?;
    let (dynamic, plain) = (open(&image, true)?, Disk::new(Chain::open_raw(&raw, true)?));
    filled(&[&dynamic, &plain])?;
    let mut bare = Device::new(Disk::new(Bare(File::open(&image)?)))?;
    // Two take turns with the raw file.
    let (mut dynamic, plain) = (Device::new(dynamic)?, RefCell::new(Device::new(plain)?));
    let mut rows = Vec::new();
    for (name, kind) in [("read", kind::IN), ("write", kind::OUT)] {
        for bytes in [4096, 64 << 10] {
            for depth in [1, 32] {
                let total = if place.long { 4 } else { 1 } * if bytes == 4096 { 40_000 } else { 8_000 };
                let work = Work { kind, bytes, depth, total: total / depth * depth };
                let mut subjects = vec![
                    Subject::new("raw file", || plain.borrow_mut().serve(work, 0)),
                    Subject::new("dynamic disk", || dynamic.serve(work, 0)).with_target(1.1),
                    Subject::new("raw file, 4 KiB further", || plain.borrow_mut().serve(work, 8)),
                ];
                if kind == kind::IN {
                    subjects.push(Subject::new("the image's own bytes", || bare.serve(work, 0)).being_floor());
                }
                let case = format!("virtio-blk {name} {} KiB, depth {depth}: processor time a request", bytes >> 10);
                rows.extend(alternate(&case, Unit::Seconds, place.rounds, &mut subjects)?);
            }
        }
    }
    std::fs::remove_file(&image)?;
    std::fs::remove_file(&raw)?;
    Ok(rows)
}

/// The test guest, which drives disks from ring 3.
fn guest(folder: &Path) -> Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vmm/guest/main.rs");
    let built = folder.join("guest");
    let link = "link-args=-nostartfiles -nostdlib -static -no-pie -Wl,--image-base=0x200000,-e,_start,--build-id=none";
    let options = ["--edition", "2024", "--crate-type", "bin", "-C", "panic=abort", "-C", "opt-level=2"];
    let mut rustc = Command::new("rustc");
    rustc.args(options).args(["-C", "relocation-model=static", "-C", link, "-o"]).arg(&built).arg(source);
    run(&mut rustc)?;
    Ok(built)
}

/// Through KVM: one request at a time, each with an exit of the guest's and a thread that wakes.
pub fn kvm(place: &Place) -> Result<Vec<Row>> {
    let guest = guest(&place.memory)?;
    let (fixed, dynamic) = (place.memory.join("fixed.vhd"), place.memory.join("dynamic.vhd"));
    let program = vhd()?;
    run(Command::new(&program).args(["create", "--size", "256M", "--type", "fixed"]).arg(&fixed))?;
    run(Command::new(&program).args(["create", "--size", "256M"]).arg(&dynamic))?;
    filled(&[&open(&fixed, true)?, &open(&dynamic, true)?])?;
    let machine = |image: &Path, requests: u64| -> Result<f64> {
        let mut command = Command::new(&program);
        command.arg("run").arg("--kernel").arg(&guest).args(["--memory", "16M", "--append"]);
        command.arg(format!("do=requests requests={requests}")).arg("--disk").arg(image);
        run(&mut command)?.cpu.context("no processor time")
    };
    let total = 10_000;
    // What the machine costs without requests is no cost of theirs.
    let cost = |image: &Path| Ok(Sample::of((machine(image, total)? - machine(image, 0)?) / total as f64));
    let mut subjects = [Subject::new("fixed disk", || cost(&fixed)), Subject::new("dynamic disk", || cost(&dynamic))];
    alternate("through KVM, read 4 KiB, depth 1: processor time a request", Unit::Seconds, place.rounds, &mut subjects)
}
