//! Looking at an image: it opens, a check finds nothing, and it reads as the model says.

use std::ops::Range;

use vhd_core::Disk;
use vhd_core::ops::check::{CheckOptions, Code, Severity, check};
use vhd_core::storage::FileStorage;
use vhd_testkit::reference::ReferenceChain;
use vhd_testkit::tagged::compare;

use super::model::Id;
use super::sectors::{Held, Sectors};
use super::subject::Subject;
use super::support::options;

/// Disks up to this many sectors are read as a whole.
const WHOLE: u64 = 300;
/// Places of others that are read.
const PLACES: usize = 24;
/// Blocks of a disk up to which all its extents are looked at.
const MANY_BLOCKS: u64 = 20_000;
/// Sectors on each side of such a place.
const AROUND: u64 = 2;
/// Bytes of a chain's tables up to which the test kit's reader, a slow one, reads it too.
const SLOW: u64 = 4 << 20;

impl Subject {
    pub fn verify(&mut self, id: Id) {
        let path = self.path(id);
        self.assert_sound(id, false);
        let disk = Disk::open(&path, &options(false)).unwrap_or_else(|error| panic!("does not open: {error}"));
        let size = self.tree.nodes[&id].size;
        assert_eq!(disk.size(), size * 512, "{}", path.display());
        let view = self.tree.view(id);
        let block = self.tree.nodes[&id].block;
        let is_short = size / block <= MANY_BLOCKS;
        for (lba, count) in self.places(id, &view) {
            self.assert_reads(&disk, id, &view, lba..lba + count);
            if !is_short {
                self.assert_extents(&disk, id, &view, lba.saturating_sub(2 * block)..(lba + 3 * block).min(size));
            }
        }
        if is_short {
            self.assert_extents(&disk, id, &view, 0..size);
        }
    }

    /// By what takes longer: data and bitmaps are checked too, and a reader that shares no code with the core says the same.
    pub fn verify_otherwise(&mut self, id: Id) {
        let chain = self.tree.chain(id);
        let len = |id: &Id| std::fs::metadata(&self.tree.nodes[id].path).unwrap().len();
        let tables: u64 = chain.iter().map(|id| self.tree.nodes[id].size / self.tree.nodes[id].block * 4).sum();
        if len(&id) < 64 << 20 {
            self.assert_sound(id, true);
        }
        if tables > SLOW {
            return;
        }
        let paths: Vec<_> = chain.iter().map(|id| self.path(*id)).collect();
        let reference = ReferenceChain::open_paths(&paths).unwrap();
        let view = self.tree.view(id);
        assert_eq!(reference.size(), self.tree.nodes[&id].size * 512);
        for (lba, count) in self.places(id, &view) {
            let found = reference.read(lba * 512..(lba + count) * 512).unwrap();
            self.assert_same(id, &view, lba, &found);
        }
    }

    fn assert_sound(&self, id: Id, deep: bool) {
        let path = self.path(id);
        let storage = FileStorage::open(&path, false).unwrap();
        let report = check(&storage, &path, &CheckOptions { deep, ..CheckOptions::default() }).unwrap();
        // Where a block made room for the table, the rest of its space may be too small for another one.
        let mut found = report.findings.iter();
        let bad = found.find(|finding| finding.severity > Severity::Note && finding.code != Code::LeakedSpace);
        assert!(bad.is_none(), "{}: {bad:?}", path.display());
    }

    /// Runs of sectors that are read: the whole disk, or its ends and some places where what it holds changes or a block ends.
    fn places(&mut self, id: Id, view: &Sectors) -> Vec<(u64, u64)> {
        let (size, block) = (self.tree.nodes[&id].size, self.tree.nodes[&id].block);
        if size <= WHOLE {
            return vec![(0, size)];
        }
        let mut at: Vec<u64> = view.runs().flat_map(|(range, _)| [range.start, range.end]).collect();
        at.extend(self.tree.chain(id).iter().map(|id| self.tree.nodes[id].size).filter(|end| *end < size));
        for edge in at.clone() {
            at.extend([edge / block * block, edge.next_multiple_of(block)]);
        }
        at.retain(|at| *at < size);
        at.sort_unstable();
        at.dedup();
        while at.len() > PLACES {
            let index = self.random.below(at.len() as u64) as usize;
            at.swap_remove(index);
        }
        at.extend([0, size - 1, self.random.below(size)]);
        at.iter().map(|at| at.saturating_sub(AROUND)).map(|from| (from, (2 * AROUND + 1).min(size - from))).collect()
    }

    pub fn assert_reads(&self, disk: &Disk, id: Id, view: &Sectors, range: Range<u64>) {
        let mut bytes = vec![0xEE; ((range.end - range.start) * 512) as usize];
        disk.read_at(&mut bytes, range.start * 512).unwrap();
        self.assert_same(id, view, range.start, &bytes);
    }

    fn assert_same(&self, id: Id, view: &Sectors, lba: u64, found: &[u8]) {
        for (lba, found) in (lba..).zip(found.chunks(512)) {
            let expected = view.get(lba).unwrap_or(Held::Zeros).sector(lba);
            if found != expected {
                let said = compare(found, &expected, lba * 512).unwrap_err();
                panic!("{}: {said}", self.name(id));
            }
        }
    }

    /// Of a range of sectors, what is said to be zero is, and nothing is left out.
    fn assert_extents(&self, disk: &Disk, id: Id, view: &Sectors, range: Range<u64>) {
        let mut at = range.start * 512;
        let mut data: Vec<Range<u64>> = Vec::new();
        disk.extents(at..range.end * 512, &mut |extent| {
            assert_eq!(extent.range.start, at, "{}", self.name(id));
            at = extent.range.end;
            if !extent.state.reads_zero() {
                match data.last_mut().filter(|last| last.end == extent.range.start) {
                    Some(last) => last.end = extent.range.end,
                    None => data.push(extent.range),
                }
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(at, range.end * 512, "{}", self.name(id));
        for (run, _) in view.runs().filter(|(_, held)| *held != Held::Zeros) {
            let bytes = run.start.max(range.start) * 512..run.end.min(range.end) * 512;
            let index = data.partition_point(|data| data.end <= bytes.start);
            let holds = data.get(index).is_some_and(|data| data.start <= bytes.start && bytes.end <= data.end);
            assert!(
                bytes.is_empty() || holds,
                "{}: a part of sectors {run:?}, which hold data, is said to be zero",
                self.name(id)
            );
        }
    }
}
