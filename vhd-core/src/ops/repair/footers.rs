//! Footers, dynamic header, locators and batmap.

use std::ops::Range;

use super::Repairer;
use super::table::{Fit, Table};
use crate::error::{Error, Result};
use crate::format::{
    BAT_ENTRY_LEN, Batmap, DiskType, DynamicHeader, FOOTER_LEN, Footer, HEADER_COOKIE, HEADER_LEN, LocatorEntry, NewHeader,
    SECTOR, Timestamp,
};
use crate::image::{Authority, Footers};
use crate::layout::{FooterPlace, Layout};
use crate::ops::check::Code;
use crate::storage::Storage;

/// Where every creator puts the header.
pub(super) const USUAL_HEADER: u64 = 512;
/// Where a BAT goes of which nothing is left.
const USUAL_TABLE: u64 = USUAL_HEADER + HEADER_LEN as u64;
/// Entries of a table that is put right: the largest disk in blocks of 512 KiB has a quarter of that.
pub(super) const MAX_ENTRIES: u32 = 16 << 20;

impl Repairer<'_> {
    /// Everything but leaked space.
    pub(super) fn structures(&mut self) -> Result<()> {
        let footers = Footers::read(&**self.overlay).map_err(|error| Error::io(error, "can't be read"))?;
        let Some((mut footer, authority)) = self.footer(&footers)? else { return Ok(()) };
        let data_end = if authority == Authority::Trailing { footers.trailing_at } else { footers.file_len };
        if self.may_lose() {
            self.right_size(&footers, &mut footer)?;
        }
        if footer.disk_type() == DiskType::Fixed {
            return self.fixed(&footers, &footer);
        }
        let header = self.header(&mut footer, data_end)?;
        self.put_in_place(&footers, &footer, authority)?;
        let Some(header) = header else { return Ok(()) };
        // What footers and header led to before may have been nothing.
        self.look_again()?;
        let layout = Layout::new(footer.current_size(), header.block_size());
        if layout.blocks() > header.max_table_entries() || layout.blocks() > MAX_ENTRIES || layout.blocks() == 0 {
            return Ok(());
        }
        let metadata = self.metadata(&footer, &header);
        let table = Table { layout, at: header.bat_offset(), metadata };
        if self.may_lose() && (self.is_table_wrong() || self.is_table_lost) {
            self.right_table(&table, data_end)?;
        }
        self.put_footers(&footers, &footer, authority, &table)?;
        if self.may_lose() && self.found(Code::BatmapPlace) {
            self.new_batmap(&header, &table)?;
        }
        self.batmap(&footer, &header)
    }

    /// Writes the footers where they are, so that what they lead to is looked at next.
    fn put_in_place(&mut self, footers: &Footers, footer: &Footer, authority: Authority) -> Result<()> {
        let bytes = footer.to_bytes();
        if footers.copy_bytes() != &bytes {
            self.write(&bytes, 0)?;
            self.change("the footer copy at the start written");
        }
        if authority == Authority::Trailing && !footers.trailing_is_short && footers.trailing_bytes() != &bytes {
            self.write(&bytes, footers.trailing_at)?;
            self.change("the trailing footer written");
        }
        Ok(())
    }

    pub(super) fn header_at(&self, at: u64) -> Result<Option<DynamicHeader>> {
        if at.saturating_add(HEADER_LEN as u64) > self.len()? {
            return Ok(None);
        }
        let mut bytes = [0; HEADER_LEN];
        self.read(&mut bytes, at)?;
        Ok(DynamicHeader::parse_tolerant(&bytes).ok())
    }

    pub(super) fn set_len(&self, len: u64) -> Result<()> {
        self.overlay.set_len(len).map_err(|error| Error::io(error, format!("can't be made {len} bytes long")))
    }

    /// The dynamic header, put right where it can be.
    fn header(&mut self, footer: &mut Footer, data_end: u64) -> Result<Option<DynamicHeader>> {
        let Some((at, mut header)) = self.sound_header(footer)? else {
            return if self.may_lose() { self.new_header(footer, data_end, None) } else { Ok(None) };
        };
        let mut bytes = [0; HEADER_LEN];
        self.read(&mut bytes, at)?;
        if header.to_bytes() != bytes {
            // Any of its fields may be the wrong one; the blocks bear it out, or do not.
            let layout = Layout::new(footer.current_size(), header.block_size());
            let fit = self.fit_of(layout, header.bat_offset(), data_end)?;
            let is_complete = layout.blocks() <= header.max_table_entries();
            if !(is_complete && fit.bad == 0 && fit.is_tight) {
                if !self.may_lose() {
                    return Ok(None);
                }
                if let Some(new) = self.new_header(footer, data_end, Some(fit))? {
                    return Ok(Some(new));
                }
                self.lose("the dynamic header's checksum is wrong; what it says is taken as it is".into());
            }
        }
        if self.may_lose() {
            self.fit_size(&header, footer);
            self.right_locators(&mut header, footer)?;
        }
        if header.to_bytes() != bytes {
            self.write(&header.to_bytes(), at)?;
            self.change("the dynamic header written with its checksum");
        }
        Ok(Some(header))
    }

    /// The header that the footers lead to, or the one where everyone puts it.
    fn sound_header(&mut self, footer: &mut Footer) -> Result<Option<(u64, DynamicHeader)>> {
        let size = footer.current_size();
        let len = self.len()?;
        let is_sound = |header: &DynamicHeader, at: u64| {
            let needed = size.div_ceil(u64::from(header.block_size()));
            let table = u64::from(header.max_table_entries()).min(needed) * BAT_ENTRY_LEN;
            let end = header.bat_offset().saturating_add(table);
            let is_over_header = header.bat_offset() < at + HEADER_LEN as u64 && at < end;
            table > 0 && end <= len && !is_over_header
        };
        let at = footer.header_offset().unwrap_or(USUAL_HEADER);
        if let Some(header) = self.header_at(at)?.filter(|header| is_sound(header, at)) {
            return Ok(Some((at, header)));
        }
        let usual = self.header_at(USUAL_HEADER)?.filter(|header| is_sound(header, USUAL_HEADER));
        if usual.is_some() {
            footer.set_header_offset(USUAL_HEADER);
            self.change("the footers lead to the dynamic header at 0x200");
        }
        Ok(usual.map(|header| (USUAL_HEADER, header)))
    }

    /// Makes the disk as large as its BAT has room for.
    fn fit_size(&mut self, header: &DynamicHeader, footer: &mut Footer) {
        let (size, original) = (footer.current_size(), footer.original_size());
        let block_size = u64::from(header.block_size());
        let room = u64::from(header.max_table_entries()) * block_size;
        if size > room {
            // What it had once may be what it has.
            let is_likely = original % SECTOR == 0 && original.div_ceil(block_size) * block_size == room;
            let right = if is_likely { original } else { room };
            self.lose(format!("the size was {size} bytes, of which the BAT has room for {right}"));
            self.change(format!("the size made {right} bytes"));
            footer.set_size(right);
        }
    }

    /// Leaves out locators that lie where none can: the image is not opened for writing with them.
    fn right_locators(&mut self, header: &mut DynamicHeader, footer: &Footer) -> Result<()> {
        let len = self.len()?;
        let batmap = self.batmap_of(footer, header).map_or(0..0, |(at, batmap)| at..batmap.offset() + batmap.len());
        let table = header.bat_offset()..header.bat_offset() + u64::from(header.max_table_entries()) * BAT_ENTRY_LEN;
        let head = 0..USUAL_HEADER + HEADER_LEN as u64;
        let is_right = |entry: &LocatorEntry| {
            let payload = entry.data_offset..entry.data_offset.saturating_add(u64::from(entry.data_length));
            let over = |other: &Range<u64>| payload.start < other.end && other.start < payload.end;
            payload.end <= len && (payload.is_empty() || (!over(&head) && !over(&table) && !over(&batmap)))
        };
        let used: Vec<_> = header.locators().filter(LocatorEntry::is_used).collect();
        let kept: Vec<_> = used.iter().filter(|entry| is_right(entry)).cloned().collect();
        if kept.len() < used.len() {
            for entry in used.iter().filter(|entry| !is_right(entry)) {
                self.lose(format!(
                    "parent locator {} at {:#x}, which is outside the file or over other structures",
                    entry.code.name(),
                    entry.data_offset
                ));
            }
            header.set_locators(&kept);
            self.change("parent locators that can't be read left out");
        }
        Ok(())
    }

    /// A header made of what the footer says and what the file looks like. Where there is one that fits the file so well,
    /// only one that fits better.
    fn new_header(&mut self, footer: &mut Footer, data_end: u64, than: Option<Fit>) -> Result<Option<DynamicHeader>> {
        let sizes = [2 << 20, 512 << 10, 1 << 20, 4 << 20, 8 << 20, 16 << 20, 256 << 10, 128 << 10, 64 << 10, 4096];
        let mut best: Option<(Fit, u64, u32)> = None;
        for block_size in sizes {
            let layout = Layout::new(footer.current_size(), block_size);
            if (1..=MAX_ENTRIES).contains(&layout.blocks())
                && let Some((fit, at)) = self.find_table(layout, data_end, best.map(|(fit, ..)| fit).or(than))?
            {
                best = Some((fit, at, block_size));
            }
        }
        if than.is_some() && best.is_none() {
            return Ok(None);
        }
        self.is_table_lost = best.is_none_or(|(fit, ..)| fit.good == 0);
        let (bat_offset, block_size) = best.map_or((USUAL_TABLE, sizes[0]), |(_, at, block_size)| (at, block_size));
        if best.is_none() {
            let blocks = Layout::new(footer.current_size(), block_size).blocks();
            if blocks == 0 || blocks > MAX_ENTRIES {
                return Ok(None);
            }
            let unused = (u64::from(blocks) * BAT_ENTRY_LEN).next_multiple_of(SECTOR);
            self.fill(0xFF, USUAL_TABLE..USUAL_TABLE + unused)?;
        }
        let entries = Layout::new(footer.current_size(), block_size).blocks();
        let mut header = DynamicHeader::new(&NewHeader { bat_offset, max_table_entries: entries, block_size });
        // What is left of the parent's identity is in the damaged one, if anything is.
        let mut old = [0; HEADER_LEN];
        let there = self.len()?.saturating_sub(USUAL_HEADER).min(HEADER_LEN as u64) as usize;
        self.read(&mut old[..there], USUAL_HEADER)?;
        let parent = old.get(40..56).and_then(|bytes| bytes.try_into().ok()).filter(|_| old.starts_with(&HEADER_COOKIE));
        if footer.disk_type() == DiskType::Differencing {
            header.set_parent(parent.unwrap_or_default(), Timestamp(0), "");
            self.lose("which image is its parent: vhd reparent --force tells it".into());
        }
        footer.set_header_offset(USUAL_HEADER);
        self.write(&header.to_bytes(), USUAL_HEADER)?;
        self.change(format!("the dynamic header made anew: BAT at {bat_offset:#x}, blocks of {block_size} bytes"));
        self.lose("what the dynamic header said; place of the BAT and block size were found by what fits the file".into());
        Ok(Some(header))
    }

    /// What is no block.
    fn metadata(&self, footer: &Footer, header: &DynamicHeader) -> Vec<Range<u64>> {
        let at = footer.header_offset().unwrap_or(USUAL_HEADER);
        let bat = header.bat_offset();
        let blocks = footer.current_size().div_ceil(u64::from(header.block_size()));
        let mut parts = vec![0..SECTOR, at..at + HEADER_LEN as u64, bat..bat + blocks * BAT_ENTRY_LEN];
        let used = header.locators().filter(|entry| entry.is_used() && entry.data_length > 0);
        parts.extend(used.map(|entry| entry.data_offset..entry.data_offset.saturating_add(u64::from(entry.data_length))));
        if let Some((at, batmap)) = self.batmap_of(footer, header) {
            parts.extend([at..at + SECTOR, batmap.offset()..batmap.offset() + batmap.len()]);
        }
        let len = self.len().unwrap_or(u64::MAX);
        parts.retain(|part| part.end <= len);
        parts
    }

    fn is_table_wrong(&self) -> bool {
        let codes = [
            Code::BlockOutside,
            Code::BlockCut,
            Code::BlockOverFooter,
            Code::BlockOverMetadata,
            Code::BlockDuplicate,
            Code::BlocksOverlap,
            Code::BatOutside,
        ];
        codes.into_iter().any(|code| self.found(code))
    }

    /// Writes both footers where they belong, if they are not what they should be.
    fn put_footers(&mut self, footers: &Footers, footer: &Footer, authority: Authority, table: &Table) -> Result<()> {
        let bytes = footer.to_bytes();
        let len = self.len()?;
        // Behind everything; in the file's last sector where that is free.
        let end = table.end(&**self.overlay)?;
        let whole = len - len % SECTOR;
        let place = match (authority, footers.trailing_is_short) {
            (Authority::Trailing, false) if footers.trailing_at >= end && footers.trailing_at + SECTOR == len => {
                footers.trailing_at
            }
            (Authority::Trailing, true) if footers.trailing_at >= end => footers.trailing_at,
            _ if whole >= end + SECTOR => whole - SECTOR,
            _ => FooterPlace::PageEnd.file_len(end) - SECTOR,
        };
        let mut found = vec![0; FOOTER_LEN];
        let there = len.saturating_sub(place).min(SECTOR) as usize;
        self.read(&mut found[..there], place)?;
        if !self.may_lose() && self.is_table_wrong() && place + SECTOR > len {
            // A longer file would hide what its end has lost.
            return Ok(());
        }
        if there < FOOTER_LEN || found != bytes || place + SECTOR != len {
            if !self.overlay.can_grow() && place + SECTOR != len {
                return Ok(());
            }
            if place + SECTOR != len {
                self.set_len(place + SECTOR)?;
            }
            self.write(&bytes, place)?;
            self.change("the trailing footer written");
        }
        let mut copy = vec![0; FOOTER_LEN];
        self.read(&mut copy, 0)?;
        if copy != bytes {
            self.write(&bytes, 0)?;
            self.change("the footer copy at the start written");
        }
        Ok(())
    }

    /// tapdisk's batmap, where one is that makes sense.
    fn batmap_of(&self, footer: &Footer, header: &DynamicHeader) -> Option<(u64, Batmap)> {
        let at = Batmap::header_offset(header.bat_offset(), header.max_table_entries());
        let len = self.len().ok()?;
        if footer.creator().app != *b"tap\0" || at.saturating_add(SECTOR) > len {
            return None;
        }
        let mut sector = [0; SECTOR as usize];
        self.read(&mut sector, at).ok()?;
        let batmap = Batmap::parse(&sector)?;
        (batmap.offset() >= at + SECTOR && batmap.offset() + batmap.len() <= len).then_some((at, batmap))
    }

    /// Puts a batmap whose map is nowhere behind its header, cleared, where there is room.
    fn new_batmap(&mut self, header: &DynamicHeader, table: &Table) -> Result<()> {
        let at = Batmap::header_offset(header.bat_offset(), header.max_table_entries());
        let mut sector = [0; SECTOR as usize];
        self.read(&mut sector, at)?;
        let Some(batmap) = Batmap::parse(&sector) else { return Ok(()) };
        let sectors = u64::from(table.layout.blocks()).div_ceil(8 * SECTOR);
        let map = at + SECTOR..at + SECTOR + sectors * SECTOR;
        let is_free = table.is_free(&**self.overlay, &map)? && map.end + SECTOR <= self.len()?;
        if is_free && (batmap.offset() != map.start || batmap.len() != map.end - map.start) {
            self.write(&batmap.cleared_at(map.start, u32::try_from(sectors).unwrap_or(u32::MAX)), at)?;
            self.fill(0, map)?;
            self.change("tapdisk's batmap made anew, cleared");
        }
        Ok(())
    }

    /// Clears a batmap that is wrong: then tapdisk looks at the sector bitmaps, which are right.
    fn batmap(&mut self, footer: &Footer, header: &DynamicHeader) -> Result<()> {
        let is_wrong =
            [Code::BatmapChecksum, Code::BatmapUnallocated, Code::BatmapNotFull].into_iter().any(|code| self.found(code));
        let Some((at, batmap)) = self.batmap_of(footer, header).filter(|_| is_wrong) else { return Ok(()) };
        if batmap.len() > super::MAX_MOVED {
            return Ok(());
        }
        self.fill(0, batmap.offset()..batmap.offset() + batmap.len())?;
        self.write(&batmap.cleared(), at)?;
        self.change("tapdisk's batmap cleared");
        Ok(())
    }
}
