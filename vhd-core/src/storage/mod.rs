//! Bytes of one host file.

mod access;
mod aligned;
mod beside;
mod buffers;
mod direct;
mod file;
mod found;
mod held;
mod host;
mod lock;
mod memory;
mod overlay;
mod replace;
mod shared;
mod unnamed;

use std::fmt::Debug;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::BorrowedFd;

pub use access::Access;
pub use aligned::AlignedBuffer;
pub(crate) use aligned::PAGE;
pub use beside::{Beneath, open_beneath, read_beside};
pub use buffers::{ReadBuffers, WriteBuffers};
pub use file::FileStorage;
pub use held::Room;
pub use host::{Host, LocalHost, folder_of, put_file, resolve};
pub(crate) use host::{put_name, remove_file};
pub use lock::LockMode;
pub use memory::MemoryStorage;
pub(crate) use overlay::Overlay;
pub(crate) use replace::may_change_names_beside;
pub use replace::{rehearse_replace, replace_file};
pub use shared::SharedBytes;
pub(crate) use shared::{read_by_copy, write_by_copy};

use crate::block::Spliced;

/// Zeros for those who must write some.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Bytes of one host file or device, positional and shared.
///
/// Contract: no call is ever short; a read past the end is `UnexpectedEof`; a write past the end grows a regular file
/// and fails on a device. Nothing survives a power cut before [`Storage::sync`] returned, and what was not synced may
/// reach the medium in any order or not at all. Implementations retry `EINTR` and never panic.
#[expect(clippy::len_without_is_empty, reason = "nobody asks whether a file is empty")]
pub trait Storage: Send + Sync + Debug {
    /// Fills all of `bufs` from `offset` on.
    ///
    /// # Errors
    /// `UnexpectedEof` past the end; whatever the host says.
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()>;

    /// As [`Storage::read_vectored_at`], but where the host can tell that the bytes are not in its memory it does not wait for
    /// them: false then, and `bufs` hold anything.
    ///
    /// # Errors
    /// As there.
    fn read_if_cached(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<bool> {
        self.read_vectored_at(bufs, offset).map(|()| true)
    }

    /// Writes all of `bufs` from `offset` on.
    ///
    /// # Errors
    /// Whatever the host says; a part may have been written.
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()>;

    /// Fills a range of memory that others use too, from `offset` on.
    ///
    /// # Errors
    /// As [`Storage::read_vectored_at`].
    fn read_shared_at(&self, to: &dyn SharedBytes, range: Range<u64>, offset: u64) -> io::Result<()> {
        shared::read(self, to, range, offset)
    }

    /// Writes a range of memory that others use too, from `offset` on.
    ///
    /// # Errors
    /// As [`Storage::write_vectored_at`].
    fn write_shared_at(&self, from: &dyn SharedBytes, range: Range<u64>, offset: u64) -> io::Result<()> {
        shared::write(self, from, range, offset)
    }

    /// Fills `buf`; see [`Storage::read_vectored_at`].
    ///
    /// # Errors
    /// As there.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_vectored_at(&mut [IoSliceMut::new(buf)], offset)
    }

    /// Writes `buf`; see [`Storage::write_vectored_at`].
    ///
    /// # Errors
    /// As there.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_vectored_at(&[IoSlice::new(buf)], offset)
    }

    /// Bytes of the file.
    ///
    /// # Errors
    /// Whatever the host says.
    fn len(&self) -> io::Result<u64>;

    /// Makes the file `len` bytes long; new bytes read as zeros.
    ///
    /// # Errors
    /// Whatever the host says; a device can't change.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// A barrier: returns when all bytes written before, and the file's length, are durable.
    ///
    /// # Errors
    /// Whatever the host says. After a failure nothing is known about what was written since the last success.
    fn sync(&self) -> io::Result<()>;

    /// Makes a range inside the file read as zeros and gives its space back where the host can.
    ///
    /// # Errors
    /// Whatever the host says.
    fn punch_hole(&self, range: Range<u64>) -> io::Result<()>;

    /// Makes a range inside the file read as zeros and keeps or reserves its space.
    ///
    /// # Errors
    /// Whatever the host says.
    fn zero_range(&self, range: Range<u64>) -> io::Result<()>;

    /// True when the host is known to do [`Storage::punch_hole`], or with `keep` [`Storage::zero_range`], without writing
    /// all the zeros.
    fn zeroes_fast(&self, keep: bool) -> bool {
        let _ = keep;
        false
    }

    /// True when writes are known to go to this machine's memory or disk: they wait for nobody else.
    fn is_local(&self) -> bool {
        false
    }

    /// Reserves space for a range, so that writing it can't run out of space. Content stays.
    ///
    /// # Errors
    /// `StorageFull`, or whatever the host says.
    fn allocate(&self, range: Range<u64>) -> io::Result<()>;

    /// The first range at or after `offset` that may hold anything but zeros; `None` when only zeros follow.
    ///
    /// # Errors
    /// Whatever the host says.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;

    /// Puts a range into a pipe, as [`BlockDevice::splice_at`](crate::block::BlockDevice::splice_at) has it: what is written to the range before
    /// the pipe is read may be seen there.
    ///
    /// # Errors
    /// As the host fails or the file ends before; the pipe may hold part of it then.
    fn splice_at(&self, pipe: BorrowedFd<'_>, range: Range<u64>, wait: bool) -> io::Result<Spliced> {
        let _ = (pipe, range, wait);
        Ok(Spliced::No)
    }

    /// A hint that all that is written from now on will be synced soon: the host may begin with it at once, so that the medium is
    /// busy while more is written. Promises nothing.
    fn write_early(&self) {}

    /// False for a device: its length is fixed and no byte of it is known to be zero.
    fn can_grow(&self) -> bool;

    /// Bytes that the host has given to the file, holes left out.
    ///
    /// # Errors
    /// Whatever the host says.
    fn allocated(&self) -> io::Result<u64>;

    /// The open file of the host that this is, or that is below it.
    fn as_file(&self) -> Option<&FileStorage> {
        None
    }
}

/// Writes zeros over a range, for hosts without a better way.
fn write_zeros(storage: &(impl Storage + ?Sized), range: Range<u64>) -> io::Result<()> {
    let mut offset = range.start;
    while offset < range.end {
        let len = usize::try_from(range.end - offset).unwrap_or(usize::MAX).min(ZEROS.len());
        storage.write_at(&ZEROS[..len], offset)?;
        offset += len as u64;
    }
    Ok(())
}
