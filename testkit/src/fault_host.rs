//! Real files and folders of which one change fails.

use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vhd_core::Error;
use vhd_core::storage::{FileStorage, Host, LocalHost, Storage};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// A host of which the n-th change fails, once or for ever: writes (half arrives), lengths, holes, syncs, and what is done
/// to names.
#[derive(Clone, Debug)]
pub struct FaultHost {
    at: usize,
    for_ever: bool,
    code: i32,
    calls: Arc<AtomicUsize>,
}

impl FaultHost {
    /// Fails at change number `at`, counted from 1; for want of space or because the medium is broken.
    #[must_use]
    pub fn new(at: usize, for_ever: bool, no_space: bool) -> Self {
        Self { at, for_ever, code: if no_space { ENOSPC } else { EIO }, calls: Arc::default() }
    }

    /// True when a change failed.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.calls.load(Ordering::SeqCst) >= self.at
    }

    fn call(&self) -> io::Result<()> {
        let number = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let fails = number == self.at || (self.for_ever && number > self.at);
        if fails { Err(io::Error::from_raw_os_error(self.code)) } else { Ok(()) }
    }

    fn named(&self, path: &Path, what: &str) -> Result<(), Error> {
        self.call().map_err(|error| Error::io(error, what).at(path))
    }

    fn over(&self, file: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(FaultFile { file, host: self.clone() })
    }
}

impl Host for FaultHost {
    fn adopt(&self, file: Arc<FileStorage>) -> Arc<dyn Storage> {
        self.over(file)
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>, Error> {
        self.named(path, "can't be created")?;
        Ok(self.over(LocalHost.create(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), Error> {
        self.named(from, "can't be renamed")?;
        LocalHost.rename(from, to)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<(), Error> {
        self.named(from, "can't be renamed")?;
        LocalHost.rename_new(from, to)
    }

    fn remove(&self, path: &Path) -> Result<(), Error> {
        if path.exists() {
            self.named(path, "can't be removed")?;
        }
        LocalHost.remove(path)
    }

    fn sync_folder(&self, folder: &Path) -> Result<(), Error> {
        self.named(folder, "can't be synced")?;
        LocalHost.sync_folder(folder)
    }
}

#[derive(Debug)]
struct FaultFile {
    file: Arc<dyn Storage>,
    host: FaultHost,
}

impl Storage for FaultFile {
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        self.file.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        if let Err(error) = self.host.call() {
            // Whole sectors of a half arrived.
            if let Some(first) = bufs.first() {
                let len = (offset + first.len() as u64 / 2) / 512 * 512;
                self.file.write_at(&first[..len.saturating_sub(offset) as usize], offset)?;
            }
            return Err(error);
        }
        self.file.write_vectored_at(bufs, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.host.call()?;
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.host.call()?;
        self.file.sync()
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.host.call()?;
        self.file.punch_hole(range)
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.host.call()?;
        self.file.zero_range(range)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.host.call()?;
        self.file.allocate(range)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(offset)
    }

    fn can_grow(&self) -> bool {
        self.file.can_grow()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }
}
