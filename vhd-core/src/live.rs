//! A disk whose files may change while it is in use: snapshots under load, and resizing.
//!
//! Requests share a lock that a change holds alone. It waits for those under way, and new ones wait for it: a few
//! milliseconds for a snapshot, which makes one small file durable.

mod layer;

use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, TryLockError};

use crossbeam_utils::sync::{ShardedLock, ShardedLockReadGuard, ShardedLockWriteGuard};
use uuid::Uuid;

use crate::block::{BlockDevice, Capabilities, Disk, Extent, Found, Spliced, ZeroMode};
use crate::chain::{Chain, ChainOptions, ChildOptions, Layer, UndoSession, create_over_open, open_file};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Created, Image, OpenOptions};
use crate::ops::saved_state;
use crate::storage::{FileStorage, Host, LockMode, SharedBytes, folder_of, resolve};

/// A disk that can get a new leaf, or another size, while others read and write it.
///
/// [`LiveDisk::disk`] gives the handle that they use. A handle has the size of the moment when it was made.
#[derive(Clone)]
pub struct LiveDisk(Arc<Shared>);

/// Sharded, so that threads that only want to know it is not changing do not pass one line of the processor's cache around.
struct Shared(ShardedLock<State>);

enum State {
    Open(Open),
    /// It could not be opened again after a change: why.
    Lost {
        kind: ErrorKind,
        message: String,
        path: PathBuf,
        options: ChainOptions,
    },
}

struct Open {
    chain: Chain,
    /// The leaf's file, which bears the lock.
    file: Arc<FileStorage>,
    options: ChainOptions,
}

/// A leaf that one of several disks gets in [`snapshot_all`].
#[derive(Clone, Debug)]
pub struct NewLeaf<'a> {
    /// The disk.
    pub disk: &'a LiveDisk,
    /// Where the new leaf goes.
    pub path: PathBuf,
    /// What it is like.
    pub options: ChildOptions,
}

impl LiveDisk {
    /// Opens an image with its parents.
    ///
    /// # Errors
    /// As [`Chain::open`].
    pub fn open(path: &Path, options: &ChainOptions) -> Result<Self> {
        Ok(Self(Arc::new(Shared(ShardedLock::new(State::Open(Open::new(path, options)?))))))
    }

    /// The handle for reading and writing. It may be made again after a change, to know the new size.
    #[must_use]
    pub fn disk(&self) -> Disk {
        Disk::of(Arc::clone(&self.0) as Arc<dyn BlockDevice>)
    }

    /// The file of the leaf as it is now.
    #[must_use]
    pub fn leaf(&self) -> PathBuf {
        self.0.layer_path(0).unwrap_or_default()
    }

    /// True while a change is under way, which requests would wait for.
    #[must_use]
    pub fn is_changing(&self) -> bool {
        matches!(self.0.0.try_read(), Err(TryLockError::WouldBlock))
    }

    /// True when a write waits neither for a change that is under way nor, as far as is known, for another machine.
    #[must_use]
    pub fn takes_writes_at_once(&self) -> bool {
        self.0.0.try_read().is_ok_and(|state| state.open().is_ok_and(|open| open.chain.is_local()))
    }

    /// Looks at the chain as it is now. Changes wait meanwhile.
    ///
    /// # Errors
    /// As `look` fails; when the disk was lost.
    pub fn with_chain<T>(&self, look: impl FnOnce(&Chain) -> Result<T>) -> Result<T> {
        look(&self.0.read().open()?.chain)
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

    /// Puts a new leaf at `path` over the leaf, which is read from then on and not written any more. What was written
    /// before is in the old leaf and durable, what is written later goes to the new one. When it fails all is as it was.
    ///
    /// # Errors
    /// `ReadOnly`; `Refused` over an undo disk; `Exists`; as the host fails.
    pub fn snapshot(&self, path: &Path, options: &ChildOptions) -> Result<Created> {
        let new = NewLeaf { disk: self, path: path.to_owned(), options: options.clone() };
        Ok(snapshot_all(&[new])?.remove(0))
    }

    /// Notes in the leaf that a virtual machine's saved state relies on it as it is, or does not any more; durable when it
    /// returns. A disk that is open read-only is left alone.
    ///
    /// # Errors
    /// As [`LiveDisk::reopen_after`] and [`saved_state::set`].
    pub fn set_saved_state(&self, saved: bool) -> Result<()> {
        if self.disk().capabilities().read_only {
            return Ok(());
        }
        self.reopen_with(|path, options| {
            options.image.owns_saved_state = saved;
            saved_state::set(path, saved, options)
        })
    }

    /// Closes the disk, does `work` on its files while nobody uses them, and opens it again: with the size that it has
    /// then. When it can't be opened again every call fails, until this succeeds.
    ///
    /// # Errors
    /// As `work` fails, when the disk is open again; as it can't be closed or opened.
    pub fn reopen_after<T>(&self, work: impl FnOnce(&Path, &ChainOptions) -> Result<T>) -> Result<T> {
        self.reopen_with(|path, options| work(path, options))
    }

    fn reopen_with<T>(&self, work: impl FnOnce(&Path, &mut ChainOptions) -> Result<T>) -> Result<T> {
        let mut state = self.0.write();
        let (path, mut options) = match &*state {
            State::Open(open) => {
                open.chain.close()?;
                (open.leaf_path().to_owned(), open.options.clone())
            }
            State::Lost { path, options, .. } => (path.clone(), options.clone()),
        };
        let message = "is closed while its files are changed".to_owned();
        *state = State::Lost { kind: ErrorKind::Io, message, path: path.clone(), options: options.clone() };
        let result = work(&path, &mut options);
        match Open::new(&path, &options) {
            Ok(open) => {
                *state = State::Open(open);
                result
            }
            Err(error) => {
                let message = format!("could not be opened again: {}", error.message());
                *state = State::Lost { kind: error.kind(), message, path, options };
                Err(error)
            }
        }
    }
}

/// Gives each of several disks a new leaf, all at one instant: a write that was answered before another began on any of
/// them is in the old leaf if that other one is. When one fails all are as they were.
///
/// # Errors
/// As [`LiveDisk::snapshot`]; `InvalidInput` when a disk is named twice.
pub fn snapshot_all(new: &[NewLeaf<'_>]) -> Result<Vec<Created>> {
    let mut order: Vec<usize> = (0..new.len()).collect();
    // Everyone takes the locks in one order.
    order.sort_by_key(|&index| Arc::as_ptr(&new[index].disk.0).cast::<()>());
    if order.windows(2).any(|pair| Arc::ptr_eq(&new[pair[0]].disk.0, &new[pair[1]].disk.0)) {
        return Err(Error::new(ErrorKind::InvalidInput, "a disk can't get two new leaves at once"));
    }
    let mut states: Vec<_> = order.iter().map(|&index| (index, new[index].disk.0.write())).collect();
    states.sort_by_key(|(index, _)| *index);
    let mut states: Vec<_> = states.into_iter().map(|(_, state)| state).collect();
    let mut prepared: Vec<Prepared> = Vec::new();
    for (leaf, state) in new.iter().zip(&states) {
        match state.open().and_then(|open| Prepared::new(open, leaf)) {
            Ok(ready) => prepared.push(ready),
            Err(error) => {
                // The states of those that were prepared come first, in the same order.
                for (ready, state) in prepared.into_iter().zip(&states) {
                    ready.undo(state);
                }
                return Err(error);
            }
        }
    }
    Ok(states.iter_mut().zip(prepared).map(|(state, ready)| ready.switch(state)).collect())
}

impl Open {
    fn new(path: &Path, options: &ChainOptions) -> Result<Self> {
        let (chain, file) = Chain::open_with_file(path, options, &mut |_| Ok(()))?;
        Ok(Self { chain, file, options: options.clone() })
    }

    fn leaf_path(&self) -> &Path {
        self.chain.layers()[0].path()
    }
}

/// A new leaf that is durable, and what its chain will be.
struct Prepared {
    created: Created,
    leaf: Layer,
    file: Arc<FileStorage>,
    /// The old leaf, to be read only.
    parent: Layer,
    parent_file: Arc<FileStorage>,
}

impl Prepared {
    fn new(open: &Open, new: &NewLeaf<'_>) -> Result<Self> {
        let old = open.chain.layers()[0].image().filter(|image| !image.is_read_only());
        let Some(old) = old else {
            return Err(
                Error::new(ErrorKind::ReadOnly, "is open read-only, so there is nothing to keep apart").at(open.leaf_path())
            );
        };
        if UndoSession::of(old)?.is_some() {
            let message = "is an undo disk: commit or discard its session before a snapshot is made";
            return Err(Error::new(ErrorKind::Refused, message).at(old.path()));
        }
        // What was written is in the old leaf for good, which is left as if it had been closed.
        old.close()?;
        let mut uuid = old.footer().uuid();
        if uuid == [0; 16] {
            uuid = Uuid::new_v4().into_bytes();
            Image::set_uuid_of(&**old.storage(), uuid).map_err(|error| error.at(old.path()))?;
        }
        let host = &*open.options.host;
        let created = create_over_open(host, &new.path, old, uuid, &new.options)?;
        Self::open(open, old.path(), &new.path, created).inspect_err(|_| remove(host, &new.path))
    }

    fn open(open: &Open, old: &Path, new: &Path, created: Created) -> Result<Self> {
        let file = open_file(new, true, &open.options)?;
        file.lock(LockMode::Write)?;
        let storage = open.options.host.adopt(Arc::clone(&file));
        let leaf = Layer::Image(Image::open(storage, new, &open.options.image)?);
        let parent_file = open_file(old, false, &open.options)?;
        if parent_file.identity()? != open.file.identity()? {
            let message = "is another file than the one in use: it was renamed or replaced meanwhile";
            return Err(Error::new(ErrorKind::Parent, message).at(old));
        }
        let look = OpenOptions { writable: false, ..open.options.image.clone() };
        let parent = Layer::Image(Image::open(Arc::clone(&parent_file) as _, old, &look)?);
        Ok(Self { created, leaf, file, parent, parent_file })
    }

    fn undo(self, state: &State) {
        let path = self.leaf.path().to_owned();
        drop(self);
        if let State::Open(open) = state {
            remove(&*open.options.host, &path);
        }
    }

    /// Makes it what is used.
    fn switch(self, state: &mut State) -> Created {
        let State::Open(open) = state else { return self.created };
        // Others may read the old leaf from now on; nobody gets to write it in between.
        open.file.share();
        if let Err(error) = self.parent_file.lock(LockMode::Read) {
            tracing::warn!("{error}");
        }
        let parents = std::iter::once(self.parent).chain(open.chain.layers()[1..].iter().cloned());
        // Should the disk be opened again, its parents are where they are now.
        let folder = resolve(folder_of(open.leaf_path()));
        if !open.options.parents.parent_dirs.contains(&folder) {
            open.options.parents.parent_dirs.push(folder);
        }
        open.chain = Chain::over(self.leaf, parents.collect());
        open.file = self.file;
        self.created
    }
}

/// For good: a child that came back after a power cut would be of an older moment than its parent.
fn remove(host: &dyn Host, path: &Path) {
    if let Err(error) = host.remove(path).and_then(|()| host.sync_folder(folder_of(path))) {
        tracing::warn!("a snapshot that failed can't be removed: {error}");
    }
}

impl State {
    fn open(&self) -> Result<&Open> {
        match self {
            Self::Open(open) => Ok(open),
            Self::Lost { kind, message, path, .. } => Err(Error::new(*kind, message.clone()).at(path)),
        }
    }
}

impl Shared {
    fn read(&self) -> ShardedLockReadGuard<'_, State> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> ShardedLockWriteGuard<'_, State> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockDevice for Shared {
    fn capabilities(&self) -> Capabilities {
        match &*self.read() {
            State::Open(open) => open.chain.capabilities(),
            State::Lost { .. } => Capabilities { size: 0, read_only: true, discard_granularity: 4096, layers: 1 },
        }
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<()> {
        self.read().open()?.chain.read_vectored_at(bufs, offset)
    }

    fn find_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64, wait: bool) -> Result<Found> {
        self.read().open()?.chain.find_vectored_at(bufs, offset, wait)
    }

    fn splice_at(&self, pipe: BorrowedFd<'_>, range: Range<u64>, wait: bool) -> Result<Spliced> {
        self.read().open()?.chain.splice_at(pipe, range, wait)
    }

    fn read_shared_at(&self, to: &dyn SharedBytes, offset: u64) -> Result<()> {
        self.read().open()?.chain.read_shared_at(to, offset)
    }

    fn write_shared_at(&self, from: &dyn SharedBytes, offset: u64) -> Result<()> {
        self.read().open()?.chain.write_shared_at(from, offset)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<()> {
        self.read().open()?.chain.write_vectored_at(bufs, offset)
    }

    fn flush(&self) -> Result<()> {
        self.read().open()?.chain.flush()
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()> {
        self.read().open()?.chain.zero(range, mode)
    }

    fn extents(&self, range: Range<u64>, visit: &mut dyn FnMut(Extent) -> Result<()>) -> Result<()> {
        self.read().open()?.chain.extents(range, visit)
    }

    fn layer_path(&self, depth: usize) -> Option<PathBuf> {
        match &*self.read() {
            State::Open(open) => open.chain.layer_path(depth),
            State::Lost { path, .. } => (depth == 0).then(|| path.clone()),
        }
    }

    fn close(&self) -> Result<()> {
        match &*self.read() {
            State::Open(open) => open.chain.close(),
            State::Lost { .. } => Ok(()),
        }
    }
}

impl fmt::Debug for LiveDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LiveDisk").field(&self.leaf()).finish()
    }
}
