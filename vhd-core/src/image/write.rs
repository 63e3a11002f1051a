//! Writing: in place where the sectors are present, through allocation and bitmap bits where they are not.
//!
//! What makes data visible after a power cut is written by `commit`, later and after a barrier. What makes it
//! visible to readers of this process changes here, after the data was written.

use std::io::IoSlice;
use std::ops::Range;
use std::sync::PoisonError;

use smallvec::SmallVec;

use super::bat::Entry;
use super::space::Slot;
use super::{Below, Image, Sparse};
use crate::error::{Error, ErrorKind, Result};
use crate::format::SECTOR;
use crate::layout::BlockPart;
use crate::storage::{SharedBytes, WriteBuffers};

impl Image {
    /// Writes `bufs` at `offset`. `below` is what the image's parent holds; only writes that do not begin and end on
    /// a sector look at it.
    ///
    /// # Errors
    /// `OutOfRange`, `ReadOnly`, `Latched`; `NoSpace`, after which writing may go on; `Io`, which latches the image.
    pub fn write(&self, bufs: &[IoSlice<'_>], offset: u64, below: &dyn Below) -> Result<()> {
        let range = offset..offset.saturating_add(bufs.iter().map(|buf| buf.len() as u64).sum());
        let mut rest = None;
        self.write_parts(range, Data::Own(bufs), &mut |sparse, part| {
            sparse.write_part(self, part, &Data::Own(&rest.get_or_insert_with(|| WriteBuffers::new(bufs)).take(part.len)), below)
        })
    }

    /// As [`Self::write`], of memory that others use too.
    ///
    /// # Errors
    /// As there.
    pub fn write_shared(&self, from: &dyn SharedBytes, offset: u64, below: &dyn Below) -> Result<()> {
        let range = offset..offset.saturating_add(from.len());
        let mut at = 0;
        self.write_parts(range, Data::Shared(from, 0..from.len()), &mut |sparse, part| {
            let piece = Data::Shared(from, at..at + part.len);
            at += part.len;
            sparse.write_part(self, part, &piece, below)
        })
    }

    /// Writes to one place, where that is known, else calls `write` with each part of the range.
    fn write_parts(
        &self,
        range: Range<u64>,
        all: Data<'_>,
        write: &mut dyn FnMut(&Sparse, BlockPart) -> Result<()>,
    ) -> Result<()> {
        self.check_write(&range)?;
        if range.is_empty() {
            return Ok(());
        }
        let _held = self.hold();
        if let Some(place) = self.known_place(&range) {
            self.write_data(&all, place)?;
        } else if let Some(sparse) = &self.sparse {
            sparse.layout.parts(range).try_for_each(|part| write(sparse, part))?;
        }
        self.note_completed();
        Ok(())
    }

    fn write_data(&self, data: &Data<'_>, offset: u64) -> Result<()> {
        let written = match data {
            Data::Own(bufs) => self.storage.write_vectored_at(bufs, offset),
            Data::Shared(from, range) => self.storage.write_shared_at(*from, range.clone(), offset),
        };
        match written {
            Ok(()) => Ok(()),
            Err(error) => Err(self.write_error(error, || format!("can't be written at {offset:#x}"))),
        }
    }
}

/// What is written.
enum Data<'a> {
    /// Buffers.
    Own(&'a [IoSlice<'a>]),
    /// A range of memory that others use too.
    Shared(&'a dyn SharedBytes, Range<u64>),
}

impl Sparse {
    /// True when all sectors that `part` touches are present in the block's slot.
    fn is_present(&self, image: &Image, entry: Entry, sector: u32, part: &BlockPart) -> Result<bool> {
        if entry.is_full() {
            return Ok(true);
        }
        let bitmap = self.bitmap(image, sector)?;
        Ok(self.note_if_full(image, part.block, entry, &bitmap) || bitmap.all_set(part.sectors()))
    }

    /// True when all sectors of a block are present. Nobody needs to ask its bitmap again then.
    pub(super) fn note_if_full(&self, image: &Image, block: u32, entry: Entry, bitmap: &super::bitmap::Bitmap) -> bool {
        let is_full = bitmap.all_set(0..self.layout.block_len(block).div_ceil(SECTOR));
        if is_full {
            self.bat.note_full(&*image.storage, block, entry);
        }
        is_full
    }

    pub(super) fn bitmap(&self, image: &Image, sector: u32) -> Result<std::sync::Arc<super::bitmap::Bitmap>> {
        self.bitmaps
            .get(&*image.storage, &self.layout, sector)
            .map_err(|error| image.read_error(error, self.layout.slot(sector).start))
    }

    fn write_part(&self, image: &Image, part: BlockPart, piece: &Data<'_>, below: &dyn Below) -> Result<()> {
        let entry = self.entry(image, part.block)?;
        if let Some(sector) = entry.sector()
            && self.is_present(image, entry, sector, &part)?
        {
            return image.write_data(piece, self.layout.data_offset(sector) + part.within);
        }
        let stripe = self.stripe(part.block);
        if part.is_sector_aligned() && entry.sector().is_some() {
            let _shared = stripe.read().unwrap_or_else(PoisonError::into_inner);
            let entry = self.entry(image, part.block)?;
            if let Some(sector) = entry.sector() {
                return self.write_absent(image, &part, entry, sector, piece, below);
            }
        }
        let exclusive = stripe.write().unwrap_or_else(PoisonError::into_inner);
        let (entry, sector) = self.allocate(image, part.block)?;
        if part.is_sector_aligned() {
            // The block is there: others may write their sectors of it meanwhile.
            let _shared = std::sync::RwLockWriteGuard::downgrade(exclusive);
            self.write_absent(image, &part, entry, sector, piece, below)
        } else {
            self.write_absent(image, &part, entry, sector, piece, below)
        }
    }

    /// Writes a part of which some sectors may be absent, then makes them present. Where the part begins or ends
    /// inside an absent sector, the rest of that sector comes from below; the caller holds the stripe alone then.
    fn write_absent(
        &self,
        image: &Image,
        part: &BlockPart,
        entry: Entry,
        sector: u32,
        piece: &Data<'_>,
        below: &dyn Below,
    ) -> Result<()> {
        let data = self.layout.data_offset(sector);
        if entry.is_full() {
            return image.write_data(piece, data + part.within);
        }
        let bitmap = self.bitmap(image, sector)?;
        let sectors = part.sectors();
        if part.is_sector_aligned() {
            image.write_data(piece, data + part.within)?;
            self.make_present(image, part.block, &bitmap, sectors);
            return Ok(());
        }
        let copy;
        let piece = match piece {
            Data::Own(bufs) => *bufs,
            Data::Shared(from, range) => {
                copy = copy_of(*from, range)?;
                &[IoSlice::new(&copy)]
            }
        };
        let absent = |sector: u64| !bitmap.all_set(sector..sector + 1);
        let (mut head, mut tail) = ([0; SECTOR as usize], [0; SECTOR as usize]);
        let (mut from, mut to) = (part.within, part.within + part.len);
        let block_start = self.layout.block_start(part.block);
        let fill = |sector: u64, buf: &mut [u8]| below.read_below(buf, block_start + sector * SECTOR);
        let mut all: SmallVec<[IoSlice<'_>; 6]> = SmallVec::new();
        if from % SECTOR != 0 && absent(sectors.start) {
            fill(sectors.start, &mut head)?;
            all.push(IoSlice::new(&head[..to_index(from % SECTOR)]));
            from -= from % SECTOR;
        }
        all.extend(piece.iter().map(|buf| IoSlice::new(buf)));
        if to % SECTOR != 0 && absent(sectors.end - 1) {
            fill(sectors.end - 1, &mut tail)?;
            all.push(IoSlice::new(&tail[to_index(to % SECTOR)..]));
            to = to.next_multiple_of(SECTOR);
        }
        debug_assert_eq!(all.iter().map(|buf| buf.len() as u64).sum::<u64>(), to - from);
        image.write_data(&Data::Own(&all), data + from)?;
        self.make_present(image, part.block, &bitmap, sectors);
        Ok(())
    }

    /// Makes sectors visible whose data was written, and queues their bits for the file.
    pub(super) fn make_present(
        &self,
        image: &Image,
        block: u32,
        bitmap: &std::sync::Arc<super::bitmap::Bitmap>,
        sectors: Range<u64>,
    ) {
        if bitmap.set(sectors) && bitmap.mark_dirty() {
            image.meta().queue_bitmap(block, std::sync::Arc::clone(bitmap));
            image.note_deferred();
        }
    }

    /// The entry of a block, which is allocated if it is not yet. The caller holds its stripe alone.
    pub(super) fn allocate(&self, image: &Image, block: u32) -> Result<(Entry, u32)> {
        let entry = self.entry(image, block)?;
        if let Some(sector) = entry.sector() {
            return Ok((entry, sector));
        }
        let slot = self.take_slot(image)?;
        if let Err(error) = self.prepare(image, slot) {
            // Whatever was written there, it is nobody's now.
            image.meta().recycle(self.layout.slot(slot.sector()));
            return Err(error);
        }
        self.bitmaps.remove(slot.sector());
        // All bits of a dynamic disk's new block are set, so that readers who ignore bitmaps agree with those who do not.
        let entry = Entry::new(slot.sector(), !self.differencing);
        self.bat.set(&*image.storage, block, entry).map_err(|error| image.read_error(error, self.bat.offset()))?;
        // A differencing block needs no barrier of its own: its bits do, when they are set.
        image.meta().queue_entry(block, matches!(slot, Slot::Recycled(_)));
        image.note_deferred();
        Ok((entry, slot.sector()))
    }

    fn take_slot(&self, image: &Image) -> Result<Slot> {
        image.reclaim();
        let mut meta = image.meta();
        if let Some(slot) = meta.take_slot(&self.layout) {
            return Ok(slot);
        }
        image.grow(self, &mut meta)?;
        meta.take_slot(&self.layout).ok_or_else(|| {
            Error::new(ErrorKind::NoSpace, "has no room for another block: BAT entries reach 2 TiB into the file").at(&image.path)
        })
    }

    /// Gives a slot the content of a block that nothing was written to.
    fn prepare(&self, image: &Image, slot: Slot) -> Result<()> {
        let range = self.layout.slot(slot.sector());
        let bitmap_len = to_index(self.layout.bitmap_len());
        let mut bitmap = vec![0; bitmap_len];
        if !self.differencing {
            bitmap[..to_index(self.layout.block_sectors().div_ceil(8))].fill(0xFF);
            if matches!(slot, Slot::Recycled(_)) {
                let data = range.start + self.layout.bitmap_len()..range.end;
                let at = data.start;
                image
                    .storage
                    .punch_hole(data)
                    .map_err(|error| image.write_error(error, || format!("can't be zeroed at {at:#x}")))?;
            }
        }
        // Written even where it is zero already: its space is reserved, so that no later flush lacks it.
        image.write_data(&Data::Own(&[IoSlice::new(&bitmap)]), range.start)
    }
}

/// A part of a block.
fn copy_of(from: &dyn SharedBytes, range: &Range<u64>) -> Result<Vec<u8>> {
    let mut copy = vec![0; to_index(range.end - range.start)];
    from.get(range.start, &mut copy).map_err(|error| Error::io(error, "memory can't be reached"))?;
    Ok(copy)
}

/// Bytes of one block or less, as an index.
fn to_index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
