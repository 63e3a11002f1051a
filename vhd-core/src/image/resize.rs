//! Giving a dynamic or differencing image another size: its metadata is laid out anew at the front of the file, with a table
//! for as many blocks, while what counts meanwhile is a copy of it at the end.

use std::path::Path;
use std::sync::Arc;

use super::blocks::Blocks;
use super::{Footers, Image, OpenOptions};
use crate::error::{Error, ErrorKind, Result, fail};
use crate::format::{BAT_ENTRY_LEN, Batmap, DiskType, DynamicHeader, FOOTER_LEN, Footer, HEADER_LEN, LocatorEntry, SECTOR};
use crate::layout::{DATA_ALIGNMENT, FooterPlace};
use crate::storage::Storage;

/// Where every creator puts the header.
const HEADER_AT: u64 = FOOTER_LEN as u64;
/// Where the BAT may be at the earliest.
const HEADER_END: u64 = HEADER_AT + HEADER_LEN as u64;
/// Bytes that are written at once.
const CHUNK: usize = 1 << 20;
/// Bytes that the locators which move may have together: they are paths.
const MAX_LOCATORS: u64 = 16 << 20;

impl Image {
    /// Gives the dynamic or differencing image in `storage`, which is not open otherwise, a size of `size` bytes, a
    /// multiple of 512. What is beyond it is lost; what is new reads as zeros. Calls `advance` with bytes that were moved.
    /// Where `dry` it only counts them. The caller opens the image for writing next: that is the last barrier.
    ///
    /// # Errors
    /// `Unsupported` on a device, which can't grow; those of [`Image::open`].
    pub(crate) fn set_size(
        storage: &Arc<dyn Storage>,
        path: &Path,
        size: u64,
        options: &OpenOptions,
        dry: bool,
        advance: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        // Mended first: both footers must be sound when one of them changes.
        let options = OpenOptions { writable: !dry, background_flush: None, ..options.clone() };
        let image = Self::open(Arc::clone(storage), path, &options)?;
        let Some(header) = image.header().cloned().filter(|_| !dry || size != image.size()) else { return Ok(()) };
        if !storage.can_grow() {
            fail!(Unsupported, "is on a device: another size needs room that it does not have; convert it to a file first");
        }
        if size != image.size() {
            let mut blocks = Blocks::of(&image, dry)?;
            blocks.clear_beyond_end(image.size(), image.footer().disk_type() == DiskType::Differencing)?;
            let batmap = image.sparse.as_ref().and_then(|sparse| sparse.batmap.as_ref());
            let entries = u32::try_from(size.div_ceil(u64::from(header.block_size()))).unwrap_or(u32::MAX);
            let front = Front::plan(&**storage, &header, &blocks, entries, batmap)?;
            blocks.clear_until(front.end, advance)?;
            if dry {
                return Ok(());
            }
            Relayout { storage: &**storage, footer: image.footer(), old: &header, blocks: &blocks, size }.run(&front)?;
        }
        image.close()?;
        drop(image);
        // What lay behind the last block is nobody's any more.
        let image = Self::open(Arc::clone(storage), path, &options)?;
        Blocks::of(&image, false)?.shorten()
    }
}

/// The metadata at the front of the file, as it will be.
struct Front {
    header: DynamicHeader,
    /// The batmap's header, and bytes of the map behind it.
    batmap: Option<([u8; 512], u64)>,
    batmap_at: u64,
    /// Locators that come to lie behind the BAT.
    payloads: Vec<(u64, Vec<u8>)>,
    /// Where blocks may begin.
    end: u64,
}

impl Front {
    fn plan(storage: &dyn Storage, old: &DynamicHeader, blocks: &Blocks, entries: u32, batmap: Option<&Batmap>) -> Result<Self> {
        let used: Vec<_> = old.locators().filter(LocatorEntry::is_used).collect();
        let first_slot = blocks.first_slot()?.unwrap_or(u64::MAX);
        let before = |at: u64| {
            let ends = used.iter().map(|entry| entry.data_offset.saturating_add(entry.reserved_len()));
            ends.filter(|end| *end <= at).max().unwrap_or(HEADER_END).max(HEADER_END).next_multiple_of(SECTOR)
        };
        // Behind the blocks it was put by an interruption; it goes back.
        let bat_at = if (HEADER_END..first_slot).contains(&old.bat_offset()) { old.bat_offset() } else { before(first_slot) };
        let batmap_at = Batmap::header_offset(bat_at, entries);
        let batmap = batmap.map(|batmap| {
            let sectors = u64::from(entries).div_ceil(8 * SECTOR);
            (batmap.cleared_at(batmap_at + SECTOR, u32::try_from(sectors).unwrap_or(u32::MAX)), sectors * SECTOR)
        });
        let mut end = batmap_at + batmap.as_ref().map_or(0, |(_, len)| SECTOR + len);
        let stays = |entry: &LocatorEntry| {
            entry.data_offset >= HEADER_END && entry.data_offset.saturating_add(entry.reserved_len()) <= bat_at
        };
        let moving: u64 = used.iter().filter(|entry| !stays(entry)).map(|entry| u64::from(entry.data_length)).sum();
        if moving > MAX_LOCATORS {
            fail!(Unsupported, "its parent locators have {moving} bytes, more than paths do; see `vhd check`");
        }
        let mut payloads = Vec::new();
        let mut locators = Vec::new();
        for mut entry in used {
            if !stays(&entry) {
                let mut payload = vec![0; entry.data_length as usize];
                storage.read_at(&mut payload, entry.data_offset).map_err(|error| Error::io(error, "can't be read"))?;
                let room = u64::from(entry.data_length).next_multiple_of(SECTOR);
                entry.data_space = u32::try_from(room).unwrap_or(u32::MAX);
                entry.data_offset = end;
                payloads.push((end, payload));
                end += room;
            }
            locators.push(entry);
        }
        let mut header = old.clone();
        header.set_table(bat_at, entries);
        header.set_locators(&locators);
        Ok(Self { header, batmap, batmap_at, payloads, end })
    }
}

/// One change of size.
struct Relayout<'a> {
    storage: &'a dyn Storage,
    footer: &'a Footer,
    old: &'a DynamicHeader,
    blocks: &'a Blocks,
    size: u64,
}

impl Relayout<'_> {
    fn run(&self, front: &Front) -> Result<()> {
        let footers = Footers::read(self.storage).map_err(|error| Error::io(error, "can't be read"))?;
        // An image that holds no block may end before the new table does, which must not lie over the copy that counts.
        let header_at = footers.file_len.max(front.end).next_multiple_of(DATA_ALIGNMENT);
        let bat_at = header_at + HEADER_LEN as u64;
        let (old_bat, blocks) = self.blocks.table();
        let bat_len = (u64::from(blocks) * BAT_ENTRY_LEN).next_multiple_of(SECTOR);
        let mut at = bat_at + bat_len;
        let mut passing = self.old.clone();
        passing.set_table(bat_at, blocks);
        // Those that stay where they are do so in both headers.
        let mut moving = front.payloads.iter();
        let mut payloads = Vec::new();
        let locators: Vec<_> = front
            .header
            .locators()
            .filter(LocatorEntry::is_used)
            .map(|mut entry| {
                if let Some((_, payload)) = moving.as_slice().first().filter(|(front, _)| *front == entry.data_offset) {
                    moving.next();
                    entry.data_offset = at;
                    payloads.push((at, payload));
                    at += (payload.len() as u64).next_multiple_of(SECTOR);
                }
                entry
            })
            .collect();
        passing.set_locators(&locators);
        // A sector of zeros behind the table: where tapdisk's batmap would be there is none.
        let len = FooterPlace::PageEnd.file_len(at + SECTOR);
        let copy = || {
            self.storage.set_len(len).map_err(|error| Error::io(error, format!("can't grow to {len} bytes")))?;
            self.write(&passing.to_bytes(), header_at)?;
            self.write_table(old_bat, blocks, bat_at)?;
            payloads.into_iter().try_for_each(|(at, payload)| self.write(payload, at))?;
            self.write(&self.footer.to_bytes(), len - SECTOR)
        };
        // As it was, where there is no room: a footer stands at the old end.
        copy().inspect_err(|_| drop(self.storage.set_len(footers.file_len)))?;
        self.sync()?;
        let mut footer = self.footer.clone();
        footer.set_header_offset(header_at);
        self.lead(&footer, len)?;
        self.sync()?;
        // What is at the front is nobody's now.
        self.write(&front.header.to_bytes(), HEADER_AT)?;
        self.write_table(bat_at, front.header.max_table_entries(), front.header.bat_offset())?;
        if let Some((header, map_len)) = &front.batmap {
            self.write(header, front.batmap_at)?;
            self.zero(front.batmap_at + SECTOR, *map_len)?;
        }
        front.payloads.iter().try_for_each(|(at, payload)| self.write(payload, *at))?;
        self.sync()?;
        footer.set_header_offset(HEADER_AT);
        footer.set_size(self.size);
        // Durable before anything else is written: the image is opened next, which begins with a barrier.
        self.lead(&footer, len)
    }

    /// Writes the table for as many blocks: those there are in the table at `from`, then unused ones.
    fn write_table(&self, from: u64, entries: u32, at: u64) -> Result<()> {
        let there = u64::from(self.blocks.table().1.min(entries)) * BAT_ENTRY_LEN;
        let len = (u64::from(entries) * BAT_ENTRY_LEN).next_multiple_of(SECTOR);
        let mut buffer = vec![0; CHUNK];
        let mut done = 0;
        while done < len {
            let bytes = &mut buffer[..(len - done).min(CHUNK as u64) as usize];
            let old = there.saturating_sub(done).min(bytes.len() as u64) as usize;
            bytes[old..].fill(0xFF);
            self.storage
                .read_at(&mut bytes[..old], from + done)
                .map_err(|error| Error::io(error, format!("can't be read at {:#x}", from + done)))?;
            self.write(bytes, at + done)?;
            done += bytes.len() as u64;
        }
        Ok(())
    }

    fn zero(&self, at: u64, len: u64) -> Result<()> {
        let zeros = vec![0; CHUNK];
        (0..len).step_by(CHUNK).try_for_each(|done| self.write(&zeros[..(len - done).min(CHUNK as u64) as usize], at + done))
    }

    /// Makes both footers this one: either alone is right, in whatever order they arrive.
    fn lead(&self, footer: &Footer, len: u64) -> Result<()> {
        self.write(&footer.to_bytes(), 0)?;
        self.write(&footer.to_bytes(), len - SECTOR)
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.storage.write_at(bytes, at).map_err(|error| Error::io(error, format!("can't be written at {at:#x}")))
    }

    fn sync(&self) -> Result<()> {
        // Whatever the reason, nothing is known of what was written.
        self.storage.sync().map_err(|error| Error::io(error, "can't be synced").with_kind(ErrorKind::Io))
    }
}
