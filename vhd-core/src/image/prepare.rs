//! What opening for writing looks at and mends, before the first write: nothing of the file may be in doubt that
//! writing builds upon.

use std::ops::Range;

use super::Sparse;
use super::footers::{Authority, Footers};
use super::open::Found;
use super::order::{Entries, Order, TablePart};
use crate::error::{Error, Result, fail};
use crate::format::{BAT_ENTRY_LEN, BAT_UNUSED, Batmap, HEADER_LEN, SECTOR};
use crate::layout::{DATA_ALIGNMENT, FooterPlace};
use crate::storage::Storage;

/// Refuses metadata that lies over other metadata, as writing one would change the other; and locators beyond the end of
/// the file, as blocks would come to lie over them when it grows.
pub(super) fn check_metadata(sparse: &Sparse, found: &Found) -> Result<()> {
    let file_len = found.footers.file_len;
    for locator in sparse.header.locators().filter(|locator| locator.is_used() && locator.data_length > 0) {
        let (at, len) = (locator.data_offset, u64::from(locator.data_length));
        if at.checked_add(len).is_none_or(|end| end > file_len) {
            fail!(
                Corrupt,
                "parent locator of {len} bytes at {at:#x} is beyond the end of the file ({file_len:#x} bytes), so it is not \
                 opened for writing; `vhd check` says more"
            );
        }
    }
    let header_at = found.footer.header_offset().unwrap_or(0);
    let bat = sparse.bat.offset();
    let mut parts = vec![
        ("footer copy", 0..SECTOR),
        ("dynamic header", header_at..header_at + HEADER_LEN as u64),
        ("BAT", bat..bat + u64::from(sparse.layout.blocks()) * BAT_ENTRY_LEN),
    ];
    if found.authority == Authority::Trailing {
        parts.push(("trailing footer", found.footers.trailing_at..file_len));
    }
    if let Some(batmap) = &sparse.batmap {
        parts.push(("batmap", batmap.offset()..batmap.offset() + batmap.len()));
    }
    parts.sort_by_key(|(_, range)| range.start);
    for pair in parts.windows(2) {
        let [(a, first), (b, second)] = pair else { continue };
        if first.end > second.start {
            fail!(
                Corrupt,
                "{a} at {:#x} and {b} at {:#x} overlap, so it is not opened for writing; `vhd check` says more",
                first.start,
                second.start
            );
        }
    }
    Ok(())
}

/// Free ranges of the file that are kept in mind. There may be millions, of blocks of 4 KiB; those beyond are found when the image
/// is opened again.
const MAX_FREE: usize = 256 << 10;

/// What is known of an image's blocks once all of them were looked at.
#[derive(Debug)]
pub(super) struct Scanned {
    pub(super) blocks: u32,
    /// Where the last one ends.
    pub(super) end: u64,
    pub(super) are_aligned: bool,
    /// What lies between them, after all metadata and before the trailing footer, where it holds a block.
    pub(super) free: Vec<Range<u64>>,
}

/// Looks at all blocks. Refuses what must not be written to: blocks that overlap each other, the metadata or the footer, or lie outside
/// the file.
pub(super) fn scan_blocks(storage: &dyn Storage, sparse: &Sparse, found: &Found) -> Result<Scanned> {
    let end = match found.authority {
        Authority::Trailing => found.footers.trailing_at,
        Authority::Copy => found.footers.file_len,
    };
    let advice = "so it is not opened for writing; `vhd check` says more";
    let judge = |sector: u32| {
        let slot = sparse.layout.slot(sector);
        if slot.end > end {
            let what = format!("ends at {:#x}, beyond the end of the data at {end:#x}", slot.end);
            fail!(Corrupt, "block at sector {sector:#x} {what}, {advice}");
        }
        if slot.start < sparse.metadata_max && sparse.metadata.iter().any(|part| slot.start < part.end && part.start < slot.end) {
            fail!(Corrupt, "block at sector {sector:#x} overlaps the metadata, {advice}");
        }
        Ok(())
    };
    let table = TablePart { offset: sparse.bat.offset(), blocks: 0..sparse.layout.blocks() };
    table.scan(storage, &mut |entries| {
        match entries {
            Entries::Read(_, entries) => {
                let mut used = entries.iter().map(|entry| u32::from_be_bytes(*entry)).filter(|entry| *entry != BAT_UNUSED);
                used.try_for_each(judge)?;
            }
            Entries::Zeros(_) => judge(0)?,
        }
        Ok(true)
    })?;
    let order = Order::of(storage, table, 0..BAT_UNUSED)?;
    let mut scanned =
        Scanned { blocks: u32::try_from(order.count()).unwrap_or(u32::MAX), end: 0, are_aligned: true, free: Vec::new() };
    let slot_len = sparse.layout.slot_len();
    let mut used_end = sparse.metadata_end(found.footers.file_len);
    let mut gap = |free: &mut Vec<Range<u64>>, slot: &Range<u64>| {
        if used_end + slot_len <= slot.start && free.len() < MAX_FREE {
            free.push(used_end..slot.start);
        }
        used_end = used_end.max(slot.end);
    };
    let mut cursor = order.ascending();
    let mut before = None;
    while let Some(placed) = cursor.next(storage)? {
        let slot = sparse.layout.slot(placed.sector());
        if let Some(before) = before.replace(placed.sector()).filter(|_| scanned.end > slot.start) {
            fail!(Corrupt, "blocks at sectors {before:#x} and {:#x} overlap, {advice}", placed.sector());
        }
        scanned.are_aligned &= (slot.start + sparse.layout.bitmap_len()) % DATA_ALIGNMENT == 0;
        scanned.end = slot.end;
        gap(&mut scanned.free, &slot);
    }
    let footer_at = found.footers.trailing_at;
    gap(&mut scanned.free, &(footer_at..footer_at));
    Ok(scanned)
}

/// Where this image's creator puts the trailing footer: what it did so far goes on.
pub(super) fn footer_place(are_aligned: bool, footers: &Footers, end: u64) -> FooterPlace {
    let all_aligned = footers.file_len % DATA_ALIGNMENT == 0 && are_aligned;
    if footers.trailing_at == end && !all_aligned { FooterPlace::BehindData } else { FooterPlace::PageEnd }
}

/// What opening an image for writing did to it.
#[derive(Debug)]
pub(super) struct Mended {
    /// Bytes of the file.
    pub(super) file_len: u64,
    /// What was found and what was written, one sentence each.
    pub(super) notes: Vec<String>,
}

/// Writes what a writable image needs: both footers valid and equal, the batmap cleared; then a barrier, if anything
/// changed. None between them: the footer that counts changes in one sector, to what says the same.
pub(super) fn mend(storage: &dyn Storage, sparse: &Sparse, found: &Found, end: u64) -> Result<Mended> {
    let footers = &found.footers;
    let bytes = found.footer.to_bytes();
    let mut file_len = footers.file_len;
    let mut notes = Vec::new();
    let write = |bytes: &[u8], at: u64| {
        storage.write_at(bytes, at).map_err(|error| Error::io(error, format!("can't be written at {at:#x}")))
    };
    if footers.trailing_is_short && found.authority == Authority::Trailing {
        file_len = complete_short_footer(storage, footers, &mut notes)?;
    } else if found.authority == Authority::Copy {
        // The last sector, where no block lies there; else behind the last block, where the file can grow.
        let last = file_len - file_len % SECTOR;
        file_len = match (last >= end + SECTOR, storage.can_grow()) {
            (true, _) => last,
            (false, true) => FooterPlace::PageEnd.file_len(end),
            (false, false) => {
                fail!(Corrupt, "the device's last sector, where its footer should be, is inside a block; `vhd check` says more")
            }
        };
        let at = file_len - SECTOR;
        write(&bytes, at)?;
        if file_len < footers.file_len {
            storage.set_len(file_len).map_err(|error| Error::io(error, "can't be shortened to whole sectors"))?;
        }
        let what = footers.trailing.as_ref().err().map(|error| format!(" ({error})")).unwrap_or_default();
        notes.push(format!("found no valid trailing footer{what}; written at {at:#x} from the copy at the start"));
    }
    if *footers.copy_bytes() != bytes {
        write(&bytes, 0)?;
        notes.push(match &footers.copy {
            Ok(_) => {
                "found that the footer copy at the start differs from the trailing footer, which counts; written from that".into()
            }
            Err(error) => format!("found no valid footer copy at the start ({error}); written from the footer that counts"),
        });
    }
    if let Some(batmap) = &sparse.batmap
        && clear_batmap(storage, sparse, batmap)?
    {
        notes.push("found tapdisk's batmap in use; cleared, so that tapdisk looks at the sector bitmaps".into());
    }
    mend_trailing(storage, found, &mut notes)?;
    if !notes.is_empty() {
        storage.sync().map_err(|error| Error::io(error, "can't be synced"))?;
    }
    Ok(Mended { file_len, notes })
}

/// As [`mend`], for a fixed disk, which has one footer only.
pub(super) fn mend_fixed(storage: &dyn Storage, found: &Found) -> Result<Mended> {
    let (footers, mut notes) = (&found.footers, Vec::new());
    let file_len = match footers.trailing_is_short {
        true => complete_short_footer(storage, footers, &mut notes)?,
        false => footers.file_len,
    };
    mend_trailing(storage, found, &mut notes)?;
    if !notes.is_empty() {
        storage.sync().map_err(|error| Error::io(error, "can't be synced"))?;
    }
    Ok(Mended { file_len, notes })
}

/// Rights the checksum of a trailing footer that counts: old tapdisks leave their hidden byte out of it, and others do
/// not open the image then. Only that sector changes, and what it says does not.
fn mend_trailing(storage: &dyn Storage, found: &Found, notes: &mut Vec<String>) -> Result<()> {
    let (footers, bytes) = (&found.footers, found.footer.to_bytes());
    if found.authority == Authority::Copy || *footers.trailing_bytes() == bytes {
        return Ok(());
    }
    let at = footers.trailing_at;
    storage.write_at(&bytes, at).map_err(|error| Error::io(error, format!("can't be written at {at:#x}")))?;
    notes.push("found a checksum of the trailing footer that leaves out its hidden byte; written with the right one".into());
    Ok(())
}

/// Clears tapdisk's batmap: whatever we write, it must not believe that a sector bitmap need not be read.
fn clear_batmap(storage: &dyn Storage, sparse: &Sparse, batmap: &Batmap) -> Result<bool> {
    let failed = |error| Error::io(error, "tapdisk's batmap can't be cleared");
    let mut offset = batmap.offset();
    let end = offset + batmap.len();
    let mut changed = false;
    let mut bytes = vec![0; 64 << 10];
    while offset < end {
        let chunk = usize::try_from(end - offset).unwrap_or(usize::MAX).min(bytes.len());
        storage.read_at(&mut bytes[..chunk], offset).map_err(failed)?;
        if bytes[..chunk].iter().any(|&byte| byte != 0) {
            storage.write_at(&vec![0; chunk], offset).map_err(failed)?;
            changed = true;
        }
        offset += chunk as u64;
    }
    if changed {
        let at = Batmap::header_offset(sparse.header.bat_offset(), sparse.header.max_table_entries());
        storage.write_at(&batmap.cleared(), at).map_err(failed)?;
    }
    Ok(changed)
}

/// Makes a 511-byte footer one of 512: the byte that is missing is a reserved zero.
fn complete_short_footer(storage: &dyn Storage, footers: &Footers, notes: &mut Vec<String>) -> Result<u64> {
    let len = footers.trailing_at + SECTOR;
    storage.set_len(len).map_err(|error| Error::io(error, "can't grow by the footer's last byte"))?;
    notes.push("found a trailing footer of 511 bytes, as Virtual PC wrote before 2004; its last byte written".into());
    Ok(len)
}
