//! The BAT: where blocks are, what they lie over, and the space that nothing names.

use std::cmp::Ordering;
use std::fmt;
use std::ops::Range;

use super::footer::Basis;
use super::header::Table;
use super::{Check, Code, MAX_LISTED, Region, Severity};
use crate::error::{Error, Result};
use crate::format::{BAT_UNUSED, SECTOR};
use crate::image::{Entries, Order, TablePart};
use crate::layout::DATA_ALIGNMENT;
use crate::ops::copy::is_zero;

/// Room among the metadata that is no leak: locators are given up to 64 KiB each.
const METADATA_ROOM: u64 = 64 << 10;
/// Where space was given back to the host, what is left at each end: the host's blocks have 64 KiB at most.
const EDGE: u64 = 64 << 10;
/// Room beyond that of the data that is nobody's fault.
const RESERVE: u64 = 256 << 10;

/// What the BAT names, in the file's order.
pub(super) struct Blocks {
    /// Blocks of the disk that begin in the file.
    pub(super) order: Order,
    /// What entries beyond the disk's end name.
    extra: Order,
}

/// Entries beyond the disk's end that are used.
#[derive(Default)]
struct Extra {
    used: u64,
    first: Option<(u32, u32)>,
}

impl Extra {
    fn add(&mut self, block: u32, sector: u32, count: u64) {
        self.used += count;
        self.first.get_or_insert((block, sector));
    }
}

impl Check<'_> {
    /// Reads the whole table and judges each entry.
    pub(super) fn blocks(&mut self, table: &Table, regions: &[Region], basis: &Basis) -> Result<Blocks> {
        let mut extra = Extra::default();
        let total = table.entries.saturating_add(table.extra);
        let metadata_end = regions.iter().map(|region| region.range.end).max().unwrap_or(0);
        let storage = self.storage;
        let part = |blocks| TablePart { offset: table.offset, blocks };
        let judge = |this: &mut Self, block, sector| this.block(block, sector, table, regions, metadata_end, basis);
        part(0..total).scan(storage, &mut |entries| {
            match entries {
                Entries::Read(first, entries) => {
                    for (block, entry) in (first..).zip(entries) {
                        match u32::from_be_bytes(*entry) {
                            BAT_UNUSED => {}
                            sector if block < table.entries => judge(self, block, sector),
                            sector => extra.add(block, sector, 1),
                        }
                    }
                }
                // There may be half a thousand million of them: the first are told, the others counted.
                Entries::Zeros(blocks) => {
                    let split = table.entries.clamp(blocks.start, blocks.end);
                    let told = split.min(blocks.start.saturating_add(MAX_LISTED as u32));
                    (blocks.start..told).for_each(|block| judge(self, block, 0));
                    if told < split {
                        let before = self.findings.counts.clone();
                        judge(self, told, 0);
                        self.findings.repeat(&before, u64::from(split - told - 1));
                    }
                    if split < blocks.end {
                        extra.add(split, 0, u64::from(blocks.end - split));
                    }
                }
            }
            Ok(true)
        })?;
        if let Some((block, sector)) = extra.first {
            let message = format!(
                "names sector {sector:#x}, but the disk ends before this block; {} entries past its end are used",
                extra.used
            );
            self.add(Code::BatExtraUsed, format!("BAT entry {block}"), message);
        }
        // A hole in the file reads as entries of 0: they were told.
        let inside = 1..u32::try_from(self.file_len.div_ceil(SECTOR)).unwrap_or(BAT_UNUSED).max(1);
        let order = Order::of(storage, part(0..table.entries), inside.clone())?;
        let blocks = Blocks { order, extra: Order::of(storage, part(table.entries..total), inside)? };
        self.block_overlaps(&blocks, table)?;
        Ok(blocks)
    }

    /// One entry by itself: inside the file, and over nothing that is no block.
    fn block(&mut self, block: u32, sector: u32, table: &Table, regions: &[Region], metadata_end: u64, basis: &Basis) {
        let slot = table.layout.slot(sector);
        let len = self.file_len;
        let mut add = |code, rest: &dyn Fn() -> String| {
            self.findings.add_with(code, || (format!("BAT entry {block}"), format!("names sector {sector:#x}, {}", rest())));
        };
        if slot.start >= len {
            add(Code::BlockOutside, &|| format!("beyond the end of the file ({len:#x} bytes)"));
            return;
        }
        if slot.end > len {
            add(Code::BlockCut, &|| format!("so its block ends at {:#x}, beyond the end of the file ({len:#x} bytes)", slot.end));
        } else if basis.trailing_counts && slot.end > basis.data_end {
            let footer = basis.data_end;
            add(Code::BlockOverFooter, &|| format!("so its block ends at {:#x}, over the footer at {footer:#x}", slot.end));
        }
        if slot.start >= metadata_end {
            return;
        }
        // The trailing footer was dealt with.
        let under = |region: &&Region| region.overlaps(&slot) && region.range.start != basis.data_end;
        if regions.iter().any(|region| under(&region)) {
            add(Code::BlockOverMetadata, &|| {
                let names: Vec<_> = regions.iter().filter(under).map(|region| region.name.as_str()).collect();
                format!("so its block lies at {:#x} to {:#x}, over {}", slot.start, slot.end, names.join(", "))
            });
        }
    }

    /// Blocks that share bytes: all slots are of one length, so neighbours in the file's order tell.
    fn block_overlaps(&mut self, blocks: &Blocks, table: &Table) -> Result<()> {
        let mut cursor = blocks.order.ascending();
        let mut before = None;
        while let Some(b) = cursor.next(self.storage)? {
            let Some(a) = before.replace(b) else { continue };
            if a.sector() == b.sector() {
                self.findings.add_with(Code::BlockDuplicate, || {
                    let message = format!("names sector {:#x}, and BAT entry {} does too", b.sector(), a.block());
                    (format!("BAT entry {}", b.block()), message)
                });
                continue;
            }
            let end = table.layout.slot(a.sector()).end;
            if end > table.layout.slot(b.sector()).start {
                self.findings.add_with(Code::BlocksOverlap, || {
                    let (first, last) = (a.sector(), end.div_ceil(SECTOR));
                    let message = format!(
                        "names sector {:#x}, inside the block of BAT entry {} (sectors {first:#x} to {last:#x})",
                        b.sector(),
                        a.block()
                    );
                    (format!("BAT entry {}", b.block()), message)
                });
            }
        }
        Ok(())
    }

    /// Space that nothing names. Returns where the last structure ends; `None` when not all of them are known.
    pub(super) fn leaks(&mut self, table: &Table, regions: &[Region], blocks: &Blocks, basis: &Basis) -> Result<Option<u64>> {
        if !table.complete {
            return Ok(None);
        }
        // The sector in which a trailing footer stands, or is missing.
        let footer_at = if basis.trailing_counts { basis.data_end } else { self.file_len.saturating_sub(SECTOR) };
        let mut metadata: Vec<_> = regions.iter().filter(|region| region.range.start < footer_at).collect();
        metadata.sort_by_key(|region| region.range.start);
        let metadata_end = metadata.iter().map(|region| region.reserved_end.max(region.range.end)).max().unwrap_or(0);
        let mut leaks = Leaks { end: 0, metadata_end, slot_len: table.layout.slot_len() };
        let (mut leaked, mut free) = (Gaps::default(), Gaps::default());
        let mut metadata =
            metadata.into_iter().map(|region| region.range.start..region.reserved_end.max(region.range.end)).peekable();
        let (mut named, mut extra) = (blocks.order.ascending(), blocks.extra.ascending());
        loop {
            let slot = |sector: u32| table.layout.slot(sector);
            let block = named.peek(self.storage)?.map(|placed| slot(placed.sector()));
            let other = extra.peek(self.storage)?.map(|placed| slot(placed.sector()));
            let region = metadata.peek().cloned();
            let first = [&region, &other, &block].into_iter().flatten().min_by_key(|used| used.start).cloned();
            let Some(used) = first else { break };
            if region.as_ref() == Some(&used) {
                metadata.next();
            } else if other.as_ref() == Some(&used) {
                extra.next(self.storage)?;
            } else {
                named.next(self.storage)?;
            }
            if let Some(gap) = leaks.take(used.start, used.end, footer_at) {
                self.judge_gap(gap, &mut leaked, &mut free)?;
            }
        }
        // On a device the footer stands at the device's end, and what is before it waits for blocks.
        if let Some(gap) = leaks.tail(footer_at).filter(|_| self.storage.can_grow()) {
            self.judge_gap(gap, &mut leaked, &mut free)?;
        }
        if free.count > 0 && self.has_reserve()? {
            leaked.join(std::mem::take(&mut free));
        }
        self.tell_leaks(&leaked);
        if free.count > 0 {
            let message = format!("{} bytes that no structure names wait for blocks: {free}", free.bytes);
            self.add(Code::FreeSpace, "file", message);
        }
        Ok(Some(leaks.end))
    }

    fn judge_gap(&mut self, gap: Range<u64>, leaked: &mut Gaps, free: &mut Gaps) -> Result<()> {
        if self.is_given_back(&gap)? {
            free.add(gap)
        } else {
            leaked.add(gap)
        }
        Ok(())
    }

    /// True where the host has no room for a range: a block was freed there, or the file grew, and the next block comes there. All of
    /// a device has its room, whoever names it.
    fn is_given_back(&mut self, gap: &Range<u64>) -> Result<bool> {
        let failed = |error, at: u64| Error::io(error, format!("can't be examined at {at:#x}"));
        // Where slots meet within a block of the host, zeros are left.
        let most = (2 * EDGE).max((gap.end - gap.start) / 8);
        let (mut at, mut left, mut bytes) = (gap.start, 0, vec![0; EDGE as usize]);
        while self.storage.can_grow() && at < gap.end {
            let Some(data) = self.next_data(at)?.filter(|data| data.start < gap.end) else { break };
            at = data.start.max(at);
            let bytes = &mut bytes[..(data.end.min(gap.end) - at).min(EDGE) as usize];
            left += bytes.len() as u64;
            if left > most {
                return Ok(false);
            }
            self.storage.read_at(bytes, at).map_err(|error| failed(error, at))?;
            if !is_zero(bytes) {
                return Ok(false);
            }
            at += bytes.len() as u64;
        }
        Ok(true)
    }

    /// True where the host keeps room for the file that holds no data: a process that reserved it was killed.
    fn has_reserve(&self) -> Result<bool> {
        let failed = |error| Error::io(error, "can't be examined");
        if !self.storage.can_grow() {
            return Ok(false);
        }
        let (mut data, mut at) = (0, 0);
        while let Some(range) = self.storage.next_data(at).map_err(failed)?.filter(|range| range.end > at) {
            data += range.end - range.start.max(at);
            at = range.end;
        }
        // What the host needs to say where the data is, is counted too.
        Ok(self.storage.allocated().map_err(failed)? > data + data / 64 + RESERVE)
    }

    fn tell_leaks(&mut self, leaked: &Gaps) {
        if leaked.count == 0 {
            return;
        }
        // Where the BAT is damaged this may be what is left of the blocks that it lost.
        let damaged = self.findings.list.iter().any(|finding| finding.severity == Severity::Error);
        self.add(Code::LeakedSpace, "file", format!("{} bytes that no structure names: {leaked}", leaked.bytes));
        if damaged && let Some(last) = self.findings.list.last_mut() {
            last.repairable = false;
        }
    }
}

/// Ranges that are told of one by one.
const MAX_GAPS: usize = 8;

/// Ranges that nothing names.
#[derive(Default)]
struct Gaps {
    first: Vec<Range<u64>>,
    count: usize,
    bytes: u64,
}

impl Gaps {
    fn add(&mut self, gap: Range<u64>) {
        self.count += 1;
        self.bytes += gap.end - gap.start;
        if self.first.len() < MAX_GAPS {
            self.first.push(gap);
        }
    }
}

impl Gaps {
    fn join(&mut self, other: Self) {
        self.count += other.count;
        self.bytes += other.bytes;
        self.first.extend(other.first);
        self.first.sort_unstable_by_key(|gap| gap.start);
        self.first.truncate(MAX_GAPS);
    }
}

impl fmt::Display for Gaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, gap) in self.first.iter().enumerate() {
            write!(f, "{}{:#x} to {:#x}", if index > 0 { ", " } else { "" }, gap.start, gap.end)?;
        }
        if self.count > self.first.len() { write!(f, ", and {} more", self.count - self.first.len()) } else { Ok(()) }
    }
}

/// Gaps between what is used, found by walking over the file once.
struct Leaks {
    /// Where the used part ends so far.
    end: u64,
    metadata_end: u64,
    slot_len: u64,
}

impl Leaks {
    /// Notes that `start..end` is used; calls come in ascending order of `start`. Returns the gap before it.
    fn take(&mut self, start: u64, end: u64, limit: u64) -> Option<Range<u64>> {
        let start = start.min(limit);
        // Room between pieces of metadata belongs to their layout, unless it is large.
        let least = match self.end.cmp(&self.metadata_end) {
            Ordering::Less => self.slot_len.max(METADATA_ROOM),
            // Windows fills the BAT's last page, then aligns the first block.
            Ordering::Equal => self.slot_len.max(2 * DATA_ALIGNMENT),
            Ordering::Greater => self.slot_len,
        };
        let gap = self.gap(start, least);
        self.end = self.end.max(end.min(limit));
        gap
    }

    /// The end of the file: a gap there keeps it longer than it must be.
    fn tail(&self, footer_at: u64) -> Option<Range<u64>> {
        self.gap(footer_at, self.slot_len.clamp(2 * DATA_ALIGNMENT, 1 << 20))
    }

    fn gap(&self, start: u64, least: u64) -> Option<Range<u64>> {
        (start >= self.end && start - self.end >= least).then_some(self.end..start)
    }
}
