//! The blocks of an image that nobody else uses: freed, moved and the file cut, in batches of one barrier before the BAT
//! and one after.
//!
//! What the disk reads stays the same throughout: a block is copied before an entry names the copy, and space is used
//! again only once no durable entry names it.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use super::Image;
use super::footers::Footers;
use super::prepare::footer_place;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{BAT_ENTRY_LEN, BAT_UNUSED, Footer, SECTOR};
use crate::layout::{DATA_ALIGNMENT, FooterPlace, Layout};
use crate::storage::{AlignedBuffer, Storage};

/// Bytes that are moved between two publications of the BAT, at most. More barriers cost time, a larger batch costs space
/// where blocks change places.
const BATCH: u64 = 256 << 20;

/// The blocks of one image.
pub(crate) struct Blocks {
    storage: Arc<dyn Storage>,
    footer: Footer,
    layout: Layout,
    bat_offset: u64,
    place: FooterPlace,
    /// Nothing is written: what would be done is only counted.
    dry: bool,
    /// The table, as it will be.
    entries: Vec<u32>,
    /// Sectors of the table that the file does not have yet.
    unpublished: BTreeSet<u64>,
    /// First byte of each slot in use, the ones that were left but not published too.
    slots: BTreeMap<u64, u32>,
    /// Slots that are left once the table is published.
    left: Vec<u64>,
    /// Gaps that hold a slot.
    gaps: BTreeMap<u64, u64>,
    /// Where blocks may begin.
    floor: u64,
    file_len: u64,
    /// Bytes that were copied since the table was published.
    unsynced: u64,
    /// Something was written since the last barrier.
    dirty: Cell<bool>,
    buffer: AlignedBuffer,
    /// The hole of the file that was found last, and the range without holes behind it.
    hole: Range<u64>,
    no_hole: Range<u64>,
}

impl Blocks {
    /// Takes the blocks of an image, which must not be written otherwise as long as this lives.
    ///
    /// # Errors
    /// `Unsupported` for a fixed disk; as the host fails.
    pub(crate) fn of(image: &Image, dry: bool) -> Result<Self> {
        let Some(sparse) = &image.sparse else {
            return Err(Error::new(ErrorKind::Unsupported, "is a fixed disk: it has no blocks").at(&image.path));
        };
        let storage = Arc::clone(&image.storage);
        let mut entries = vec![BAT_UNUSED; sparse.layout.blocks() as usize];
        let mut slots = BTreeMap::new();
        let scanned = sparse.bat.scan(&*storage, |block, sector| {
            entries[block as usize] = sector;
            slots.insert(u64::from(sector) * SECTOR, block);
        });
        scanned.map_err(|error| image.read_error(error, sparse.bat.offset()))?;
        let footers = Footers::read(&*storage).map_err(|error| image.read_error(error, 0))?;
        let floor = sparse.metadata_end(footers.file_len).next_multiple_of(SECTOR);
        let sectors: Vec<_> = slots.keys().map(|start| (start / SECTOR) as u32).collect();
        let end = sectors.last().map_or(0, |&sector| sparse.layout.slot(sector).end).max(floor);
        let mut blocks = Self {
            footer: image.footer.clone(),
            layout: sparse.layout,
            bat_offset: sparse.bat.offset(),
            place: footer_place(sparse, &sectors, &footers, end),
            dry,
            entries,
            unpublished: BTreeSet::new(),
            slots,
            left: Vec::new(),
            gaps: BTreeMap::new(),
            floor,
            file_len: footers.file_len,
            unsynced: 0,
            dirty: Cell::new(false),
            buffer: AlignedBuffer::new(DATA_ALIGNMENT as usize),
            hole: 0..0,
            no_hole: 0..0,
            storage,
        };
        blocks.find_gaps();
        Ok(blocks)
    }

    /// Blocks in the order in which they lie in the file.
    pub(crate) fn in_file_order(&self) -> Vec<u32> {
        self.slots.values().copied().collect()
    }

    /// Bytes of the file.
    pub(crate) fn file_len(&self) -> u64 {
        self.file_len
    }

    /// The slot of a block.
    pub(crate) fn slot(&self, block: u32) -> Range<u64> {
        self.layout.slot(self.entries[block as usize])
    }

    /// Reads a block's sector bitmap.
    pub(crate) fn bitmap(&self, block: u32) -> Result<Vec<u8>> {
        let mut bitmap = vec![0; self.layout.bitmap_len() as usize];
        self.read(&mut bitmap, self.slot(block).start)?;
        Ok(bitmap)
    }

    /// Reads a part of a block's data.
    pub(crate) fn read_data(&self, block: u32, within: u64, bytes: &mut [u8]) -> Result<()> {
        self.read(bytes, self.layout.data_offset(self.entries[block as usize]) + within)
    }

    /// True when the host knows that a block's data is a hole, before any block was moved. It is asked once for each hole, and
    /// each range that is none: finding where that ends costs the host a walk to it.
    pub(crate) fn is_hole(&mut self, block: u32) -> Result<bool> {
        let start = self.layout.data_offset(self.entries[block as usize]);
        let end = start + self.layout.block_size();
        if self.no_hole.contains(&start) {
            return Ok(false);
        }
        if !self.hole.contains(&start) {
            let next = self.storage.next_data(start).map_err(|error| Error::io(error, "can't be searched for holes"))?;
            self.hole = start..next.as_ref().map_or(u64::MAX, |data| data.start);
            self.no_hole = next.unwrap_or_default();
        }
        Ok(self.hole.end >= end)
    }

    /// Replaces a block's sector bitmap: bits are cleared whose sectors read the same without them.
    pub(crate) fn set_bitmap(&mut self, block: u32, bitmap: &[u8]) -> Result<()> {
        self.write(bitmap, self.slot(block).start)
    }

    /// Frees a block, which reads the same without its entry.
    pub(crate) fn free(&mut self, block: u32) {
        self.left.push(self.slot(block).start);
        self.set_entry(block, BAT_UNUSED);
    }

    /// Moves blocks from the end of the file into gaps before them, as long as there are any. Returns how many.
    pub(crate) fn fill_gaps(&mut self, advance: &mut dyn FnMut(u64) -> Result<()>) -> Result<u64> {
        self.publish()?;
        let aligned = self.is_aligned();
        let mut moved = 0;
        for block in self.in_file_order().into_iter().rev() {
            let Some(to) = self.lowest_gap(aligned).filter(|to| *to < self.slot(block).start) else { break };
            self.relocate(block, to)?;
            moved += 1;
            advance(self.layout.slot_len())?;
        }
        self.publish()?;
        Ok(moved)
    }

    /// Moves each block whose data is not aligned to a place where it is. Returns how many.
    pub(crate) fn align(&mut self, advance: &mut dyn FnMut(u64) -> Result<()>) -> Result<u64> {
        self.place = FooterPlace::PageEnd;
        self.publish()?;
        let mut moved = 0;
        for block in self.in_file_order() {
            if self.layout.data_offset(self.entries[block as usize]) % DATA_ALIGNMENT == 0 {
                continue;
            }
            // What was left last may be the gap that is needed, once the table is published.
            if self.lowest_gap(true).is_none() && self.left.last().is_some_and(|left| self.has_room_around(*left)) {
                self.publish()?;
            }
            let to = match self.lowest_gap(true) {
                Some(gap) => gap,
                None => self.append()?,
            };
            self.relocate(block, to)?;
            moved += 1;
            advance(self.layout.slot_len())?;
        }
        self.publish()?;
        Ok(moved)
    }

    /// First byte of the first block, where there is one.
    pub(crate) fn first_slot(&self) -> Option<u64> {
        self.slots.keys().next().copied()
    }

    /// Moves all blocks that begin before `end` further back. Returns how many. Their old places are free with the next
    /// barrier.
    pub(crate) fn clear_until(&mut self, end: u64, advance: &mut dyn FnMut(u64) -> Result<()>) -> Result<u64> {
        self.publish()?;
        let aligned = self.is_aligned();
        self.floor = self.floor.max(end);
        self.find_gaps();
        let in_the_way: Vec<_> = self.slots.range(..end).map(|(_, block)| *block).collect();
        for block in &in_the_way {
            let to = match self.lowest_gap(aligned) {
                Some(gap) => gap,
                None => self.append()?,
            };
            self.relocate(*block, to)?;
            advance(self.layout.slot_len())?;
        }
        self.write_table()?;
        Ok(in_the_way.len() as u64)
    }

    /// Takes out of the way what the last block holds beyond the end of the disk, which shows when the disk grows: zeros in
    /// a dynamic disk, nothing in a differencing one. Returns true if there was anything; it is durable with the next barrier.
    pub(crate) fn clear_beyond_end(&mut self, size: u64, differencing: bool) -> Result<bool> {
        let within = size % self.layout.block_size();
        let Some(last) = self.layout.blocks().checked_sub(1).filter(|last| within > 0 && self.is_allocated(*last)) else {
            return Ok(false);
        };
        let changed = if differencing {
            let mut bitmap = self.bitmap(last)?;
            let before = bitmap.clone();
            let beyond = within / SECTOR..self.layout.block_size() / SECTOR;
            beyond.for_each(|sector| bitmap[(sector / 8) as usize] &= !(0x80 >> (sector % 8)));
            if bitmap != before {
                self.set_bitmap(last, &bitmap)?;
            }
            bitmap != before
        } else {
            let mut rest = vec![0; (self.layout.block_size() - within) as usize];
            self.read_data(last, within, &mut rest)?;
            let changed = rest.iter().any(|byte| *byte != 0);
            if changed {
                rest.fill(0);
                self.write(&rest, self.layout.data_offset(self.entries[last as usize]) + within)?;
            }
            changed
        };
        Ok(changed)
    }

    /// The table as it is now.
    pub(crate) fn entries(&self) -> &[u32] {
        &self.entries
    }

    fn is_allocated(&self, block: u32) -> bool {
        self.entries[block as usize] != BAT_UNUSED
    }

    /// Makes all durable and cuts the file behind its last block. A power cut may leave the length without the footer:
    /// the header copy counts then.
    pub(crate) fn cut(&mut self) -> Result<()> {
        self.shorten()?;
        if self.dirty.get() { self.sync() } else { Ok(()) }
    }

    /// As [`Blocks::cut`], without the last barrier: for who opens the image next, which begins with one.
    pub(crate) fn shorten(&mut self) -> Result<()> {
        self.publish()?;
        let end = self.slots.keys().next_back().map_or(0, |start| start + self.layout.slot_len()).max(self.floor);
        let len = self.place.file_len(end);
        if len < self.file_len && self.storage.can_grow() {
            self.write(&self.footer.to_bytes(), len - SECTOR)?;
            if !self.dry {
                self.storage.set_len(len).map_err(|error| Error::io(error, format!("can't shrink to {len} bytes")))?;
            }
            self.file_len = len;
        }
        Ok(())
    }

    /// Makes what was done durable; then what was left is free.
    pub(crate) fn publish(&mut self) -> Result<()> {
        if self.unpublished.is_empty() {
            return Ok(());
        }
        self.write_table()?;
        self.sync()?;
        let left = std::mem::take(&mut self.left);
        for start in &left {
            self.slots.remove(start);
        }
        left.into_iter().for_each(|start| self.find_gap_at(start));
        Ok(())
    }

    /// Writes what changed of the table, once the copies that it names are durable.
    fn write_table(&mut self) -> Result<()> {
        if self.unsynced > 0 {
            self.sync()?;
        }
        self.unsynced = 0;
        const PER_SECTOR: usize = (SECTOR / BAT_ENTRY_LEN) as usize;
        for sector in std::mem::take(&mut self.unpublished) {
            let first = sector as usize * PER_SECTOR;
            let last = (first + PER_SECTOR).min(self.entries.len());
            // The last sector may hold entries beyond the disk, which stay as they are.
            let bytes: Vec<u8> = self.entries[first..last].iter().flat_map(|entry| entry.to_be_bytes()).collect();
            self.write(&bytes, self.bat_offset + sector * SECTOR)?;
        }
        Ok(())
    }

    /// True when all blocks are aligned, so that they must stay so.
    fn is_aligned(&self) -> bool {
        self.slots.keys().all(|start| (start + self.layout.bitmap_len()) % DATA_ALIGNMENT == 0)
    }

    fn find_gaps(&mut self) {
        let footer_at = self.file_len - SECTOR;
        let footer = std::iter::once(footer_at..self.file_len);
        let mut end = self.floor;
        self.gaps.clear();
        for slot in self.slots.keys().map(|start| *start..start + self.layout.slot_len()).chain(footer) {
            if end + self.layout.slot_len() <= slot.start {
                self.gaps.insert(end, slot.start);
            }
            end = end.max(slot.end);
        }
    }

    /// Finds the gap around a place that no slot has any more, as [`Blocks::find_gaps`] does, which looks at all of them.
    fn find_gap_at(&mut self, at: u64) {
        let len = self.layout.slot_len();
        let start = self.slots.range(..at).next_back().map_or(0, |(start, _)| start + len).max(self.floor);
        let end = self.slots.range(at..).next().map_or(self.file_len - SECTOR, |(start, _)| *start);
        while let Some((&inside, _)) = self.gaps.range(start..end.max(start)).next() {
            self.gaps.remove(&inside);
        }
        if start + len <= end {
            self.gaps.insert(start, end);
        }
    }

    /// Where the first gap that holds a slot has room for it.
    fn lowest_gap(&self, aligned: bool) -> Option<u64> {
        let fits = |(start, end): (&u64, &u64)| {
            let at = if aligned { self.layout.aligned_slot_start(*start) } else { *start };
            (at + self.layout.slot_len() <= *end).then_some(at)
        };
        self.gaps.iter().find_map(fits)
    }

    /// True when the space around a slot that was left, with others beside it that were, holds an aligned slot.
    fn has_room_around(&self, left: u64) -> bool {
        let len = self.layout.slot_len();
        let is_used = |start: &&u64| !self.left.contains(start);
        let before = self.slots.range(..left).rev().map(|(start, _)| start).find(is_used).map_or(0, |start| start + len);
        let after = self.slots.range(left..).map(|(start, _)| *start).find(|start| is_used(&start));
        let start = self.layout.aligned_slot_start(before.max(self.floor));
        start + len <= after.unwrap_or(self.file_len - SECTOR)
    }

    /// Makes the file longer by a slot, and the footer stand behind it.
    fn append(&mut self) -> Result<u64> {
        if !self.storage.can_grow() {
            return Err(Error::new(ErrorKind::NoSpace, "is on a device without room to move blocks"));
        }
        // Where blocks may begin may be far beyond the end of a small file, whose table is to become a large one.
        let at = self.layout.aligned_slot_start(self.file_len.max(self.floor));
        let end = at + self.layout.slot_len();
        let len = FooterPlace::PageEnd.file_len(end);
        if !self.dry {
            self.storage.set_len(len).map_err(|error| Error::io(error, format!("can't grow to {len} bytes")))?;
        }
        // As it was, where there is no room: a footer stands at the old end.
        let written = self.write(&self.footer.to_bytes(), len - SECTOR);
        written.inspect_err(|_| drop(self.storage.set_len(self.file_len)))?;
        self.file_len = len;
        self.find_gap_at(at);
        Ok(at)
    }

    /// Copies a block to a gap. Its old slot is left.
    fn relocate(&mut self, block: u32, to: u64) -> Result<()> {
        let sector = u32::try_from(to / SECTOR).ok().filter(|sector| *sector != BAT_UNUSED);
        let Some(sector) = sector else {
            return Err(Error::new(ErrorKind::Unsupported, format!("a block at {to:#x} is beyond what a BAT entry can name")));
        };
        let from = self.slot(block);
        if !self.dry {
            self.copy(from.start, to)?;
        }
        self.left.push(from.start);
        self.slots.insert(to, block);
        let gap = self.gaps.range(..=to).next_back().map(|(start, end)| (*start, *end));
        if let Some((start, end)) = gap {
            self.gaps.remove(&start);
            let len = self.layout.slot_len();
            if start + len <= to {
                self.gaps.insert(start, to);
            }
            if to + len + len <= end {
                self.gaps.insert(to + len, end);
            }
        }
        self.set_entry(block, sector);
        self.unsynced += self.layout.slot_len();
        if self.unsynced >= BATCH { self.publish() } else { Ok(()) }
    }

    fn copy(&mut self, from: u64, to: u64) -> Result<()> {
        let len = self.layout.slot_len() as usize;
        if self.buffer.len() < len {
            self.buffer = AlignedBuffer::new(len);
        }
        let mut buffer = std::mem::replace(&mut self.buffer, AlignedBuffer::new(0));
        let copied = self.read(&mut buffer[..len], from).and_then(|()| self.write(&buffer[..len], to));
        self.buffer = buffer;
        copied
    }

    fn set_entry(&mut self, block: u32, entry: u32) {
        self.entries[block as usize] = entry;
        self.unpublished.insert(u64::from(block) * BAT_ENTRY_LEN / SECTOR);
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        self.storage.read_at(bytes, at).map_err(|error| Error::io(error, format!("can't be read at {at:#x}")))
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        if self.dry {
            return Ok(());
        }
        self.dirty.set(true);
        self.storage.write_at(bytes, at).map_err(|error| Error::io(error, format!("can't be written at {at:#x}")))
    }

    fn sync(&self) -> Result<()> {
        if self.dry {
            return Ok(());
        }
        self.dirty.set(false);
        // Whatever the reason, nothing is known of what was written.
        self.storage.sync().map_err(|error| Error::io(error, "can't be synced").with_kind(ErrorKind::Io))
    }
}
