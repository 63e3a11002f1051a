//! What must be so beside a signature of few bytes, or instead of one.

use super::signatures::Looked;
use super::{Found, u16_at, u32_at};
use crate::format::SECTOR;
use crate::partition::is_table;

/// Bytes of one of the four labels of a member of a pool, where its blocks begin, and their magic.
const ZFS_LABEL: u64 = 256 << 10;
const ZFS_PAIRS: u64 = 16 << 10;
const ZFS_BLOCKS: u64 = 128 << 10;
const ZFS_MAGIC: [u8; 8] = [0, 0, 0, 0, 0, 0xBA, 0xB1, 0x0C];
/// Bytes at the start of a volume in which a log of XFS has a record.
const XFS_LOG: u64 = 256 << 10;

/// Those that the signature is at the start of, or nothing.
fn rest(looked: &Looked<'_>, at: u64, len: u64) -> Found<Vec<u8>> {
    Ok(looked.bytes(at, len)?.unwrap_or_default())
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16_at(bytes, at).swap_bytes()
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32_at(bytes, at).swap_bytes()
}

/// The sum of all pairs of bytes.
fn sum_of_pairs(bytes: &[u8]) -> u16 {
    let pairs = bytes.as_chunks::<2>().0.iter();
    pairs.fold(0, |sum: u16, pair| sum.wrapping_add(u16::from_le_bytes(*pair)))
}

pub(super) fn lvm1(looked: &Looked<'_>, at: u64) -> Found<bool> {
    Ok(matches!(u16_at(&rest(looked, at, 4)?, 2), 1 | 2))
}

pub(super) fn via(looked: &Looked<'_>, at: u64) -> Found<bool> {
    let bytes = rest(looked, at, 51)?;
    let Some((sum, summed)) = bytes.split_last() else { return Ok(false) };
    Ok(summed[2] <= 2 && summed.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)) == *sum)
}

pub(super) fn silicon(looked: &Looked<'_>, at: u64) -> Found<bool> {
    let bytes = rest(looked, at - 0x60, SECTOR)?;
    let Some(summed) = bytes.get(..0x13E) else { return Ok(false) };
    Ok(summed[0x116] < 8 && sum_of_pairs(summed).wrapping_add(u16_at(&bytes, 0x13E)) == 0)
}

pub(super) fn jmicron(looked: &Looked<'_>, at: u64) -> Found<bool> {
    let bytes = rest(looked, at, 0x80)?;
    Ok(bytes.get(0x30).is_some_and(|mode| *mode <= 5) && sum_of_pairs(&bytes) <= 1)
}

pub(super) fn core_storage(looked: &Looked<'_>, at: u64) -> Found<bool> {
    let bytes = rest(looked, at - 88, 94)?;
    Ok(u16_at(&bytes, 8) == 1 && u32_at(&bytes, 90) == 1)
}

pub(super) fn hfs_plus(looked: &Looked<'_>, at: u64) -> Found<bool> {
    Ok(matches!(be16(&rest(looked, at, 4)?, 2), 4 | 5))
}

pub(super) fn hfs(looked: &Looked<'_>, at: u64) -> Found<bool> {
    let block = be32(&rest(looked, at, 24)?, 20);
    Ok(block > 0 && block % 512 == 0)
}

/// A member of a pool has four labels, two in front and two at the end. Any of them counts.
pub(super) fn zfs(looked: &Looked<'_>, _: u64) -> Found<bool> {
    let end = looked.len() / ZFS_LABEL * ZFS_LABEL;
    let places = [Some(0), Some(ZFS_LABEL), end.checked_sub(2 * ZFS_LABEL), end.checked_sub(ZFS_LABEL)];
    for at in places.into_iter().flatten() {
        // The blocks of 1 KiB and more say which state of the pool counts, in either order of bytes.
        let blocks = rest(looked, at + ZFS_BLOCKS, ZFS_LABEL - ZFS_BLOCKS)?;
        let mut backwards = ZFS_MAGIC;
        backwards.reverse();
        if blocks.chunks(1024).any(|block| block.starts_with(&ZFS_MAGIC) || block.starts_with(&backwards)) {
            return Ok(true);
        }
        // A list of names and values: its encoding, its order of bytes, version 0, unique names, the first pair's length.
        let pairs = rest(looked, at + ZFS_PAIRS, 64)?;
        let is_list = pairs.len() == 64 && pairs[0] == 1 && pairs[1] <= 1 && pairs[2..4] == [0, 0];
        let first = be32(&pairs, 12);
        if is_list && be32(&pairs, 4) == 0 && be32(&pairs, 8) == 1 && (16..4096).contains(&first) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A log of XFS on a device of its own: a record in one of the first sectors, and no file system in front of it.
pub(super) fn xfs_log(looked: &Looked<'_>, _: u64) -> Found<bool> {
    let bytes = rest(looked, 0, XFS_LOG)?;
    for sector in bytes.chunks_exact(SECTOR as usize) {
        if sector.starts_with(b"XFSB") {
            return Ok(false);
        }
        let is_record = be32(sector, 0) == 0xFEED_BABE && matches!(be32(sector, 8), 1..=2);
        if is_record && be32(sector, 12) as i32 > 0 && matches!(be32(sector, 300), 1..=3) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Its superblock says how long it is, and has a checksum.
pub(super) fn nilfs(looked: &Looked<'_>, at: u64) -> Found<bool> {
    const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::Algorithm { xorout: 0, ..crc::CRC_32_ISO_HDLC });
    let bytes = rest(looked, at - 6, 1024)?;
    let len = usize::from(u16_at(&bytes, 8));
    let Some(mut summed) = bytes.get(..len).filter(|_| len >= 20).map(<[u8]>::to_vec) else { return Ok(false) };
    summed[16..20].fill(0);
    let mut digest = CRC.digest_with_initial(u32_at(&bytes, 12).reverse_bits());
    digest.update(&summed);
    Ok(digest.finalize() == u32_at(&bytes, 16))
}

/// A superblock without room for a clear signature: its counts must agree. That of ext and of EROFS is in the same place.
pub(super) fn minix(looked: &Looked<'_>, at: u64) -> Found<bool> {
    let bytes = rest(looked, at, 64)?;
    if bytes.len() < 64 || u16_at(&bytes, 56) == 0xEF53 || bytes.starts_with(&[0xE2, 0xE1, 0xF5, 0xE0]) {
        return Ok(false);
    }
    Ok([u16_at as fn(&[u8], usize) -> u16, be16].into_iter().zip([u32_at as fn(&[u8], usize) -> u32, be32]).any(
        |(short, long)| {
            let old = match short(&bytes, 16) {
                0x137F | 0x138F => Some(u32::from(short(&bytes, 2))),
                0x2468 | 0x2478 => Some(long(&bytes, 20)),
                _ => None,
            };
            let (inodes, zones, maps) = match old {
                Some(zones) => (u32::from(short(&bytes, 0)), zones, 4),
                None if short(&bytes, 24) == 0x4D5A => (long(&bytes, 0), long(&bytes, 20), 6),
                None => return false,
            };
            let [for_inodes, for_zones, first, shift] = [0, 2, 4, 6].map(|field| u64::from(short(&bytes, maps + field)));
            // A map is of blocks of 1 KiB at least, with a bit for each.
            let (inodes, zones) = (u64::from(inodes), u64::from(zones));
            let has_maps = for_inodes * 8192 > inodes && for_zones * 8192 > zones.saturating_sub(first);
            inodes > 0 && shift == 0 && first <= zones && has_maps
        },
    ))
}

pub(super) fn master_boot_record(looked: &Looked<'_>, at: u64) -> Found<bool> {
    Ok(looked.bytes(at, SECTOR)?.is_some_and(|sector| is_table(&sector)))
}

/// A driver descriptor, and the map's first entry in the block behind it.
pub(super) fn apple(looked: &Looked<'_>, at: u64) -> Found<bool> {
    let block = u64::from(be16(&rest(looked, at, 4)?, 2));
    Ok(matches!(block, 512 | 1024 | 2048 | 4096) && rest(looked, at + block, 2)? == b"PM")
}

/// All pairs of bytes of the first sector give zero.
pub(super) fn sun(looked: &Looked<'_>, at: u64) -> Found<bool> {
    let bytes = rest(looked, at - 508, SECTOR)?;
    let pairs = bytes.as_chunks::<2>().0.iter();
    Ok(!bytes.is_empty() && pairs.fold(0, |all: u16, pair| all ^ u16::from_le_bytes(*pair)) == 0)
}
