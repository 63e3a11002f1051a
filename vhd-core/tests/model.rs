//! Goal: whatever is done to a disk, it reads as the model says, and so do its files for independent readers.
//!
//! Method: random writes, zeroes, discards, flushes, reopens, snapshots and operations of the disk manager on fixed, dynamic and differencing disks
//! with blocks from 4 KiB and odd sizes, against an oracle in memory that shares no code with the core. After each
//! operation the touched range is compared; at the end the whole disk, here, through the test kit's own reader, and
//! for some through qemu-img and vhdimount.
//! It would fail if data were lost, misplaced or brought back, by any operation in any order.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

use std::ops::Range;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use vhd_core::block::ZeroMode;
use vhd_core::chain::{Chain, ChainOptions, ChildOptions, create_child};
use vhd_core::format::{Creator, DiskType, Timestamp};
use vhd_core::image::{CreateOptions, NewKind, OpenOptions, create_file};
use vhd_core::ops::compact::{CompactOptions, compact};
use vhd_core::ops::diff::diff;
use vhd_core::ops::in_place::{InPlaceOptions, convert_in_place};
use vhd_core::ops::merge::{self, MergeOptions};
use vhd_core::ops::repair::{RepairMode, repair};
use vhd_core::ops::reparent::reparent;
use vhd_core::ops::resize::{ResizeOptions, resize};
use vhd_core::ops::undo;
use vhd_core::storage::AlignedBuffer;
use vhd_core::{Disk, ErrorKind, Progress};
use vhd_testkit::model::ModelDisk;
use vhd_testkit::reference::ReferenceChain;

#[derive(Clone, Debug)]
enum Op {
    Write {
        at: u64,
        len: u64,
        fill: u8,
    },
    Zero {
        at: u64,
        len: u64,
        keep: bool,
    },
    Flush,
    Reopen,
    Snapshot {
        grow: u64,
    },
    Compact {
        realign: bool,
    },
    Merge,
    Resize {
        blocks: i8,
    },
    /// To fixed, or to dynamic.
    InPlace,
    /// The parent gets another name, and its child is told.
    Reparent,
    Undo {
        at: u64,
        len: u64,
        commit: bool,
    },
    /// Of what is sound.
    Repair,
}

/// Positions are fractions of the disk (0 to 2^32), so that shrinking the disk keeps a case meaningful.
fn ops(aligned: u64) -> impl Strategy<Value = Vec<Op>> {
    let len = prop_oneof![3 => 1..1500_u64, 2 => 1..40_000_u64, 1 => 1..400_000_u64];
    let place = (any::<u32>(), len).prop_map(move |(at, len)| (u64::from(at), len.next_multiple_of(aligned)));
    let op = prop_oneof![
        8 => (place.clone(), 1..=255_u8).prop_map(|((at, len), fill)| Op::Write { at, len, fill }),
        4 => (place.clone(), any::<bool>()).prop_map(|((at, len), keep)| Op::Zero { at, len, keep }),
        2 => Just(Op::Flush),
        1 => Just(Op::Reopen),
        1 => prop_oneof![4 => Just(0), 1 => 1..9_u64].prop_map(|grow| Op::Snapshot { grow }),
        1 => any::<bool>().prop_map(|realign| Op::Compact { realign }),
        1 => Just(Op::Merge),
        1 => (-9..60_i8).prop_map(|blocks| Op::Resize { blocks }),
        1 => prop_oneof![Just(Op::InPlace), Just(Op::Reparent), Just(Op::Repair)],
        1 => (place, any::<bool>()).prop_map(|((at, len), commit)| Op::Undo { at, len, commit }),
    ];
    prop::collection::vec(op, 1..40)
}

struct Subject {
    folder: tempfile::TempDir,
    /// Base first.
    paths: Vec<PathBuf>,
    disk: Option<Disk>,
    model: ModelDisk,
    /// Positions and lengths are multiples of this.
    aligned: u64,
    block_size: u32,
    /// The base is.
    fixed: bool,
    /// Past the page cache.
    direct: bool,
}

fn options() -> ChainOptions {
    // The test decides when metadata is flushed, so that a failing case fails again.
    let image = OpenOptions { writable: true, background_flush: None, ..OpenOptions::default() };
    ChainOptions { image, ..ChainOptions::default() }
}

impl Subject {
    fn new(kind: NewKind, size: u64, block_size: u32, aligned: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("base.vhd");
        let fixed = matches!(kind, NewKind::Fixed { .. });
        let create =
            CreateOptions { kind, size, block_size, uuid: [1; 16], creator: Creator::WINDOWS_10, timestamp: Timestamp(0) };
        create_file(&path, &create, false).unwrap();
        let disk = Disk::open(&path, &options()).unwrap();
        let model = ModelDisk::new(disk.size());
        Self { folder, paths: vec![path], disk: Some(disk), model, aligned, block_size, fixed, direct: false }
    }

    fn disk(&self) -> &Disk {
        self.disk.as_ref().unwrap()
    }

    fn leaf(&self) -> &Path {
        self.paths.last().unwrap()
    }

    fn range(&self, at: u64, len: u64) -> Range<u64> {
        let size = self.model.size();
        let start = ((size * at) >> 32) / self.aligned * self.aligned;
        start..(start + len).min(size)
    }

    fn reopen(&mut self) {
        self.disk().close().unwrap();
        self.disk = None;
        self.disk = Some(Disk::open(self.leaf(), &ChainOptions { direct: self.direct, ..options() }).unwrap());
    }

    fn apply(&mut self, op: &Op, step: usize) {
        match *op {
            Op::Write { at, len, fill } => {
                let range = self.range(at, len);
                let bytes: Vec<u8> = range.clone().map(|i| fill ^ (i >> 9) as u8 ^ step as u8).collect();
                let mut buffer = AlignedBuffer::new(bytes.len());
                buffer.copy_from_slice(&bytes);
                self.disk().write_at(&buffer, range.start).unwrap();
                self.model.write(range.start, &bytes);
                self.compare(range);
            }
            Op::Zero { at, len, keep } => {
                let range = self.range(at, len);
                self.disk().zero(range.clone(), if keep { ZeroMode::Keep } else { ZeroMode::Free }).unwrap();
                self.model.write_zeroes(range.clone());
                self.compare(range);
            }
            Op::Flush => self.disk().flush().unwrap(),
            Op::Reopen => self.reopen(),
            Op::Snapshot { grow } => self.snapshot(grow),
            Op::Compact { realign } => self.compact(realign),
            Op::Merge => self.merge(),
            Op::Resize { blocks } => self.resize(blocks),
            Op::InPlace => self.in_place(),
            Op::Reparent => self.reparent(step),
            Op::Undo { at, len, commit } => self.undo(at, len, commit, step as u8),
            Op::Repair => self.repair(),
        }
    }

    /// Does something to the files while the disk is closed.
    fn closed(&mut self, operation: impl FnOnce(&mut Self)) {
        self.disk().close().unwrap();
        self.disk = None;
        operation(self);
        self.disk = Some(Disk::open(self.leaf(), &ChainOptions { direct: self.direct, ..options() }).unwrap());
        self.compare(0..self.model.size());
    }

    fn in_place(&mut self) {
        if self.paths.len() > 1 {
            return;
        }
        self.closed(|it| {
            it.fixed = !it.fixed;
            let to = if it.fixed { DiskType::Fixed } else { DiskType::Dynamic };
            let how = InPlaceOptions { block_size: it.block_size, ..InPlaceOptions::new(to) };
            convert_in_place(it.leaf(), &how, &ChainOptions::default(), &Progress::default()).unwrap();
        });
    }

    fn reparent(&mut self, step: usize) {
        let Some(below) = self.paths.len().checked_sub(2) else { return };
        self.closed(|it| {
            let moved = it.folder.path().join(format!("moved in step {step}.vhd"));
            std::fs::rename(&it.paths[below], &moved).unwrap();
            it.paths[below] = moved.clone();
            reparent(it.leaf(), &moved, false, false, &ChainOptions::default()).unwrap();
        });
    }

    /// Writes to an undo disk, and keeps it or not.
    fn undo(&mut self, at: u64, len: u64, commit: bool, fill: u8) {
        let range = self.range(at, len);
        let bytes = vec![fill; (range.end - range.start) as usize];
        if commit {
            self.model.write(range.start, &bytes);
        }
        self.closed(|it| {
            let (image, chain) = ([it.leaf().to_owned()], ChainOptions::default());
            undo::start(&image, None, &chain).unwrap();
            let disk = Disk::open(&it.leaf().with_extension("vud"), &options()).unwrap();
            disk.write_at(&bytes, range.start).unwrap();
            disk.close().unwrap();
            drop(disk);
            match commit {
                true => undo::commit(&image, None, false, &chain, &Progress::default()).unwrap(),
                false => drop(undo::discard(&image, None, false, &chain).unwrap()),
            }
        });
    }

    fn repair(&mut self) {
        self.closed(|it| {
            let before = std::fs::read(it.leaf()).unwrap();
            let done = repair(it.leaf(), RepairMode::All, false, &ChainOptions::default(), &Progress::default()).unwrap();
            assert!(done.ok() && done.lost.is_empty(), "{done:?}");
            // What is left over is all that there may be to do.
            let given_back = done.changes.iter().all(|change| change.contains("given back"));
            assert!(given_back && (done.changes.len() == 1 || std::fs::read(it.leaf()).unwrap() == before), "{done:?}");
            if let Some(journal) = done.journal {
                std::fs::remove_file(journal).unwrap();
            }
        });
    }

    fn snapshot(&mut self, grow: u64) {
        if self.paths.len() >= 5 {
            return;
        }
        self.disk().close().unwrap();
        self.disk = None;
        let n = self.paths.len();
        let child = self.folder.path().join(format!("child {n} ü.vhd"));
        let size = self.model.size() + grow * 512 * 8;
        let new = ChildOptions { size: Some(size), block_size: Some(self.block_size), ..ChildOptions::new([n as u8 + 1; 16]) };
        create_child(&child, self.leaf(), &new, &ChainOptions::default()).unwrap();
        self.paths.push(child);
        self.model.snapshot_sized(size);
        self.disk = Some(Disk::open(self.leaf(), &ChainOptions { direct: self.direct, ..options() }).unwrap());
    }

    fn compact(&mut self, realign: bool) {
        if self.disk().capabilities().layers == 1 && self.fixed {
            return;
        }
        self.disk().close().unwrap();
        self.disk = None;
        let compact = |dry_run| {
            let how = CompactOptions { realign, dry_run, ..CompactOptions::default() };
            compact(self.leaf(), &how, &mut |_| Ok(Vec::new()), &ChainOptions::default(), &Progress::default()).unwrap()
        };
        let planned = compact(true);
        assert_eq!(planned, compact(false), "the plan told something else");
        assert_eq!(std::fs::metadata(self.leaf()).unwrap().len(), planned.len_after);
        let again = compact(false);
        assert_eq!((again.dropped, again.cleared, again.len_after), (0, 0, planned.len_after), "not all at once");
        self.disk = Some(Disk::open(self.leaf(), &ChainOptions { direct: self.direct, ..options() }).unwrap());
        self.compare(0..self.model.size());
    }

    /// Grows, or shrinks and gives up what is cut off.
    fn resize(&mut self, blocks: i8) {
        let size = (self.model.size() as i64 + i64::from(blocks) * 512 * 3).max(4096) as u64;
        let parent = self.paths.len().checked_sub(2).map_or(0, |below| self.model.up_to(below).size());
        // What is new would show the parent's.
        let is_refused = size > self.model.size() && parent > self.model.size();
        self.disk().close().unwrap();
        self.disk = None;
        let how = ResizeOptions { shrink: true, discard_data: true, ..ResizeOptions::default() };
        match resize(self.leaf(), size, &how, &ChainOptions::default(), &Progress::default()) {
            Err(error) if is_refused => assert_eq!(error.kind(), ErrorKind::Refused, "{error}"),
            result => {
                assert_eq!(result.unwrap().to, size);
                self.model.resize(size);
            }
        }
        self.disk = Some(Disk::open(self.leaf(), &ChainOptions { direct: self.direct, ..options() }).unwrap());
        self.compare(0..self.model.size());
    }

    fn merge(&mut self) {
        // One that is smaller than its parent leaves that as large as it was, and one that is larger makes it grow, which
        // is refused where a larger one below would show.
        let size = |down: usize| self.paths.len().checked_sub(down + 1).map_or(0, |index| self.model.up_to(index).size());
        if self.paths.len() == 1 || size(1) > size(0) || (size(1) < size(0) && size(2) > size(1)) {
            return;
        }
        self.disk().close().unwrap();
        self.disk = None;
        let how = MergeOptions { delete: true, ..MergeOptions::default() };
        let plan = merge::plan(self.leaf(), &how, &ChainOptions::default()).unwrap();
        merge::execute(&plan, &how, &ChainOptions::default(), &Progress::default()).unwrap();
        assert!(!self.leaf().exists());
        self.paths.pop();
        self.model.merge(self.paths.len());
        self.disk = Some(Disk::open(self.leaf(), &ChainOptions { direct: self.direct, ..options() }).unwrap());
        self.compare(0..self.model.size());
    }

    fn compare(&self, range: Range<u64>) {
        // A little around it, too: what a write must leave alone.
        let range = range.start.saturating_sub(700)..(range.end + 700).min(self.model.size());
        let mut bytes = vec![0xEE; (range.end - range.start) as usize];
        self.disk().read_at(&mut bytes, range.start).unwrap();
        let expected = self.model.read(range.clone());
        if let Some(at) = bytes.iter().zip(&expected).position(|(a, b)| a != b) {
            panic!("byte {} is {:#x}, expected {:#x}", range.start + at as u64, bytes[at], expected[at]);
        }
    }

    fn check_extents(&self) {
        let mut at = 0;
        for extent in self.disk().extents_in(0..self.model.size()).unwrap() {
            assert_eq!(extent.range.start, at);
            assert!(extent.range.end > at);
            at = extent.range.end;
            if extent.state.reads_zero() {
                let zeros = self.model.read(extent.range.clone());
                assert!(zeros.iter().all(|&byte| byte == 0), "{extent:?} is not zero");
            }
        }
        assert_eq!(at, self.model.size());
    }

    /// What `diff` says changed since each image of the chain was written since; nothing else is different.
    fn check_diffs(&self) {
        let chain = Chain::open(self.leaf(), &ChainOptions::default()).unwrap();
        for (layer, path) in self.paths.iter().enumerate() {
            let old = self.model.up_to(layer);
            let mut changed: Vec<Range<u64>> = Vec::new();
            diff(&chain, path, &mut |range| {
                changed.push(range);
                Ok(())
            })
            .unwrap();
            assert!(changed.windows(2).all(|pair| pair[0].end < pair[1].start), "{changed:?}");
            for lba in 0..self.model.size() / 512 {
                let above = self.paths.len() - 1 - layer;
                // A smaller image hides the rest of those below it.
                let shown = (layer..self.paths.len()).map(|layer| self.model.up_to(layer).size()).min().unwrap();
                let written = lba * 512 >= shown || self.model.depth_of(lba).is_some_and(|depth| depth < above);
                if changed.iter().any(|range| range.contains(&(lba * 512))) {
                    assert!(written, "sector {lba} was not written since {}", path.display());
                } else {
                    assert!(self.model.sector(lba) == old.sector(lba), "sector {lba} changed since {}", path.display());
                }
            }
        }
    }

    /// The whole disk, here and through the test kit's reader, which reads the closed files.
    fn finish(&mut self) {
        self.compare(0..self.model.size());
        self.check_extents();
        self.reopen();
        self.compare(0..self.model.size());
        self.disk().close().unwrap();
        self.disk = None;
        self.check_diffs();
        let leaf_first: Vec<_> = self.paths.iter().rev().collect();
        let reference = ReferenceChain::open_paths(&leaf_first).unwrap();
        assert_eq!(reference.size(), self.model.size());
        assert!(reference.read_all().unwrap() == self.model.read(0..self.model.size()), "the reference reader disagrees");
    }
}

fn shape() -> impl Strategy<Value = (NewKind, u64, u32)> {
    let kind = prop_oneof![3 => Just(NewKind::Dynamic), 1 => Just(NewKind::Fixed { preallocate: false })];
    let block = prop_oneof![Just(4 << 10), Just(8 << 10), Just(64 << 10), Just(512 << 10), Just(2 << 20)];
    (kind, 1..2000_u64, block).prop_map(|(kind, sectors, block)| (kind, sectors * 512, block))
}

/// The usual block size, and some of them.
fn usual_shape() -> impl Strategy<Value = (NewKind, u64, u32)> {
    let kind = prop_oneof![3 => Just(NewKind::Dynamic), 1 => Just(NewKind::Fixed { preallocate: false })];
    (kind, 1..2000_u64).prop_map(|(kind, pages)| (kind, pages * 4096, 2 << 20))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn reads_as_the_model_says((kind, size, block) in shape(), ops in ops(1)) {
        let mut subject = Subject::new(kind, size, block, 1);
        for (step, op) in ops.iter().enumerate() {
            subject.apply(op, step);
        }
        subject.finish();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// What is compared goes through the cache, as it begins inside a sector: both views of a file must agree.
    #[test]
    fn direct_io_reads_as_the_model_says((kind, size) in usual_shape().prop_map(|(kind, size, _)| (kind, size)), ops in ops(4096)) {
        let mut subject = Subject::new(kind, size, 64 << 10, 4096);
        subject.direct = true;
        subject.reopen();
        for (step, op) in ops.iter().enumerate() {
            subject.apply(op, step);
        }
        subject.finish();
    }
}

proptest! {
    // Each case starts other programs, so there are few of them.
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// libvhdi takes a bit for all later ones of its byte, so chains are written in runs of 4 KiB here; and it loses
    /// the present sectors at the end of a child's block unless blocks have 2 MiB, so they have.
    #[test]
    fn other_readers_agree((kind, size, block) in usual_shape(), ops in ops(4096)) {
        let mut subject = Subject::new(kind, size, block, 4096);
        for (step, op) in ops.iter().enumerate() {
            subject.apply(op, step);
        }
        subject.finish();
        let expected = subject.model.read(0..subject.model.size());
        let flat = subject.paths.len() == 1;
        if flat && let Some(qemu) = vhd_testkit::tools::QemuImg::find() {
            prop_assert!(qemu.to_raw(subject.leaf()).unwrap() == expected, "qemu-img disagrees");
        }
        // libvhdi fails past the end of a parent that is smaller than its child, and takes the original size for the disk's.
        let same_size = ops.iter().all(|op| !matches!(op, Op::Snapshot { grow: 1.. } | Op::Resize { .. }));
        if same_size && let Some(vhdimount) = vhd_testkit::tools::VhdiMount::find() {
            prop_assert!(vhdimount.to_raw(subject.leaf()).unwrap() == expected, "vhdimount disagrees");
        }
    }
}

/// Found by `reads_as_the_model_says`.
#[test]
fn what_a_smaller_image_between_hides_has_changed() {
    let mut subject = Subject::new(NewKind::Dynamic, 12 * 512, 4096, 1);
    subject.apply(&Op::Write { at: 0, len: 12 * 512, fill: 7 }, 0);
    subject.snapshot(0);
    subject.resize(-1);
    subject.snapshot(1);
    subject.finish();
}

/// Found by `direct_io_reads_as_the_model_says`.
#[test]
fn a_child_that_is_smaller_than_its_parent_follows_it() {
    let mut subject = Subject::new(NewKind::Dynamic, 12 * 512, 4096, 1);
    subject.apply(&Op::Write { at: 0, len: 12 * 512, fill: 7 }, 0);
    subject.snapshot(0);
    subject.resize(-1);
    subject.reparent(3);
    subject.finish();
}

/// Found by `reads_as_the_model_says`: a file that grows while blocks are aligned gets one gap at its end, not two that hold none.
#[test]
fn what_an_alignment_leaves_at_the_end_is_given_back_at_once() {
    let mut subject = Subject::new(NewKind::Dynamic, 164_352, 4096, 1);
    subject.apply(&Op::Write { at: 2_461_912_718, len: 4097, fill: 1 }, 0);
    subject.apply(&Op::Reopen, 1);
    subject.apply(&Op::Write { at: 92_745_078, len: 548, fill: 1 }, 2);
    subject.apply(&Op::Zero { at: 206_553_140, len: 289, keep: true }, 3);
    subject.compact(true);
    subject.finish();
}

#[test]
fn ranges_outside_the_disk_are_refused() {
    let subject = Subject::new(NewKind::Dynamic, 10 * 512, 4096, 1);
    let disk = subject.disk();
    for (offset, len) in [(10 * 512, 1), (10 * 512 - 1, 2), (u64::MAX, 1), (u64::MAX - 5, 10), (0, 10 * 512 + 1)] {
        let mut bytes = vec![0; len];
        assert_eq!(disk.read_at(&mut bytes, offset).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(disk.write_at(&bytes, offset).unwrap_err().kind(), ErrorKind::OutOfRange);
        let range = offset..offset.saturating_add(len as u64);
        if range.end > range.start {
            assert_eq!(disk.zero(range.clone(), ZeroMode::Free).unwrap_err().kind(), ErrorKind::OutOfRange);
            assert_eq!(disk.extents_in(range).unwrap_err().kind(), ErrorKind::OutOfRange);
        }
    }
    disk.read_at(&mut [], 10 * 512).unwrap();
    disk.write_at(&[], 0).unwrap();
    disk.zero(5..5, ZeroMode::Free).unwrap();
}
