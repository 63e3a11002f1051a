//! Replies of the transmission phase.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes, Unaligned};

use super::{EXTENDED_REPLY_MAGIC, Errno, Request, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk};

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct SimpleBytes {
    magic: U32,
    error: U32,
    cookie: U64,
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct StructuredBytes {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    len: U32,
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct ExtendedBytes {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    offset: U64,
    len: U64,
}

const _: () = {
    assert!(size_of::<SimpleBytes>() == 16);
    assert!(size_of::<StructuredBytes>() == 20);
    assert!(size_of::<ExtendedBytes>() == 32);
};

/// How a session's replies look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// One header, and the data of a READ.
    Simple,
    /// Chunks.
    Structured,
    /// Chunks with lengths of 64 bits.
    Extended,
}

/// Room for the longest header, and the offset and length of a hole.
const HEAD: usize = size_of::<ExtendedBytes>() + size_of::<u64>() + size_of::<u32>();

/// The bytes before a reply's data.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; HEAD],
    len: u8,
}

impl Head {
    /// Nothing.
    pub const EMPTY: Self = Self { bytes: [0; HEAD], len: 0 };

    fn of(parts: &[&[u8]]) -> Self {
        let mut head = Self::EMPTY;
        for part in parts {
            let at = usize::from(head.len);
            head.bytes[at..at + part.len()].copy_from_slice(part);
            head.len += part.len() as u8;
        }
        head
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// What a chunk says.
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    /// See [`chunk`](super::chunk).
    pub kind: u16,
    /// The last of its reply.
    pub done: bool,
    /// Bytes of its payload, the offset of a data chunk included.
    pub len: u64,
}

impl Style {
    /// The header of a chunk. Simple replies have none.
    #[must_use]
    pub fn chunk(self, request: &Request, what: Chunk) -> Head {
        let (flags, kind) = (U16::new(if what.done { chunk::DONE } else { 0 }), U16::new(what.kind));
        let cookie = U64::new(request.cookie);
        match self {
            Self::Simple => Head::EMPTY,
            Self::Structured => {
                // No chunk is that long: payloads are limited.
                let len = U32::new(u32::try_from(what.len).unwrap_or(u32::MAX));
                let magic = U32::new(STRUCTURED_REPLY_MAGIC);
                Head::of(&[StructuredBytes { magic, flags, kind, cookie, len }.as_bytes()])
            }
            Self::Extended => {
                let (offset, len) = (U64::new(request.offset), U64::new(what.len));
                let magic = U32::new(EXTENDED_REPLY_MAGIC);
                Head::of(&[ExtendedBytes { magic, flags, kind, cookie, offset, len }.as_bytes()])
            }
        }
    }

    /// The header before `len` bytes of data from `offset` on. In simple style it begins the whole reply.
    #[must_use]
    pub fn data(self, request: &Request, offset: u64, len: u64, done: bool) -> Head {
        if self == Self::Simple {
            return simple(request, 0);
        }
        let head = self.chunk(request, Chunk { kind: chunk::OFFSET_DATA, done, len: len + 8 });
        Head::of(&[head.as_bytes(), U64::new(offset).as_bytes()])
    }

    /// A chunk that says that `len` bytes from `offset` on are zero. Simple replies have no such thing.
    #[must_use]
    pub fn hole(self, request: &Request, offset: u64, len: u32, done: bool) -> Head {
        let head = self.chunk(request, Chunk { kind: chunk::OFFSET_HOLE, done, len: 12 });
        Head::of(&[head.as_bytes(), U64::new(offset).as_bytes(), U32::new(len).as_bytes()])
    }

    /// The reply of a request that is done and returns nothing.
    #[must_use]
    pub fn success(self, request: &Request) -> Head {
        match self {
            // Allowed for all but READ, and shorter.
            Self::Simple | Self::Structured => simple(request, 0),
            Self::Extended => self.chunk(request, Chunk { kind: chunk::NONE, done: true, len: 0 }),
        }
    }

    /// The end of a reply whose chunks were sent.
    #[must_use]
    pub fn end(self, request: &Request) -> Head {
        self.chunk(request, Chunk { kind: chunk::NONE, done: true, len: 0 })
    }

    /// The reply of a request that failed: a head and, but in simple style, more bytes with a message for people.
    #[must_use]
    pub fn failure(self, request: &Request, error: Errno, message: &str, at: Option<u64>) -> (Head, Vec<u8>) {
        if self == Self::Simple {
            return (simple(request, error.number()), Vec::new());
        }
        let message = &message.as_bytes()[..message.floor_char_boundary(super::MAX_STRING)];
        let mut payload = error.number().to_be_bytes().to_vec();
        payload.extend_from_slice(&(message.len() as u16).to_be_bytes());
        payload.extend_from_slice(message);
        payload.extend_from_slice(at.map(u64::to_be_bytes).as_ref().map_or(&[][..], |offset| offset));
        let kind = if at.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR };
        (self.chunk(request, Chunk { kind, done: true, len: payload.len() as u64 }), payload)
    }
}

fn simple(request: &Request, error: u32) -> Head {
    let (magic, cookie) = (U32::new(SIMPLE_REPLY_MAGIC), U64::new(request.cookie));
    Head::of(&[SimpleBytes { magic, error: U32::new(error), cookie }.as_bytes()])
}
