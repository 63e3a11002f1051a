//! Making writes durable, in an order that a power cut can't turn against the user.
//!
//! A flush takes what is to be published: BAT entries and sector bitmaps as they are at that moment, which name only
//! data whose writes were completed before. Then: barrier; bitmaps and BAT; barrier. The first barrier is left out
//! where nothing depends on it: only entries of fresh blocks of a dynamic disk, which read zero whether their data
//! arrived or not. A block that was freed goes back to the free space after the second barrier, once nobody
//! who looked it up before is still reading or writing it. `docs/crash-consistency.md` argues each step.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::bat::Entry;
use super::bitmap::Bitmap;
use super::space::{Slot, Space};
use super::{Image, Sparse};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{BAT_ENTRY_LEN, SECTOR};
use crate::layout::{DATA_ALIGNMENT, FooterPlace, Layout};

/// A file grows by at least this much, so that small images need few barriers.
const MIN_GROWTH: u64 = 16 << 20;
/// And by at most this much: what a killed process leaves behind is a hole, but it shows in the file's length.
const MAX_GROWTH: u64 = 512 << 20;
/// Entries of one sector of the BAT.
const SECTOR_ENTRIES: u32 = (SECTOR / BAT_ENTRY_LEN) as u32;
/// Sectors of the BAT that are written together at most: 64 KiB.
const MAX_RUN: u32 = 128;
/// Bitmaps that may wait before the background flush is asked to hurry: 8 MiB of the usual size.
const MANY_BITMAPS: usize = 16 << 10;

/// What the file's metadata still has to learn, and the free space.
#[derive(Debug, Default)]
pub(super) struct Meta {
    space: Space,
    /// Blocks whose entry in the file's BAT may differ from the live one.
    entries: BTreeSet<u32>,
    /// Bitmaps with bits that the file lacks, and the blocks they belong to.
    bitmaps: Vec<(u32, Arc<Bitmap>)>,
    /// Slots that the live BAT no longer names, but the file's may.
    freed: Vec<u32>,
    /// Slots that no BAT names, with the ticket after which nobody uses them.
    limbo: VecDeque<(u64, u32)>,
    /// Entries that wait need a barrier before they are written: the file grew, or space was recycled.
    barrier: bool,
    /// The file grew since it was opened: closing gives back what is left.
    grown: bool,
    /// Blocks that are allocated.
    allocated: u32,
    /// Where the trailing footer goes.
    footer_place: FooterPlace,
}

impl Meta {
    pub(super) fn new(allocated: u32, free: impl IntoIterator<Item = Range<u64>>, footer_place: FooterPlace) -> Self {
        let mut meta = Self { allocated, footer_place, ..Self::default() };
        for range in free {
            meta.space.recycle(range);
        }
        meta
    }

    pub(super) fn take_slot(&mut self, layout: &Layout) -> Option<Slot> {
        self.space.take(layout)
    }

    pub(super) fn recycle(&mut self, range: Range<u64>) {
        self.space.recycle(range);
    }

    pub(super) fn queue_entry(&mut self, block: u32, recycled: bool) {
        self.entries.insert(block);
        self.barrier |= recycled;
        self.allocated += 1;
    }

    pub(super) fn queue_bitmap(&mut self, block: u32, bitmap: Arc<Bitmap>) {
        self.bitmaps.push((block, bitmap));
    }

    pub(super) fn queue_free(&mut self, block: u32, sector: u32) {
        self.entries.insert(block);
        self.freed.push(sector);
        self.allocated = self.allocated.saturating_sub(1);
    }

    fn is_idle(&self) -> bool {
        self.entries.is_empty() && self.bitmaps.is_empty() && self.freed.is_empty() && !self.barrier
    }
}

/// What one flush publishes.
struct Work {
    entries: Vec<(u32, Entry)>,
    bitmaps: Vec<(u32, Arc<Bitmap>, Vec<u8>)>,
    freed: Vec<u32>,
    /// The barrier before publishing is needed.
    barrier: bool,
}

impl Image {
    /// Makes all writes that were completed before this call durable. Costs nothing when there are none.
    ///
    /// # Errors
    /// `Io` or `Latched`: nothing is known of writes since the last flush that succeeded. `NoSpace`: nothing is
    /// lost; flush again when there is room.
    pub fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.check_latch()?;
        let target = self.completed.get();
        let covered = || self.durable.load(Ordering::SeqCst) >= target;
        if covered() {
            return Ok(());
        }
        self.flushes.flush(covered, || self.flush_alone())
    }

    /// A flush, of whoever has the turn.
    fn flush_alone(&self) -> Result<()> {
        self.check_latch()?;
        let completed = self.completed.get();
        let work = match &self.sparse {
            None => None,
            Some(sparse) => self.take_work(sparse)?.map(|work| (sparse, work)),
        };
        if let Some((sparse, work)) = &work {
            let published = self.publish(sparse, work);
            if let Err(error) = published {
                self.put_back(work);
                return Err(error);
            }
        }
        let synced = self.sync();
        if let Some((sparse, work)) = work {
            if synced.is_err() {
                self.put_back(&work);
            } else {
                let ticket = sparse.grace.ticket();
                self.meta().limbo.extend(work.freed.into_iter().map(|sector| (ticket, sector)));
            }
        }
        synced?;
        self.durable.store(completed, Ordering::SeqCst);
        self.reclaim();
        Ok(())
    }

    fn take_work(&self, sparse: &Sparse) -> Result<Option<Work>> {
        let mut meta = self.meta();
        if meta.is_idle() {
            return Ok(None);
        }
        // Read what can fail before anything is taken out of the queues.
        let entries = meta.entries.iter().map(|&block| Ok((block, sparse.bat.get(&*self.storage, block)?)));
        let entries =
            entries.collect::<std::io::Result<Vec<_>>>().map_err(|error| self.read_error(error, sparse.bat.offset()))?;
        meta.entries.clear();
        let bitmaps: Vec<_> = std::mem::take(&mut meta.bitmaps)
            .into_iter()
            .map(|(block, bitmap)| {
                bitmap.mark_clean();
                let bytes = bitmap.to_bytes();
                (block, bitmap, bytes)
            })
            .collect();
        let barrier = std::mem::take(&mut meta.barrier) || !bitmaps.is_empty();
        Ok(Some(Work { entries, bitmaps, freed: std::mem::take(&mut meta.freed), barrier }))
    }

    /// Queues again what could not be published.
    fn put_back(&self, work: &Work) {
        let mut meta = self.meta();
        meta.entries.extend(work.entries.iter().map(|(block, _)| *block));
        for (block, bitmap, _) in &work.bitmaps {
            if bitmap.mark_dirty() {
                meta.bitmaps.push((*block, Arc::clone(bitmap)));
            }
        }
        meta.freed.extend(&work.freed);
        meta.barrier |= work.barrier;
    }

    fn publish(&self, sparse: &Sparse, work: &Work) -> Result<()> {
        if work.barrier {
            self.sync()?;
        }
        for (block, bitmap, bytes) in &work.bitmaps {
            // A block that was freed meanwhile needs no bits.
            if sparse.bat.get(&*self.storage, *block).is_ok_and(|entry| entry.sector() == Some(bitmap.sector)) {
                let at = sparse.layout.slot(bitmap.sector).start;
                self.storage
                    .write_at(bytes, at)
                    .map_err(|error| self.write_error(error, || format!("sector bitmap can't be written at {at:#x}")))?;
            }
        }
        let mut rest = &work.entries[..];
        while let Some(&(first, _)) = rest.first() {
            // Sectors of the BAT that lie close together are written as one.
            let first = first / SECTOR_ENTRIES;
            let count = rest.iter().take_while(|(block, _)| block / SECTOR_ENTRIES - first < MAX_RUN).count();
            let (run, tail) = rest.split_at(count);
            self.write_entries(sparse, run)?;
            rest = tail;
        }
        Ok(())
    }

    /// Writes entries that lie close together in the BAT. What else those sectors hold stays as the file has it:
    /// entries that changed after this flush began are not ready to be published.
    fn write_entries(&self, sparse: &Sparse, run: &[(u32, Entry)]) -> Result<()> {
        let (Some((first, _)), Some((last, _))) = (run.first(), run.last()) else { return Ok(()) };
        let first_entry = first - first % SECTOR_ENTRIES;
        let entries = (last / SECTOR_ENTRIES + 1) * SECTOR_ENTRIES - first_entry;
        let at = sparse.bat.offset() + u64::from(first_entry) * BAT_ENTRY_LEN;
        let mut bytes = vec![0; entries as usize * BAT_ENTRY_LEN as usize];
        self.storage.read_at(&mut bytes, at).map_err(|error| self.read_error(error, at))?;
        for (block, entry) in run {
            let index = (block - first_entry) as usize * BAT_ENTRY_LEN as usize;
            bytes[index..index + BAT_ENTRY_LEN as usize].copy_from_slice(&entry.to_bytes());
        }
        self.storage.write_at(&bytes, at).map_err(|error| self.write_error(error, || format!("BAT can't be written at {at:#x}")))
    }

    /// A barrier. After a failure nothing is known of what was written, so the image is latched whatever the reason.
    pub(super) fn sync(&self) -> Result<()> {
        self.storage.sync().map_err(|error| {
            let error = Error::io(error, "can't be synced").with_kind(ErrorKind::Io).at(&self.path);
            self.latch_for(&error);
            error
        })
    }

    /// Tells the background flush that metadata waits.
    pub(super) fn note_deferred(&self) {
        self.note_completed();
        if let Some(flusher) = self.background.get() {
            flusher.poke(self.meta().bitmaps.len() >= MANY_BITMAPS);
        }
    }

    /// Gives freed slots that nobody uses any more back to the free space, and their bytes back to the host.
    pub(super) fn reclaim(&self) {
        let Some(sparse) = &self.sparse else { return };
        loop {
            let sector = {
                let mut meta = self.meta();
                match meta.limbo.front() {
                    Some(&(ticket, sector)) if sparse.grace.has_passed(ticket) => {
                        meta.limbo.pop_front();
                        sector
                    }
                    _ => return,
                }
            };
            let slot = sparse.layout.slot(sector);
            // Not having it back costs the host space, nothing else.
            if let Err(error) = self.storage.punch_hole(slot.clone()) {
                tracing::warn!("{}: freed space can't be given back: {error}", self.path.display());
            }
            self.meta().recycle(slot);
        }
    }

    /// Grows the file by a batch of blocks: length, then the footer at the new end. The old footer stays where it is
    /// until the next barrier, and its sector is never used again as fresh space.
    pub(super) fn grow(&self, sparse: &Sparse, meta: &mut Meta) -> Result<()> {
        let layout = &sparse.layout;
        let old_len = self.file_len.load(Ordering::Relaxed);
        let full =
            |why: &str| Err(Error::new(ErrorKind::NoSpace, format!("has no room for another block: {why}")).at(&self.path));
        if !self.storage.can_grow() {
            return full("the device is full");
        }
        let stride = layout.slot_len().next_multiple_of(DATA_ALIGNMENT);
        let wanted = (u64::from(meta.allocated) * stride / 4).clamp(MIN_GROWTH, MAX_GROWTH) / stride;
        let start = layout.aligned_slot_start(old_len);
        let nameable = (u64::from(u32::MAX) * SECTOR).saturating_sub(start) / stride;
        let needed = u64::from(layout.blocks().saturating_sub(meta.allocated));
        let count = wanted.max(1).min(needed.max(1)).min(nameable);
        if count == 0 {
            return full("BAT entries reach 2 TiB into the file");
        }
        let end = start + (count - 1) * stride + layout.slot_len();
        let new_len = meta.footer_place.file_len(end);
        let footer_at = new_len - SECTOR;
        self.storage.set_len(new_len).map_err(|error| self.write_error(error, || format!("can't grow to {new_len} bytes")))?;
        if let Err(error) = self.storage.write_at(&self.footer.to_bytes(), footer_at) {
            let error = self.write_error(error, || format!("footer can't be written at {footer_at:#x}"));
            // As it was: the old footer stands at the old end.
            self.storage
                .set_len(old_len)
                .map_err(|error| self.write_error(error, || format!("can't shrink back to {old_len} bytes")))?;
            return Err(error);
        }
        self.file_len.store(new_len, Ordering::Relaxed);
        meta.space.set_fresh(old_len..footer_at);
        meta.barrier = true;
        meta.grown = true;
        Ok(())
    }

    /// Flushes, and gives back what the file grew but no block uses. The image may be used afterwards.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn close(&self) -> Result<()> {
        if let Some(flusher) = self.background.get() {
            flusher.stop();
        }
        if self.read_only {
            return Ok(());
        }
        self.flush()?;
        self.trim()
    }

    /// Cuts the file behind its last block, with the footer at its new place. A power cut may leave the length without the
    /// footer, as when the file grows; closing returns when both are durable.
    fn trim(&self) -> Result<()> {
        let _turn = self.flushes.turn();
        let mut meta = self.meta();
        if !meta.grown || self.latch.get().is_some() {
            return Ok(());
        }
        let old_len = self.file_len.load(Ordering::Relaxed);
        let tail = meta.space.tail_start(old_len - SECTOR);
        let new_len = meta.footer_place.file_len(tail);
        if new_len >= old_len {
            return Ok(());
        }
        let footer_at = new_len - SECTOR;
        let written = self.storage.write_at(&self.footer.to_bytes(), footer_at);
        written.map_err(|error| self.write_error(error, || format!("footer can't be written at {footer_at:#x}")))?;
        self.storage.set_len(new_len).map_err(|error| self.write_error(error, || format!("can't shrink to {new_len} bytes")))?;
        self.sync()?;
        self.file_len.store(new_len, Ordering::Relaxed);
        meta.space.cut(footer_at);
        meta.grown = false;
        Ok(())
    }
}
