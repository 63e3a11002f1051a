//! The BAT: where blocks are, what they lie over, and the space that nothing names.

use std::cmp::Ordering;

use super::footer::Basis;
use super::header::Table;
use super::{Check, Code, Region, Severity};
use crate::error::Result;
use crate::format::{BAT_ENTRY_LEN, BAT_UNUSED, SECTOR};
use crate::layout::DATA_ALIGNMENT;

/// Bytes of the BAT that are read at once.
const CHUNK: usize = 1 << 20;
/// Room among the metadata that is no leak: locators are given up to 64 KiB each.
const METADATA_ROOM: u64 = 64 << 10;

/// An entry of the BAT: the block's first sector above its index, so that sorting puts them in the file's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry(u64);

impl Entry {
    fn new(sector: u32, block: u32) -> Self {
        Self(u64::from(sector) << 32 | u64::from(block))
    }

    pub(super) fn sector(self) -> u32 {
        (self.0 >> 32) as u32
    }

    pub(super) fn block(self) -> u32 {
        self.0 as u32
    }
}

/// What the BAT names.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    /// Blocks of the disk that begin in the file, in the file's order.
    pub(super) entries: Vec<Entry>,
    /// First sectors of what entries beyond the disk's end name, ascending.
    extra: Vec<u32>,
}

impl Check<'_> {
    /// Reads the whole table and judges each entry.
    pub(super) fn blocks(&mut self, table: &Table, regions: &[Region], basis: &Basis) -> Result<Blocks> {
        let mut blocks = Blocks::default();
        let (mut extra_used, mut first_extra) = (0_u64, None);
        let total = table.entries.saturating_add(table.extra);
        let metadata_end = regions.iter().map(|region| region.range.end).max().unwrap_or(0);
        let mut bytes = vec![0; CHUNK.min(total as usize * BAT_ENTRY_LEN as usize)];
        let mut block = 0;
        while block < total {
            let count = (bytes.len() / BAT_ENTRY_LEN as usize).min((total - block) as usize);
            let bytes = &mut bytes[..count * BAT_ENTRY_LEN as usize];
            self.read(bytes, table.offset + u64::from(block) * BAT_ENTRY_LEN)?;
            for entry in bytes.as_chunks::<4>().0 {
                let sector = u32::from_be_bytes(*entry);
                if sector != BAT_UNUSED && block < table.entries {
                    self.block(block, sector, table, regions, metadata_end, basis);
                    // A hole in the file reads as millions of entries of 0: they are told, not kept.
                    if sector != 0 && u64::from(sector) * SECTOR < self.file_len {
                        blocks.entries.push(Entry::new(sector, block));
                    }
                } else if sector != BAT_UNUSED {
                    extra_used += 1;
                    first_extra.get_or_insert((block, sector));
                    if sector != 0 && u64::from(sector) * SECTOR < self.file_len {
                        blocks.extra.push(sector);
                    }
                }
                block += 1;
            }
        }
        if let Some((block, sector)) = first_extra {
            let message = format!(
                "names sector {sector:#x}, but the disk ends before this block; {extra_used} entries past its end are used"
            );
            self.add(Code::BatExtraUsed, format!("BAT entry {block}"), message);
        }
        blocks.entries.sort_unstable();
        blocks.extra.sort_unstable();
        self.block_overlaps(&blocks.entries, table);
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
    fn block_overlaps(&mut self, entries: &[Entry], table: &Table) {
        for pair in entries.windows(2) {
            let (a, b) = (pair[0], pair[1]);
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
    }

    /// Space that nothing names. Returns where the last structure ends; `None` when not all of them are known.
    pub(super) fn leaks(&mut self, table: &Table, regions: &[Region], blocks: &Blocks, basis: &Basis) -> Option<u64> {
        if !table.complete {
            return None;
        }
        // The sector in which a trailing footer stands, or is missing.
        let footer_at = if basis.trailing_counts { basis.data_end } else { self.file_len.saturating_sub(SECTOR) };
        let mut metadata: Vec<_> = regions.iter().filter(|region| region.range.start < footer_at).collect();
        metadata.sort_by_key(|region| region.range.start);
        let metadata_end = metadata.iter().map(|region| region.reserved_end.max(region.range.end)).max().unwrap_or(0);
        let mut leaks = Leaks { end: 0, metadata_end, slot_len: table.layout.slot_len(), found: Vec::new(), count: 0, bytes: 0 };
        let mut metadata = metadata.into_iter().peekable();
        let mut extra = blocks.extra.iter().copied().peekable();
        for sector in blocks.entries.iter().map(|entry| entry.sector()).chain([u32::MAX]) {
            let start = if sector == u32::MAX { u64::MAX } else { u64::from(sector) * SECTOR };
            while let Some(region) = metadata.next_if(|region| region.range.start <= start) {
                leaks.take(region.range.start, region.reserved_end.max(region.range.end), footer_at);
            }
            while let Some(other) = extra.next_if(|&other| other <= sector) {
                let slot = table.layout.slot(other);
                leaks.take(slot.start, slot.end, footer_at);
            }
            if sector != u32::MAX {
                leaks.take(start, table.layout.slot(sector).end, footer_at);
            }
        }
        let used_end = leaks.end;
        // On a device the footer stands at the device's end, and what is before it waits for blocks.
        if self.storage.can_grow() {
            leaks.tail(footer_at);
        }
        self.tell_leaks(&leaks);
        Some(used_end)
    }

    fn tell_leaks(&mut self, leaks: &Leaks) {
        if leaks.count == 0 {
            return;
        }
        let mut places: Vec<_> = leaks.found.iter().map(|(start, end)| format!("{start:#x} to {end:#x}")).collect();
        if leaks.count > places.len() {
            places.push(format!("and {} more", leaks.count - places.len()));
        }
        let message = format!("{} bytes that no structure names: {}", leaks.bytes, places.join(", "));
        // Where the BAT is damaged this may be what is left of the blocks that it lost.
        let damaged = self.findings.list.iter().any(|finding| finding.severity == Severity::Error);
        self.add(Code::LeakedSpace, "file", message);
        if damaged && let Some(last) = self.findings.list.last_mut() {
            last.repairable = false;
        }
    }
}

/// Ranges that are told of one by one.
const MAX_LEAKS: usize = 8;

/// Gaps between what is used, found by walking over the file once.
struct Leaks {
    /// Where the used part ends so far.
    end: u64,
    metadata_end: u64,
    slot_len: u64,
    found: Vec<(u64, u64)>,
    count: usize,
    bytes: u64,
}

impl Leaks {
    /// Notes that `start..end` is used; calls come in ascending order of `start`.
    fn take(&mut self, start: u64, end: u64, limit: u64) {
        let start = start.min(limit);
        // Room between pieces of metadata belongs to their layout, unless it is large.
        let least = match self.end.cmp(&self.metadata_end) {
            Ordering::Less => self.slot_len.max(METADATA_ROOM),
            // Windows fills the BAT's last page, then aligns the first block.
            Ordering::Equal => self.slot_len.max(2 * DATA_ALIGNMENT),
            Ordering::Greater => self.slot_len,
        };
        self.gap(start, least);
        self.end = self.end.max(end.min(limit));
    }

    /// The end of the file: a gap there keeps it longer than it must be.
    fn tail(&mut self, footer_at: u64) {
        self.gap(footer_at, self.slot_len.clamp(2 * DATA_ALIGNMENT, 1 << 20));
    }

    fn gap(&mut self, start: u64, least: u64) {
        if start < self.end || start - self.end < least {
            return;
        }
        self.count += 1;
        self.bytes += start - self.end;
        if self.found.len() < MAX_LEAKS {
            self.found.push((self.end, start));
        }
    }
}
