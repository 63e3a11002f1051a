//! A disk whose files may change while it is in use: snapshots under load, another size, the note of a saved state.
//!
//! Requests share a lock that a change holds alone. It waits for those under way, and new ones wait for it: a few
//! milliseconds for a snapshot, which makes one small file durable.
//!
//! A change works on the files as they are open and locked. None is given up, none is looked for by its name again: which
//! files the disk is made of was settled when it was opened. What a name leads to by now is asked only to tell it to others.

mod change;
mod layer;
mod snapshot;

use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use crossbeam_utils::sync::{ShardedLock, ShardedLockReadGuard, ShardedLockWriteGuard};

pub use snapshot::{NewLeaf, snapshot_all};

use crate::block::{BlockDevice, Capabilities, Disk, Extent, Found, Spliced, ZeroMode};
use crate::chain::{Chain, ChainOptions, Layer};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::storage::{FileStorage, Room, SharedBytes};

/// A disk that can get a new leaf, or another size, while others read and write it.
///
/// [`LiveDisk::disk`] gives the handle that they use. A handle has the size of the moment when it was made.
#[derive(Clone)]
pub struct LiveDisk(Arc<Shared>);

struct Shared {
    /// Sharded, so that threads that only want to know it is not changing do not pass one line of the processor's cache around.
    state: ShardedLock<Open>,
    /// Held by a change from its beginning to its end, while requests may still go on. It is taken first.
    turn: Mutex<()>,
}

struct Open {
    chain: Arc<Chain>,
    /// The leaf's file, which bears the lock.
    file: Arc<FileStorage>,
    options: ChainOptions,
    /// Why the leaf can't be read any more: a change failed, and then so did looking at what it left.
    lost: Option<(ErrorKind, String)>,
}

impl LiveDisk {
    /// Opens an image with its parents.
    ///
    /// # Errors
    /// As [`Chain::open`].
    pub fn open(path: &Path, options: &ChainOptions) -> Result<Self> {
        let (chain, file) = Chain::open_with_file(path, options, &mut |_| Ok(()))?;
        let open = Open { chain: Arc::new(chain), file, options: options.clone(), lost: None };
        Ok(Self(Arc::new(Shared { state: ShardedLock::new(open), turn: Mutex::new(()) })))
    }

    /// The handle for reading and writing. It may be made again after a change, to know the new size.
    #[must_use]
    pub fn disk(&self) -> Disk {
        Disk::of(Arc::clone(&self.0) as Arc<dyn BlockDevice>)
    }

    /// The file of the leaf, by the name that it was last known to have.
    #[must_use]
    pub fn leaf(&self) -> PathBuf {
        self.0.read().leaf_path().to_owned()
    }

    /// True while a change is under way, which requests would wait for.
    #[must_use]
    pub fn is_changing(&self) -> bool {
        matches!(self.0.state.try_read(), Err(TryLockError::WouldBlock))
    }

    /// True when a write waits neither for a change that is under way nor, as far as is known, for another machine.
    #[must_use]
    pub fn takes_writes_at_once(&self) -> bool {
        self.0.state.try_read().is_ok_and(|open| open.chain.is_local())
    }

    /// Looks at the chain as it is now. Changes wait meanwhile.
    ///
    /// # Errors
    /// As `look` fails; when the disk was lost.
    pub fn with_chain<T>(&self, look: impl FnOnce(&Chain) -> Result<T>) -> Result<T> {
        look(self.0.read().chain()?)
    }

    /// Each layer as it is now, leaf first: what the disk would be with that layer as its leaf, read-only. It stays that
    /// layer when the disk gets a new leaf.
    ///
    /// # Errors
    /// When the disk was lost.
    pub fn layers(&self) -> Result<Vec<Disk>> {
        let count = self.with_chain(|chain| Ok(chain.layers().len()))?;
        Ok((0..count).rev().map(|above| Disk::new(layer::LiveLayer::new(self.clone(), above))).collect())
    }

    /// What tells each of its files from all others, leaf first: see [`FileStorage::identity`].
    ///
    /// # Errors
    /// As the host fails.
    pub fn identities(&self) -> Result<Vec<(u64, u64)>> {
        self.0.read().chain.layers().iter().filter_map(Layer::file).map(FileStorage::identity).collect()
    }
}

impl Open {
    fn chain(&self) -> Result<&Chain> {
        match &self.lost {
            None => Ok(&self.chain),
            Some((kind, message)) => Err(Error::new(*kind, message.clone()).at(self.leaf_path())),
        }
    }

    fn leaf_path(&self) -> &Path {
        self.chain.layers()[0].path()
    }

    /// The leaf, where it is written to.
    fn written(&self) -> Option<&Arc<Image>> {
        self.chain.layers()[0].image().filter(|image| !image.is_read_only())
    }
}

impl Shared {
    fn read(&self) -> ShardedLockReadGuard<'_, Open> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> ShardedLockWriteGuard<'_, Open> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockDevice for Shared {
    fn capabilities(&self) -> Capabilities {
        self.read().chain.capabilities()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.read().chain()?.read_vectored_at(bufs, offset)
    }

    fn find_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64, wait: bool) -> Result<Found> {
        self.read().chain()?.find_vectored_at(bufs, offset, wait)
    }

    fn splice_at(&self, pipe: BorrowedFd<'_>, range: Range<u64>, wait: bool) -> Result<Spliced> {
        self.read().chain()?.splice_at(pipe, range, wait)
    }

    fn read_shared_at(&self, to: &dyn SharedBytes, offset: u64) -> Result<()> {
        self.read().chain()?.read_shared_at(to, offset)
    }

    fn write_shared_at(&self, from: &dyn SharedBytes, offset: u64) -> Result<()> {
        self.read().chain()?.write_shared_at(from, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.read().chain()?.write_vectored_at(bufs, offset)
    }

    fn flush(&self) -> Result<()> {
        self.read().chain()?.flush()
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()> {
        self.read().chain()?.zero(range, mode)
    }

    fn extents(&self, range: Range<u64>, visit: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
        self.read().chain()?.extents(range, visit)
    }

    fn layer_path(&self, depth: usize) -> Option<PathBuf> {
        self.read().chain.layer_path(depth)
    }

    fn room(&self) -> Option<Room> {
        self.state.try_read().ok()?.chain.room()
    }

    fn close(&self) -> Result<()> {
        // What was answered before a change that lost it is durable.
        self.read().chain().map_or(Ok(()), |chain| chain.close())
    }
}

impl fmt::Debug for LiveDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LiveDisk").field(&self.leaf()).finish()
    }
}
