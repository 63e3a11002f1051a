//! Real files and folders of which one change fails.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vhd_core::Error;
use vhd_core::storage::{FileStorage, Host, LocalHost, Storage};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// Bytes of files, by device and inode.
type Durable = HashMap<(u64, u64), Vec<u8>>;

/// A host of which the n-th change fails, once or for ever: writes (half arrives), lengths, holes, syncs, and what is done
/// to names. Or the n-th sync of a file alone, which loses what was written to that file since the last one.
#[derive(Clone, Debug)]
pub struct FaultHost {
    at: usize,
    for_ever: bool,
    code: i32,
    calls: Arc<AtomicUsize>,
    /// Syncs of files alone are counted, and lose what they should have kept.
    loses: bool,
    /// What is durable of each file that was ever opened, by what the host calls it.
    durable: Arc<Mutex<Durable>>,
    /// File offset of the write that failed last.
    failed_at: Arc<Mutex<Option<u64>>>,
    /// Called before each call, reads and those that fail among them.
    before: Before,
}

#[derive(Clone, Default)]
struct Before {
    call: Option<Arc<dyn Fn() + Send + Sync>>,
    /// Before reads, too.
    reads: bool,
}

impl std::fmt::Debug for Before {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Before")
    }
}

impl Before {
    fn change(&self) {
        if let Some(call) = &self.call {
            call();
        }
    }

    fn read(&self) {
        if self.reads {
            self.change();
        }
    }
}

impl FaultHost {
    /// Fails at change number `at`, counted from 1; for want of space or because the medium is broken.
    #[must_use]
    pub fn new(at: usize, for_ever: bool, no_space: bool) -> Self {
        let code = if no_space { ENOSPC } else { EIO };
        let (calls, durable, failed_at) = Default::default();
        Self { at, for_ever, code, calls, loses: false, durable, failed_at, before: Before::default() }
    }

    /// The same, which calls `before` whenever it is asked for something: what others do at that moment. (It must ask another
    /// host.)
    #[must_use]
    pub fn calling(self, before: impl Fn() + Send + Sync + 'static) -> Self {
        Self { before: Before { call: Some(Arc::new(before)), reads: true }, ..self }
    }

    /// As [`FaultHost::calling`], but before changes alone, and before files that are to be changed are taken.
    #[must_use]
    pub fn calling_at_changes(self, before: impl Fn() + Send + Sync + 'static) -> Self {
        Self { before: Before { call: Some(Arc::new(before)), reads: false }, ..self }
    }

    /// Sync number `at` of a file fails, counted from 1, and what was written to that file since it was last synced is gone:
    /// what Linux does when a disk fails to take the page cache. The next sync succeeds.
    #[must_use]
    pub fn losing(at: usize) -> Self {
        Self { loses: true, ..Self::new(at, false, false) }
    }

    /// Where in its file the write was that failed last; nothing when it was no write.
    #[must_use]
    pub fn failed_at(&self) -> Option<u64> {
        *self.failed_at.lock().unwrap()
    }

    /// True when a change failed.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.calls.load(Ordering::SeqCst) >= self.at
    }

    /// A change that is no sync of a file.
    fn call(&self) -> io::Result<()> {
        if self.loses { Ok(()) } else { self.count() }
    }

    /// A change of a range of a file.
    fn call_at(&self, offset: u64) -> io::Result<()> {
        self.call().inspect_err(|_| *self.failed_at.lock().unwrap() = Some(offset))
    }

    fn count(&self) -> io::Result<()> {
        self.before.change();
        let number = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let fails = number == self.at || (self.for_ever && number > self.at);
        if fails { Err(io::Error::from_raw_os_error(self.code)) } else { Ok(()) }
    }

    fn named(&self, path: &Path, what: &str) -> Result<(), Error> {
        self.call().map_err(|error| Error::io(error, what).at(path))
    }

    fn over(&self, file: Arc<FileStorage>) -> Arc<dyn Storage> {
        let identity = file.identity().unwrap();
        if self.loses {
            self.durable.lock().unwrap().entry(identity).or_insert_with(|| content(&*file));
        }
        Arc::new(FaultFile { file, host: self.clone(), identity })
    }
}

impl Host for FaultHost {
    fn adopt(&self, file: Arc<FileStorage>) -> Arc<dyn Storage> {
        self.before.change();
        self.over(file)
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>, Error> {
        self.named(path, "can't be created")?;
        drop(LocalHost.create(path)?);
        Ok(self.over(Arc::new(FileStorage::open(path, true)?)))
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
    file: Arc<FileStorage>,
    host: FaultHost,
    identity: (u64, u64),
}

fn content(file: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

impl Storage for FaultFile {
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        self.host.before.read();
        self.file.read_vectored_at(bufs, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        if let Err(error) = self.host.call_at(offset) {
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
        if !self.host.loses {
            self.host.call()?;
            return self.file.sync();
        }
        let mut durable = self.host.durable.lock().unwrap();
        if let Err(error) = self.host.count() {
            let left = &durable[&self.identity];
            self.file.set_len(left.len() as u64)?;
            self.file.write_at(left, 0)?;
            return Err(error);
        }
        durable.insert(self.identity, content(&*self.file));
        Ok(())
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.host.call_at(range.start)?;
        self.file.punch_hole(range)
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.host.call_at(range.start)?;
        self.file.zero_range(range)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.host.call_at(range.start)?;
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

    fn as_file(&self) -> Option<&FileStorage> {
        Some(&self.file)
    }
}
