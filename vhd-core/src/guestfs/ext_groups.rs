//! The groups of ext2, ext3 and ext4: where their bitmaps are, and whether these can be believed.

use std::ops::Range;

use super::ext::{Superblock, crc32c, feature};
use super::{Found, Volume, doubt, u16_at, u32_at};

/// Bytes of all group descriptors at most: those of a file system of 2040 GiB with blocks of 1 KiB have 16 MiB.
const MAX_DESCRIPTORS: u64 = 32 << 20;
/// The block bitmap of the group was never written.
const BLOCK_UNINIT: u16 = 2;
/// Where a descriptor has its own checksum.
const CHECKSUM_AT: usize = 0x1E;

/// All groups of a file system.
pub(super) struct Groups {
    pub(super) superblock: Superblock,
    descriptors: Vec<u8>,
    /// Blocks of bitmaps and inode tables, ascending: used, whatever a bitmap says.
    metadata: Vec<Range<u64>>,
}

/// One group, as its descriptor has it.
struct Group {
    bitmap: u64,
    free: u64,
    flags: u16,
    bitmap_checksum: u32,
}

impl Groups {
    /// Reads all descriptors.
    pub(super) fn read(volume: &Volume<'_>, superblock: Superblock) -> Found<Self> {
        let mut groups = Self { superblock, descriptors: Vec::new(), metadata: Vec::new() };
        let (count, block) = (groups.count(), groups.superblock.block);
        let len = count * groups.superblock.descriptor_len;
        if len > MAX_DESCRIPTORS {
            return doubt(format!("it has {count} groups, more than any that is known"));
        }
        for index in 0..len.div_ceil(block) {
            let at = groups.descriptor_block(index) * block;
            groups.descriptors.extend(volume.read(at, block.min(len - index * block))?);
        }
        for group in 0..count {
            groups.verify(group)?;
            groups.note_metadata(group)?;
        }
        groups.metadata.sort_unstable_by_key(|range| range.start);
        Ok(groups)
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        (self.superblock.blocks - self.superblock.first_block).div_ceil(self.superblock.blocks_per_group)
    }

    /// Units that a group has: the last may have fewer.
    pub(super) fn units_in(&self, group: u64) -> u64 {
        let it = &self.superblock;
        let blocks = (it.blocks - it.first_block - group * it.blocks_per_group).min(it.blocks_per_group);
        blocks.div_ceil(it.unit)
    }

    fn first_block_of(&self, group: u64) -> u64 {
        self.superblock.first_block + group * self.superblock.blocks_per_group
    }

    /// True for groups that begin with a copy of the superblock.
    fn has_superblock(&self, group: u64) -> bool {
        let it = &self.superblock;
        let is_power = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        if group == 0 {
            true
        } else if it.compatible & feature::SPARSE_SUPER2 != 0 {
            it.backup_groups.contains(&group)
        } else {
            it.read_only & feature::SPARSE_SUPER == 0 || group == 1 || is_power(3) || is_power(5) || is_power(7)
        }
    }

    /// The block that holds a block of descriptors: all together behind the superblock, or each in front of the groups
    /// that it describes.
    fn descriptor_block(&self, index: u64) -> u64 {
        let it = &self.superblock;
        if it.incompatible & feature::META_BG == 0 || index < it.first_meta_group {
            return it.first_block.max(1024 / it.block) + 1 + index;
        }
        let group = index * (it.block / it.descriptor_len);
        self.first_block_of(group) + u64::from(self.has_superblock(group))
    }

    fn descriptor(&self, group: u64) -> &[u8] {
        let len = self.superblock.descriptor_len as usize;
        &self.descriptors[group as usize * len..][..len]
    }

    /// A number of which a descriptor has 32 low bits, and in a long one 32 high ones.
    fn long(&self, group: u64, low: usize, high: usize) -> u64 {
        let descriptor = self.descriptor(group);
        u64::from(u32_at(descriptor, low)) | u64::from(u32_at(descriptor, high)) << 32
    }

    fn group(&self, group: u64) -> Group {
        let descriptor = self.descriptor(group);
        // Behind the end of a short one there is nothing: zero.
        Group {
            bitmap: self.long(group, 0, 32),
            free: u64::from(u16_at(descriptor, 12)) | u64::from(u16_at(descriptor, 44)) << 16,
            flags: u16_at(descriptor, 18),
            bitmap_checksum: u32::from(u16_at(descriptor, 24)) | u32::from(u16_at(descriptor, 56)) << 16,
        }
    }

    /// Says whether a descriptor is what was written.
    fn verify(&self, group: u64) -> Found<()> {
        let it = &self.superblock;
        let descriptor = self.descriptor(group);
        let number = u32::try_from(group).unwrap_or(u32::MAX).to_le_bytes();
        let (front, rest) = (&descriptor[..CHECKSUM_AT], &descriptor[CHECKSUM_AT + 2..]);
        let expected = if it.read_only & feature::METADATA_CSUM != 0 {
            crc32c(it.checksum_seed, &[&number, front, &[0; 2], rest]) as u16
        } else if it.read_only & feature::GDT_CSUM != 0 {
            const CRC16: crc::Crc<u16> = crc::Crc::<u16>::new(&crc::CRC_16_MODBUS);
            let mut digest = CRC16.digest();
            [&it.uuid[..], &number, front, rest].into_iter().for_each(|part| digest.update(part));
            digest.finalize()
        } else {
            return Ok(());
        };
        match u16_at(descriptor, CHECKSUM_AT) == expected {
            true => Ok(()),
            false => doubt(format!("the descriptor of group {group} has a wrong checksum; e2fsck puts it right")),
        }
    }

    fn note_metadata(&mut self, group: u64) -> Found<()> {
        let it = &self.superblock;
        let table_len = (it.inodes_per_group * it.inode_len).div_ceil(it.block);
        if table_len > it.blocks_per_group {
            return doubt("its superblock contradicts itself about inodes");
        }
        let places = [(self.long(group, 0, 32), 1), (self.long(group, 4, 36), 1), (self.long(group, 8, 40), table_len)];
        for (at, len) in places {
            let end = at.checked_add(len).filter(|end| at > it.first_block && *end <= it.blocks);
            let Some(end) = end else {
                return doubt(format!("group {group} says that its metadata is at block {at}, outside the file system"));
            };
            self.metadata.push(at..end);
        }
        Ok(())
    }

    /// What is used in a group, one bit a unit.
    pub(super) fn used(&self, volume: &Volume<'_>, group: u64) -> Found<Vec<u8>> {
        let it = &self.superblock;
        let found = self.group(group);
        let len = it.blocks_per_group / it.unit / 8;
        let has_checksums = it.read_only & (feature::METADATA_CSUM | feature::GDT_CSUM) != 0;
        let mut used = if found.flags & BLOCK_UNINIT != 0 && has_checksums {
            let mut used = vec![0; len as usize];
            self.mark_front(group, &mut used);
            used
        } else {
            let bitmap = volume.read(found.bitmap * it.block, len)?;
            self.verify_bitmap(group, &found, &bitmap)?;
            bitmap
        };
        let first = self.first_block_of(group);
        let end = first + it.blocks_per_group;
        let from = self.metadata.partition_point(|range| range.start < first.saturating_sub(it.blocks_per_group));
        for range in self.metadata[from..].iter().take_while(|range| range.start < end) {
            mark(&mut used, range.start.max(first) - first..range.end.min(end).max(first) - first, it.unit);
        }
        let units = self.units_in(group);
        let free = (0..units).filter(|unit| used[(unit / 8) as usize] >> (unit % 8) & 1 == 0).count() as u64;
        match free == found.free {
            true => Ok(used),
            false => doubt(format!(
                "the bitmap of group {group} has {free} free, its descriptor says {}; e2fsck puts it right",
                found.free
            )),
        }
    }

    fn verify_bitmap(&self, group: u64, found: &Group, bitmap: &[u8]) -> Found<()> {
        let it = &self.superblock;
        if it.read_only & feature::METADATA_CSUM == 0 {
            return Ok(());
        }
        let sum = crc32c(it.checksum_seed, &[bitmap]);
        let mask = if it.descriptor_len >= 64 { u32::MAX } else { 0xFFFF };
        match sum & mask == found.bitmap_checksum & mask {
            true => Ok(()),
            false => doubt(format!("the bitmap of group {group} has a wrong checksum; e2fsck puts it right")),
        }
    }

    /// Marks what a group whose bitmap was never written begins with: copies of the superblock and of descriptors.
    fn mark_front(&self, group: u64, used: &mut [u8]) {
        let it = &self.superblock;
        let per_block = it.block / it.descriptor_len;
        let is_meta = it.incompatible & feature::META_BG != 0 && group / per_block >= it.first_meta_group;
        let superblock = u64::from(self.has_superblock(group));
        let descriptors = match (is_meta, superblock) {
            // The first two groups and the last that a block describes have it.
            (true, _) => u64::from(matches!(group % per_block, 0 | 1) || group % per_block == per_block - 1),
            (false, 0) => 0,
            (false, _) => {
                let all = self.count().div_ceil(per_block);
                let all = if it.incompatible & feature::META_BG != 0 { it.first_meta_group.min(all) } else { all };
                all + it.reserved_descriptor_blocks
            }
        };
        mark(used, 0..superblock + descriptors, it.unit);
    }
}

/// Marks blocks of a group as used.
fn mark(used: &mut [u8], blocks: Range<u64>, unit: u64) {
    for unit in blocks.start / unit..blocks.end.div_ceil(unit) {
        if let Some(byte) = used.get_mut((unit / 8) as usize) {
            *byte |= 1 << (unit % 8);
        }
    }
}
