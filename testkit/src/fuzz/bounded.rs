//! A file in memory with little room.

use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;

use vhd_core::storage::{MemoryStorage, Storage};

/// Bytes of a file at most.
pub(super) const LIMIT: u64 = 8 << 20;

/// A file in memory that has no room beyond a limit, so that no offset in an image makes a test use much memory.
#[derive(Debug)]
pub struct Bounded {
    file: MemoryStorage,
    limit: u64,
}

impl Bounded {
    /// A file with this content that may become 8 MiB long.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { limit: LIMIT.max(bytes.len() as u64), file: MemoryStorage::new(bytes) }
    }

    /// A copy of the content.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.file.to_vec()
    }

    fn room(&self, end: Option<u64>) -> io::Result<()> {
        match end {
            Some(end) if end <= self.limit => Ok(()),
            _ => Err(io::ErrorKind::StorageFull.into()),
        }
    }
}

impl Storage for Bounded {
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        self.file.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.room(offset.checked_add(bufs.iter().map(|buf| buf.len() as u64).sum()))?;
        self.file.write_vectored_at(bufs, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.room(Some(len))?;
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.file.punch_hole(range)
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.file.zero_range(range)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.room(Some(range.end))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(offset)
    }

    fn can_grow(&self) -> bool {
        true
    }

    fn allocated(&self) -> io::Result<u64> {
        self.file.len()
    }
}
