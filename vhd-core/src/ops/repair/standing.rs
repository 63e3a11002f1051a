//! An image against its undo journal: what of it is as it was, what is as the repair left it, and what is somebody else's.

use std::ops::Range;

use super::journal::{CHUNK, CRC, Journal, Sums, chunks, data_in, failed, sectors_of};
use crate::error::{Error, Result};
use crate::format::{BAT_ENTRY_LEN, BAT_UNUSED, DiskType, DynamicHeader, HEADER_LEN, SECTOR};
use crate::image::{Footers, TablePart};
use crate::layout::Layout;
use crate::ops::copy::is_zero;
use crate::storage::Storage;

/// What an image holds where its repair wrote.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Something is as it was before the repair, and not as the repair left it.
    pub original: bool,
    /// Something is as the repair left it, and not as it was before.
    pub repaired: bool,
    /// What is neither: it was written since.
    pub other: Option<String>,
}

impl Journal {
    /// Compares an image with what the journal knows of it.
    ///
    /// # Errors
    /// As the host fails.
    pub fn compare(&self, image: &dyn Storage) -> Result<Standing> {
        let [before, after] = self.len;
        let len = image.len().map_err(|error| Error::io(error, "can't be examined"))?;
        let mut standing =
            Standing { original: len == before && before != after, repaired: len == after && before != after, other: None };
        if len != before && len != after {
            standing.other = Some(format!("has {len} bytes, {after} after the repair"));
            return Ok(standing);
        }
        let mut comparison = Comparison { journal: self, image, len, standing };
        let mut added = before;
        for index in 0..self.written.len() {
            let range = &self.written[index];
            // What was added and not written was zeros, as a gap before a block.
            comparison.zeros(added..range.start)?;
            comparison.written(index)?;
            added = added.max(range.end);
        }
        comparison.zeros(added..after)?;
        if len == before && before > after {
            comparison.cut_off(after)?;
        }
        Ok(comparison.standing)
    }

    /// What an undo would cut off that is nowhere else. A repair adds copies of blocks, zeros and footers.
    ///
    /// # Errors
    /// As the host fails.
    pub(super) fn cuts_off(&self, image: &dyn Storage) -> Result<Option<String>> {
        let before = self.len[0];
        let len = image.len().map_err(failed)?;
        let Some((footer, _)) = Footers::read(image).map_err(failed)?.authority(true).ok().filter(|_| len > before) else {
            return Ok(None);
        };
        if footer.disk_type() == DiskType::Fixed {
            let data = before..footer.current_size().min(len).max(before);
            let is_lost = data_in(image, data.clone(), 0)? > 0;
            return Ok(is_lost.then(|| format!("has data from {:#x} to {:#x}, which would be cut off", data.start, data.end)));
        }
        let mut header = [0; HEADER_LEN];
        let at = footer.header_offset().filter(|at| at.saturating_add(HEADER_LEN as u64) <= len).unwrap_or(0);
        image.read_at(&mut header, at).map_err(failed)?;
        let Ok(header) = DynamicHeader::parse_tolerant(&header) else { return Ok(None) };
        let layout = Layout::new(footer.current_size(), header.block_size());
        let blocks = layout.blocks().min(header.max_table_entries());
        let table = TablePart { offset: header.bat_offset(), blocks: 0..blocks };
        let mut beyond = Vec::new();
        table.used(image, |block, sector| {
            let slot = layout.slot(sector);
            // More than have room is no sound image, and one is enough.
            if slot.end > before && slot.start < len && beyond.len() as u64 <= len / layout.slot_len() {
                beyond.push((block, slot));
            }
        })?;
        let (mut now, mut old) = (vec![0; CHUNK], vec![0; CHUNK]);
        for (block, slot) in beyond {
            let mut entry = [0; BAT_ENTRY_LEN as usize];
            self.read_restored(image, &mut entry, table.offset + u64::from(block) * BAT_ENTRY_LEN)?;
            let source =
                Some(u32::from_be_bytes(entry)).filter(|entry| *entry != BAT_UNUSED).map(|entry| layout.slot(entry).start);
            for (at, len) in chunks(&(slot.start.max(before)..slot.end.min(len))) {
                let (now, old) = (&mut now[..len], &mut old[..len]);
                image.read_at(now, at).map_err(failed)?;
                old.fill(0);
                if let Some(source) = source {
                    self.read_restored(image, old, source + at - slot.start)?;
                }
                if now != old {
                    return Ok(Some(format!(
                        "has block {block} at {:#x}, which would be cut off and is nowhere else",
                        slot.start
                    )));
                }
            }
        }
        Ok(None)
    }

    /// What the image would hold; zeros beyond its end.
    fn read_restored(&self, image: &dyn Storage, bytes: &mut [u8], at: u64) -> Result<()> {
        let end = self.len[0].min(image.len().map_err(failed)?);
        let there = end.saturating_sub(at).min(bytes.len() as u64) as usize;
        bytes[there..].fill(0);
        image.read_at(&mut bytes[..there], at).map_err(failed)?;
        let end = at + bytes.len() as u64;
        let first = self.kept.partition_point(|kept| kept.range.end <= at);
        for kept in self.kept[first..].iter().take_while(|kept| kept.range.start < end) {
            let (from, to) = (kept.range.start.max(at), kept.range.end.min(end));
            self.read_kept(&mut bytes[(from - at) as usize..(to - at) as usize], from)?;
        }
        Ok(())
    }
}

/// One comparison of an image with its journal.
struct Comparison<'a> {
    journal: &'a Journal,
    image: &'a dyn Storage,
    /// Bytes of the image.
    len: u64,
    standing: Standing,
}

impl Comparison<'_> {
    fn other(&mut self, range: Range<u64>) {
        self.standing
            .other
            .get_or_insert_with(|| format!("no longer has what the repair left from {:#x} to {:#x}", range.start, range.end));
    }

    /// Reads a part of the image; zeros beyond its end.
    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        let there = self.len.saturating_sub(at).min(bytes.len() as u64) as usize;
        bytes[there..].fill(0);
        let read = if there > 0 { self.image.read_at(&mut bytes[..there], at) } else { Ok(()) };
        read.map_err(|error| Error::io(error, format!("can't be read at {at:#x}")))
    }

    /// A range that must be zeros, as far as it is there.
    fn zeros(&mut self, range: Range<u64>) -> Result<()> {
        let range = range.start..range.end.min(self.len);
        if range.start < range.end && data_in(self.image, range.clone(), 0)? > 0 {
            self.other(range);
        }
        Ok(())
    }

    /// A range that the repair wrote.
    fn written(&mut self, index: usize) -> Result<()> {
        let (journal, range) = (self.journal, self.journal.written[index].clone());
        let before = journal.len[0];
        let (mut now, mut old) = (vec![0; CHUNK], vec![0; CHUNK]);
        let (mut digest, mut is_original, mut is_same) = (CRC.digest(), true, true);
        let sums = match &journal.sums {
            Sums::Sectors(at) => Some(at + journal.written[..index].iter().map(sectors_of).sum::<u64>() * 4),
            Sums::Ranges(_) => None,
        };
        for (at, len) in chunks(&range) {
            let (now, old) = (&mut now[..len], &mut old[..len]);
            self.read(now, at)?;
            // What was not there reads as zeros where the file has become longer.
            old.fill(0);
            let there = before.saturating_sub(at).min(len as u64) as usize;
            journal.read_kept(&mut old[..there], at)?;
            let Some(sums) = sums else {
                digest.update(now);
                is_original &= now == old;
                continue;
            };
            let mut known = vec![0; len.div_ceil(SECTOR as usize) * 4];
            journal.file.read_at(&mut known, sums + (at - range.start) / SECTOR * 4).map_err(failed)?;
            let sectors = now.chunks(SECTOR as usize).zip(old.chunks(SECTOR as usize)).zip(known.as_chunks::<4>().0);
            for (((now, old), sum), start) in sectors.zip((at..).step_by(SECTOR as usize)) {
                let end = start + now.len() as u64;
                let is_repaired = end <= self.len && CRC.checksum(now) == u32::from_be_bytes(*sum);
                match (now == old, is_repaired) {
                    (true, true) => {}
                    (true, false) => self.standing.original = true,
                    (false, true) => self.standing.repaired = true,
                    (false, false) => {
                        self.other(start..end);
                        is_same = false;
                    }
                }
                if !is_same {
                    return Ok(());
                }
            }
        }
        if let Sums::Ranges(sums) = &journal.sums {
            match (is_original, range.end <= self.len && digest.finalize() == sums[index]) {
                (true, true) => {}
                (true, false) => self.standing.original = true,
                (false, true) => self.standing.repaired = true,
                (false, false) => self.other(range),
            }
        }
        Ok(())
    }

    /// What the repair cut off, in a file that is as long as before: it is there, or was not put back yet.
    fn cut_off(&mut self, after: u64) -> Result<()> {
        let (mut now, mut old) = (vec![0; CHUNK], vec![0; CHUNK]);
        for kept in self.journal.kept.iter().filter(|kept| kept.range.end > after) {
            for (at, len) in chunks(&(kept.range.start.max(after)..kept.range.end)) {
                let (now, old) = (&mut now[..len], &mut old[..len]);
                self.read(now, at)?;
                self.journal.read_kept(old, at)?;
                for ((now, old), start) in now.chunks(SECTOR as usize).zip(old.chunks(SECTOR as usize)).zip((at..).step_by(512)) {
                    if now == old {
                        continue;
                    }
                    self.standing.repaired = true;
                    if !is_zero(now) {
                        self.other(start..start + now.len() as u64);
                    }
                }
            }
        }
        Ok(())
    }
}
