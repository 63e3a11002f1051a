//! What everything else consumes: a disk as a guest sees it, whatever holds it.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

pub use crate::image::ZeroMode;

use crate::error::{Error, Result};
use crate::storage::Room;
pub use crate::storage::SharedBytes;
use crate::storage::{read_by_copy, write_by_copy};

/// What a run of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentState {
    /// A layer holds bytes.
    Data,
    /// A layer says that it is zero.
    Zero,
    /// No layer holds it, so it reads as zeros.
    Absent,
}

impl ExtentState {
    /// The word for JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Zero => "zero",
            Self::Absent => "absent",
        }
    }

    /// True when it reads as zeros whatever the file holds.
    #[must_use]
    pub fn reads_zero(self) -> bool {
        self != Self::Data
    }
}

/// A run of a disk: what it is, which layer says so, and where its bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The bytes of the disk.
    pub range: Range<u64>,
    /// What they are.
    pub state: ExtentState,
    /// The layer that says so: 0 is the leaf. For what is absent, the base.
    pub depth: usize,
    /// Offset in that layer's file, for data.
    pub offset: Option<u64>,
}

impl Extent {
    /// Makes one of two neighbours that are alike; false when they are not.
    pub fn merge(&mut self, next: &Self) -> bool {
        let alike = self.range.end == next.range.start
            && (self.state, self.depth) == (next.state, next.depth)
            && self.offset.map(|offset| offset + (self.range.end - self.range.start)) == next.offset;
        if alike {
            self.range.end = next.range.end;
        }
        alike
    }
}

/// What a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Bytes that layers hold.
    Data,
    /// Zeros that no file has: the metadata says so.
    Zeros,
    /// That it would have to wait. What is in the buffers now means nothing.
    NotNow,
}

/// What became of a range that was to go into a pipe ([`BlockDevice::splice_at`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spliced {
    /// It is in the pipe.
    All,
    /// It can't be had so, and the pipe is as it was.
    No,
    /// It may be, but would have to be waited for. The pipe is as it was.
    NotNow,
}

/// Why a copy failed: on the side of the disk, or of memory.
enum Copied {
    Disk(Error),
    Memory(io::Error),
}

impl From<io::Error> for Copied {
    fn from(error: io::Error) -> Self {
        Self::Memory(error)
    }
}

impl Copied {
    fn into_error(self) -> Error {
        match self {
            Self::Disk(error) => error,
            Self::Memory(error) => Error::io(error, "memory can't be reached"),
        }
    }
}

/// What a disk is and can do; constant while it is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Bytes, a multiple of 512.
    pub size: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Discards in units of this many bytes give space back.
    pub discard_granularity: u64,
    /// Files that make up the disk: 1 without parents.
    pub layers: usize,
}

/// A disk.
///
/// Contract: any range may be asked for, `u64::MAX` included, at any byte; what is not inside the disk is
/// `OutOfRange`, never a panic, and nothing is done then. All calls may come from many threads at once. Two that
/// overlap and one of which writes end as if one came after the other, sector by sector. A write that was answered is
/// seen by every later read, and is durable once a later [`BlockDevice::flush`] was answered.
pub trait BlockDevice: Send + Sync {
    /// What it is and can do.
    fn capabilities(&self) -> Capabilities;

    /// Fills all of `bufs` from `offset` on.
    ///
    /// # Errors
    /// `OutOfRange`; as a layer can't be read.
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()>;

    /// As [`BlockDevice::read_vectored_at`], and says what was found. Without `wait` it is [`Found::NotNow`] where the data
    /// is not in the host's memory, as far as the host can tell; metadata that is looked at for the first time is waited for.
    ///
    /// # Errors
    /// As there.
    fn find_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64, wait: bool) -> Result<Found> {
        let _ = wait;
        self.read_vectored_at(bufs, offset).map(|()| Found::Data)
    }

    /// Puts a range into a pipe without copying it: the pages of the host's page cache themselves. That can be where the range is in one piece of one
    /// file, and whatever is written to that place as long as the disk is open is what was written to the range: whoever reads the pipe until then has
    /// what a read at some moment between would have had, sector by sector. Else it is [`Spliced::No`], and so by default. The pipe does
    /// not wait, is empty, and has room. `wait` as for [`BlockDevice::find_vectored_at`].
    ///
    /// # Errors
    /// `OutOfRange`; as the file can't be read, and then the pipe may hold part of the range.
    fn splice_at(&self, pipe: BorrowedFd<'_>, range: Range<u64>, wait: bool) -> Result<Spliced> {
        let _ = (pipe, range, wait);
        Ok(Spliced::No)
    }

    /// Writes all of `bufs` from `offset` on.
    ///
    /// # Errors
    /// `OutOfRange`, `ReadOnly`, `Latched`, `NoSpace`, `Io`.
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()>;

    /// As [`BlockDevice::read_vectored_at`], into memory that others use too.
    ///
    /// # Errors
    /// As there.
    fn read_shared_at(&self, to: &dyn SharedBytes, offset: u64) -> Result<()> {
        let read = |bytes: &mut [u8], at: u64| {
            self.read_vectored_at(&mut [IoSliceMut::new(bytes)], offset.saturating_add(at)).map_err(Copied::Disk)
        };
        read_by_copy(to, 0..to.len(), read).map_err(Copied::into_error)
    }

    /// As [`BlockDevice::write_vectored_at`], of memory that others use too: they may change it meanwhile.
    ///
    /// # Errors
    /// As there.
    fn write_shared_at(&self, from: &dyn SharedBytes, offset: u64) -> Result<()> {
        let write = |bytes: &[u8], at: u64| {
            self.write_vectored_at(&[IoSlice::new(bytes)], offset.saturating_add(at)).map_err(Copied::Disk)
        };
        write_by_copy(from, 0..from.len(), write).map_err(Copied::into_error)
    }

    /// Makes everything that was written before durable.
    ///
    /// # Errors
    /// `Latched`, `NoSpace`, `Io`.
    fn flush(&self) -> Result<()>;

    /// Makes a range read as zeros, and keeps or gives back its space. This is discard too: a discarded range is
    /// zero and never shows a parent's data.
    ///
    /// # Errors
    /// As [`BlockDevice::write_vectored_at`].
    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()>;

    /// Calls `visit` with the extents of a range: ascending, without gaps, neighbours alike merged.
    ///
    /// # Errors
    /// `OutOfRange`; as metadata can't be read; as `visit` fails.
    fn extents(&self, range: Range<u64>, visit: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()>;

    /// The file that a layer is in; 0 is the leaf.
    fn layer_path(&self, depth: usize) -> Option<PathBuf>;

    /// What the leaf's file takes of its volume, and what is left there; `None` where that can't be told, or not at once.
    fn room(&self) -> Option<Room> {
        None
    }

    /// Flushes and gives back what the host lent. The disk may be used afterwards.
    ///
    /// # Errors
    /// As [`BlockDevice::flush`].
    fn close(&self) -> Result<()>;
}

/// A disk that is shared by all who use it: a cheap clone. Its capabilities were read once.
#[derive(Clone)]
pub struct Disk {
    device: Arc<dyn BlockDevice>,
    capabilities: Arc<Capabilities>,
}

impl Disk {
    /// A disk over any device.
    #[must_use]
    pub fn new(device: impl BlockDevice + 'static) -> Self {
        Self::of(Arc::new(device))
    }

    /// A disk over a device that others use too.
    #[must_use]
    pub fn of(device: Arc<dyn BlockDevice>) -> Self {
        Self { capabilities: Arc::new(device.capabilities()), device }
    }

    /// What it is and can do.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.capabilities.size
    }

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// As [`BlockDevice::read_vectored_at`].
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.device.read_vectored_at(&mut [IoSliceMut::new(buf)], offset)
    }

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// As [`BlockDevice::write_vectored_at`].
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.device.write_vectored_at(&[IoSlice::new(buf)], offset)
    }

    /// The extents of a range, as a list.
    ///
    /// # Errors
    /// As [`BlockDevice::extents`].
    pub fn extents_in(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        self.device.extents(range, &mut |extent| {
            extents.push(extent);
            Ok(())
        })?;
        Ok(extents)
    }
}

impl std::ops::Deref for Disk {
    type Target = dyn BlockDevice;

    fn deref(&self) -> &Self::Target {
        &*self.device
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Disk").field(&self.capabilities).finish()
    }
}
