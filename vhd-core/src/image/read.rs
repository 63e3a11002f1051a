//! Reading: who holds each sector of a range, and where.

use std::ops::Range;

use super::{Image, Sparse};
use crate::error::Result;
use crate::format::SECTOR;
use crate::layout::BlockPart;

/// What an image says of a run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// It holds them, from this file offset on.
    Present(u64),
    /// It says that they are zero, and no parent is asked.
    Zero,
    /// It says nothing: the parent's show through, or zeros where there is none.
    Absent,
}

/// A run of bytes of the disk of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The bytes.
    pub range: Range<u64>,
    /// Who holds them.
    pub kind: RunKind,
}

impl Image {
    /// Calls `visit` with the runs of a range, ascending and without gaps.
    ///
    /// The file offsets hold until the guard of [`Image::hold`] is dropped, when others write meanwhile.
    ///
    /// # Errors
    /// `OutOfRange`; `Corrupt` where the BAT lies; as the host fails to read metadata; as `visit` fails.
    pub fn map(&self, range: Range<u64>, visit: &mut dyn FnMut(Run) -> Result<()>) -> Result<()> {
        self.check_range(&range)?;
        let Some(sparse) = &self.sparse else {
            let start = range.start;
            return if range.is_empty() { Ok(()) } else { visit(Run { range, kind: RunKind::Present(start) }) };
        };
        for part in sparse.layout.parts(range) {
            sparse.map_part(self, part, visit)?;
        }
        Ok(())
    }

    /// Where in the file a range is, where that is one place and known: all that there is to find for most requests to a disk
    /// that is full of data. What is not known so may be in one piece all the same.
    ///
    /// The range is inside the disk. The offset holds as those of [`Self::map`] do.
    pub(crate) fn known_place(&self, range: &Range<u64>) -> Option<u64> {
        let Some(sparse) = &self.sparse else { return Some(range.start) };
        let part = sparse.layout.parts(range.clone()).next().filter(|part| part.len == range.end - range.start)?;
        let entry = sparse.bat.known(part.block).filter(|entry| entry.is_full())?;
        Some(sparse.layout.data_offset(entry.sector()?) + part.within)
    }

    /// True when no place in the file ever comes to hold another part of the disk, as long as the image is open.
    pub(crate) fn keeps_places(&self) -> bool {
        self.sparse.is_none() || self.read_only
    }

    /// Keeps the space of all blocks that are allocated now from being given to others.
    #[must_use = "the guard is what keeps the space"]
    pub fn hold(&self) -> impl Sized + '_ {
        // Images that are only read free no blocks.
        self.sparse.as_ref().filter(|_| !self.keeps_places()).map(|sparse| sparse.grace.enter())
    }
}

impl Sparse {
    fn map_part(&self, image: &Image, part: BlockPart, visit: &mut dyn FnMut(Run) -> Result<()>) -> Result<()> {
        let start = self.layout.block_start(part.block) + part.within;
        let whole = start..start + part.len;
        let entry = self.entry(image, part.block)?;
        let Some(sector) = entry.sector() else {
            return visit(Run { range: whole, kind: RunKind::Absent });
        };
        let data = self.layout.data_offset(sector);
        if entry.is_full() {
            return visit(Run { range: whole, kind: RunKind::Present(data + part.within) });
        }
        let bitmap = self.bitmap(image, sector)?;
        if self.note_if_full(image, part.block, entry, &bitmap) {
            return visit(Run { range: whole, kind: RunKind::Present(data + part.within) });
        }
        let block_start = self.layout.block_start(part.block);
        for (sectors, present) in bitmap.runs(part.sectors()) {
            // Sectors at the edges may be touched in part only.
            let from = (sectors.start * SECTOR).max(part.within);
            let to = (sectors.end * SECTOR).min(part.within + part.len);
            let kind = match (present, self.differencing) {
                (true, _) => RunKind::Present(data + from),
                (false, true) => RunKind::Absent,
                // Other writers leave rubbish under clear bits; it was never written, so it is zero.
                (false, false) => RunKind::Zero,
            };
            visit(Run { range: block_start + from..block_start + to, kind })?;
        }
        Ok(())
    }
}
