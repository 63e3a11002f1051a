//! A file that nobody can find yet.

use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;

use super::{FileStorage, Storage};

/// A new file under a passing name, while it is filled. A power cut leaves nothing of it, in whatever order it was written, so
/// its barriers are left out: it is synced once, before it gets its name.
#[derive(Debug)]
pub(super) struct Unnamed(pub(super) Arc<dyn Storage>);

impl Storage for Unnamed {
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        self.0.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.0.write_vectored_at(bufs, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.0.punch_hole(range)
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.0.zero_range(range)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.0.allocate(range)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.0.next_data(offset)
    }

    fn write_early(&self) {
        self.0.write_early();
    }

    fn can_grow(&self) -> bool {
        self.0.can_grow()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.0.allocated()
    }

    fn as_file(&self) -> Option<&FileStorage> {
        self.0.as_file()
    }
}
