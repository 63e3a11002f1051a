//! Parent locators: where an image says its parent is.
#![allow(clippy::little_endian_bytes, reason = "W2ru and W2ku hold UTF-16LE, the one little-endian text in the format")]

use std::mem::size_of;

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// One entry of the header's locator table, as bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct LocatorBytes {
    code: [u8; 4],
    data_space: U32,
    data_length: U32,
    reserved: [u8; 4],
    data_offset: U64,
}

const _: () = assert!(size_of::<LocatorBytes>() == 24);

impl LocatorBytes {
    pub(super) const UNUSED: Self =
        Self { code: [0; 4], data_space: U32::ZERO, data_length: U32::ZERO, reserved: [0; 4], data_offset: U64::ZERO };
}

/// What a locator's payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlatformCode {
    /// The slot is unused.
    None,
    /// Windows path relative to the child's folder, UTF-16LE, begins with `.\`.
    W2ru,
    /// Absolute Windows path, UTF-16LE.
    W2ku,
    /// File URL (RFC 2396), UTF-8. tapdisk writes `file://` and a relative path.
    MacX,
    /// Mac OS alias, opaque here.
    Mac,
    /// Relative Windows path, ANSI; deprecated.
    Wi2r,
    /// Absolute Windows path, ANSI; deprecated.
    Wi2k,
    /// None of those of the specification.
    Other([u8; 4]),
}

impl PlatformCode {
    /// Our own: the session of an undo disk, as JSON. Others pass over codes that they don't know.
    pub const UNDO_SESSION: Self = Self::Other(*b"vhdU");
    /// Our own: what a linked disk is linked to, as JSON.
    pub const LINKED_DISK: Self = Self::Other(*b"vhdL");

    /// The code that these four bytes name.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 4]) -> Self {
        match &bytes {
            [0, 0, 0, 0] => Self::None,
            b"W2ru" => Self::W2ru,
            b"W2ku" => Self::W2ku,
            b"MacX" => Self::MacX,
            b"Mac " => Self::Mac,
            b"Wi2r" => Self::Wi2r,
            b"Wi2k" => Self::Wi2k,
            _ => Self::Other(bytes),
        }
    }

    /// The four bytes that name this code.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 4] {
        match self {
            Self::None => [0; 4],
            Self::W2ru => *b"W2ru",
            Self::W2ku => *b"W2ku",
            Self::MacX => *b"MacX",
            Self::Mac => *b"Mac ",
            Self::Wi2r => *b"Wi2r",
            Self::Wi2k => *b"Wi2k",
            Self::Other(bytes) => bytes,
        }
    }

    /// The code as text: `W2ru`, `MacX`, …
    #[must_use]
    pub fn name(self) -> String {
        self.to_bytes().escape_ascii().to_string()
    }

    /// The path that a payload of this code holds, in the words of the file; `None` for opaque or malformed ones.
    /// Text ends at a NUL. Unpaired surrogates and bytes that are not UTF-8 become U+FFFD.
    #[must_use]
    pub fn decode(self, payload: &[u8]) -> Option<String> {
        match self {
            Self::W2ru | Self::W2ku => {
                let units = payload.as_chunks::<2>().0.iter().map(|&pair| u16::from_le_bytes(pair));
                let text = char::decode_utf16(units.take_while(|&unit| unit != 0));
                Some(text.map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect())
            }
            Self::MacX | Self::Wi2r | Self::Wi2k => {
                let text = payload.split(|&byte| byte == 0).next().unwrap_or_default();
                Some(String::from_utf8_lossy(text).into_owned())
            }
            Self::None | Self::Mac | Self::Other(_) => None,
        }
    }
}

/// The payload of a locator: `text` as `code` stores it. Codes that hold no text get none.
#[must_use]
pub fn encode_locator(code: PlatformCode, text: &str) -> Vec<u8> {
    match code {
        PlatformCode::W2ru | PlatformCode::W2ku => text.encode_utf16().flat_map(u16::to_le_bytes).collect(),
        PlatformCode::MacX | PlatformCode::Wi2r | PlatformCode::Wi2k => text.as_bytes().to_vec(),
        PlatformCode::None | PlatformCode::Mac | PlatformCode::Other(_) => Vec::new(),
    }
}

/// One entry of the locator table: what the payload is, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocatorEntry {
    /// What the payload is.
    pub code: PlatformCode,
    /// Room for the payload. The specification says sectors; Windows and everyone else write bytes. Nothing here
    /// relies on it.
    pub data_space: u32,
    /// Bytes of the payload.
    pub data_length: u32,
    /// File offset of the payload.
    pub data_offset: u64,
}

impl LocatorEntry {
    pub(super) fn from_bytes(bytes: &LocatorBytes) -> Self {
        Self {
            code: PlatformCode::from_bytes(bytes.code),
            data_space: bytes.data_space.get(),
            data_length: bytes.data_length.get(),
            data_offset: bytes.data_offset.get(),
        }
    }

    pub(super) fn to_bytes(&self) -> LocatorBytes {
        LocatorBytes {
            code: self.code.to_bytes(),
            data_space: U32::new(self.data_space),
            data_length: U32::new(self.data_length),
            reserved: [0; 4],
            data_offset: U64::new(self.data_offset),
        }
    }

    /// True for a slot that holds a locator.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.code != PlatformCode::None
    }

    /// Bytes of the file that the payload may use: the data space in whichever unit makes it hold the payload,
    /// and at least the payload's length. Below 512 the space can only be sectors (tapdisk's rule); a file that
    /// counts more sectors than that is understood to count bytes.
    #[must_use]
    pub fn reserved_len(&self) -> u64 {
        let space = u64::from(self.data_space);
        let bytes = if space < 512 { space * 512 } else { space };
        bytes.max(u64::from(self.data_length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_survives_in_every_code_that_holds_text() {
        for code in [PlatformCode::W2ru, PlatformCode::W2ku, PlatformCode::MacX, PlatformCode::Wi2r, PlatformCode::Wi2k] {
            assert_eq!(PlatformCode::from_bytes(code.to_bytes()), code);
            assert_eq!(code.decode(&encode_locator(code, r".\base ü.vhd")).as_deref(), Some(r".\base ü.vhd"));
        }
        assert_eq!(PlatformCode::Mac.decode(b"alias"), None);
    }

    #[test]
    fn malformed_text_is_still_text() {
        assert_eq!(PlatformCode::W2ru.decode(&[0x00, 0xD8, b'a', 0, b'b']).as_deref(), Some("\u{FFFD}a"));
        assert_eq!(PlatformCode::MacX.decode(&[0xFF, b'x', 0, b'y']).as_deref(), Some("\u{FFFD}x"));
    }
}
