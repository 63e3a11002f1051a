//! The errors that may be on the wire.

use std::fmt;

use vhd_core::ErrorKind;

/// An error as clients understand it. The protocol knows no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// The export is read-only.
    Perm = 1,
    /// The disk failed.
    Io = 5,
    /// The server has no memory.
    NoMem = 12,
    /// The request makes no sense here.
    Inval = 22,
    /// No room, or beyond the end.
    NoSpc = 28,
    /// A reply would be too long.
    Overflow = 75,
    /// It could not be done fast.
    NotSup = 95,
    /// The server ends.
    Shutdown = 108,
}

impl Errno {
    /// The number on the wire.
    #[must_use]
    pub fn number(self) -> u32 {
        self as u32
    }

    /// What a client is told of a failure of the disk.
    #[must_use]
    pub fn of(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::NoSpace => Self::NoSpc,
            ErrorKind::ReadOnly => Self::Perm,
            ErrorKind::OutOfRange | ErrorKind::InvalidInput => Self::Inval,
            _ => Self::Io,
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Perm => "the export is read-only",
            Self::Io => "the disk failed",
            Self::NoMem => "the server has no memory",
            Self::Inval => "the request makes no sense here",
            Self::NoSpc => "there is no room",
            Self::Overflow => "the reply would be too long",
            Self::NotSup => "it can't be done fast",
            Self::Shutdown => "the server ends",
        })
    }
}
