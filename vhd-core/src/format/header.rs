//! The dynamic header: 1024 bytes that describe the blocks of a dynamic or differencing image and its parent.

use std::mem::{offset_of, size_of};

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::ones_complement;
use super::locator::{LocatorBytes, LocatorEntry};
use super::{HEADER_LEN, MAX_BLOCK_SIZE, MIN_BLOCK_SIZE, SECTOR, Timestamp};

/// First eight bytes of a dynamic header.
pub const HEADER_COOKIE: [u8; 8] = *b"cxsparse";
/// Parent locators that a header has room for.
pub const LOCATOR_SLOTS: usize = 8;
/// UTF-16 units of the parent's name.
pub const PARENT_NAME_UNITS: usize = 256;
const VERSION_1: u32 = 0x0001_0000;
const CHECKSUM: std::ops::Range<usize> = 36..40;

/// The dynamic header as bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct HeaderBytes {
    cookie: [u8; 8],
    data_offset: U64,
    bat_offset: U64,
    version: U32,
    max_table_entries: U32,
    block_size: U32,
    checksum: U32,
    parent_uuid: [u8; 16],
    parent_timestamp: U32,
    reserved1: [u8; 4],
    parent_name: [U16; PARENT_NAME_UNITS],
    locators: [LocatorBytes; LOCATOR_SLOTS],
    reserved2: [u8; 256],
}

const _: () = {
    assert!(size_of::<HeaderBytes>() == HEADER_LEN);
    assert!(offset_of!(HeaderBytes, checksum) == CHECKSUM.start);
    assert!(offset_of!(HeaderBytes, parent_uuid) == 40);
    assert!(offset_of!(HeaderBytes, parent_name) == 64);
    assert!(offset_of!(HeaderBytes, locators) == 576);
    assert!(offset_of!(HeaderBytes, reserved2) == 768);
};

/// What is wrong with bytes that should be a dynamic header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The cookie is another one.
    #[error("no dynamic header: found \"{}\", expected \"cxsparse\"", .0.escape_ascii())]
    Cookie([u8; 8]),
    /// The checksum is not that of the bytes.
    #[error("dynamic header checksum is {found:#010x}, its bytes give {computed:#010x}")]
    Checksum {
        /// In the file.
        found: u32,
        /// Of the file's bytes.
        computed: u32,
    },
    /// A version of the format that was never published.
    #[error("dynamic header version is {0:#010x}, expected 0x00010000")]
    Version(u32),
    /// A block size that can't be served.
    #[error("block size is {0}, expected a power of two from 4 KiB to 256 MiB")]
    BlockSize(u32),
    /// The BAT would begin off a sector or inside the footer copy.
    #[error("BAT offset is {0:#x}, expected a multiple of 512 after the dynamic header")]
    BatOffset(u64),
}

/// A dynamic header whose cookie, version, block size and BAT offset are right. The checksum is right too, unless
/// it was parsed by [`DynamicHeader::parse_tolerant`]; it is always right in [`DynamicHeader::to_bytes`].
#[derive(Clone)]
pub struct DynamicHeader {
    bytes: HeaderBytes,
}

/// What a new image's dynamic header says.
#[derive(Clone, Debug)]
pub struct NewHeader {
    /// File offset of the BAT.
    pub bat_offset: u64,
    /// Entries of the BAT.
    pub max_table_entries: u32,
    /// Bytes of a block.
    pub block_size: u32,
}

impl DynamicHeader {
    /// Reads a dynamic header.
    ///
    /// # Errors
    /// Anything [`HeaderError`] names.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        let header = Self::parse_tolerant(bytes)?;
        let (found, computed) = (header.bytes.checksum.get(), header.computed_checksum());
        if found == computed { Ok(header) } else { Err(HeaderError::Checksum { found, computed }) }
    }

    /// Reads a dynamic header whatever its checksum.
    ///
    /// # Errors
    /// Anything [`HeaderError`] names but the checksum.
    pub fn parse_tolerant(bytes: &[u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        let bytes = HeaderBytes::read_from_bytes(bytes).unwrap_or_else(|_| unreachable!("both are 1024 bytes"));
        if bytes.cookie != HEADER_COOKIE {
            return Err(HeaderError::Cookie(bytes.cookie));
        }
        if bytes.version.get() != VERSION_1 {
            return Err(HeaderError::Version(bytes.version.get()));
        }
        let block_size = bytes.block_size.get();
        if !block_size.is_power_of_two() || !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block_size) {
            return Err(HeaderError::BlockSize(block_size));
        }
        let bat = bytes.bat_offset.get();
        if bat < SECTOR || bat % SECTOR != 0 || bat > i64::MAX as u64 {
            return Err(HeaderError::BatOffset(bat));
        }
        Ok(Self { bytes })
    }

    /// A header without a parent.
    #[must_use]
    pub fn new(new: &NewHeader) -> Self {
        let bytes = HeaderBytes {
            cookie: HEADER_COOKIE,
            data_offset: U64::new(u64::MAX),
            bat_offset: U64::new(new.bat_offset),
            version: U32::new(VERSION_1),
            max_table_entries: U32::new(new.max_table_entries),
            block_size: U32::new(new.block_size),
            checksum: U32::ZERO,
            parent_uuid: [0; 16],
            parent_timestamp: U32::ZERO,
            reserved1: [0; 4],
            parent_name: [U16::ZERO; PARENT_NAME_UNITS],
            locators: [LocatorBytes::UNUSED; LOCATOR_SLOTS],
            reserved2: [0; 256],
        };
        Self { bytes }
    }

    /// The bytes to write, with their checksum.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = self.bytes;
        bytes.checksum = U32::new(self.computed_checksum());
        zerocopy::transmute!(bytes)
    }

    fn computed_checksum(&self) -> u32 {
        ones_complement(self.bytes.as_bytes(), CHECKSUM)
    }

    /// File offset of the BAT.
    #[must_use]
    pub fn bat_offset(&self) -> u64 {
        self.bytes.bat_offset.get()
    }

    /// Entries that the BAT has room for. More than the disk has blocks is normal.
    #[must_use]
    pub fn max_table_entries(&self) -> u32 {
        self.bytes.max_table_entries.get()
    }

    /// Bytes of a block's data.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.bytes.block_size.get()
    }

    /// Identifier of the parent; all zero when it is a raw file or device (vhd-util's convention).
    #[must_use]
    pub fn parent_uuid(&self) -> [u8; 16] {
        self.bytes.parent_uuid
    }

    /// The parent's modification time when this image was made. Windows 10 and this project write zero.
    #[must_use]
    pub fn parent_timestamp(&self) -> Timestamp {
        Timestamp(self.bytes.parent_timestamp.get())
    }

    /// The parent's name: a file name or a whole path. Unpaired surrogates become U+FFFD.
    #[must_use]
    pub fn parent_name(&self) -> String {
        let units = self.bytes.parent_name.iter().map(|unit| unit.get()).take_while(|&unit| unit != 0);
        char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
    }

    /// The locator table, all eight slots.
    pub fn locators(&self) -> impl Iterator<Item = LocatorEntry> + '_ {
        self.bytes.locators.iter().map(LocatorEntry::from_bytes)
    }

    /// Names the parent. A name of more than 256 UTF-16 units is cut: locators hold the whole path.
    pub fn set_parent(&mut self, uuid: [u8; 16], timestamp: Timestamp, name: &str) {
        self.bytes.parent_uuid = uuid;
        self.bytes.parent_timestamp = U32::new(timestamp.0);
        self.bytes.parent_name = [U16::ZERO; PARENT_NAME_UNITS];
        for (slot, unit) in self.bytes.parent_name.iter_mut().zip(name.encode_utf16()) {
            *slot = U16::new(unit);
        }
    }

    /// Puts the BAT elsewhere, with room for as many entries.
    pub(crate) fn set_table(&mut self, offset: u64, entries: u32) {
        self.bytes.bat_offset = U64::new(offset);
        self.bytes.max_table_entries = U32::new(entries);
    }

    /// Replaces the locator table; slots beyond `entries` become unused, entries beyond the eighth are dropped.
    pub fn set_locators(&mut self, entries: &[LocatorEntry]) {
        self.bytes.locators = [LocatorBytes::UNUSED; LOCATOR_SLOTS];
        for (slot, entry) in self.bytes.locators.iter_mut().zip(entries) {
            *slot = entry.to_bytes();
        }
    }
}

impl std::fmt::Debug for DynamicHeader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DynamicHeader")
            .field("bat_offset", &self.bat_offset())
            .field("max_table_entries", &self.max_table_entries())
            .field("block_size", &self.block_size())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::PlatformCode;

    #[test]
    fn survives_the_round_trip() {
        let mut header = DynamicHeader::new(&NewHeader { bat_offset: 0x2000, max_table_entries: 20, block_size: 2 << 20 });
        header.set_parent([3; 16], Timestamp(0), "parent – ü.vhd");
        let entry = LocatorEntry { code: PlatformCode::W2ku, data_space: 4096, data_length: 66, data_offset: 0x1000 };
        header.set_locators(std::slice::from_ref(&entry));
        let again = DynamicHeader::parse(&header.to_bytes()).unwrap();
        assert_eq!(again.parent_name(), "parent – ü.vhd");
        assert_eq!(again.locators().next(), Some(entry));
        assert_eq!(again.to_bytes(), header.to_bytes());
    }

    #[test]
    fn every_wrong_field_is_named() {
        let good = DynamicHeader::new(&NewHeader { bat_offset: 0x600, max_table_entries: 20, block_size: 2 << 20 }).to_bytes();
        let with = |offset: usize, value: u8| {
            let mut bytes = good;
            bytes[offset] = value;
            DynamicHeader::parse(&bytes).unwrap_err()
        };
        assert!(matches!(with(0, b'x'), HeaderError::Cookie(_)));
        assert!(matches!(with(24, 9), HeaderError::Version(_)));
        assert!(matches!(with(33, 0x30), HeaderError::BlockSize(0x30_0000)));
        assert!(matches!(with(23, 1), HeaderError::BatOffset(0x601)));
        assert!(matches!(with(900, 1), HeaderError::Checksum { .. }));
    }
}
