//! ext2, ext3 and ext4: each group of blocks has a bitmap.

use std::ops::Range;

use super::ext_groups::Groups;
use super::{FileSystem, Found, Recognised, Volume, doubt, runs, u16_at, u32_at};

/// Where the superblock is, and how long.
const SUPERBLOCK: u64 = 1024;
const MAGIC: u16 = 0xEF53;

/// Features, as the superblock has them: those that may be lacked, those that no one may lack, those for writers.
pub(super) mod feature {
    pub(in crate::guestfs) const JOURNAL: u32 = 0x4;
    pub(in crate::guestfs) const SPARSE_SUPER2: u32 = 0x200;
    pub(in crate::guestfs) const RECOVER: u32 = 0x4;
    pub(in crate::guestfs) const META_BG: u32 = 0x10;
    pub(in crate::guestfs) const EXTENTS: u32 = 0x40;
    pub(in crate::guestfs) const BIT64: u32 = 0x80;
    pub(in crate::guestfs) const CSUM_SEED: u32 = 0x2000;
    pub(in crate::guestfs) const SPARSE_SUPER: u32 = 0x1;
    pub(in crate::guestfs) const GDT_CSUM: u32 = 0x10;
    pub(in crate::guestfs) const BIGALLOC: u32 = 0x200;
    pub(in crate::guestfs) const METADATA_CSUM: u32 = 0x400;
    pub(in crate::guestfs) const ORPHAN_PRESENT: u32 = 0x10000;
    /// Directory entries with types, extents, 64 bits, multiple mount protection, flexible groups, inodes for extended
    /// attributes, data in directories, checksum seed, large directories, inline data, encryption, case folding, and
    /// grouped descriptors. What they change is not what a bitmap means.
    pub(super) const KNOWN_INCOMPATIBLE: u32 =
        0x2 | META_BG | EXTENTS | BIT64 | 0x100 | 0x200 | 0x400 | 0x1000 | CSUM_SEED | 0x4000 | 0x8000 | 0x10000 | 0x20000;
    /// Large and huge files, many links and large inodes, quotas, projects, read-only, verity, and those above.
    pub(super) const KNOWN_READ_ONLY: u32 = SPARSE_SUPER
        | 0x2
        | 0x4
        | 0x8
        | GDT_CSUM
        | 0x20
        | 0x40
        | 0x100
        | BIGALLOC
        | METADATA_CSUM
        | 0x1000
        | 0x2000
        | 0x8000
        | ORPHAN_PRESENT;
}

/// CRC-32C as ext4 has it: seeded, and not inverted at the end.
pub(super) const CRC32C: crc::Algorithm<u32> = crc::Algorithm { xorout: 0, check: 0, residue: 0, ..crc::CRC_32_ISCSI };

/// CRC-32C over more bytes after those that gave `seed`.
pub(super) fn crc32c(seed: u32, parts: &[&[u8]]) -> u32 {
    const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&CRC32C);
    let mut digest = CRC.digest_with_initial(seed.reverse_bits());
    parts.iter().for_each(|part| digest.update(part));
    digest.finalize()
}

/// What the superblock says that matters here.
#[derive(Clone, Debug)]
pub(super) struct Superblock {
    pub(super) compatible: u32,
    pub(super) incompatible: u32,
    pub(super) read_only: u32,
    /// Bytes of a block.
    pub(super) block: u64,
    /// Blocks that a bit of a bitmap stands for: more than one with the feature for that.
    pub(super) unit: u64,
    pub(super) blocks: u64,
    pub(super) first_block: u64,
    pub(super) blocks_per_group: u64,
    pub(super) inodes_per_group: u64,
    pub(super) inode_len: u64,
    pub(super) descriptor_len: u64,
    pub(super) reserved_descriptor_blocks: u64,
    pub(super) first_meta_group: u64,
    pub(super) backup_groups: [u64; 2],
    pub(super) uuid: [u8; 16],
    pub(super) checksum_seed: u32,
}

/// Recognises ext2, ext3 or ext4.
pub(super) fn recognise(volume: &Volume<'_>) -> Found<Option<Recognised>> {
    let bytes = volume.read(SUPERBLOCK, 1024)?;
    if u16_at(&bytes, 56) != MAGIC || u32_at(&bytes, 24) > 6 {
        return Ok(None);
    }
    let (compatible, incompatible) = (u32_at(&bytes, 92), u32_at(&bytes, 96));
    let read_only = u32_at(&bytes, 100);
    let is_ext4 = incompatible & !(0x2 | feature::RECOVER | feature::META_BG) != 0 || read_only & !0x7 != 0;
    let name = match (is_ext4, compatible & feature::JOURNAL != 0) {
        (true, _) => "ext4",
        (false, true) => "ext3",
        (false, false) => "ext2",
    };
    let open = || -> Found<Box<dyn FileSystem>> {
        let superblock = Superblock::parse(&bytes, volume.len())?;
        Ok(Box::new(Ext { groups: Groups::read(volume, superblock)?, last: None }))
    };
    Ok(Some(Recognised::system(name, open())))
}

impl Superblock {
    fn parse(bytes: &[u8], room: u64) -> Found<Self> {
        let long = |at| u64::from(u32_at(bytes, at));
        let (incompatible, read_only) = (u32_at(bytes, 96), u32_at(bytes, 100));
        refuse_state(bytes, incompatible, read_only)?;
        let uuid: [u8; 16] = bytes[104..120].try_into().unwrap_or_default();
        if read_only & feature::METADATA_CSUM != 0 && crc32c(!0, &[&bytes[..1020]]) != u32_at(bytes, 1020) {
            return doubt("its superblock has a wrong checksum; e2fsck puts it right");
        }
        let is_64bit = incompatible & feature::BIT64 != 0;
        let block = 1024_u64 << u32_at(bytes, 24);
        let unit_shift = u32_at(bytes, 28).checked_sub(u32_at(bytes, 24));
        let unit = match (read_only & feature::BIGALLOC != 0, unit_shift) {
            (false, _) => 1,
            (true, Some(shift @ 0..=16)) => 1 << shift,
            (true, _) => return doubt("its superblock contradicts itself about units"),
        };
        let with_uuid = crc32c(!0, &[&uuid]);
        let it = Self {
            compatible: u32_at(bytes, 92),
            incompatible,
            read_only,
            block,
            unit,
            blocks: long(4) | if is_64bit { long(336) << 32 } else { 0 },
            first_block: long(20),
            blocks_per_group: long(32),
            inodes_per_group: long(40),
            inode_len: if long(76) == 0 { 128 } else { u64::from(u16_at(bytes, 88)) },
            descriptor_len: if is_64bit { u64::from(u16_at(bytes, 254)) } else { 32 },
            reserved_descriptor_blocks: u64::from(u16_at(bytes, 206)),
            first_meta_group: long(260),
            backup_groups: [long(588), long(592)],
            uuid,
            checksum_seed: if incompatible & feature::CSUM_SEED != 0 { u32_at(bytes, 624) } else { with_uuid },
        };
        let first_expected = u64::from(block == 1024 && unit == 1);
        let per_group = it.blocks_per_group / unit;
        let sound = it.first_block == first_expected
            && it.blocks > it.first_block
            && per_group > 0
            && per_group % 8 == 0
            && per_group <= block * 8
            && it.blocks_per_group == per_group * unit
            && it.inode_len.is_power_of_two()
            && (128..=block).contains(&it.inode_len)
            && it.descriptor_len.is_power_of_two()
            && (32..=1024).contains(&it.descriptor_len)
            && (!is_64bit || it.descriptor_len >= 64)
            && it.inodes_per_group > 0
            && it.inodes_per_group <= block * 8;
        match it.blocks.checked_mul(block) {
            _ if !sound => doubt("its superblock contradicts itself"),
            Some(len) if len <= room => Ok(it),
            _ => doubt(format!("it has {} blocks of {block} bytes, the place it is in {room} bytes", it.blocks)),
        }
    }
}

/// Says why nothing that the bitmaps say counts.
fn refuse_state(bytes: &[u8], incompatible: u32, read_only: u32) -> Found<()> {
    let (state, orphan) = (u16_at(bytes, 58), u32_at(bytes, 232));
    if incompatible & feature::RECOVER != 0 || read_only & feature::ORPHAN_PRESENT != 0 || state & 1 == 0 || orphan != 0 {
        return doubt("dirty: it was not unmounted; mount it once, or let e2fsck put it right");
    }
    if state & 2 != 0 {
        return doubt("its system found errors in it; e2fsck puts it right");
    }
    let unknown = incompatible & !feature::KNOWN_INCOMPATIBLE;
    if unknown != 0 {
        return doubt(format!("it has features that are not known here (incompatible {unknown:#x})"));
    }
    let unknown = read_only & !feature::KNOWN_READ_ONLY;
    if unknown != 0 {
        return doubt(format!("it has features that are not known here (for writers {unknown:#x})"));
    }
    Ok(())
}

struct Ext {
    groups: Groups,
    /// The last group that was read, as ranges ascend: its number and what is used in it, one bit a unit.
    last: Option<(u64, Vec<u8>)>,
}

impl FileSystem for Ext {
    fn free(&mut self, volume: &Volume<'_>, range: Range<u64>, push: &mut dyn FnMut(Range<u64>)) -> Found<()> {
        let superblock = self.groups.superblock.clone();
        let unit = superblock.block * superblock.unit;
        let group_len = superblock.blocks_per_group * superblock.block;
        let origin = superblock.first_block * superblock.block;
        let first = range.start.saturating_sub(origin) / group_len;
        let last = range.end.saturating_sub(origin).div_ceil(group_len).min(self.groups.count());
        for group in first..last {
            let used = match self.last.take() {
                Some((number, used)) if number == group => used,
                _ => self.groups.used(volume, group)?,
            };
            let start = origin + group * group_len;
            let unit_of = |at: u64| at.saturating_sub(start) / unit;
            let units = self.groups.units_in(group);
            let wanted = unit_of(range.start).min(units)..unit_of(range.end.saturating_add(unit)).min(units);
            let is_free = |unit: u64| used[(unit / 8) as usize] >> (unit % 8) & 1 == 0;
            runs(wanted, is_free, |run| push(start + run.start * unit..start + run.end * unit));
            self.last = Some((group, used));
        }
        Ok(())
    }
}
