//! What a driver may know of the disk: features and the configuration space.

use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::{Block, SECTOR};

/// Pieces of data in one request at most: a driver splits what has more.
pub const MAX_SEGMENTS: u32 = 254;
/// Bytes of one of them at most.
pub const MAX_SEGMENT: u32 = 256 << 10;
/// Bytes of data in one request at most: what a driver that keeps to the other limits never exceeds.
pub const MAX_TRANSFER: u64 = 64 << 20;
const _: () = assert!(MAX_SEGMENTS as u64 * MAX_SEGMENT as u64 <= MAX_TRANSFER);
/// Ranges in one discard or write-zeroes request at most.
pub const MAX_RANGES: u32 = 16;
/// Sectors in one of those ranges at most: 1 GiB, so that a request takes a bounded time.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// Cylinders, heads and sectors per track.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors per track.
    pub sectors: u8,
}

/// `struct virtio_blk_config`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Space {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    block_size: U32,
    physical_block_exponent: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    queues: U16,
    max_discard_sectors: U32,
    max_discard_ranges: U32,
    discard_alignment: U32,
    max_zeroes_sectors: U32,
    max_zeroes_ranges: U32,
    zeroes_may_unmap: u8,
    unused1: [u8; 3],
}
const _: () = assert!(size_of::<Space>() == 60);

impl Block {
    /// The features that it offers.
    #[must_use]
    pub fn features(&self) -> u64 {
        let bit = |number: u32| 1_u64 << number;
        let always = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            blk::VIRTIO_BLK_F_SEG_MAX,
            blk::VIRTIO_BLK_F_SIZE_MAX,
            blk::VIRTIO_BLK_F_BLK_SIZE,
            blk::VIRTIO_BLK_F_TOPOLOGY,
            blk::VIRTIO_BLK_F_FLUSH,
            blk::VIRTIO_BLK_F_MQ,
        ];
        let mut features = always.into_iter().map(bit).sum();
        if self.geometry.is_some() {
            features |= bit(blk::VIRTIO_BLK_F_GEOMETRY);
        }
        if self.read_only {
            features |= bit(blk::VIRTIO_BLK_F_RO);
        } else {
            features |= bit(blk::VIRTIO_BLK_F_DISCARD) | bit(blk::VIRTIO_BLK_F_WRITE_ZEROES);
        }
        features
    }

    /// Reads the configuration space; past its end it is zero.
    pub fn read_config(&self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        let space = self.space();
        let space = usize::try_from(offset).ok().and_then(|offset| space.as_bytes().get(offset..)).unwrap_or(&[]);
        let len = space.len().min(bytes.len());
        bytes[..len].copy_from_slice(&space[..len]);
    }

    fn space(&self) -> Space {
        let geometry = self.geometry.unwrap_or_default();
        let granularity = self.disk.capabilities().discard_granularity;
        let granularity = u32::try_from(granularity / SECTOR).unwrap_or(u32::MAX).max(1);
        Space {
            capacity: (self.disk.size() / SECTOR).into(),
            size_max: MAX_SEGMENT.into(),
            seg_max: MAX_SEGMENTS.into(),
            cylinders: geometry.cylinders.into(),
            heads: geometry.heads,
            sectors: geometry.sectors,
            block_size: (SECTOR as u32).into(),
            // Data begins on a 4 KiB boundary of the file in what Windows 8 and we make.
            physical_block_exponent: 3,
            alignment_offset: 0,
            min_io_size: 8.into(),
            opt_io_size: granularity.into(),
            writeback: 1,
            unused0: 0,
            queues: self.queues.into(),
            max_discard_sectors: MAX_RANGE_SECTORS.into(),
            max_discard_ranges: MAX_RANGES.into(),
            discard_alignment: granularity.into(),
            max_zeroes_sectors: MAX_RANGE_SECTORS.into(),
            max_zeroes_ranges: MAX_RANGES.into(),
            zeroes_may_unmap: 1,
            unused1: [0; 3],
        }
    }
}
