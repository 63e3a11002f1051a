//! Giving a differencing image another parent, or another parent locator, while every state between leads to the old one
//! or to the new one.

use std::path::Path;
use std::sync::Arc;

use super::create::{ParentLink, locator_texts};
use super::{Footers, Image, OpenOptions};
use crate::error::{Error, ErrorKind, Result, fail};
use crate::format::{
    DynamicHeader, FOOTER_LEN, Footer, HEADER_LEN, LocatorEntry, PlatformCode, SECTOR, Timestamp, encode_locator,
};
use crate::layout::{DATA_ALIGNMENT, FooterPlace};
use crate::storage::Storage;

/// Slots of the locator table.
const SLOTS: usize = 8;

/// A header and the payloads of its locators, placed.
struct Placed {
    header: DynamicHeader,
    payloads: Vec<(u64, Vec<u8>)>,
}

impl Image {
    /// Makes the differencing image in `storage`, which is not open otherwise, a child of what `link` names. Locators
    /// that hold paths are replaced; others stay.
    ///
    /// The header and its locators are more than one sector. So they are written to the file's end first, and the
    /// footers, of one sector each, lead there while the ones in place are rewritten; then back.
    ///
    /// # Errors
    /// `InvalidInput` when it has no parent; `Unsupported` on a device, which can't grow; those of [`Image::open`].
    pub(crate) fn set_parent(storage: &Arc<dyn Storage>, path: &Path, link: &ParentLink, options: &OpenOptions) -> Result<()> {
        // Mended first: both footers must be sound when one of them changes.
        let options = OpenOptions { writable: true, background_flush: None, ..options.clone() };
        let image = Self::open(Arc::clone(storage), path, &options)?;
        let (Some(header), Some(at)) = (image.header().cloned(), image.footer().header_offset()) else {
            fail!(InvalidInput, "is a fixed disk: it has no parent");
        };
        if image.footer().disk_type() != crate::format::DiskType::Differencing {
            fail!(InvalidInput, "is a dynamic disk: it has no parent");
        }
        image.close()?;
        drop(image);
        Relink { storage: &**storage, at, link }.run(&header)
    }
}

/// One change of parent.
struct Relink<'a> {
    storage: &'a dyn Storage,
    /// Where the header is.
    at: u64,
    link: &'a ParentLink,
}

impl Relink<'_> {
    fn run(&self, old: &DynamicHeader) -> Result<()> {
        let footers = Footers::read(self.storage).map_err(|error| Error::io(error, "can't be read"))?;
        let (footer, _) = footers.authority(false).map_err(|error| Error::new(ErrorKind::Corrupt, error.to_string()))?;
        let in_place = self.place_in(self.rooms(old, footers.trailing_at), old);
        if let Some(placed) = &in_place
            && self.is_one_sector(old, placed)?
        {
            self.write(&placed.header.to_bytes()[..SECTOR as usize], self.at)?;
            return self.sync();
        }
        if !self.storage.can_grow() {
            fail!(Unsupported, "is on a device: another parent needs room that it does not have; convert it to a file first");
        }
        let len = footers.file_len;
        let passing = self.place_at(len.next_multiple_of(DATA_ALIGNMENT), old);
        let header_at = end_of(&passing, len).next_multiple_of(SECTOR);
        let longer = FooterPlace::PageEnd.file_len(header_at + HEADER_LEN as u64);
        self.set_len(longer)?;
        self.write_placed(&passing, header_at)?;
        self.write(&footer.to_bytes(), longer - SECTOR)?;
        self.sync()?;
        self.lead_to(&footer, header_at, longer)?;
        self.sync()?;
        // What was in place is nobody's now.
        self.write_placed(in_place.as_ref().unwrap_or(&passing), self.at)?;
        self.sync()?;
        self.lead_to(&footer, self.at, longer)?;
        if in_place.is_some() {
            // The footer that was the last one still says the same: no barrier before, whichever arrives.
            self.set_len(len)?;
        }
        self.sync()
    }

    /// Makes both footers lead to the header at `at`: either alone is right, in whatever order they arrive.
    fn lead_to(&self, footer: &Footer, at: u64, len: u64) -> Result<()> {
        let mut footer = footer.clone();
        footer.set_header_offset(at);
        self.write(&footer.to_bytes(), 0)?;
        self.write(&footer.to_bytes(), len - SECTOR)
    }

    /// True when nothing but the header's first sector would change.
    fn is_one_sector(&self, old: &DynamicHeader, new: &Placed) -> Result<bool> {
        if old.to_bytes()[SECTOR as usize..] != new.header.to_bytes()[SECTOR as usize..] {
            return Ok(false);
        }
        for (at, payload) in &new.payloads {
            let mut found = vec![0; payload.len()];
            self.storage.read_at(&mut found, *at).map_err(|error| Error::io(error, "can't be read"))?;
            if found != *payload {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The room of the locators that are replaced. What they say of it themselves counts only as far as nothing else
    /// begins there.
    fn rooms(&self, old: &DynamicHeader, footer_at: u64) -> Vec<(u64, u64)> {
        let others = [self.at, old.bat_offset(), footer_at];
        let used: Vec<_> = old.locators().filter(LocatorEntry::is_used).collect();
        let begins = |at: u64| used.iter().map(|entry| entry.data_offset).chain(others).filter(|other| *other > at).min();
        let replaced = used.iter().filter(|entry| holds_path(entry.code));
        let room = |entry: &LocatorEntry| {
            let next = begins(entry.data_offset).unwrap_or(entry.data_offset);
            let sure = u64::from(entry.data_length).next_multiple_of(SECTOR);
            let said = u64::from(entry.data_space);
            // A header of ours or of Windows has blocks behind its BAT only.
            let room = if entry.data_offset < old.bat_offset() && said % SECTOR == 0 { said.max(sure) } else { sure };
            (entry.data_offset, room.min(next - entry.data_offset))
        };
        let mut rooms: Vec<_> = replaced.map(room).collect();
        rooms.sort_unstable();
        rooms
    }

    fn new_header(&self, old: &DynamicHeader, entries: Vec<LocatorEntry>) -> DynamicHeader {
        let mut header = old.clone();
        header.set_parent(self.link.uuid, Timestamp(0), &self.link.name);
        let kept = old.locators().filter(|entry| entry.is_used() && !holds_path(entry.code));
        // Of ours the most useful come first, if there are not slots for all.
        let kept: Vec<_> = kept.take(SLOTS - 1).collect();
        let mut all = entries;
        all.truncate(SLOTS - kept.len());
        all.extend(kept);
        header.set_locators(&all);
        header
    }

    /// Places the locators in these rooms, if all fit: each in one of its own, or as many in one as it holds.
    fn place_in(&self, rooms: Vec<(u64, u64)>, old: &DynamicHeader) -> Option<Placed> {
        let mut rooms = rooms;
        let shared = rooms.len() < locator_texts(self.link).len();
        let mut placed = Vec::new();
        for (code, text) in locator_texts(self.link) {
            let payload = encode_locator(code, &text);
            let needed = (payload.len() as u64).next_multiple_of(SECTOR);
            let (at, room) = rooms.iter_mut().find(|(_, room)| *room >= needed)?;
            let taken = if shared { needed } else { *room };
            placed.push((entry(code, *at, taken, &payload), payload));
            (*at, *room) = (*at + taken, *room - taken);
        }
        Some(self.placed(placed, old))
    }

    /// Places the locators from `at` on.
    fn place_at(&self, at: u64, old: &DynamicHeader) -> Placed {
        let mut at = at;
        let mut placed = Vec::new();
        for (code, text) in locator_texts(self.link) {
            let payload = encode_locator(code, &text);
            let room = (payload.len() as u64).next_multiple_of(SECTOR);
            placed.push((entry(code, at, room, &payload), payload));
            at += room;
        }
        self.placed(placed, old)
    }

    fn placed(&self, placed: Vec<(LocatorEntry, Vec<u8>)>, old: &DynamicHeader) -> Placed {
        let entries = placed.iter().map(|(entry, _)| entry.clone()).collect();
        let payloads = placed.into_iter().map(|(entry, payload)| (entry.data_offset, payload)).collect();
        Placed { header: self.new_header(old, entries), payloads }
    }

    fn write_placed(&self, placed: &Placed, header_at: u64) -> Result<()> {
        for (at, payload) in &placed.payloads {
            self.write(payload, *at)?;
        }
        self.write(&placed.header.to_bytes(), header_at)
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.storage.write_at(bytes, at).map_err(|error| Error::io(error, format!("can't be written at {at:#x}")))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.storage.set_len(len).map_err(|error| Error::io(error, format!("can't be made {len} bytes long")))
    }

    fn sync(&self) -> Result<()> {
        self.storage.sync().map_err(|error| Error::io(error, "can't be synced"))
    }
}

fn holds_path(code: PlatformCode) -> bool {
    !matches!(code, PlatformCode::None | PlatformCode::Mac | PlatformCode::Other(_))
}

fn entry(code: PlatformCode, at: u64, room: u64, payload: &[u8]) -> LocatorEntry {
    let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    LocatorEntry { code, data_space: narrow(room), data_length: narrow(payload.len() as u64), data_offset: at }
}

/// Where the payloads end.
fn end_of(placed: &Placed, start: u64) -> u64 {
    placed.payloads.iter().map(|(at, payload)| at + payload.len() as u64).max().unwrap_or(start)
}

const _: () = assert!(FOOTER_LEN as u64 == SECTOR);
