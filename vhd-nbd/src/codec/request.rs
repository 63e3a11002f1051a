//! Requests of the transmission phase.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, command_flag};

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct CompactBytes {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    len: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ExtendedBytes {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    len: U64,
}

/// Bytes of a compact request.
pub const COMPACT_REQUEST: usize = size_of::<CompactBytes>();
/// Bytes of an extended request.
pub const EXTENDED_REQUEST: usize = size_of::<ExtendedBytes>();

const _: () = {
    assert!(COMPACT_REQUEST == 28);
    assert!(EXTENDED_REQUEST == 32);
};

/// Bytes of a request's header.
#[must_use]
pub fn request_len(extended: bool) -> usize {
    if extended { EXTENDED_REQUEST } else { COMPACT_REQUEST }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Bytes.
    Read,
    /// Takes bytes.
    Write,
    /// Ends the session.
    Disconnect,
    /// Makes what was written durable.
    Flush,
    /// A range is not needed any more.
    Trim,
    /// A range will be read soon.
    Cache,
    /// Zeros.
    WriteZeroes,
    /// What a range is.
    BlockStatus,
    /// Nothing that is known.
    Unknown(u16),
}

impl Command {
    const KNOWN: [Self; 8] =
        [Self::Read, Self::Write, Self::Disconnect, Self::Flush, Self::Trim, Self::Cache, Self::WriteZeroes, Self::BlockStatus];

    fn from_number(number: u16) -> Self {
        Self::KNOWN.get(usize::from(number)).copied().unwrap_or(Self::Unknown(number))
    }

    fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(number) => number,
        }
    }
}

/// A request, its payload left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// See [`command_flag`].
    pub flags: u16,
    /// What is asked for.
    pub command: Command,
    /// The client's word for it, that the reply repeats.
    pub cookie: u64,
    /// First byte of the disk.
    pub offset: u64,
    /// Bytes of the disk, or of the payload.
    pub len: u64,
}

impl Request {
    /// Reads a request of [`request_len`] bytes. `None` when it is none: the stream can't be understood any more.
    #[must_use]
    pub fn parse(bytes: &[u8], extended: bool) -> Option<Self> {
        let (magic, wanted, fields) = if extended {
            let raw = ExtendedBytes::ref_from_bytes(bytes).ok()?;
            (raw.magic, EXTENDED_REQUEST_MAGIC, (raw.flags, raw.command, raw.cookie, raw.offset, raw.len.get()))
        } else {
            let raw = CompactBytes::ref_from_bytes(bytes).ok()?;
            (raw.magic, REQUEST_MAGIC, (raw.flags, raw.command, raw.cookie, raw.offset, u64::from(raw.len.get())))
        };
        if magic.get() != wanted {
            return None;
        }
        let (flags, command, cookie, offset, len) = fields;
        let command = Command::from_number(command.get());
        Some(Self { flags: flags.get(), command, cookie: cookie.get(), offset: offset.get(), len })
    }

    /// The request as bytes. A length beyond 32 bits has no compact form.
    #[must_use]
    pub fn to_bytes(&self, extended: bool) -> Option<Vec<u8>> {
        let (flags, command) = (U16::new(self.flags), U16::new(self.command.number()));
        let (cookie, offset) = (U64::new(self.cookie), U64::new(self.offset));
        if extended {
            let magic = U32::new(EXTENDED_REQUEST_MAGIC);
            let bytes = ExtendedBytes { magic, flags, command, cookie, offset, len: U64::new(self.len) };
            return Some(bytes.as_bytes().to_vec());
        }
        let len = U32::new(u32::try_from(self.len).ok()?);
        Some(CompactBytes { magic: U32::new(REQUEST_MAGIC), flags, command, cookie, offset, len }.as_bytes().to_vec())
    }

    /// True when a flag is set.
    #[must_use]
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Bytes that follow the header, whether they make sense or not.
    #[must_use]
    pub fn payload(&self, extended: bool) -> u64 {
        let has_payload = if extended { self.has(command_flag::PAYLOAD_LEN) } else { self.command == Command::Write };
        if has_payload { self.len } else { 0 }
    }

    /// The end of the range, where there is a number for it.
    #[must_use]
    pub fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn requests_survive_the_wire(flags: u16, number: u16, cookie: u64, offset: u64, len: u32, extended: bool) {
            let request = Request { flags, command: Command::from_number(number), cookie, offset, len: len.into() };
            let bytes = request.to_bytes(extended).unwrap();
            prop_assert_eq!(bytes.len(), request_len(extended));
            prop_assert_eq!(Request::parse(&bytes, extended), Some(request));
            prop_assert_eq!(Request::parse(&bytes, !extended), None);
        }
    }

    #[test]
    fn a_long_range_has_no_compact_form() {
        let request = Request { flags: 0, command: Command::Trim, cookie: 1, offset: 0, len: 1 << 40 };
        assert_eq!(request.to_bytes(false), None);
        assert_eq!(Request::parse(&request.to_bytes(true).unwrap(), true), Some(request));
    }
}
