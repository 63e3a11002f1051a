//! Sector bitmaps: which sectors of a block are present in this image.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use crate::layout::Layout;
use crate::storage::Storage;

/// Bytes of sector bitmaps that are kept in memory for one image.
const CACHE_LEN: u64 = 16 << 20;
const SHARDS: usize = 16;

/// The live bitmap of one block. Bits are only ever set: a block that loses sectors is freed.
#[derive(Debug)]
pub(super) struct Bitmap {
    /// First sector of the slot that it belongs to.
    pub(super) sector: u32,
    /// Bit 0 of the block is the most significant of the first word.
    words: Box<[AtomicU64]>,
    /// True while it is queued to be written.
    dirty: AtomicBool,
}

impl Bitmap {
    fn from_bytes(sector: u32, bytes: &[u8]) -> Self {
        let words = bytes.as_chunks::<8>().0.iter().map(|word| AtomicU64::new(u64::from_be_bytes(*word))).collect();
        Self { sector, words, dirty: AtomicBool::new(false) }
    }

    /// The bytes as they are now; bits that are set meanwhile may or may not be in it.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.load(Ordering::Acquire).to_be_bytes()).collect()
    }

    /// Marks it dirty; true when it was not, and the caller must queue it.
    pub(super) fn mark_dirty(&self) -> bool {
        !self.dirty.swap(true, Ordering::AcqRel)
    }

    /// Marks it clean, before its bytes are taken: bits set from now on queue it again.
    pub(super) fn mark_clean(&self) {
        self.dirty.swap(false, Ordering::AcqRel);
    }

    /// Sets the bits of `sectors`; true when any was clear.
    pub(super) fn set(&self, sectors: Range<u64>) -> bool {
        let mut changed = false;
        for (index, mask) in masks(sectors) {
            changed |= self.words[index].fetch_or(mask, Ordering::AcqRel) & mask != mask;
        }
        changed
    }

    /// True when all bits of `sectors` are set.
    pub(super) fn all_set(&self, sectors: Range<u64>) -> bool {
        masks(sectors).all(|(index, mask)| self.words[index].load(Ordering::Acquire) & mask == mask)
    }

    /// Cuts `sectors` into runs of equal bits.
    pub(super) fn runs(&self, sectors: Range<u64>) -> impl Iterator<Item = (Range<u64>, bool)> + '_ {
        let mut at = sectors.start;
        std::iter::from_fn(move || {
            if at >= sectors.end {
                return None;
            }
            let start = at;
            let present = self.bit(at);
            while at < sectors.end {
                let word = self.words[(at / 64) as usize].load(Ordering::Acquire);
                // Bits from `at` on, moved to the top; those of the other value become ones.
                let other = (if present { !word } else { word }) << (at % 64);
                let equal = u64::from(other.leading_zeros()).min(64 - at % 64);
                at += equal;
                if at % 64 != 0 || equal == 0 {
                    break;
                }
            }
            at = at.min(sectors.end);
            Some((start..at, present))
        })
    }

    fn bit(&self, sector: u64) -> bool {
        self.words[(sector / 64) as usize].load(Ordering::Acquire) >> (63 - sector % 64) & 1 == 1
    }
}

/// Word indexes and masks that cover a range of bits.
fn masks(bits: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let (first, last) = (bits.start / 64, bits.end.div_ceil(64));
    (first..last).map(move |word| {
        let from = bits.start.saturating_sub(word * 64).min(64);
        let to = (bits.end - word * 64).min(64);
        let ones_from = u64::MAX.checked_shr(u32::try_from(from).unwrap_or(64)).unwrap_or(0);
        let ones_to = u64::MAX.checked_shr(u32::try_from(to).unwrap_or(64)).unwrap_or(0);
        (usize::try_from(word).unwrap_or(usize::MAX), ones_from & !ones_to)
    })
}

type Shard = FxHashMap<u32, Arc<Bitmap>>;

/// The bitmaps of an image that were looked at lately, by the first sector of their slot: a block that is freed and
/// allocated again elsewhere has another bitmap, and requests that are still under way in the old one can't mix them.
#[derive(Debug)]
pub(super) struct BitmapCache {
    shards: [Mutex<Shard>; SHARDS],
    shard_capacity: usize,
}

impl BitmapCache {
    pub(super) fn new(layout: &Layout) -> Self {
        let capacity = (CACHE_LEN / SHARDS as u64 / layout.bitmap_len()).max(4);
        Self { shards: Default::default(), shard_capacity: usize::try_from(capacity).unwrap_or(4) }
    }

    fn shard(&self, sector: u32) -> MutexGuard<'_, Shard> {
        // Slots are a whole number of pages apart: only a hash spreads them.
        let index = sector.wrapping_mul(0x9E37_79B1) >> 28;
        self.shards[index as usize % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bitmap of the slot that begins at `sector`, from memory or the file.
    ///
    /// It is read under the shard's lock, so that no thread can bring back an older one from the file.
    pub(super) fn get(&self, storage: &dyn Storage, layout: &Layout, sector: u32) -> io::Result<Arc<Bitmap>> {
        let mut shard = self.shard(sector);
        if let Some(bitmap) = shard.get(&sector) {
            return Ok(Arc::clone(bitmap));
        }
        let mut bytes = vec![0; usize::try_from(layout.bitmap_len()).unwrap_or(usize::MAX)];
        storage.read_at(&mut bytes, layout.slot(sector).start)?;
        let bitmap = Arc::new(Bitmap::from_bytes(sector, &bytes));
        if shard.len() >= self.shard_capacity {
            // Those in use, and the dirty ones, which the flush queue holds, stay: their bits are nowhere else.
            let spare = shard.iter().filter(|(_, bitmap)| Arc::strong_count(bitmap) == 1).map(|(&sector, _)| sector);
            for sector in spare.take(self.shard_capacity / 4 + 1).collect::<Vec<_>>() {
                shard.remove(&sector);
            }
        }
        shard.insert(sector, Arc::clone(&bitmap));
        Ok(bitmap)
    }

    /// Forgets the bitmap of a slot that is given to another block. Its space was recycled, so nobody uses the old one.
    pub(super) fn remove(&self, sector: u32) {
        self.shard(sector).remove(&sector);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(bytes: &[u8]) -> Bitmap {
        Bitmap::from_bytes(0, bytes)
    }

    #[test]
    fn bit_0_is_the_most_significant() {
        let bitmap = bitmap(&[0; 16]);
        assert!(bitmap.set(0..1) && !bitmap.set(0..1));
        assert!(bitmap.set(63..66));
        assert_eq!(bitmap.to_bytes(), [0x80, 0, 0, 0, 0, 0, 0, 1, 0xC0, 0, 0, 0, 0, 0, 0, 0]);
        assert!(bitmap.all_set(63..66) && !bitmap.all_set(62..66) && bitmap.all_set(5..5));
    }

    #[test]
    fn runs_equal_the_bits() {
        // Every start and end over a pattern that has long and short runs across words.
        let mut bytes = [0_u8; 24];
        bytes[3..13].fill(0xFF);
        (bytes[0], bytes[15], bytes[20]) = (0x5A, 0x01, 0x80);
        let bitmap = bitmap(&bytes);
        let bit = |sector: u64| bytes[(sector / 8) as usize] >> (7 - sector % 8) & 1 == 1;
        for start in 0..192 {
            for end in start..=192 {
                let mut expected = start;
                for (run, present) in bitmap.runs(start..end) {
                    assert_eq!(run.start, expected);
                    assert!(run.end > run.start && run.end <= end);
                    assert!(run.clone().all(|sector| bit(sector) == present));
                    assert!(run.end == end || bit(run.end) != present);
                    expected = run.end;
                }
                assert_eq!(expected, end);
            }
        }
    }
}
