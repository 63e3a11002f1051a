//! Sector bitmaps and data.

use std::io;
use std::ops::Range;

use super::batmap::Map;
use super::blocks::Blocks;
use super::footer::Basis;
use super::header::Table;
use super::{Check, Code};
use crate::error::{Error, Result};
use crate::format::{DiskType, FOOTER_COOKIE, FOOTER_LEN, Footer, SECTOR};
use crate::image::PlacedBlock;
use crate::layout::DATA_ALIGNMENT;
use crate::ops::copy::is_zero;
use crate::storage::AlignedBuffer;

/// Bytes of data that are read at once; whole sectors.
const CHUNK: u64 = 1 << 20;
/// QEMU puts a block right behind BAT or blocks, so an old footer is found this near to the block's beginning, behind
/// a gap for alignment or a batmap; or where a footer of Windows stands, at the end of a 4 KiB page.
const OLD_FOOTER_REACH: u64 = 64 << 10;

/// Takes a piece of data: the range it is of, its file offset, its bytes.
type Visit<'a> = dyn FnMut(&Range<u64>, u64, &[u8]) + 'a;

/// What is known of the block under examination.
struct Block<'a> {
    bitmap: &'a [u8],
    /// Clear bits mean zeros: there is no parent.
    dynamic: bool,
    /// Sectors with a clear bit that hold data.
    hidden: u64,
    first_hidden: u64,
}

impl Check<'_> {
    /// Reads a fixed disk's data: all there is to see is whether the host can.
    pub(super) fn deep_fixed(&mut self, basis: &Basis) -> Result<()> {
        let end = basis.size.unwrap_or(0).min(basis.data_end);
        if let Some(progress) = self.options.progress {
            progress.set_total(end);
        }
        let mut buf = AlignedBuffer::new(CHUNK as usize);
        self.data_chunks(0..end, &mut buf, "data", &mut |_, _, _| {})
    }

    /// Reads bitmap and data of every block that lies in the file and over no other.
    pub(super) fn deep_blocks(&mut self, basis: &Basis, table: &Table, blocks: &Blocks, batmap: Option<&Map>) -> Result<()> {
        let layout = &table.layout;
        if let Some(progress) = self.options.progress {
            progress.set_total(blocks.order.count() * layout.block_size());
        }
        let mut buf = AlignedBuffer::new(CHUNK.min(layout.block_size()) as usize);
        let mut bitmap = vec![0; layout.bitmap_len() as usize];
        let mut end = 0;
        let mut cursor = blocks.order.ascending();
        while let Some(entry) = cursor.next(self.storage)? {
            let slot = layout.slot(entry.sector());
            // A block over another one was told of; reading each of a million duplicates would take for ever.
            if slot.start < end || slot.end > basis.data_end {
                self.advance(layout.block_size())?;
                continue;
            }
            end = slot.end;
            let place = format!("block {}", entry.block());
            if let Err(error) = self.read_bitmap(&mut bitmap, slot.start)? {
                self.add(Code::Unreadable, place, format!("sector bitmap can't be read at {:#x}: {error}", slot.start));
                self.advance(layout.block_size())?;
                continue;
            }
            if batmap.is_some_and(|map| map.is_full(entry.block())) && !is_full(&bitmap, layout.block_sectors()) {
                self.findings.add_with(Code::BatmapNotFull, || {
                    (format!("batmap bit {}", entry.block()), "is set, but the block's sector bitmap is not full".into())
                });
            }
            let dynamic = basis.disk_type != DiskType::Differencing;
            let mut block = Block { bitmap: &bitmap, dynamic, hidden: 0, first_hidden: 0 };
            let mut footers = Vec::new();
            self.data_chunks(slot.start + layout.bitmap_len()..slot.end, &mut buf, &place, &mut |data, at, bytes| {
                block.look(data, at, bytes, slot.start, basis, &mut footers);
            })?;
            let (hidden, first_hidden) = (block.hidden, block.first_hidden);
            self.tell_block(entry, hidden, first_hidden, &footers);
        }
        Ok(())
    }

    fn tell_block(&mut self, entry: PlacedBlock, hidden: u64, first_hidden: u64, footers: &[(u64, u64)]) {
        let place = || format!("block {}", entry.block());
        if hidden != 0 {
            self.findings.add_with(Code::BitmapClearOverData, || {
                let message = format!(
                    "{hidden} sectors with a clear bit hold data, the first is {first_hidden}; expected zeros, and read as zeros \
                     here, but not by QEMU"
                );
                (place(), message)
            });
        }
        for &(sector, at) in footers {
            self.findings.add_with(Code::QemuDamage, || {
                let message = format!(
                    "sector {sector} holds a footer of this image, where one stood at {at:#x} before: QEMU put the block over it, and \
                     sectors that were never written may hold garbage"
                );
                (place(), message)
            });
        }
    }

    /// Calls `visit` with the pieces of a range that may be other than zero: the range, where the piece begins, bytes.
    fn data_chunks(&mut self, range: Range<u64>, buf: &mut [u8], place: &str, visit: &mut Visit<'_>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let next = self.next_data(at)?;
            // Whole sectors, whatever the host's holes are made of.
            let start = next.as_ref().map_or(range.end, |data| data.start.clamp(at, range.end));
            let start = start - (start - range.start) % SECTOR;
            self.advance(start - at)?;
            at = start;
            let stop = next.map_or(range.end, |data| data.end.max(at + SECTOR)).min(range.end);
            while at < stop {
                let len = (range.end - at).min(buf.len() as u64).min((stop - at).next_multiple_of(SECTOR));
                let bytes = &mut buf[..len as usize];
                match self.storage.read_at(bytes, at) {
                    Ok(()) => visit(&range, at, bytes),
                    Err(error) => {
                        self.findings.add_with(Code::Unreadable, || {
                            (place.to_owned(), format!("{len} bytes at {at:#x} can't be read: {error}"))
                        });
                    }
                }
                self.advance(len)?;
                at += len;
            }
        }
        Ok(())
    }

    /// The inner result is the host's, which can be told as a finding.
    fn read_bitmap(&mut self, bitmap: &mut [u8], at: u64) -> Result<io::Result<()>> {
        if self.next_data(at)?.is_some_and(|data| data.start < at + bitmap.len() as u64) {
            return Ok(self.storage.read_at(bitmap, at));
        }
        bitmap.fill(0);
        Ok(Ok(()))
    }

    /// The next range that is no hole. A hole may be as large as millions of blocks, so the last answer is kept.
    pub(super) fn next_data(&mut self, at: u64) -> Result<Option<Range<u64>>> {
        // Behind the last one is nothing but a hole.
        const NONE: Range<u64> = u64::MAX..u64::MAX;
        let is_some = |data: Range<u64>| Some(data).filter(|data| *data != NONE);
        if let Some((asked, data)) = &self.next_data
            && (*asked..data.end).contains(&at)
        {
            return Ok(is_some(data.clone()));
        }
        let next = self.storage.next_data(at).map_err(|error| Error::io(error, format!("can't be examined at {at:#x}")))?;
        let next = next.unwrap_or(NONE);
        self.next_data = Some((at, next.clone()));
        Ok(is_some(next))
    }

    fn advance(&self, bytes: u64) -> Result<()> {
        self.options.progress.map_or(Ok(()), |progress| progress.advance(bytes))
    }
}

impl Block<'_> {
    /// Looks at a piece of the block's data. `footers` takes the sector and file offset of each footer in it.
    fn look(&mut self, data: &Range<u64>, at: u64, bytes: &[u8], slot_start: u64, basis: &Basis, footers: &mut Vec<(u64, u64)>) {
        let (sectors, _) = bytes.as_chunks::<FOOTER_LEN>();
        for (index, sector) in sectors.iter().enumerate() {
            let place = at + index as u64 * SECTOR;
            let number = (place - data.start) / SECTOR;
            let present = self.bitmap[number as usize / 8] >> (7 - number % 8) & 1 == 1;
            if present {
                let near = place - slot_start < OLD_FOOTER_REACH || (place + SECTOR).is_multiple_of(DATA_ALIGNMENT);
                if near
                    && sector.starts_with(&FOOTER_COOKIE)
                    && Footer::parse(sector).is_ok_and(|footer| footer.uuid() == basis.uuid)
                {
                    footers.push((number, place));
                }
            } else if self.dynamic && !is_zero(sector) {
                if self.hidden == 0 {
                    self.first_hidden = number;
                }
                self.hidden += 1;
            }
        }
    }
}

fn is_full(bitmap: &[u8], sectors: u64) -> bool {
    (0..sectors).all(|sector| bitmap[sector as usize / 8] >> (7 - sector % 8) & 1 == 1)
}
