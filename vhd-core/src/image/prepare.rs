//! What opening for writing looks at and mends, before the first write: nothing of the file may be in doubt that
//! writing builds upon.

use std::ops::Range;

use super::Sparse;
use super::footers::{Authority, Footers};
use super::open::Found;
use crate::error::{Error, Result, fail};
use crate::format::{BAT_ENTRY_LEN, Batmap, HEADER_LEN, SECTOR};
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

/// First sectors of all blocks, ascending. Refuses what must not be written to: blocks that overlap each other, the
/// metadata or the footer, or lie outside the file.
pub(super) fn scan_blocks(storage: &dyn Storage, sparse: &Sparse, found: &Found) -> Result<Vec<u32>> {
    let end = match found.authority {
        Authority::Trailing => found.footers.trailing_at,
        Authority::Copy => found.footers.file_len,
    };
    let advice = "so it is not opened for writing; `vhd check` says more";
    // More blocks than have room overlap, and need not all be kept to find out where: a hole in the file reads as a table
    // of millions of entries.
    let most = usize::try_from(end / sparse.layout.slot_len()).unwrap_or(usize::MAX);
    let (mut sectors, mut wrong) = (Vec::new(), None);
    let judge = |sector: u32| {
        let slot = sparse.layout.slot(sector);
        if slot.end > end {
            let what = format!("ends at {:#x}, beyond the end of the data at {end:#x}", slot.end);
            return Err(format!("block at sector {sector:#x} {what}, {advice}"));
        }
        if slot.start < sparse.metadata_max && sparse.metadata.iter().any(|part| slot.start < part.end && part.start < slot.end) {
            return Err(format!("block at sector {sector:#x} overlaps the metadata, {advice}"));
        }
        Ok(())
    };
    let scanned = sparse.bat.scan(storage, |_, sector| {
        if wrong.is_none() && sectors.len() <= most {
            wrong = judge(sector).err();
            sectors.push(sector);
        }
    });
    scanned.map_err(|error| Error::io(error, "BAT can't be read"))?;
    if let Some(message) = wrong {
        fail!(Corrupt, "{message}");
    }
    sectors.sort_unstable();
    for pair in sectors.windows(2) {
        if sparse.layout.slot(pair[0]).end > sparse.layout.slot(pair[1]).start {
            fail!(Corrupt, "blocks at sectors {:#x} and {:#x} overlap, {advice}", pair[0], pair[1]);
        }
    }
    Ok(sectors)
}

/// Where this image's creator puts the trailing footer: what it did so far goes on.
pub(super) fn footer_place(sparse: &Sparse, blocks: &[u32], footers: &Footers, end: u64) -> FooterPlace {
    let is_aligned = |offset: u64| offset % DATA_ALIGNMENT == 0;
    let all_aligned = is_aligned(footers.file_len) && blocks.iter().all(|&sector| is_aligned(sparse.layout.data_offset(sector)));
    if footers.trailing_at == end && !all_aligned { FooterPlace::BehindData } else { FooterPlace::PageEnd }
}

/// What lies between the blocks, after all metadata and before the trailing footer, where it holds a block.
pub(super) fn free_ranges(sparse: &Sparse, blocks: &[u32], footers: &Footers) -> Vec<Range<u64>> {
    let mut free = Vec::new();
    let mut end = sparse.metadata_end(footers.file_len);
    let footer_at = footers.trailing_at;
    let footer = footer_at..footer_at;
    for slot in blocks.iter().map(|&sector| sparse.layout.slot(sector)).chain(std::iter::once(footer)) {
        if end + sparse.layout.slot_len() <= slot.start {
            free.push(end..slot.start);
        }
        end = end.max(slot.end);
    }
    free
}

/// Writes what a writable image needs: both footers valid and equal, the batmap cleared; then a barrier, if anything
/// changed. None between them: the footer that counts changes in one sector, to what says the same. Returns the file's
/// length.
pub(super) fn mend(storage: &dyn Storage, sparse: &Sparse, found: &Found, end: u64) -> Result<u64> {
    let footers = &found.footers;
    let bytes = found.footer.to_bytes();
    let mut file_len = footers.file_len;
    let mut changed = false;
    let write = |bytes: &[u8], at: u64| {
        storage.write_at(bytes, at).map_err(|error| Error::io(error, format!("can't be written at {at:#x}")))
    };
    if footers.trailing_is_short && found.authority == Authority::Trailing {
        file_len = complete_short_footer(storage, footers)?;
        changed = true;
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
        write(&bytes, file_len - SECTOR)?;
        if file_len < footers.file_len {
            storage.set_len(file_len).map_err(|error| Error::io(error, "can't be shortened to whole sectors"))?;
        }
        changed = true;
    }
    if *footers.copy_bytes() != bytes {
        write(&bytes, 0)?;
        changed = true;
    }
    if let Some(batmap) = &sparse.batmap {
        changed |= clear_batmap(storage, sparse, batmap)?;
    }
    changed |= mend_trailing(storage, found)?;
    if changed {
        storage.sync().map_err(|error| Error::io(error, "can't be synced"))?;
    }
    Ok(file_len)
}

/// As [`mend`], for a fixed disk, which has one footer only.
pub(super) fn mend_fixed(storage: &dyn Storage, found: &Found) -> Result<u64> {
    let footers = &found.footers;
    let file_len = if footers.trailing_is_short { complete_short_footer(storage, footers)? } else { footers.file_len };
    if mend_trailing(storage, found)? || footers.trailing_is_short {
        storage.sync().map_err(|error| Error::io(error, "can't be synced"))?;
    }
    Ok(file_len)
}

/// Rights the checksum of a trailing footer that counts: old tapdisks leave their hidden byte out of it, and others do
/// not open the image then. Only that sector changes, and what it says does not. True if it was written.
fn mend_trailing(storage: &dyn Storage, found: &Found) -> Result<bool> {
    let (footers, bytes) = (&found.footers, found.footer.to_bytes());
    if found.authority == Authority::Copy || *footers.trailing_bytes() == bytes {
        return Ok(false);
    }
    let at = footers.trailing_at;
    storage.write_at(&bytes, at).map_err(|error| Error::io(error, format!("can't be written at {at:#x}")))?;
    Ok(true)
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
fn complete_short_footer(storage: &dyn Storage, footers: &Footers) -> Result<u64> {
    let len = footers.trailing_at + SECTOR;
    storage.set_len(len).map_err(|error| Error::io(error, "can't grow by the footer's last byte"))?;
    Ok(len)
}
