//! Bytes of the VHD format to validated structures and back. No I/O.
//!
//! Every structure comes as two types: one of bytes (`zerocopy`, big-endian fields, its layout proved at
//! compile time) and one of meaning, which wraps the bytes, checks them when parsed and keeps what it
//! does not own (reserved bytes, creator, tapdisk's hidden byte) as it found it.
//!
//! The facts are in `docs/format.md`; they come from Microsoft's "Virtual Hard Disk Image Format
//! Specification" (2006) and from files that other tools made.

mod batmap;
mod checksum;
mod footer;
mod geometry;
mod header;
mod locator;
mod stage;
mod timestamp;

pub use batmap::{BATMAP_COOKIE, Batmap};
pub use footer::{Creator, DiskType, FOOTER_COOKIE, Footer, FooterError, NewFooter};
pub use geometry::{Geometry, IDE_LIMIT};
pub use header::{DynamicHeader, HEADER_COOKIE, HeaderError, LOCATOR_SLOTS, NewHeader, PARENT_NAME_UNITS};
pub use locator::{LocatorEntry, PlatformCode, encode_locator};
pub use stage::Stage;
pub use timestamp::Timestamp;

/// Bytes of a sector. The format knows no other sector size.
pub const SECTOR: u64 = 512;
/// Bytes of a footer.
pub const FOOTER_LEN: usize = 512;
/// Bytes of the footer that Virtual PC wrote before 2004: one less, the last reserved byte is missing.
pub const OLD_FOOTER_LEN: usize = 511;
/// Bytes of a dynamic header.
pub const HEADER_LEN: usize = 1024;
/// A BAT entry that names no block.
pub const BAT_UNUSED: u32 = 0xFFFF_FFFF;
/// Bytes of one BAT entry.
pub const BAT_ENTRY_LEN: u64 = 4;
/// The smallest block that is read and written: one page. Smaller ones are in no file ever seen and make a
/// sector bitmap per sector.
pub const MIN_BLOCK_SIZE: u32 = 4 << 10;
/// The largest block that is read and written. Its sector bitmap is 64 KiB, which bounds the memory of one.
pub const MAX_BLOCK_SIZE: u32 = 256 << 20;
/// The block size that every creator writes by default.
pub const DEFAULT_BLOCK_SIZE: u32 = 2 << 20;
/// The largest disk that is created: 2040 GiB, what Windows and Virtual Server allow.
pub const MAX_CREATE_SIZE: u64 = 2040 << 30;
/// The largest disk that is opened. A BAT entry counts sectors in 32 bits, so no image holds more.
pub const MAX_DISK_SIZE: u64 = (u32::MAX as u64) * SECTOR;
/// Windows refuses disks smaller than this.
pub const WINDOWS_MIN_SIZE: u64 = 3 << 20;

/// Bytes of the sector bitmap of a block of `block_size` bytes, padded to whole sectors.
#[must_use]
pub fn bitmap_len(block_size: u32) -> u64 {
    (u64::from(block_size) / SECTOR).div_ceil(8).next_multiple_of(SECTOR)
}
