//! Sectors that describe themselves.
//!
//! Each holds the image, place and write it belongs to, so a stale, misplaced
//! or torn sector names its own origin when a test fails.

use std::fmt;

/// Bytes in a sector, always.
pub const SECTOR: usize = 512;

const MAGIC: &[u8; 8] = b"VHDTAG01";
// Where the fields stand in a tagged sector; the rest is filler.
const IMAGE: usize = 8;
const LBA: usize = 12;
const WRITE: usize = 20;
const SUM: usize = 28;
const FILLER: usize = 36;

/// Who wrote a sector, where and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag {
    /// Number of the image (or layer) the write went to.
    pub image: u32,
    /// Guest sector number.
    pub lba: u64,
    /// Number of the write, counted by the test.
    pub write: u64,
}

impl fmt::Display for Tag {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { image, lba, write } = self;
        write!(out, "tag image {image} lba {lba} write {write}")
    }
}

impl Tag {
    /// The sector that says this. Equal tags give equal bytes.
    #[must_use]
    pub fn sector(&self) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        bytes[..IMAGE].copy_from_slice(MAGIC);
        bytes[IMAGE..LBA].copy_from_slice(&self.image.to_be_bytes());
        bytes[LBA..WRITE].copy_from_slice(&self.lba.to_be_bytes());
        bytes[WRITE..SUM].copy_from_slice(&self.write.to_be_bytes());
        // The filler differs from tag to tag, so that no two sectors share a
        // tail that could hide a tear.
        let mut state = fnv(&bytes[..SUM]);
        for chunk in bytes[FILLER..].chunks_mut(8) {
            state = next(state);
            let word = state.to_be_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
        let sum = checksum(&bytes);
        bytes[SUM..FILLER].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// The tag a sector holds; `None` unless every byte of it is right.
    #[must_use]
    pub fn of(sector: &[u8]) -> Option<Self> {
        let tag = Self::claimed(sector)?;
        (sector == tag.sector()).then_some(tag)
    }

    // What the first bytes say, whatever the rest holds.
    fn claimed(sector: &[u8]) -> Option<Self> {
        if sector.len() != SECTOR || sector[..IMAGE] != MAGIC[..] {
            return None;
        }
        Some(Self {
            image: u32::from_be_bytes(sector[IMAGE..LBA].try_into().unwrap()),
            lba: u64::from_be_bytes(sector[LBA..WRITE].try_into().unwrap()),
            write: u64::from_be_bytes(sector[WRITE..SUM].try_into().unwrap()),
        })
    }
}

/// The bytes of `count` sectors from `lba` on, each with its own tag.
#[must_use]
pub fn run(image: u32, lba: u64, count: u64, write: u64) -> Vec<u8> {
    (lba..lba + count).flat_map(|lba| Tag { image, lba, write }.sector()).collect()
}

/// What a sector holds, in words for a failure message.
#[must_use]
pub fn describe(sector: &[u8]) -> String {
    if let Some(tag) = Tag::of(sector) {
        return tag.to_string();
    }
    if let Some(first) = sector.first()
        && sector.iter().all(|byte| byte == first)
    {
        return match first {
            0 => "zeros".to_owned(),
            byte => format!("all bytes {byte:#04x}"),
        };
    }
    if let Some(tag) = Tag::claimed(sector) {
        let good = tag.sector();
        let torn = sector.iter().zip(&good).position(|(a, b)| a != b).unwrap();
        return format!("torn: {tag} up to byte {torn}, then foreign bytes");
    }
    if sector.starts_with(b"conectix") {
        return "a VHD footer".to_owned();
    }
    let head: Vec<String> = sector.iter().take(16).map(|b| format!("{b:02x}")).collect();
    format!("torn or foreign bytes {}...", head.join(" "))
}

/// Compares what was read with what should have been, and says in words where
/// they first differ.
///
/// `start` is the byte offset on the disk of both slices.
///
/// # Errors
/// The first difference, or a difference in length.
pub fn compare(got: &[u8], want: &[u8], start: u64) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("got {} bytes, want {} bytes", got.len(), want.len()));
    }
    let Some(at) = first_difference(got, want) else {
        return Ok(());
    };
    let disk = start + at as u64;
    // Show the whole sector of the disk, as far as both slices hold it.
    let within = usize::try_from(disk % SECTOR as u64).unwrap();
    let from = at.saturating_sub(within);
    let to = (at - within.min(at) + SECTOR).min(got.len());
    Err(format!(
        "disk byte {disk} (sector {}, byte {within}): got {}, want {}",
        disk / SECTOR as u64,
        describe(&got[from..to]),
        describe(&want[from..to]),
    ))
}

fn first_difference(got: &[u8], want: &[u8]) -> Option<usize> {
    // Slices compare far faster than bytes, and disks are mostly equal.
    let chunk = got.chunks(4096).zip(want.chunks(4096)).position(|(a, b)| a != b)? * 4096;
    got[chunk..].iter().zip(&want[chunk..]).position(|(a, b)| a != b).map(|at| chunk + at)
}

// Over everything but the field itself.
fn checksum(bytes: &[u8; SECTOR]) -> u64 {
    fnv(&bytes[..SUM]) ^ fnv(&bytes[FILLER..]).rotate_left(1)
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

// xorshift64: never 0 from a state that is not 0.
fn next(state: u64) -> u64 {
    let mut x = state | 1;
    x ^= x << 13;
    x ^= x >> 7;
    x ^ (x << 17)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAG: Tag = Tag { image: 1, lba: 77, write: 12 };

    #[test]
    fn a_tag_survives_its_sector() {
        assert_eq!(Tag::of(&TAG.sector()), Some(TAG));
        assert_eq!(describe(&TAG.sector()), "tag image 1 lba 77 write 12");
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        for at in 0..SECTOR {
            let mut sector = TAG.sector();
            sector[at] ^= 0x40;
            assert_eq!(Tag::of(&sector), None, "byte {at}");
        }
    }

    #[test]
    fn descriptions_tell_zeros_tears_and_footers_apart() {
        assert_eq!(describe(&[0; SECTOR]), "zeros");
        assert_eq!(describe(&[0xC7; SECTOR]), "all bytes 0xc7");
        let mut torn = TAG.sector();
        torn[256..].fill(0);
        assert!(describe(&torn).starts_with("torn: tag image 1 lba 77 write 12 up to byte 256"));
        let mut footer = [1; SECTOR];
        footer[..8].copy_from_slice(b"conectix");
        assert_eq!(describe(&footer), "a VHD footer");
    }

    #[test]
    fn compare_names_the_sector_and_both_contents() {
        let want = run(1, 8, 3, 1);
        let mut got = want.clone();
        got[1024..].fill(0);
        let said = compare(&got, &want, 8 * 512).unwrap_err();
        assert_eq!(said, "disk byte 5120 (sector 10, byte 0): got zeros, want tag image 1 lba 10 write 1");
        assert!(compare(&want, &want, 0).is_ok());
    }
}
