//! The BAT: entries that can't be right, and a table that is lost.

use std::ops::Range;
use std::sync::Arc;

use super::Repairer;
use super::footers::MAX_ENTRIES;
use super::lost::Fate;
use crate::error::Result;
use crate::format::{BAT_ENTRY_LEN, BAT_UNUSED, SECTOR};
use crate::image::{Entries, Order, TablePart};
use crate::layout::Layout;
use crate::storage::Storage;

/// Bytes of blocks that are copied because two entries claim one place, at least; as many as the file has are.
pub(super) const MAX_COPIED: u64 = 64 << 20;
/// Blocks that are copied at most: each is kept in mind, and a range of the journal.
const MAX_COPIES: u32 = 128 << 10;
/// Room between structures that is no sign of a block: locators are given up to 64 KiB each.
const MAX_GAP: u64 = 128 << 10;

/// The table, whose entries are in the file.
pub(super) struct Table {
    pub(super) layout: Layout,
    pub(super) at: u64,
    /// What is no block.
    pub(super) metadata: Vec<Range<u64>>,
}

/// How well entries of a BAT fit the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fit {
    /// Entries that name a block of their own inside the file.
    pub(super) good: u64,
    /// Entries that can't be right.
    pub(super) bad: u64,
    /// The file has no room for another block that they do not name.
    pub(super) is_tight: bool,
}

impl Fit {
    /// What is larger fits better.
    pub(super) fn rank(self) -> (i64, bool) {
        (self.good as i64 - self.bad as i64, self.is_tight)
    }
}

impl Table {
    fn part(&self) -> TablePart {
        TablePart { offset: self.at, blocks: 0..self.layout.blocks() }
    }

    /// Bytes of the entries.
    fn len(&self) -> u64 {
        u64::from(self.layout.blocks()) * BAT_ENTRY_LEN
    }

    fn is_over_metadata(&self, slot: &Range<u64>) -> bool {
        self.metadata.iter().any(|part| slot.start < part.end && part.start < slot.end)
    }

    /// Calls `visit` with all that is used, until it returns false.
    fn used(&self, storage: &dyn Storage, visit: &mut dyn FnMut(Used) -> Result<bool>) -> Result<()> {
        self.part().scan(storage, &mut |entries| match entries {
            Entries::Zeros(blocks) => visit(Used::Zeros(blocks)),
            Entries::Read(first, entries) => {
                for (block, entry) in (first..).zip(entries) {
                    let entry = u32::from_be_bytes(*entry);
                    if entry != BAT_UNUSED && !visit(Used::Entry(block, entry))? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
        })
    }

    /// True when neither metadata nor blocks lie in a range.
    pub(super) fn is_free(&self, storage: &dyn Storage, range: &Range<u64>) -> Result<bool> {
        let mut is_free = !self.is_over_metadata(range);
        self.used(storage, &mut |used| {
            let slot = self.layout.slot(used.sector());
            is_free &= slot.start >= range.end || range.start >= slot.end;
            Ok(is_free)
        })?;
        Ok(is_free)
    }

    /// Where the metadata and the last block end.
    pub(super) fn end(&self, storage: &dyn Storage) -> Result<u64> {
        let mut end = self.metadata.iter().map(|part| part.end).max().unwrap_or(0);
        self.used(storage, &mut |used| {
            end = end.max(self.layout.slot(used.sector()).end);
            Ok(true)
        })?;
        Ok(end)
    }
}

/// Entries that are used.
enum Used {
    Entry(u32, u32),
    /// A hole of the file, where each names sector 0.
    Zeros(Range<u32>),
}

impl Used {
    fn sector(&self) -> u32 {
        match self {
            Self::Entry(_, sector) => *sector,
            Self::Zeros(_) => 0,
        }
    }

    fn count(&self) -> u64 {
        match self {
            Self::Entry(..) => 1,
            Self::Zeros(blocks) => u64::from(blocks.end - blocks.start),
        }
    }
}

impl Repairer<'_> {
    /// Rights the entries. `data_end` is where the trailing footer stands, or the end of the file.
    pub(super) fn right_table(&mut self, table: &Table, data_end: u64) -> Result<()> {
        let file_len = self.len()?;
        let storage = Arc::clone(self.overlay);
        // What an interrupted growth left out is part of it, too.
        self.fill(0xFF, file_len.max(table.at)..table.at + table.len())?;
        let impossible = |entry: u32| {
            let slot = table.layout.slot(entry);
            slot.start >= file_len || table.is_over_metadata(&slot)
        };
        let (mut used, mut wrong) = (0, 0);
        table.used(&*storage, &mut |entry| {
            used += entry.count();
            wrong += if impossible(entry.sector()) { entry.count() } else { 0 };
            Ok(true)
        })?;
        let is_lost = self.is_table_lost || (wrong > 0 && wrong * 2 >= used && wrong + 1 >= used);
        if is_lost && self.rebuild_table(table, data_end)? {
            self.change("the BAT made anew");
            return Ok(());
        }
        let mut changed = 0;
        table.used(&*storage, &mut |used| {
            let (block, entry) = match used {
                Used::Entry(block, entry) => (block, entry),
                Used::Zeros(blocks) => {
                    let at = |block: u32| table.at + u64::from(block) * BAT_ENTRY_LEN;
                    self.fill(0xFF, at(blocks.start)..at(blocks.end))?;
                    changed += u64::from(blocks.end - blocks.start);
                    self.lost.range(Fate::Impossible, blocks);
                    return Ok(true);
                }
            };
            let slot = table.layout.slot(entry);
            if impossible(entry) {
                self.set_entry(table, block, BAT_UNUSED)?;
                changed += 1;
                self.lost.blocks(Fate::Impossible, &[block], || {
                    format!(
                        "block {block}: its BAT entry named sector {entry:#x}, where no block can be; it reads as never written"
                    )
                });
            } else if slot.end > file_len {
                let lost = slot.end - file_len;
                self.lost.blocks(Fate::Cut, &[block], || {
                    format!("block {block}: its last {lost} bytes are beyond the end of the file, and read as zeros")
                });
            } else if slot.end > data_end {
                self.lost.blocks(Fate::OverFooter, &[block], || {
                    format!("block {block}: the footer was over its bytes at {data_end:#x}, which hold that now")
                });
            }
            Ok(true)
        })?;
        changed += self.separate(table, data_end)?;
        if changed > 0 {
            self.change(format!("{changed} BAT entries put right"));
        }
        Ok(())
    }

    fn set_entry(&self, table: &Table, block: u32, entry: u32) -> Result<()> {
        self.write(&entry.to_be_bytes(), table.at + u64::from(block) * BAT_ENTRY_LEN)
    }

    /// Gives each of several blocks that share bytes a place of its own. Nobody knows whose the bytes are, so each has them. Returns
    /// how many entries change.
    fn separate(&mut self, table: &Table, data_end: u64) -> Result<u64> {
        let storage = Arc::clone(self.overlay);
        let (slot_len, mut changed) = (table.layout.slot_len(), 0);
        let can_grow = self.can_grow();
        // Behind all that is there: what no entry names may be what one has lost.
        let used_end = table.end(&*storage)?;
        let mut free = if can_grow { used_end.max(data_end) } else { used_end };
        let mut room = MAX_COPIED.max(if can_grow { data_end } else { 0 });
        let mut copies = 0;
        let order = Order::of(&*storage, table.part(), 0..BAT_UNUSED)?;
        let mut cursor = order.ascending();
        // All slots are of one length, so the one before reaches as far as any.
        let mut before: Option<(u64, u32, bool)> = None;
        let mut kept_end = 0;
        while let Some(placed) = cursor.next(&*storage)? {
            let (block, slot) = (placed.block(), table.layout.slot(placed.sector()));
            let shared = before.filter(|(end, ..)| *end > slot.start);
            let mut is_dropped = false;
            if slot.start < kept_end {
                let to = table.layout.aligned_slot_start(free);
                let entry = u32::try_from(to / SECTOR).ok().filter(|entry| *entry != BAT_UNUSED);
                let has_room = slot_len <= room && copies < MAX_COPIES && (can_grow || to + slot_len <= data_end);
                if let Some(entry) = entry.filter(|_| has_room) {
                    let copied = storage.copy(slot.clone(), to);
                    copied.map_err(|error| crate::error::Error::io(error, format!("can't be repaired at {to:#x}")))?;
                    self.set_entry(table, block, entry)?;
                    free = to + slot_len;
                    room -= slot_len;
                    copies += 1;
                } else {
                    self.set_entry(table, block, BAT_UNUSED)?;
                    is_dropped = true;
                }
                changed += 1;
            } else {
                kept_end = slot.end;
            }
            if let Some((end, owner, is_owner_dropped)) = shared {
                let bytes = end - slot.start;
                if is_dropped {
                    self.lost.blocks(Fate::Dropped, &[block], || {
                        format!(
                            "block {block}: shared {bytes} bytes with block {owner}, which keeps them; it reads as never written"
                        )
                    });
                } else {
                    let now = match is_owner_dropped {
                        true => format!("block {block} has them now, and may be wrong"),
                        false => "each has a copy now, one of them is wrong".into(),
                    };
                    self.lost.blocks(Fate::Shared, &[owner, block], || {
                        let at = slot.start;
                        format!("blocks {owner} and {block}: both claimed {bytes} bytes at {at:#x}; {now}")
                    });
                }
            }
            before = Some((slot.end, block, is_dropped));
        }
        Ok(changed)
    }

    /// Finds the blocks of a table that names none. Which block is which is written nowhere else: they are taken to be in
    /// order. False when none are found.
    fn rebuild_table(&mut self, table: &Table, data_end: u64) -> Result<bool> {
        let layout = table.layout;
        let start = table.metadata.iter().map(|part| part.end).max().unwrap_or(0);
        let packed = Places { start: start.next_multiple_of(SECTOR), end: data_end, stride: layout.slot_len() };
        let first = layout.aligned_slot_start(start);
        let aligned =
            Places { start: first, end: data_end, stride: layout.aligned_slot_start(first + layout.slot_len()) - first };
        let (in_packed, in_aligned) =
            (self.slots_in(layout, &packed, &mut |_| Ok(()))?, self.slots_in(layout, &aligned, &mut |_| Ok(()))?);
        let ((full, found), places) = if in_aligned.0 > in_packed.0 { (in_aligned, aligned) } else { (in_packed, packed) };
        if full == 0 {
            return Ok(false);
        }
        self.fill(0xFF, table.at..table.at + table.len())?;
        let count = found.min(u64::from(layout.blocks())) as u32;
        let mut block = 0;
        let this = &*self;
        this.slots_in(layout, &places, &mut |sector| {
            if block < count {
                this.set_entry(table, block, sector)?;
            }
            block += 1;
            Ok(())
        })?;
        let mut text = format!(
            "the BAT is lost; {found} blocks were found in the file, and are taken to be the first {count} of the disk, in order"
        );
        if count == layout.blocks() {
            text.push_str(" (as many as it has, so only their order is a guess)");
        }
        self.lose(text);
        Ok(true)
    }

    /// Calls `visit` with the first sector of each slot that has a sector bitmap with a bit. Returns how many have a full one, and how
    /// many there are.
    fn slots_in(&self, layout: Layout, places: &Places, visit: &mut dyn FnMut(u32) -> Result<()>) -> Result<(u64, u64)> {
        let (mut at, mut full, mut found) = (places.start, 0, 0);
        let mut bitmap = vec![0; layout.bitmap_len() as usize];
        let mut data = 0..0;
        while at + layout.slot_len() <= places.end {
            if !data.contains(&at) {
                let next = self.overlay.next_data(at).map_err(|error| crate::error::Error::io(error, "can't be examined"))?;
                data = next.unwrap_or(u64::MAX..u64::MAX);
            }
            if data.start >= at + layout.bitmap_len() {
                // Only zeros up to there, so no bits.
                at += ((data.start - at) / places.stride).max(1).min(u64::MAX / places.stride / 2) * places.stride;
                continue;
            }
            self.read(&mut bitmap, at)?;
            if bitmap.iter().any(|byte| *byte != 0) {
                let bits = &bitmap[..(layout.block_sectors() / 8) as usize];
                full += u64::from(bits.iter().all(|byte| *byte == 0xFF));
                if let Ok(sector) = u32::try_from(at / SECTOR) {
                    found += 1;
                    visit(sector)?;
                }
            }
            at += places.stride;
        }
        Ok((full, found))
    }

    /// How well the entries at `at` fit the file, for blocks that end before `data_end`. More than a table may have do not.
    pub(super) fn fit_of(&self, layout: Layout, at: u64, data_end: u64) -> Result<Fit> {
        /// What has more wrong entries than right ones is no table.
        const ENOUGH: u64 = 64;
        if layout.blocks() > MAX_ENTRIES {
            return Ok(Fit::default());
        }
        let table = Table { layout, at, metadata: Vec::new() };
        let after = (at + table.len()).next_multiple_of(SECTOR);
        let mut fit = Fit::default();
        table.used(&**self.overlay, &mut |used| {
            let slot = layout.slot(used.sector());
            match slot.start >= after && slot.end <= data_end {
                true => fit.good += used.count(),
                false => fit.bad += used.count(),
            }
            Ok(fit.bad <= fit.good + ENOUGH)
        })?;
        if fit.bad > fit.good + ENOUGH {
            return Ok(fit);
        }
        let sector = |at: u64| u32::try_from(at / SECTOR).unwrap_or(BAT_UNUSED);
        let inside = sector(after)..data_end.checked_sub(layout.slot_len()).map_or(0, |last| sector(last).saturating_add(1));
        let order = Order::of(&**self.overlay, table.part(), inside)?;
        let mut cursor = order.ascending();
        let (mut end, mut is_tight) = (after, true);
        fit.good = 0;
        while let Some(placed) = cursor.next(&**self.overlay)? {
            let slot = layout.slot(placed.sector());
            match slot.start < end {
                true => fit.bad += 1,
                false => fit.good += 1,
            }
            is_tight &= slot.start < end + layout.slot_len().max(MAX_GAP);
            end = end.max(slot.end);
        }
        fit.is_tight = is_tight && data_end < end + layout.slot_len().max(MAX_GAP);
        Ok(fit)
    }

    /// Looks for a table, sector by sector, that fits better `than` one does. The first that fits best counts. Returns how well, and
    /// where it is.
    pub(super) fn find_table(&self, layout: Layout, data_end: u64, than: Option<Fit>) -> Result<Option<(Fit, u64)>> {
        const REACH: u64 = 1 << 20;
        const FIRST: u64 = 1536;
        let len = u64::from(layout.blocks()) * BAT_ENTRY_LEN;
        let end = data_end.min(FIRST + REACH + len);
        if end < FIRST + len {
            return Ok(None);
        }
        let weights = self.weights(layout, FIRST..end, FIRST + len..data_end)?;
        let (whole, rest) = ((len / SECTOR) as usize, len % SECTOR / BAT_ENTRY_LEN);
        let mut weight: i64 = weights.iter().take(whole).sum();
        let mut best: Option<(Fit, u64)> = None;
        for (index, at) in (FIRST..=end - len).step_by(SECTOR as usize).enumerate() {
            let than = best.map(|(fit, _)| fit).or(than);
            // Most places can't be better than one that is right, and need no closer look.
            if than.is_none_or(|than| (weight + rest as i64, true) > than.rank()) {
                let fit = self.fit_of(layout, at, data_end)?;
                if fit.good >= fit.bad && than.is_none_or(|than| fit.rank() > than.rank()) {
                    best = Some((fit, at));
                }
            }
            weight += weights.get(index + whole).unwrap_or(&0) - weights.get(index).unwrap_or(&0);
        }
        Ok(best)
    }

    /// How much each whole sector of a range speaks for a table, at most: its entries that name blocks in `room`, less those that
    /// name nothing in it.
    fn weights(&self, layout: Layout, range: Range<u64>, room: Range<u64>) -> Result<Vec<i64>> {
        const CHUNK: usize = 64 << 10;
        let weight = |entry: &[u8; 4]| {
            let entry = u32::from_be_bytes(*entry);
            let slot = layout.slot(entry);
            match entry {
                BAT_UNUSED => 0,
                _ if slot.start >= room.start && slot.end <= room.end => 1,
                _ => -1,
            }
        };
        let (mut weights, mut buffer, mut at) = (Vec::new(), vec![0; CHUNK], range.start);
        while at < range.end {
            let bytes = &mut buffer[..(range.end - at).min(CHUNK as u64) as usize];
            self.read(bytes, at)?;
            let sectors = bytes.chunks_exact(SECTOR as usize);
            weights.extend(sectors.map(|sector| sector.as_chunks::<4>().0.iter().map(weight).sum::<i64>()));
            at += bytes.len() as u64;
        }
        Ok(weights)
    }

    pub(super) fn len(&self) -> Result<u64> {
        self.overlay.len().map_err(|error| crate::error::Error::io(error, "can't be examined"))
    }

    /// False on a device, whose length is what it is.
    pub(super) fn can_grow(&self) -> bool {
        self.overlay.can_grow()
    }
}

/// Where blocks may be that lie one behind the other.
struct Places {
    start: u64,
    end: u64,
    stride: u64,
}
