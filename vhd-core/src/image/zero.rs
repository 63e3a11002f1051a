//! Discard and write zeroes: the range reads as zeros afterwards, never as the parent's data.

use std::ops::Range;
use std::sync::PoisonError;

use super::bat::Entry;
use super::{Below, Image, Sparse};
use crate::error::Result;
use crate::format::SECTOR;
use crate::layout::BlockPart;

/// What becomes of the space of a range that is zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// It may be given back: discard, or write zeroes that may unmap.
    Free,
    /// It stays, and blocks that are not there are allocated: write zeroes with `NO_HOLE`.
    Keep,
}

impl Image {
    /// Makes a range read as zeros.
    ///
    /// In a dynamic disk whole blocks are freed. In a differencing one that is done only where the parent is zero, as
    /// far as its metadata tells; elsewhere zeros are held here, so that the parent's data stays hidden.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub fn zero(&self, range: Range<u64>, mode: ZeroMode, below: &dyn Below) -> Result<()> {
        self.check_write(&range)?;
        if range.is_empty() {
            return Ok(());
        }
        match &self.sparse {
            None => self.zero_file(range, mode)?,
            Some(sparse) => {
                let _held = sparse.grace.enter();
                for part in sparse.layout.parts(range) {
                    sparse.zero_part(self, part, mode, below)?;
                }
            }
        }
        self.note_completed();
        Ok(())
    }

    fn zero_file(&self, range: Range<u64>, mode: ZeroMode) -> Result<()> {
        let at = range.start;
        let done = match mode {
            ZeroMode::Free => self.storage.punch_hole(range),
            ZeroMode::Keep => self.storage.zero_range(range),
        };
        done.map_err(|error| self.write_error(error, || format!("can't be zeroed at {at:#x}")))
    }
}

impl Sparse {
    fn zero_part(&self, image: &Image, part: BlockPart, mode: ZeroMode, below: &dyn Below) -> Result<()> {
        let whole = part.within == 0 && part.len == self.layout.block_len(part.block);
        if whole && mode == ZeroMode::Free && self.is_zero_below(&part, below)? {
            return self.free(image, part.block);
        }
        if mode == ZeroMode::Free && self.entry(image, part.block)?.sector().is_none() {
            // Nothing here to hide the parent's zeros, and nothing of ours to zero.
            if self.is_zero_below(&part, below)? {
                return Ok(());
            }
        }
        if part.is_sector_aligned() {
            return self.zero_sectors(image, &part, mode, below);
        }
        self.zero_bytes(image, part, mode, below)
    }

    /// Zeros a part that begins or ends inside a sector: the sectors at its edges are written, the rest is zeroed.
    fn zero_bytes(&self, image: &Image, part: BlockPart, mode: ZeroMode, below: &dyn Below) -> Result<()> {
        let (start, end) = (part.within, part.within + part.len);
        let first_whole = start.next_multiple_of(SECTOR).min(end);
        let last_whole = (end - end % SECTOR).max(first_whole);
        let base = self.layout.block_start(part.block);
        for edge in [start..first_whole, last_whole..end] {
            if !edge.is_empty() {
                let zeros = [0; SECTOR as usize];
                let len = usize::try_from(edge.end - edge.start).unwrap_or(0);
                image.write(&[std::io::IoSlice::new(&zeros[..len])], base + edge.start, below)?;
            }
        }
        if first_whole < last_whole {
            let middle = BlockPart { block: part.block, within: first_whole, len: last_whole - first_whole };
            self.zero_sectors(image, &middle, mode, below)?;
        }
        Ok(())
    }

    fn is_zero_below(&self, part: &BlockPart, below: &dyn Below) -> Result<bool> {
        if !self.differencing {
            return Ok(true);
        }
        let start = self.layout.block_start(part.block) + part.within;
        let mut zero = true;
        below.zero_runs(start..start + part.len, &mut |_, is_zero| {
            zero &= is_zero;
            Ok(())
        })?;
        Ok(zero)
    }

    /// Zeros whole sectors of one block and keeps or makes them present where that is needed.
    fn zero_sectors(&self, image: &Image, part: &BlockPart, mode: ZeroMode, below: &dyn Below) -> Result<()> {
        let stripe = self.stripe(part.block);
        let (entry, sector) = {
            let _exclusive = stripe.write().unwrap_or_else(PoisonError::into_inner);
            let entry = self.entry(image, part.block)?;
            match entry.sector() {
                None if mode == ZeroMode::Free && !self.differencing => return Ok(()),
                _ => self.allocate(image, part.block)?,
            }
        };
        let _shared = stripe.read().unwrap_or_else(PoisonError::into_inner);
        // Freed between the two locks: a discard of the whole block came after this one began, and zeroed it.
        if self.entry(image, part.block)?.sector() != Some(sector) {
            return Ok(());
        }
        let data = self.layout.data_offset(sector);
        if entry.is_full() {
            return image.zero_file(data + part.within..data + part.within + part.len, mode);
        }
        let bitmap = self.bitmap(image, sector)?;
        let base = self.layout.block_start(part.block);
        for (run, present) in bitmap.runs(part.sectors()).collect::<Vec<_>>() {
            let bytes = run.start * SECTOR..run.end * SECTOR;
            if present {
                image.zero_file(data + bytes.start..data + bytes.end, mode)?;
                continue;
            }
            if !self.differencing && mode == ZeroMode::Free {
                continue;
            }
            below.zero_runs(base + bytes.start..base + bytes.end, &mut |piece, zero_below| {
                if zero_below && mode == ZeroMode::Free {
                    return Ok(());
                }
                let within = piece.start - base..piece.end - base;
                // A piece of the parent may end inside a sector, where a smaller parent ends: whole sectors are ours.
                let sectors = within.start / SECTOR..within.end.div_ceil(SECTOR);
                image.zero_file(data + sectors.start * SECTOR..data + sectors.end * SECTOR, mode)?;
                self.make_present(image, part.block, &bitmap, sectors);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Frees a block: it reads as zeros or as the parent, which is zero there. Its space is used again only after the
    /// file's BAT no longer names it and nobody reads or writes it.
    fn free(&self, image: &Image, block: u32) -> Result<()> {
        let _exclusive = self.stripe(block).write().unwrap_or_else(PoisonError::into_inner);
        let entry = self.entry(image, block)?;
        let Some(sector) = entry.sector() else { return Ok(()) };
        self.bat.set(&*image.storage, block, Entry::UNUSED).map_err(|error| image.read_error(error, self.bat.offset()))?;
        image.meta().queue_free(block, sector);
        image.note_deferred();
        Ok(())
    }
}
