//! What is done to one image.

use vhd_core::block::ZeroMode;
use vhd_core::chain::{ChildOptions, create_child};
use vhd_core::format::{DiskType, MAX_CREATE_SIZE};
use vhd_core::image::NewKind;
use vhd_core::ops::compact::{CompactOptions, compact};
use vhd_core::ops::copy::{compare, copy};
use vhd_core::ops::in_place::{InPlaceOptions, convert_in_place};
use vhd_core::ops::reparent::reparent;
use vhd_core::ops::resize::{ResizeOptions, resize};
use vhd_core::{Disk, ErrorKind, Progress};

use super::model::{Id, Node, PARENT, Refusal};
use super::sectors::{Held, Sectors};
use super::subject::{Scale, Subject};
use super::support::{child_options, new_image, open, options};

const MAX_SECTORS: u64 = MAX_CREATE_SIZE / 512;
const GIB: u64 = (1 << 30) / 512;
const MIB: u64 = (1 << 20) / 512;
/// Blocks at most, so that a table has no more than a few MiB.
const MAX_BLOCKS: u64 = 1_100_000;
/// Sectors that a disk of less is compared to another as a whole.
const SMALL: u64 = GIB;

impl Subject {
    fn size(&mut self, block: u64) -> u64 {
        let most = MAX_SECTORS.min(MAX_BLOCKS * block);
        let size = match (self.scale, self.random.below(8)) {
            (Scale::Small, 0) => 1 + self.random.below(20),
            (Scale::Small, 1) => (1 + self.random.below(60)) * block,
            (Scale::Small, _) => 1 + self.random.below(4000),
            (Scale::Any, 0) => 1,
            (Scale::Any, 1) => 1 + self.random.below(4000),
            (Scale::Any, 2 | 3) => 1 + self.random.below(64 * MIB),
            (Scale::Any, 4) => self.random.below(2000) * block + self.random.below(3),
            (Scale::Any, 5) => MAX_SECTORS - self.random.below(2) * self.random.below(GIB),
            (Scale::Any, _) => (1 + self.random.below(300)) * GIB,
        };
        size.clamp(1, most)
    }

    fn block(&mut self) -> u64 {
        match self.scale {
            Scale::Small => self.pick(&[8, 8, 16, 128]).unwrap(),
            Scale::Any => self.pick(&[4096, 4096, 4096, 1024, 1024, 128, 8, 32768]).unwrap(),
        }
    }

    fn add(&mut self, name: &str, parent: Option<Id>, size: u64, block: u64) -> Id {
        self.made += 1;
        let path = self.folder.path().join(name);
        let node = Node { path, parent, size, fixed: false, block, own: Sectors::default(), undo: false };
        self.tree.nodes.insert(self.made, node);
        self.made
    }

    pub fn add_undo(&mut self, image: Id) -> Id {
        let name = self.path(image).with_extension("vud").file_name().unwrap().to_string_lossy().into_owned();
        let (size, block) = (self.tree.nodes[&image].size, self.tree.nodes[&image].block);
        let id = self.add(&name, Some(image), size, block);
        self.tree.nodes.get_mut(&id).unwrap().undo = true;
        id
    }

    pub fn create(&mut self) -> Vec<Id> {
        let (fixed, block) = (self.chance(5), self.block());
        let size = self.size(block);
        let id = self.add(&format!("i{}.vhd", self.made + 1), None, size, block);
        self.tree.nodes.get_mut(&id).unwrap().fixed = fixed;
        self.log.say(format!("create {}: {size} sectors, blocks of {block}, fixed: {fixed}", self.name(id)));
        let kind = if fixed { NewKind::Fixed { preallocate: false } } else { NewKind::Dynamic };
        new_image(&self.path(id), kind, size * 512, (block * 512) as u32);
        vec![id]
    }

    pub fn child(&mut self) -> Vec<Id> {
        let all: Vec<_> = self.tree.nodes.keys().copied().collect();
        let any = self.any();
        let parent = if self.chance(3) { self.pick(&all).unwrap() } else { any };
        let below = self.tree.nodes[&parent].clone();
        let inherits = below.size <= MAX_BLOCKS * below.block && !below.fixed && self.chance(2);
        // A parent that is fixed says nothing of blocks, so one has to be named for small disks to have several.
        let block = if inherits { below.block } else { self.block().max(below.size.div_ceil(MAX_BLOCKS).next_power_of_two()) };
        let larger = self.size(block).max(below.size);
        let size = if self.chance(3) { larger } else { below.size };
        let id = self.add(&format!("c{}.vhd", self.made + 1), Some(parent), size, block);
        self.log.say(format!("child {} of {}: {size} sectors, blocks of {block}", self.name(id), self.name(parent)));
        let block_size = (!inherits).then_some((block * 512) as u32);
        let how = ChildOptions { size: Some(size * 512), block_size, ..child_options() };
        let made = create_child(&self.path(id), &below.path, &how, &options(false));
        self.is_done(made, None);
        vec![id, parent]
    }

    pub fn write(&mut self) -> Vec<Id> {
        let id = self.any();
        if !self.tree.children(id).is_empty() {
            self.log.say(format!("write to {}, a parent", self.name(id)));
            let opened = Disk::open(&self.path(id), &options(true));
            self.is_done(opened, PARENT);
            return vec![id];
        }
        let mut disk = open(&self.path(id), true);
        for _ in 0..=self.random.below(5) {
            match self.random.below(8) {
                0 => disk.flush().unwrap(),
                1 => {
                    disk.close().unwrap();
                    drop(disk);
                    disk = open(&self.path(id), true);
                }
                2 | 3 => self.zero(id, &disk),
                _ => self.write_some(id, &disk),
            }
        }
        disk.close().unwrap();
        self.log.done += 1;
        vec![id]
    }

    /// Where something is written: somewhere, at the ends, or where something begins or ends already.
    fn place(&mut self, id: Id, longest: u64) -> std::ops::Range<u64> {
        let (size, block) = (self.tree.nodes[&id].size, self.tree.nodes[&id].block);
        let len = match self.random.below(4) {
            0 => 1 + self.random.below(longest),
            1 => block.min(longest),
            _ => 1 + self.random.below(40.min(longest)),
        };
        let edges: Vec<u64> = self.tree.view(id).runs().flat_map(|(range, _)| [range.start, range.end]).collect();
        let at = match self.random.below(8) {
            0 => 0,
            1 => size.saturating_sub(len),
            2 => size - 1,
            3 | 4 => self.pick(&edges).unwrap_or(0).saturating_sub(self.random.below(3)),
            5 => self.random.below(size) / block * block,
            _ => self.random.below(size),
        };
        let at = at.min(size - 1);
        at..(at + len).min(size)
    }

    fn write_some(&mut self, id: Id, disk: &Disk) {
        let range = self.place(id, if self.scale == Scale::Small { 300 } else { 6000 });
        self.writes += 1;
        self.log.say(format!("write {}: sectors {range:?}, write {}", self.name(id), self.writes));
        let held = Held::Tag(self.writes);
        let bytes: Vec<u8> = range.clone().flat_map(|lba| held.sector(lba)).collect();
        disk.write_at(&bytes, range.start * 512).unwrap();
        self.put(id, disk, range, held);
    }

    fn zero(&mut self, id: Id, disk: &Disk) {
        let mode = if self.chance(3) { ZeroMode::Keep } else { ZeroMode::Free };
        // What is kept takes space.
        let longest = if self.scale == Scale::Any && mode == ZeroMode::Free { 4 * GIB } else { 3000 };
        let range = self.place(id, longest);
        self.log.say(format!("zero {}: sectors {range:?}, {mode:?}", self.name(id)));
        disk.zero(range.start * 512..range.end * 512, mode).unwrap();
        self.put(id, disk, range, Held::Zeros);
    }

    fn put(&mut self, id: Id, disk: &Disk, range: std::ops::Range<u64>, held: Held) {
        let node = self.tree.nodes.get_mut(&id).unwrap();
        node.own.put(range.clone(), held);
        let around = range.start.saturating_sub(3)..(range.end + 3).min(range.start + 400).min(node.size);
        let view = self.tree.view(id);
        self.assert_reads(disk, id, &view, around);
    }

    pub fn resize(&mut self) -> Vec<Id> {
        let id = self.any();
        let node = self.tree.nodes[&id].clone();
        let block = if node.fixed { 4096 } else { node.block };
        let size = match self.random.below(4) {
            0 => (node.size + self.random.below(5)).saturating_sub(2).clamp(1, MAX_SECTORS),
            _ => self.size(block),
        };
        let discard = !self.chance(4);
        self.log.say(format!("resize {} from {} to {size} sectors, discard: {discard}", self.name(id), node.size));
        let refusal = self.tree.may_resize(id, size, discard);
        let how = ResizeOptions { shrink: true, discard_data: discard, ..ResizeOptions::default() };
        let run = |how| resize(&node.path, size * 512, &how, &options(false), &Progress::default());
        self.planned(run(ResizeOptions { dry_run: true, ..how }), refusal);
        if self.is_done(run(how), refusal) {
            self.tree.resize(id, size);
        }
        vec![id]
    }

    /// A dry run says what the run will.
    fn planned<T>(&mut self, result: Result<T, vhd_core::Error>, refusal: Refusal) {
        let counts = (self.log.done, self.log.refused);
        self.is_done(result, refusal);
        (self.log.done, self.log.refused) = counts;
    }

    pub fn compact(&mut self) -> Vec<Id> {
        let id = self.any();
        let how = CompactOptions { realign: self.chance(2), force: self.chance(4), ..CompactOptions::default() };
        self.log.say(format!("compact {}, realign: {}, force: {}", self.name(id), how.realign, how.force));
        let refusal = match &self.tree.nodes[&id] {
            _ if !how.force && !self.tree.children(id).is_empty() => PARENT,
            node if node.fixed => Some((ErrorKind::Unsupported, "is a fixed disk")),
            _ => None,
        };
        let path = self.path(id);
        let run = |how| compact(&path, &how, &mut |_| Ok(Vec::new()), &options(false), &Progress::default());
        self.planned(run(CompactOptions { dry_run: true, ..how }), refusal);
        self.is_done(run(how), refusal);
        vec![id]
    }

    pub fn in_place(&mut self) -> Vec<Id> {
        let id = self.any();
        let node = self.tree.nodes[&id].clone();
        let to = if self.chance(2) { DiskType::Fixed } else { DiskType::Dynamic };
        let block = self.block().max(node.size.div_ceil(MAX_BLOCKS).next_power_of_two());
        self.log.say(format!("convert {} in place to {}, blocks of {block}", self.name(id), to.name()));
        let refusal = match () {
            () if node.parent.is_some() => Some((ErrorKind::Unsupported, "has a parent")),
            () if node.fixed == (to == DiskType::Fixed) => Some((ErrorKind::InvalidInput, "disk already")),
            () => None,
        };
        let piece = (1 << self.random.below(12)).max((node.size / 64).next_power_of_two()) * 512;
        let how = InPlaceOptions { block_size: (block * 512) as u32, piece, ..InPlaceOptions::new(to) };
        let run = |how| convert_in_place(&node.path, &how, &options(false), &Progress::default());
        self.planned(run(InPlaceOptions { dry_run: true, ..how.clone() }), refusal);
        if self.is_done(run(how), refusal) {
            let node = self.tree.nodes.get_mut(&id).unwrap();
            (node.fixed, node.block) = (to == DiskType::Fixed, block);
        }
        vec![id]
    }

    /// Copies an image to one of its own.
    pub fn convert(&mut self) -> Vec<Id> {
        let all: Vec<_> = self.tree.nodes.keys().copied().collect();
        let from = self.pick(&all).unwrap();
        let size = self.tree.nodes[&from].size;
        let (fixed, block) = (self.chance(3), self.block().max(size.div_ceil(MAX_BLOCKS).next_power_of_two()));
        let own = self.tree.view(from);
        let id = self.add(&format!("k{}.vhd", self.made + 1), None, size, block);
        let node = self.tree.nodes.get_mut(&id).unwrap();
        (node.own, node.fixed) = (own, fixed);
        self.log.say(format!("convert {} to {}, blocks of {block}, fixed: {fixed}", self.name(from), self.name(id)));
        let kind = if fixed { NewKind::Fixed { preallocate: false } } else { NewKind::Dynamic };
        new_image(&self.path(id), kind, size * 512, (block * 512) as u32);
        let (source, target) = (open(&self.path(from), false), open(&self.path(id), true));
        copy(&source, &target, true, &Progress::default()).unwrap();
        if size <= SMALL {
            assert_eq!(compare(&source, &target, &Progress::default()).unwrap(), None);
        }
        target.close().unwrap();
        self.log.done += 1;
        vec![id]
    }

    /// Gives a parent another name, and tells its children. An undo session knows its images by their names, so those stay.
    pub fn move_parent(&mut self) -> Vec<Id> {
        let is_in_session = |id: &Id| self.tree.sessions.iter().flatten().any(|(image, undo)| image == id || undo == id);
        let parents = self.tree.nodes.keys().copied().filter(|id| !self.tree.children(*id).is_empty());
        let parents: Vec<_> = parents.filter(|id| !is_in_session(id)).collect();
        let Some(id) = self.pick(&parents) else { return Vec::new() };
        let moved = self.folder.path().join(format!("moved {} ü {}.vhd", id, self.writes));
        self.log.say(format!("move {} to {}", self.name(id), moved.file_name().unwrap().display()));
        std::fs::rename(self.path(id), &moved).unwrap();
        self.tree.nodes.get_mut(&id).unwrap().path.clone_from(&moved);
        for child in self.tree.children(id) {
            let path = self.path(child);
            self.planned(reparent(&path, &moved, false, true, &options(false)), None);
            self.is_done(reparent(&path, &moved, false, false, &options(false)), None);
        }
        vec![id]
    }

    /// Removes an image without children; an undo disk goes with its session only.
    pub fn remove(&mut self) {
        let leaves = self.tree.nodes.iter().filter(|(id, node)| !node.undo && self.tree.children(**id).is_empty());
        let leaves: Vec<_> = leaves.map(|(id, _)| *id).collect();
        match self.pick(&leaves) {
            Some(id) => {
                self.log.say(format!("remove {}", self.name(id)));
                std::fs::remove_file(self.path(id)).unwrap();
                self.tree.nodes.remove(&id);
            }
            None => drop(self.end_undo()),
        }
    }
}
