//! Where things are in a dynamic or differencing image: pure arithmetic.

use std::ops::Range;

use crate::format::{SECTOR, bitmap_len};

/// Alignment of block data in new blocks, the one of Windows 8 and later.
pub const DATA_ALIGNMENT: u64 = 4096;

/// Blocks and sectors of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of the disk.
    size: u64,
    block_shift: u32,
    bitmap_len: u64,
}

/// A part of a range that lies in one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPart {
    /// Index of the block.
    pub block: u32,
    /// First byte, counted from the block's first.
    pub within: u64,
    /// Bytes.
    pub len: u64,
}

impl BlockPart {
    /// The sectors of the block that this part touches.
    #[must_use]
    pub fn sectors(&self) -> Range<u64> {
        self.within / SECTOR..(self.within + self.len).div_ceil(SECTOR)
    }

    /// True when it begins and ends on a sector.
    #[must_use]
    pub fn is_sector_aligned(&self) -> bool {
        (self.within | self.len) % SECTOR == 0
    }
}

impl Layout {
    /// The layout of a disk of `size` bytes in blocks of `block_size`, a power of two.
    #[must_use]
    pub fn new(size: u64, block_size: u32) -> Self {
        debug_assert!(block_size.is_power_of_two());
        Self { size, block_shift: block_size.trailing_zeros(), bitmap_len: bitmap_len(block_size) }
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of a block's data.
    #[must_use]
    pub fn block_size(&self) -> u64 {
        1 << self.block_shift
    }

    /// Sectors of a block.
    #[must_use]
    pub fn block_sectors(&self) -> u64 {
        self.block_size() / SECTOR
    }

    /// Bytes of a sector bitmap, whole sectors.
    #[must_use]
    pub fn bitmap_len(&self) -> u64 {
        self.bitmap_len
    }

    /// Blocks that the disk needs; the last may be partial.
    ///
    /// # Panics
    /// Never: sizes are bounded by [`crate::format::MAX_DISK_SIZE`] and blocks are 4 KiB at least.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        u32::try_from(self.size.div_ceil(self.block_size())).unwrap_or(u32::MAX)
    }

    /// Bytes of a block in the file: sector bitmap and data.
    #[must_use]
    pub fn slot_len(&self) -> u64 {
        self.bitmap_len + self.block_size()
    }

    /// Disk offset of a block's first byte.
    #[must_use]
    pub fn block_start(&self, block: u32) -> u64 {
        u64::from(block) << self.block_shift
    }

    /// Bytes of the disk that a block holds: less than a whole block for the last of an odd size.
    #[must_use]
    pub fn block_len(&self, block: u32) -> u64 {
        self.size.saturating_sub(self.block_start(block)).min(self.block_size())
    }

    /// Cuts a range of the disk into its blocks.
    pub fn parts(&self, range: Range<u64>) -> impl Iterator<Item = BlockPart> + use<> {
        let (shift, block_size) = (self.block_shift, self.block_size());
        let mut offset = range.start;
        std::iter::from_fn(move || {
            if offset >= range.end {
                return None;
            }
            let within = offset & (block_size - 1);
            let len = (block_size - within).min(range.end - offset);
            let block = u32::try_from(offset >> shift).ok()?;
            offset += len;
            Some(BlockPart { block, within, len })
        })
    }

    /// File offset of the data of a block whose BAT entry is `entry`.
    #[must_use]
    pub fn data_offset(&self, entry: u32) -> u64 {
        u64::from(entry) * SECTOR + self.bitmap_len
    }

    /// File range of a block whose BAT entry is `entry`: sector bitmap and data.
    #[must_use]
    pub fn slot(&self, entry: u32) -> Range<u64> {
        let start = u64::from(entry) * SECTOR;
        start..start + self.slot_len()
    }

    /// Where the first slot at or after `from` begins whose data is aligned.
    #[must_use]
    pub fn aligned_slot_start(&self, from: u64) -> u64 {
        (from + self.bitmap_len).next_multiple_of(DATA_ALIGNMENT) - self.bitmap_len
    }
}

/// Where the trailing footer of a dynamic or differencing image goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FooterPlace {
    /// In the last sector of a file whose length is a multiple of 4 KiB, as Windows 8 and later do.
    #[default]
    PageEnd,
    /// Right behind the last block, as Virtual PC, QEMU and VirtualBox do. QEMU puts its next block behind the last one
    /// without looking, and where a footer further on lies inside that block, its bytes show.
    BehindData,
}

impl FooterPlace {
    /// Bytes of a file that holds everything up to `end`, and the footer.
    #[must_use]
    pub fn file_len(self, end: u64) -> u64 {
        let alignment = match self {
            Self::PageEnd => DATA_ALIGNMENT,
            Self::BehindData => SECTOR,
        };
        (end + SECTOR).next_multiple_of(alignment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_at_blocks() {
        let layout = Layout::new(10_000, 4096);
        assert_eq!(layout.blocks(), 3);
        assert_eq!(layout.block_len(2), 10_000 - 8192);
        let parts: Vec<_> = layout.parts(4000..8193).collect();
        assert_eq!(parts[0], BlockPart { block: 0, within: 4000, len: 96 });
        assert_eq!(parts[1], BlockPart { block: 1, within: 0, len: 4096 });
        assert_eq!(parts[2], BlockPart { block: 2, within: 0, len: 1 });
        assert_eq!(parts[0].sectors(), 7..8);
        assert!(!parts[0].is_sector_aligned() && parts[1].is_sector_aligned());
        assert_eq!(layout.parts(5..5).count(), 0);
    }

    #[test]
    fn new_slots_have_aligned_data() {
        for block_size in [4 << 10, 512 << 10, 2 << 20, 256 << 20] {
            let layout = Layout::new(1 << 40, block_size);
            for from in [1536, 2048, 4096, 5000 * 512] {
                let start = layout.aligned_slot_start(from);
                assert!(start >= from && (start + layout.bitmap_len()) % 4096 == 0 && start - from < 4096);
            }
        }
    }
}
