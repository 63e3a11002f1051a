//! The BAT: entries that can't be right, and a table that is lost.

use std::ops::Range;

use super::Repairer;
use super::footers::MAX_ENTRIES;
use crate::error::Result;
use crate::format::{BAT_ENTRY_LEN, BAT_UNUSED, SECTOR};
use crate::layout::Layout;
use crate::storage::Storage;

/// Bytes of blocks that are copied because two entries claim one place.
const MAX_COPIED: u64 = 64 << 20;
/// Room between structures that is no sign of a block: locators are given up to 64 KiB each.
const MAX_GAP: u64 = 128 << 10;

/// The table as it will be.
pub(super) struct Table {
    pub(super) layout: Layout,
    pub(super) at: u64,
    pub(super) entries: Vec<u32>,
    /// What is no block.
    pub(super) metadata: Vec<Range<u64>>,
}

/// How well entries of a BAT fit the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fit {
    /// Entries that name a block of their own inside the file.
    pub(super) good: usize,
    /// Entries that can't be right.
    pub(super) bad: usize,
    /// The file has no room for another block that they do not name.
    pub(super) is_tight: bool,
}

impl Fit {
    /// What is larger fits better.
    pub(super) fn rank(self) -> (i64, bool) {
        (self.good as i64 - self.bad as i64, self.is_tight)
    }

    /// Judges the entries of a table that ends at `after`, for blocks that end before `data_end`.
    fn of(table: &[u8], layout: Layout, after: u64, data_end: u64) -> Self {
        /// What has more wrong entries than right ones is no table.
        const ENOUGH: usize = 64;
        let (mut fit, mut starts) = (Self::default(), Vec::new());
        for entry in table.as_chunks::<4>().0.iter().map(|entry| u32::from_be_bytes(*entry)).filter(|entry| *entry != BAT_UNUSED)
        {
            let slot = layout.slot(entry);
            match slot.start >= after && slot.end <= data_end {
                true => starts.push(slot.start),
                false => fit.bad += 1,
            }
            if fit.bad > starts.len() + ENOUGH {
                break;
            }
        }
        starts.sort_unstable();
        let mut end = after;
        fit.is_tight = true;
        for start in starts {
            match start < end {
                true => fit.bad += 1,
                false => fit.good += 1,
            }
            fit.is_tight &= start < end + layout.slot_len().max(MAX_GAP);
            end = end.max(start + layout.slot_len());
        }
        fit.is_tight &= data_end < end + layout.slot_len().max(MAX_GAP);
        fit
    }
}

impl Table {
    fn is_over_metadata(&self, slot: &Range<u64>) -> bool {
        self.metadata.iter().any(|part| slot.start < part.end && part.start < slot.end)
    }

    /// True when neither metadata nor blocks lie in a range.
    pub(super) fn is_free(&self, range: &Range<u64>) -> bool {
        let blocks = self.entries.iter().filter(|entry| **entry != BAT_UNUSED).map(|entry| self.layout.slot(*entry));
        !self.is_over_metadata(range) && !blocks.into_iter().any(|slot| slot.start < range.end && range.start < slot.end)
    }

    /// Where the metadata and the last block end.
    pub(super) fn end(&self) -> u64 {
        let blocks = self.entries.iter().filter(|entry| **entry != BAT_UNUSED).map(|entry| self.layout.slot(*entry).end);
        blocks.chain(self.metadata.iter().map(|part| part.end)).max().unwrap_or(0)
    }

    fn bytes(&self) -> Vec<u8> {
        self.entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
    }
}

impl Repairer<'_> {
    /// Reads the table as it is.
    pub(super) fn read_table(&self, layout: Layout, at: u64, metadata: Vec<Range<u64>>) -> Result<Table> {
        let mut bytes = vec![0xFF; layout.blocks() as usize * BAT_ENTRY_LEN as usize];
        let there = self.len()?.saturating_sub(at).min(bytes.len() as u64) as usize;
        self.read(&mut bytes[..there], at)?;
        let entries = bytes.as_chunks::<4>().0.iter().map(|entry| u32::from_be_bytes(*entry)).collect();
        Ok(Table { layout, at, entries, metadata })
    }

    /// Rights the entries. `data_end` is where the trailing footer stands, or the end of the file.
    pub(super) fn right_table(&mut self, table: &mut Table, data_end: u64) -> Result<()> {
        let before = table.entries.clone();
        let file_len = self.len()?;
        let used = table.entries.iter().filter(|entry| **entry != BAT_UNUSED).count();
        let impossible = |table: &Table, entry: u32| {
            let slot = table.layout.slot(entry);
            slot.start >= file_len || table.is_over_metadata(&slot)
        };
        let wrong = table.entries.iter().filter(|entry| **entry != BAT_UNUSED && impossible(table, **entry)).count();
        let is_lost = self.is_table_lost || (wrong > 0 && wrong * 2 >= used && wrong + 1 >= used);
        if is_lost && self.rebuild_table(table, data_end)? {
            return self.put_table(table, &before);
        }
        for block in 0..table.entries.len() {
            let entry = table.entries[block];
            if entry == BAT_UNUSED {
                continue;
            }
            let slot = table.layout.slot(entry);
            if impossible(table, entry) {
                table.entries[block] = BAT_UNUSED;
                self.lose(format!(
                    "block {block}: its BAT entry named sector {entry:#x}, where no block can be; it reads as never written"
                ));
            } else if slot.end > file_len {
                let lost = slot.end - file_len;
                self.lose(format!("block {block}: its last {lost} bytes are beyond the end of the file, and read as zeros"));
            } else if slot.end > data_end {
                self.lose(format!("block {block}: the footer was over its bytes at {data_end:#x}, which hold that now"));
            }
        }
        self.separate(table)?;
        self.put_table(table, &before)
    }

    /// Gives each of several blocks that share bytes a place of its own. Nobody knows whose the bytes are, so each has them.
    fn separate(&mut self, table: &mut Table) -> Result<()> {
        let mut order: Vec<_> = (0_u32..)
            .zip(&table.entries)
            .filter(|(_, entry)| **entry != BAT_UNUSED)
            .map(|(block, entry)| (*entry, block))
            .collect();
        order.sort_unstable();
        let mut copied = 0;
        let mut last: Option<(u64, u32)> = None;
        for (entry, block) in order {
            let slot = table.layout.slot(entry);
            let Some((end, owner)) = last.filter(|(end, _)| *end > slot.start) else {
                last = Some((slot.end, block));
                continue;
            };
            let shared = end - slot.start;
            if copied + table.layout.slot_len() > MAX_COPIED {
                table.entries[block as usize] = BAT_UNUSED;
                self.lose(format!(
                    "block {block}: shared {shared} bytes with block {owner}, which keeps them; it reads as never written"
                ));
                continue;
            }
            let to = table.layout.aligned_slot_start(table.end());
            let mut bytes = vec![0; table.layout.slot_len() as usize];
            let there = self.len()?.saturating_sub(slot.start).min(bytes.len() as u64) as usize;
            self.read(&mut bytes[..there], slot.start)?;
            self.write(&bytes, to)?;
            copied += table.layout.slot_len();
            table.entries[block as usize] = u32::try_from(to / SECTOR).unwrap_or(BAT_UNUSED);
            self.lose(format!(
                "blocks {owner} and {block}: both claimed {shared} bytes at {:#x}; each has a copy now, one of them is wrong",
                slot.start
            ));
        }
        Ok(())
    }

    fn put_table(&mut self, table: &Table, before: &[u32]) -> Result<()> {
        if table.entries != before {
            let changed = table.entries.iter().zip(before).filter(|(now, before)| now != before).count();
            self.change(format!("{changed} BAT entries put right"));
        }
        // What an interrupted growth left out is part of it, too.
        if table.entries != before || table.at + table.bytes().len() as u64 > self.len()? {
            self.write(&table.bytes(), table.at)?;
        }
        Ok(())
    }

    /// Finds the blocks of a table that names none. Which block is which is written nowhere else: they are taken to be in
    /// order. False when none are found.
    fn rebuild_table(&mut self, table: &mut Table, data_end: u64) -> Result<bool> {
        let start = table.metadata.iter().map(|part| part.end).max().unwrap_or(0);
        let classic = self.slots_from(table.layout, start.next_multiple_of(SECTOR), data_end, false)?;
        let aligned = self.slots_from(table.layout, table.layout.aligned_slot_start(start), data_end, true)?;
        let (full, found) = if aligned.0 > classic.0 { aligned } else { classic };
        if full == 0 {
            return Ok(false);
        }
        table.entries.fill(BAT_UNUSED);
        let count = found.len().min(table.entries.len());
        table.entries[..count].copy_from_slice(&found[..count]);
        let mut text = format!(
            "the BAT is lost; {} blocks were found in the file, and are taken to be the first {count} of the disk, in order",
            found.len()
        );
        if count == table.entries.len() {
            text.push_str(" (as many as it has, so only their order is a guess)");
        }
        self.lose(text);
        Ok(true)
    }

    /// The slots from `at` on, one behind the other, and how many of them have a full sector bitmap.
    fn slots_from(&self, layout: Layout, at: u64, end: u64, aligned: bool) -> Result<(usize, Vec<u32>)> {
        let (mut at, mut full, mut found) = (at, 0, Vec::new());
        let mut bitmap = vec![0; layout.bitmap_len() as usize];
        while at + layout.slot_len() <= end {
            self.read(&mut bitmap, at)?;
            if bitmap.iter().any(|byte| *byte != 0) {
                let bits = &bitmap[..(layout.block_sectors() / 8) as usize];
                full += usize::from(bits.iter().all(|byte| *byte == 0xFF));
                found.extend(u32::try_from(at / SECTOR).ok());
            }
            at += layout.slot_len();
            if aligned {
                at = layout.aligned_slot_start(at);
            }
        }
        Ok((full, found))
    }

    /// How well the entries at `at` fit the file. More than a table may have do not.
    pub(super) fn fit_of(&self, layout: Layout, at: u64, data_end: u64) -> Result<Fit> {
        if layout.blocks() > MAX_ENTRIES {
            return Ok(Fit::default());
        }
        let len = u64::from(layout.blocks()) * BAT_ENTRY_LEN;
        let mut bytes = vec![0xFF; len as usize];
        let there = self.len()?.saturating_sub(at).min(len) as usize;
        self.read(&mut bytes[..there], at)?;
        Ok(Fit::of(&bytes, layout, (at + len).next_multiple_of(SECTOR), data_end))
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
        let mut bytes = vec![0; len as usize];
        let mut best: Option<(Fit, u64)> = None;
        for (index, at) in (FIRST..=end - len).step_by(SECTOR as usize).enumerate() {
            let than = best.map(|(fit, _)| fit).or(than);
            // Most places can't be better than one that is right, and need no closer look.
            if than.is_none_or(|than| (weight + rest as i64, true) > than.rank()) {
                self.read(&mut bytes, at)?;
                let fit = Fit::of(&bytes, layout, (at + len).next_multiple_of(SECTOR), data_end);
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
}

impl Repairer<'_> {
    pub(super) fn len(&self) -> Result<u64> {
        self.overlay.len().map_err(|error| crate::error::Error::io(error, "can't be examined"))
    }

    /// False on a device, whose length is what it is.
    pub(super) fn can_grow(&self) -> bool {
        self.overlay.can_grow()
    }
}
