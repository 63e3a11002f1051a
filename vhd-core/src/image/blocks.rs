//! The blocks of an image that nobody else uses: freed, moved and the file cut, in batches of one barrier before the BAT
//! and one after.
//!
//! What the disk reads stays the same throughout: a block is copied before an entry names the copy, and space is used
//! again only once no durable entry names it.
//!
//! Memory does not grow with the number of blocks: the table stays in the file, and is walked in the file's order from both ends.
//! Blocks that move go to where the walk from the front was already, so it does not matter whether it sees them.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::Image;
use super::footers::Footers;
use super::order::{Cursor, Order, PlacedBlock, TablePart};
use super::prepare::footer_place;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{BAT_ENTRY_LEN, BAT_UNUSED, Footer, SECTOR};
use crate::layout::{DATA_ALIGNMENT, FooterPlace, Layout};
use crate::storage::{AlignedBuffer, Overlay, Storage};

/// Bytes that are moved between two publications of the BAT, at most. More barriers cost time, a larger batch costs space
/// where blocks change places.
const BATCH: u64 = 256 << 20;
/// Entries that wait to be written, at most.
const MAX_PENDING: usize = 64 << 10;
/// Gaps that are kept in mind while blocks are aligned; those beyond are filled afterwards.
const MAX_GAPS: usize = 64 << 10;
/// Bytes that are copied at once: blocks have up to 256 MiB.
const MAX_BUFFER: u64 = 4 << 20;

/// The blocks of one image.
pub(crate) struct Blocks {
    storage: Arc<dyn Storage>,
    footer: Footer,
    layout: Layout,
    table: TablePart,
    place: FooterPlace,
    /// No data is moved, and what else is written is written over the file: what would be done is only counted.
    dry: bool,
    /// Entries that the file does not have yet.
    pending: BTreeMap<u32, u32>,
    /// Entries were written that may not be durable yet.
    unpublished: bool,
    /// Where blocks may begin.
    floor: u64,
    /// Where the last block ended that was ever seen.
    end: u64,
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

/// Whether a block's data is to begin on a 4 KiB boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alignment {
    Must,
    /// Where the gap has room for that.
    Preferred,
    Any,
}

/// Gaps between blocks, from the front on.
struct Gaps<'a> {
    cursor: Cursor<'a>,
    gap: Range<u64>,
    /// Where what was seen ends.
    end: u64,
}

impl Gaps<'_> {
    /// Takes the lowest place that holds a slot.
    fn take(&mut self, storage: &dyn Storage, layout: &Layout, alignment: Alignment) -> Result<Option<u64>> {
        loop {
            if let Some(at) = place_in(layout, &self.gap, alignment) {
                self.gap.start = at + layout.slot_len();
                return Ok(Some(at));
            }
            let Some(placed) = self.cursor.next(storage)? else { return Ok(None) };
            let slot = layout.slot(placed.sector());
            self.gap = self.end..slot.start.max(self.end);
            self.end = self.end.max(slot.end);
        }
    }
}

/// Where a slot fits into a gap.
fn place_in(layout: &Layout, gap: &Range<u64>, alignment: Alignment) -> Option<u64> {
    let fits = |at: u64| (at + layout.slot_len() <= gap.end).then_some(at);
    let aligned = || fits(layout.aligned_slot_start(gap.start));
    let any = || fits(gap.start.next_multiple_of(SECTOR));
    match alignment {
        Alignment::Must => aligned(),
        Alignment::Preferred => aligned().or_else(any),
        Alignment::Any => any(),
    }
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
        let mut storage = Arc::clone(&image.storage);
        if dry {
            storage = Arc::new(Overlay::new(storage).map_err(|error| image.read_error(error, 0))?);
        }
        let table = TablePart { offset: sparse.bat.offset(), blocks: 0..sparse.layout.blocks() };
        let (mut end, mut are_aligned) = (0, true);
        table.used(&*storage, |_, sector| {
            let slot = sparse.layout.slot(sector);
            end = slot.end.max(end);
            are_aligned &= is_aligned(&sparse.layout, slot.start);
        })?;
        let footers = Footers::read(&*storage).map_err(|error| image.read_error(error, 0))?;
        let floor = sparse.metadata_end(footers.file_len).next_multiple_of(SECTOR);
        Ok(Self {
            footer: image.footer.clone(),
            layout: sparse.layout,
            table,
            place: footer_place(are_aligned, &footers, end.max(floor)),
            dry,
            pending: BTreeMap::new(),
            unpublished: false,
            floor,
            end,
            file_len: footers.file_len,
            unsynced: 0,
            dirty: Cell::new(false),
            buffer: AlignedBuffer::new(DATA_ALIGNMENT as usize),
            hole: 0..0,
            no_hole: 0..0,
            storage,
        })
    }

    /// Blocks in the order in which they lie in the file, as the file's table has them.
    pub(crate) fn order(&self) -> Result<Order> {
        Order::of(&*self.storage, self.table.clone(), 0..BAT_UNUSED)
    }

    /// The file, or what is laid over it.
    pub(crate) fn storage(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.storage)
    }

    /// Bytes of the file.
    pub(crate) fn file_len(&self) -> u64 {
        self.file_len
    }

    /// Reads a block's sector bitmap.
    pub(crate) fn bitmap(&self, sector: u32) -> Result<Vec<u8>> {
        let mut bitmap = vec![0; self.layout.bitmap_len() as usize];
        self.read(&mut bitmap, self.layout.slot(sector).start)?;
        Ok(bitmap)
    }

    /// Reads a part of a block's data.
    pub(crate) fn read_data(&self, sector: u32, within: u64, bytes: &mut [u8]) -> Result<()> {
        self.read(bytes, self.layout.data_offset(sector) + within)
    }

    /// True when the host knows that a block's data is a hole, before any block was moved. It is asked once for each hole, and
    /// each range that is none: finding where that ends costs the host a walk to it.
    pub(crate) fn is_hole(&mut self, sector: u32) -> Result<bool> {
        let start = self.layout.data_offset(sector);
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
    pub(crate) fn set_bitmap(&mut self, sector: u32, bitmap: &[u8]) -> Result<()> {
        if self.dry { Ok(()) } else { self.write(bitmap, self.layout.slot(sector).start) }
    }

    /// Frees a block, which reads the same without its entry.
    pub(crate) fn free(&mut self, block: u32) -> Result<()> {
        self.set_entry(block, BAT_UNUSED)
    }

    /// Moves blocks from the end of the file into gaps before them, as long as there are any. Returns how many. Where all are aligned
    /// they stay so, if the gaps have room for that; where they `must` be, always.
    pub(crate) fn fill_gaps(&mut self, must: bool, advance: &mut dyn FnMut(u64) -> Result<()>) -> Result<u64> {
        self.publish()?;
        let alignment = match must {
            true => Alignment::Must,
            // Between aligned blocks other creators may have left gaps that hold a block, but no aligned one.
            false if self.are_aligned()? => Alignment::Preferred,
            false => Alignment::Any,
        };
        let (storage, order) = (self.storage(), self.order()?);
        let (mut gaps, mut last) = (self.gaps(&order), order.descending());
        let mut moved = 0;
        while let Some(placed) = last.next(&*storage)? {
            let from = self.layout.slot(placed.sector()).start;
            let to = gaps.take(&*storage, &self.layout, alignment)?;
            let Some(to) = to.filter(|to| *to < from) else { break };
            self.relocate(placed, to)?;
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
        let (storage, order, layout) = (self.storage(), self.order()?, self.layout);
        let (mut cursor, first_end) = (order.ascending(), self.end);
        let place = |gap: &Range<u64>| place_in(&layout, gap, Alignment::Must);
        let mut gaps: VecDeque<Range<u64>> = VecDeque::new();
        // What is free before the block that is looked at. Blocks that were there a moment ago may be named by a durable entry still.
        let (mut free_from, mut is_left) = (self.floor, false);
        let mut moved = 0;
        while let Some(placed) = cursor.next(&*storage)?.filter(|placed| layout.slot(placed.sector()).start < first_end) {
            let slot = layout.slot(placed.sector());
            let before = free_from..slot.start.max(free_from);
            let stays = is_aligned(&layout, slot.start);
            if is_left && place(&before).is_some() && (stays || gaps.is_empty()) {
                self.publish()?;
            }
            if stays {
                if place(&before).is_some() && gaps.len() < MAX_GAPS {
                    gaps.push_back(before);
                }
                (free_from, is_left) = (slot.end, false);
                continue;
            }
            let to = if let Some(gap) = gaps.front_mut() {
                let to = layout.aligned_slot_start(gap.start);
                gap.start = to + layout.slot_len();
                if place(gap).is_none() {
                    gaps.pop_front();
                }
                to
            } else if let Some(to) = place(&before) {
                free_from = to + layout.slot_len();
                to
            } else {
                self.place_behind(true)?
            };
            self.relocate(placed, to)?;
            is_left = true;
            moved += 1;
            advance(layout.slot_len())?;
        }
        self.publish()?;
        Ok(moved)
    }

    /// First byte of the first block, where there is one.
    pub(crate) fn first_slot(&self) -> Result<Option<u64>> {
        let mut first = None::<u32>;
        self.table.used(&*self.storage, |_, sector| first = Some(first.map_or(sector, |first| first.min(sector))))?;
        Ok(first.map(|sector| u64::from(sector) * SECTOR))
    }

    /// Moves all blocks that begin before `end` further back. Returns how many. Their old places are free with the next
    /// barrier.
    pub(crate) fn clear_until(&mut self, end: u64, advance: &mut dyn FnMut(u64) -> Result<()>) -> Result<u64> {
        self.publish()?;
        let are_aligned = self.are_aligned()?;
        let alignment = if are_aligned { Alignment::Must } else { Alignment::Any };
        self.floor = self.floor.max(end);
        let (storage, order) = (self.storage(), self.order()?);
        let (mut gaps, mut first) = (self.gaps(&order), order.ascending());
        let mut moved = 0;
        while let Some(placed) = first.next(&*storage)?.filter(|placed| self.layout.slot(placed.sector()).start < end) {
            let to = match gaps.take(&*storage, &self.layout, alignment)? {
                Some(gap) => gap,
                None => self.place_behind(are_aligned)?,
            };
            self.relocate(placed, to)?;
            moved += 1;
            advance(self.layout.slot_len())?;
        }
        self.write_table()?;
        Ok(moved)
    }

    /// Takes out of the way what the last block holds beyond the end of the disk, which shows when the disk grows: zeros in
    /// a dynamic disk, nothing in a differencing one. Returns true if there was anything; it is durable with the next barrier.
    pub(crate) fn clear_beyond_end(&mut self, size: u64, differencing: bool) -> Result<bool> {
        let within = size % self.layout.block_size();
        let last = self.layout.blocks().checked_sub(1).filter(|_| within > 0);
        let Some(sector) = last.map(|last| self.entry(last)).transpose()?.filter(|sector| *sector != BAT_UNUSED) else {
            return Ok(false);
        };
        let changed = if differencing {
            let mut bitmap = self.bitmap(sector)?;
            let before = bitmap.clone();
            let beyond = within / SECTOR..self.layout.block_size() / SECTOR;
            beyond.for_each(|sector| bitmap[(sector / 8) as usize] &= !(0x80 >> (sector % 8)));
            if bitmap != before {
                self.set_bitmap(sector, &bitmap)?;
            }
            bitmap != before
        } else {
            let (mut at, end) = (self.layout.data_offset(sector) + within, self.layout.slot(sector).end);
            let mut rest = vec![0; 1 << 20];
            let mut changed = false;
            while at < end {
                let rest = &mut rest[..(end - at).min(1 << 20) as usize];
                self.read(rest, at)?;
                if rest.iter().any(|byte| *byte != 0) {
                    changed = true;
                    rest.fill(0);
                    if !self.dry {
                        self.write(rest, at)?;
                    }
                }
                at += rest.len() as u64;
            }
            changed
        };
        Ok(changed)
    }

    /// File offset of the table, which is up to date in the file once it was published.
    pub(crate) fn table(&self) -> (u64, u32) {
        (self.table.offset, self.table.blocks.end)
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
        let mut end = self.floor;
        self.table.used(&*self.storage, |_, sector| end = end.max(self.layout.slot(sector).end))?;
        let len = self.place.file_len(end);
        if len < self.file_len && self.storage.can_grow() {
            self.write(&self.footer.to_bytes(), len - SECTOR)?;
            self.storage.set_len(len).map_err(|error| Error::io(error, format!("can't shrink to {len} bytes")))?;
            self.file_len = len;
        }
        Ok(())
    }

    /// Makes what was done durable; then what was left is free.
    pub(crate) fn publish(&mut self) -> Result<()> {
        if self.pending.is_empty() && !self.unpublished {
            return Ok(());
        }
        self.write_table()?;
        self.unpublished = false;
        self.sync()
    }

    /// Writes what changed of the table, once the copies that it names are durable.
    fn write_table(&mut self) -> Result<()> {
        if self.unsynced > 0 {
            self.sync()?;
        }
        self.unsynced = 0;
        // A sector at a time: it is written as a whole or not at all. The last may hold entries beyond the disk, which stay.
        const PER_SECTOR: u32 = (SECTOR / BAT_ENTRY_LEN) as u32;
        let pending = std::mem::take(&mut self.pending);
        let mut pending = pending.into_iter().peekable();
        while let Some(first) = pending.peek().map(|(block, _)| block - block % PER_SECTOR) {
            let last = (first + PER_SECTOR).min(self.table.blocks.end);
            let mut bytes = vec![0; (last - first) as usize * BAT_ENTRY_LEN as usize];
            let at = self.table.offset + u64::from(first) * BAT_ENTRY_LEN;
            self.read(&mut bytes, at)?;
            while let Some((block, entry)) = pending.next_if(|(block, _)| *block < last) {
                bytes[(block - first) as usize * BAT_ENTRY_LEN as usize..][..BAT_ENTRY_LEN as usize]
                    .copy_from_slice(&entry.to_be_bytes());
            }
            self.write(&bytes, at)?;
            self.unpublished = true;
        }
        Ok(())
    }

    /// True when all blocks are aligned.
    fn are_aligned(&self) -> Result<bool> {
        let mut are_aligned = true;
        self.table.used(&*self.storage, |_, sector| are_aligned &= is_aligned(&self.layout, u64::from(sector) * SECTOR))?;
        Ok(are_aligned)
    }

    fn gaps<'a>(&self, order: &'a Order) -> Gaps<'a> {
        Gaps { cursor: order.ascending(), gap: self.floor..self.floor, end: self.floor }
    }

    /// The place behind the last block. The file becomes longer where it has none.
    fn place_behind(&mut self, aligned: bool) -> Result<u64> {
        let alignment = if aligned { Alignment::Must } else { Alignment::Any };
        let tail = self.end.max(self.floor)..self.file_len - SECTOR;
        if let Some(place) = place_in(&self.layout, &tail, alignment) {
            return Ok(place);
        }
        if !self.storage.can_grow() {
            return Err(Error::new(ErrorKind::NoSpace, "is on a device without room to move blocks"));
        }
        // Where blocks may begin may be far beyond the end of a small file, whose table is to become a large one.
        let at = self.layout.aligned_slot_start(self.file_len.max(self.floor));
        let end = at + self.layout.slot_len();
        let len = FooterPlace::PageEnd.file_len(end);
        self.storage.set_len(len).map_err(|error| Error::io(error, format!("can't grow to {len} bytes")))?;
        // As it was, where there is no room: a footer stands at the old end.
        let written = self.write(&self.footer.to_bytes(), len - SECTOR);
        written.inspect_err(|_| drop(self.storage.set_len(self.file_len)))?;
        self.file_len = len;
        Ok(at)
    }

    /// Copies a block to a gap. Its old slot is left.
    fn relocate(&mut self, placed: PlacedBlock, to: u64) -> Result<()> {
        let sector = u32::try_from(to / SECTOR).ok().filter(|sector| *sector != BAT_UNUSED);
        let Some(sector) = sector else {
            return Err(Error::new(ErrorKind::Unsupported, format!("a block at {to:#x} is beyond what a BAT entry can name")));
        };
        if !self.dry {
            self.copy(self.layout.slot(placed.sector()).start, to)?;
        }
        self.end = self.end.max(to + self.layout.slot_len());
        self.unsynced += self.layout.slot_len();
        self.set_entry(placed.block(), sector)?;
        if self.unsynced >= BATCH { self.publish() } else { Ok(()) }
    }

    fn copy(&mut self, from: u64, to: u64) -> Result<()> {
        let len = self.layout.slot_len();
        let piece = len.min(MAX_BUFFER);
        if (self.buffer.len() as u64) < piece {
            self.buffer = AlignedBuffer::new(piece as usize);
        }
        let mut buffer = std::mem::replace(&mut self.buffer, AlignedBuffer::new(0));
        let copied = (0..len).step_by(piece as usize).try_for_each(|done| {
            let bytes = &mut buffer[..piece.min(len - done) as usize];
            self.read(bytes, from + done)?;
            self.write(bytes, to + done)
        });
        self.buffer = buffer;
        copied
    }

    /// The entry of a block as it will be.
    fn entry(&self, block: u32) -> Result<u32> {
        if let Some(entry) = self.pending.get(&block) {
            return Ok(*entry);
        }
        let mut entry = [0; BAT_ENTRY_LEN as usize];
        self.read(&mut entry, self.table.offset + u64::from(block) * BAT_ENTRY_LEN)?;
        Ok(u32::from_be_bytes(entry))
    }

    fn set_entry(&mut self, block: u32, entry: u32) -> Result<()> {
        self.pending.insert(block, entry);
        if self.pending.len() < MAX_PENDING { Ok(()) } else { self.write_table() }
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        self.storage.read_at(bytes, at).map_err(|error| Error::io(error, format!("can't be read at {at:#x}")))
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.dirty.set(true);
        self.storage.write_at(bytes, at).map_err(|error| Error::io(error, format!("can't be written at {at:#x}")))
    }

    fn sync(&self) -> Result<()> {
        self.dirty.set(false);
        // Whatever the reason, nothing is known of what was written.
        self.storage.sync().map_err(|error| Error::io(error, "can't be synced").with_kind(ErrorKind::Io))
    }
}

/// True when the data of a block whose slot begins here is aligned.
fn is_aligned(layout: &Layout, slot_start: u64) -> bool {
    (slot_start + layout.bitmap_len()) % DATA_ALIGNMENT == 0
}
