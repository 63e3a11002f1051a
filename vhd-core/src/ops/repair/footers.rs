//! Footers, dynamic header, locators and batmap.

use std::ops::Range;

use uuid::Uuid;

use super::Repairer;
use super::table::Table;
use crate::error::{Error, Result};
use crate::format::{
    BAT_ENTRY_LEN, Batmap, Creator, DiskType, DynamicHeader, FOOTER_LEN, Footer, HEADER_COOKIE, HEADER_LEN, LocatorEntry,
    MAX_DISK_SIZE, NewFooter, NewHeader, SECTOR, Timestamp,
};
use crate::image::{Authority, Footers};
use crate::layout::{FooterPlace, Layout};
use crate::ops::check::Code;
use crate::storage::Storage;

/// Where every creator puts the header.
const USUAL_HEADER: u64 = 512;
/// Entries of a table that is put right: the largest disk in blocks of 512 KiB has a quarter of that.
const MAX_ENTRIES: u32 = 16 << 20;

impl Repairer<'_> {
    /// Everything but leaked space.
    pub(super) fn structures(&mut self) -> Result<()> {
        let footers = Footers::read(&**self.overlay).map_err(|error| Error::io(error, "can't be read"))?;
        let Some((mut footer, authority)) = self.footer(&footers)? else { return Ok(()) };
        let data_end = if authority == Authority::Trailing { footers.trailing_at } else { footers.file_len };
        if self.may_lose() {
            self.right_size(&mut footer);
        }
        if footer.disk_type() == DiskType::Fixed {
            return self.fixed(&footers, &footer);
        }
        let Some(header) = self.header(&mut footer, data_end)? else { return Ok(()) };
        let layout = Layout::new(footer.current_size(), header.block_size());
        if layout.blocks() > header.max_table_entries() || layout.blocks() > MAX_ENTRIES || layout.blocks() == 0 {
            return Ok(());
        }
        let metadata = self.metadata(&footer, &header);
        let mut table = self.read_table(layout, header.bat_offset(), metadata)?;
        if self.may_lose() && self.is_table_wrong() {
            self.right_table(&mut table, data_end)?;
        }
        self.put_footers(&footers, &footer, authority, &table)?;
        if self.may_lose() && self.found(Code::BatmapPlace) {
            self.new_batmap(&header, &table)?;
        }
        self.batmap(&footer, &header)
    }

    /// The footer that counts: a valid one, one with a wrong checksum alone, or one made of what the header says.
    fn footer(&mut self, footers: &Footers) -> Result<Option<(Footer, Authority)>> {
        if let Ok(found) = footers.authority(false) {
            return Ok(Some(found));
        }
        if let Ok((footer, authority)) = footers.authority(true) {
            let size = footer.current_size();
            let fits = footer.disk_type() != DiskType::Fixed || size <= footers.trailing_at;
            if (SECTOR..=MAX_DISK_SIZE).contains(&size) && fits {
                // A byte of it is wrong, perhaps one that does not matter; the rest makes sense.
                return Ok(Some((footer, authority)));
            }
        }
        let Some(header) = self.header_at(USUAL_HEADER)?.filter(|_| self.may_lose()) else { return Ok(None) };
        let size = (u64::from(header.max_table_entries()) * u64::from(header.block_size())).min(MAX_DISK_SIZE);
        let disk_type = if header.parent_uuid() == [0; 16] { DiskType::Dynamic } else { DiskType::Differencing };
        let uuid = Uuid::new_v4();
        self.change(format!("both footers made anew: a {} disk of {size} bytes", disk_type.name()));
        self.lose(format!(
            "the image's UUID (now {uuid}, so children will not find it), its creator, and its exact size: {size} bytes is what its BAT has room for"
        ));
        let new =
            NewFooter { disk_type, size, uuid: uuid.into_bytes(), creator: Creator::WINDOWS_10, timestamp: Timestamp::now() };
        Ok(Some((Footer::new(&new), Authority::Copy)))
    }

    fn header_at(&self, at: u64) -> Result<Option<DynamicHeader>> {
        if at.saturating_add(HEADER_LEN as u64) > self.len()? {
            return Ok(None);
        }
        let mut bytes = [0; HEADER_LEN];
        self.read(&mut bytes, at)?;
        Ok(DynamicHeader::parse_tolerant(&bytes).ok())
    }

    /// A size that can't be becomes what can.
    fn right_size(&mut self, footer: &mut Footer) {
        let size = footer.current_size();
        let right = (size - size % SECTOR).min(MAX_DISK_SIZE);
        if size != right && right > 0 {
            footer.set_size(right);
            self.change(format!("the size made {right} bytes"));
            self.lose(format!("the size was {size} bytes, of which {right} can be"));
        }
    }

    /// A fixed disk: all there is is its footer.
    fn fixed(&mut self, footers: &Footers, footer: &Footer) -> Result<()> {
        let size = footer.current_size();
        let mut at = footers.trailing_at;
        if size > at {
            if !self.may_lose() {
                return Ok(());
            }
            self.write(&vec![0; (footers.file_len - at) as usize], at)?;
            self.lose(format!("the last {} bytes of the disk are beyond the end of the file, and read as zeros", size - at));
            self.change("the file made as long as the disk");
            at = size;
        }
        let mut found = vec![0; FOOTER_LEN];
        let there = self.len()?.saturating_sub(at).min(SECTOR) as usize;
        self.read(&mut found[..there], at)?;
        if found != footer.to_bytes() || at + SECTOR != self.len()? {
            self.set_len(at + SECTOR)?;
            self.write(&footer.to_bytes(), at)?;
            self.change("the trailing footer written");
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.overlay.set_len(len).map_err(|error| Error::io(error, format!("can't be made {len} bytes long")))
    }

    /// The dynamic header, put right where it can be.
    fn header(&mut self, footer: &mut Footer, data_end: u64) -> Result<Option<DynamicHeader>> {
        let mut at = footer.header_offset().unwrap_or(USUAL_HEADER);
        let size = footer.current_size();
        let needed = |header: &DynamicHeader| size.div_ceil(u64::from(header.block_size()));
        let is_sound = |header: &DynamicHeader, at: u64, len: u64| {
            let table = u64::from(header.max_table_entries()).min(needed(header)) * BAT_ENTRY_LEN;
            let end = header.bat_offset().saturating_add(table);
            let is_over_header = header.bat_offset() < at + HEADER_LEN as u64 && at < end;
            end <= len && needed(header) > 0 && !is_over_header
        };
        let len = self.len()?;
        let mut found = self.header_at(at)?.filter(|header| is_sound(header, at, len));
        let usual = self.header_at(USUAL_HEADER)?.filter(|header| is_sound(header, USUAL_HEADER, len));
        if found.is_none() && usual.is_some() {
            // The footers lead astray, the header is where everyone puts it.
            footer.set_header_offset(USUAL_HEADER);
            at = USUAL_HEADER;
            found = usual;
            self.change("the footers lead to the dynamic header at 0x200");
        }
        let Some(mut header) = found else {
            return if self.may_lose() { self.new_header(footer, data_end) } else { Ok(None) };
        };
        let needed = needed(&header);
        if self.may_lose() && u64::from(header.max_table_entries()) < needed {
            let size = u64::from(header.max_table_entries()) * u64::from(header.block_size());
            if size == 0 {
                return Ok(None);
            }
            self.lose(format!("the size was {} bytes, of which the BAT has room for {size}", footer.current_size()));
            self.change(format!("the size made {size} bytes"));
            footer.set_size(size);
        }
        if self.may_lose() {
            self.right_locators(&mut header)?;
        }
        let mut bytes = [0; HEADER_LEN];
        self.read(&mut bytes, at)?;
        if header.to_bytes() != bytes {
            self.write(&header.to_bytes(), at)?;
            self.change("the dynamic header written with its checksum");
        }
        Ok(Some(header))
    }

    /// Leaves out locators that lie where none can: the image is not opened for writing with them.
    fn right_locators(&mut self, header: &mut DynamicHeader) -> Result<()> {
        let len = self.len()?;
        let table = header.bat_offset()..header.bat_offset() + u64::from(header.max_table_entries()) * BAT_ENTRY_LEN;
        let head = 0..USUAL_HEADER + HEADER_LEN as u64;
        let is_right = |entry: &LocatorEntry| {
            let payload = entry.data_offset..entry.data_offset.saturating_add(u64::from(entry.data_length));
            let over = |other: &Range<u64>| payload.start < other.end && other.start < payload.end;
            payload.end <= len && (payload.is_empty() || (!over(&head) && !over(&table)))
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

    /// A header made of what the footer says and what the file looks like.
    fn new_header(&mut self, footer: &mut Footer, data_end: u64) -> Result<Option<DynamicHeader>> {
        let sizes = [2 << 20, 512 << 10, 1 << 20, 4 << 20, 8 << 20, 16 << 20, 256 << 10, 128 << 10, 64 << 10, 4096];
        let mut best: Option<(usize, u64, u32)> = None;
        for block_size in sizes {
            let layout = Layout::new(footer.current_size(), block_size);
            if (1..=MAX_ENTRIES).contains(&layout.blocks())
                && let Some((used, at)) = self.find_table(layout, data_end)?
                && best.is_none_or(|(most, ..)| used > most)
            {
                best = Some((used, at, block_size));
            }
        }
        let Some((_, bat_offset, block_size)) = best else { return Ok(None) };
        let entries = Layout::new(footer.current_size(), block_size).blocks();
        let mut header = DynamicHeader::new(&NewHeader { bat_offset, max_table_entries: entries, block_size });
        // What is left of the parent's identity is in the damaged one, if anything is.
        let mut old = [0; HEADER_LEN];
        self.read(&mut old, USUAL_HEADER)?;
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
            Code::HeaderMissing,
            Code::HeaderOutside,
            Code::BatOffset,
            Code::BlockSize,
            Code::HeaderVersion,
            Code::NoValidFooter,
        ];
        codes.into_iter().any(|code| self.found(code))
    }

    /// Writes both footers where they belong, if they are not what they should be.
    fn put_footers(&mut self, footers: &Footers, footer: &Footer, authority: Authority, table: &Table) -> Result<()> {
        let bytes = footer.to_bytes();
        let len = self.len()?;
        // Behind everything; in the file's last sector where that is free.
        let end = table.end();
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
        let is_free = table.is_free(&map) && map.end + SECTOR <= self.len()?;
        if is_free && (batmap.offset() != map.start || batmap.len() != map.end - map.start) {
            self.write(&vec![0; (sectors * SECTOR) as usize], map.start)?;
            self.write(&batmap.cleared_at(map.start, u32::try_from(sectors).unwrap_or(u32::MAX)), at)?;
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
        self.write(&vec![0; batmap.len() as usize], batmap.offset())?;
        self.write(&batmap.cleared(), at)?;
        self.change("tapdisk's batmap cleared");
        Ok(())
    }
}
