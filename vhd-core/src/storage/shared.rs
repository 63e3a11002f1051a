//! Memory that others change while it is used, such as a guest's.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use super::Storage;

/// Bytes that are copied at once where they can't go straight.
const PIECE: u64 = 256 << 10;

/// A run of bytes that others may read and write at any time: a guest, and whoever serves another request of its. There is no
/// reference to such bytes, in any crate; they are copied, by the kernel where they can go straight to a file or come from one.
///
/// Ranges count from the start of the run and are inside it, or it is an error.
pub trait SharedBytes {
    /// Bytes.
    fn len(&self) -> u64;

    /// True when there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills a range with bytes of a file, from `offset` on: all of it.
    ///
    /// # Errors
    /// `UnexpectedEof` past the end; whatever the host says.
    fn read_from(&self, file: BorrowedFd<'_>, offset: u64, range: Range<u64>) -> io::Result<()>;

    /// Writes a range to a file, at `offset`: all of it.
    ///
    /// # Errors
    /// Whatever the host says; a part may have been written.
    fn write_to(&self, file: BorrowedFd<'_>, offset: u64, range: Range<u64>) -> io::Result<()>;

    /// Copies bytes in, at `at`.
    ///
    /// # Errors
    /// What is not inside.
    fn put(&self, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// Copies bytes out, from `at` on.
    ///
    /// # Errors
    /// What is not inside.
    fn get(&self, at: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// True when each piece of a range has a length that is a multiple of `lengths`, and an address that is one of `addresses`.
    fn is_aligned(&self, range: Range<u64>, lengths: usize, addresses: usize) -> bool;

    /// Fills a range with zeros.
    ///
    /// # Errors
    /// What is not inside.
    fn put_zeros(&self, range: Range<u64>) -> io::Result<()> {
        pieces(range, super::ZEROS.len() as u64, |at, len| self.put(at, &super::ZEROS[..len]))
    }
}

/// Calls `each` with the pieces of a range.
pub(crate) fn pieces<E>(range: Range<u64>, most: u64, mut each: impl FnMut(u64, usize) -> Result<(), E>) -> Result<(), E> {
    let mut at = range.start;
    while at < range.end {
        let len = most.min(range.end - at);
        each(at, usize::try_from(len).unwrap_or(usize::MAX))?;
        at += len;
    }
    Ok(())
}

/// Reads with a copy in between.
pub(crate) fn read_by_copy<E: From<io::Error>>(
    to: &dyn SharedBytes,
    range: Range<u64>,
    mut read: impl FnMut(&mut [u8], u64) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; usize::try_from(PIECE.min(range.end - range.start)).unwrap_or(0)];
    pieces(range.clone(), PIECE, |at, len| {
        read(&mut buffer[..len], at - range.start)?;
        Ok(to.put(at, &buffer[..len])?)
    })
}

/// Writes with a copy in between.
pub(crate) fn write_by_copy<E: From<io::Error>>(
    from: &dyn SharedBytes,
    range: Range<u64>,
    mut write: impl FnMut(&[u8], u64) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; usize::try_from(PIECE.min(range.end - range.start)).unwrap_or(0)];
    pieces(range.clone(), PIECE, |at, len| {
        from.get(at, &mut buffer[..len])?;
        write(&buffer[..len], at - range.start)
    })
}

/// As [`Storage::read_shared_at`] by default.
pub(super) fn read(storage: &(impl Storage + ?Sized), to: &dyn SharedBytes, range: Range<u64>, offset: u64) -> io::Result<()> {
    read_by_copy(to, range, |bytes, at| storage.read_at(bytes, offset + at))
}

/// As [`Storage::write_shared_at`] by default.
pub(super) fn write(storage: &(impl Storage + ?Sized), from: &dyn SharedBytes, range: Range<u64>, offset: u64) -> io::Result<()> {
    write_by_copy(from, range, |bytes, at| storage.write_at(bytes, offset + at))
}
