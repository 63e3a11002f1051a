//! A raw file or device: a disk without a format.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::block::ZeroMode;
use crate::error::{Error, ErrorKind, Result};
use crate::format::SECTOR;
use crate::storage::{SharedBytes, Storage};

/// A raw file or device. A size that is no whole number of sectors is rounded up; what the file lacks reads as zeros.
#[derive(Debug)]
pub struct RawFile {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    /// Bytes of the file when it was opened.
    len: u64,
    read_only: bool,
    dirty: AtomicBool,
}

impl RawFile {
    /// Takes a file as a disk.
    ///
    /// # Errors
    /// As the host fails.
    pub fn new(storage: Arc<dyn Storage>, path: &Path, read_only: bool) -> Result<Self> {
        let len = storage.len().map_err(|error| Error::io(error, "can't be examined").at(path))?;
        Ok(Self { storage, path: path.to_owned(), len, read_only, dirty: AtomicBool::new(false) })
    }

    /// The same file, as long as it is now.
    pub(super) fn read_again(&self, path: &Path) -> Result<Self> {
        Self::new(Arc::clone(&self.storage), path, self.read_only)
    }

    pub(super) fn size(&self) -> u64 {
        self.len.next_multiple_of(SECTOR)
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    pub(super) fn error(&self, error: io::Error, doing: &str) -> Error {
        Error::io(error, doing).at(&self.path)
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "is open read-only").at(&self.path));
        }
        self.dirty.store(true, Ordering::SeqCst);
        Ok(())
    }

    pub(super) fn write(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.check_writable()?;
        self.storage
            .write_vectored_at(bufs, offset)
            .map_err(|error| self.error(error, &format!("can't be written at {offset:#x}")))
    }

    pub(super) fn write_shared(&self, from: &dyn SharedBytes, offset: u64) -> Result<()> {
        self.check_writable()?;
        self.storage
            .write_shared_at(from, 0..from.len(), offset)
            .map_err(|error| self.error(error, &format!("can't be written at {offset:#x}")))
    }

    pub(super) fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()> {
        self.check_writable()?;
        let at = range.start;
        let done = match mode {
            ZeroMode::Free => self.storage.punch_hole(range),
            ZeroMode::Keep => self.storage.zero_range(range),
        };
        done.map_err(|error| self.error(error, &format!("can't be zeroed at {at:#x}")))
    }

    pub(super) fn flush(&self) -> Result<()> {
        if !self.dirty.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        self.storage.sync().map_err(|error| {
            self.dirty.store(true, Ordering::SeqCst);
            self.error(error, "can't be synced")
        })
    }
}
