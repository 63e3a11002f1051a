//! The protocol's numbers and structures: bytes to values and back, no I/O.
//!
//! All of it is from the protocol's document, `doc/proto.md` of the NBD project. Numbers are big-endian.

mod constants;
mod errno;
mod reply;
mod request;

pub use constants::*;
pub use errno::Errno;
pub use reply::{Chunk, Head, Style};
pub use request::{COMPACT_REQUEST, Command, EXTENDED_REQUEST, Request, request_len};

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a client sends before each option's data.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// Which option.
    pub option: U32,
    /// Bytes of its data.
    pub len: U32,
}

/// What a server sends before the data of a reply to an option.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionReply {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option that is answered.
    pub option: U32,
    /// What sort of reply.
    pub kind: U32,
    /// Bytes of its data.
    pub len: U32,
}

const _: () = {
    assert!(size_of::<OptionHeader>() == 16);
    assert!(size_of::<OptionReply>() == 20);
};
