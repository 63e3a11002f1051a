//! What a chain of disks should hold, in memory.
//!
//! Each layer is a map of sectors; a sector that is absent is looked for in the
//! layer below, and below the base everything is zero.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::tagged::SECTOR;

type Sector = [u8; SECTOR];

#[derive(Clone, Debug)]
struct Layer {
    size: u64,
    sectors: BTreeMap<u64, Sector>,
}

/// The oracle of a chain. Layer 0 is the base, the last layer is the leaf;
/// writes go to the leaf alone.
#[derive(Clone, Debug)]
pub struct ModelDisk {
    layers: Vec<Layer>,
}

impl Layer {
    fn new(size: u64) -> Self {
        Self { size: checked_size(size), sectors: BTreeMap::new() }
    }

    // The first sector past the layer's end.
    fn end(&self) -> u64 {
        self.size / SECTOR as u64
    }
}

impl ModelDisk {
    /// A base of `size` bytes (whole sectors) that reads as zeros.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { layers: vec![Layer::new(size)] }
    }

    /// Size in bytes of the disk seen through the leaf.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.leaf().size
    }

    /// Number of layers, the base included.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The chain that ends in layer `index` (0 is the base), as its own disk.
    #[must_use]
    pub fn up_to(&self, index: usize) -> Self {
        Self { layers: self.layers[..=index].to_vec() }
    }

    /// The bytes of a range of the disk.
    ///
    /// # Panics
    /// When the range ends past the disk.
    #[must_use]
    pub fn read(&self, range: Range<u64>) -> Vec<u8> {
        assert!(range.end <= self.size(), "{range:?} ends past the disk");
        let mut bytes = Vec::with_capacity(index(range.end - range.start));
        for (lba, part) in pieces(range) {
            bytes.extend_from_slice(&self.sector(lba)[part]);
        }
        bytes
    }

    /// One sector of the disk; zeros past the end.
    #[must_use]
    pub fn sector(&self, lba: u64) -> [u8; SECTOR] {
        for layer in self.layers.iter().rev() {
            // Past a layer's end everything is zero, whatever lies below it.
            if lba >= layer.end() {
                break;
            }
            if let Some(sector) = layer.sectors.get(&lba) {
                return *sector;
            }
        }
        [0; SECTOR]
    }

    /// Writes bytes at a byte offset of the disk.
    ///
    /// # Panics
    /// When the bytes end past the disk.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let range = offset..offset + bytes.len() as u64;
        assert!(range.end <= self.size(), "{range:?} ends past the disk");
        let mut rest = bytes;
        for (lba, part) in pieces(range) {
            let (now, later) = rest.split_at(part.len());
            rest = later;
            let mut sector = self.sector(lba);
            sector[part].copy_from_slice(now);
            self.leaf_mut().sectors.insert(lba, sector);
        }
    }

    /// Makes a range read as zeros. It never shows a parent's content again.
    pub fn write_zeroes(&mut self, range: Range<u64>) {
        let zeros = vec![0; index(range.end - range.start)];
        self.write(range.start, &zeros);
    }

    /// Like [`write_zeroes`](Self::write_zeroes): a discarded range reads as
    /// zeros, in a differencing disk too.
    pub fn discard(&mut self, range: Range<u64>) {
        self.write_zeroes(range);
    }

    /// Adds a new, empty leaf of the same size.
    pub fn snapshot(&mut self) {
        self.snapshot_sized(self.size());
    }

    /// Adds a new, empty leaf of `size` bytes. Where it is larger than its
    /// parent it reads as zeros.
    pub fn snapshot_sized(&mut self, size: u64) {
        self.layers.push(Layer::new(size));
    }

    /// Gives the leaf a new size in bytes. What is cut off is forgotten, and
    /// what is added reads as zeros, even where a parent is larger.
    pub fn resize(&mut self, size: u64) {
        self.resize_layer(self.layers.len() - 1, size);
    }

    /// Merges layer `child` (not the base) into the layer below it. The disk
    /// reads the same afterwards; the merged layer has the child's size.
    pub fn merge(&mut self, child: usize) {
        let upper = self.layers.remove(child);
        self.resize_layer(child - 1, upper.size);
        self.layers[child - 1].sectors.extend(upper.sectors);
    }

    /// Depth of the layer that holds a sector (0 is the leaf); `None` where no
    /// layer does, or the disk has ended.
    #[must_use]
    pub fn depth_of(&self, lba: u64) -> Option<usize> {
        for (depth, layer) in self.layers.iter().rev().enumerate() {
            if lba >= layer.end() {
                return None;
            }
            if layer.sectors.contains_key(&lba) {
                return Some(depth);
            }
        }
        None
    }

    fn resize_layer(&mut self, at: usize, size: u64) {
        let (below, layer) = self.layers.split_at_mut(at);
        let old_end = layer[0].end();
        layer[0].size = checked_size(size);
        let end = layer[0].end();
        layer[0].sectors.split_off(&end);
        if end > old_end {
            // The layer has just come to cover these sectors: it must hide
            // what larger layers below it hold there.
            for hidden in below.iter().flat_map(|l| l.sectors.range(old_end..end)) {
                layer[0].sectors.insert(*hidden.0, [0; SECTOR]);
            }
        }
    }

    fn leaf(&self) -> &Layer {
        self.layers.last().unwrap()
    }

    fn leaf_mut(&mut self) -> &mut Layer {
        self.layers.last_mut().unwrap()
    }
}

// The sectors a byte range touches, and which bytes of each.
fn pieces(range: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let size = SECTOR as u64;
    let sectors = range.start / size..range.end.div_ceil(size);
    sectors
        .map(move |lba| {
            let from = range.start.saturating_sub(lba * size);
            let to = (range.end - lba * size).min(size);
            (lba, index(from)..index(to))
        })
        .filter(|(_, part)| !part.is_empty())
}

fn checked_size(size: u64) -> u64 {
    assert!(size.is_multiple_of(SECTOR as u64), "size {size} is not whole sectors");
    size
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 8 * 512;

    #[test]
    fn odd_writes_keep_their_neighbours() {
        let mut disk = ModelDisk::new(SIZE);
        disk.write(500, &[1; 600]);
        assert_eq!(disk.read(499..501), [0, 1]);
        assert_eq!(disk.read(1099..1101), [1, 0]);
        disk.discard(510..514);
        assert_eq!(disk.read(509..515), [1, 0, 0, 0, 0, 1]);
        assert_eq!(disk.read(0..SIZE).len(), 4096);
        assert!(disk.read(7..7).is_empty());
    }

    #[test]
    fn a_snapshot_falls_through_and_discards_hide() {
        let mut disk = ModelDisk::new(SIZE);
        disk.write(0, &[1; 1024]);
        disk.snapshot();
        assert_eq!((disk.depth_of(0), disk.depth_of(2)), (Some(1), None));
        disk.discard(0..512);
        assert_eq!(disk.read(511..513), [0, 1]);
        assert_eq!(disk.depth_of(0), Some(0));
        assert_eq!(disk.up_to(0).read(0..2), [1, 1]);
    }

    #[test]
    fn past_a_smaller_parent_is_zero_even_over_a_larger_base() {
        let mut disk = ModelDisk::new(SIZE);
        disk.write(0, &[1; 4096]);
        disk.snapshot_sized(1024);
        disk.snapshot_sized(SIZE);
        assert_eq!(disk.read(1023..1025), [1, 0]);
        let before = disk.read(0..SIZE);
        disk.merge(2);
        assert_eq!(disk.read(0..SIZE), before);
        disk.merge(1);
        assert_eq!(disk.read(0..SIZE), before);
        assert_eq!(disk.layers(), 1);
    }

    #[test]
    fn growth_reads_zero_over_a_larger_parent() {
        let mut disk = ModelDisk::new(SIZE);
        disk.write(0, &[1; 4096]);
        disk.snapshot();
        disk.resize(512);
        disk.resize(1024);
        assert_eq!(disk.read(511..513), [1, 0]);
        assert_eq!(disk.size(), 1024);
    }
}
