//! New leaves over disks in use.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::{LiveDisk, Open};
use crate::chain::{Chain, ChildOptions, Layer, UndoSession, create_over_open, open_file, uuid_of_file};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Created, Image, OpenOptions};
use crate::storage::{FileStorage, Host, LockMode, folder_of, resolve};

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
    /// Puts a new leaf at `path` over the leaf, which is read from then on and not written any more. What was written
    /// before is in the old leaf and durable, what is written later goes to the new one. When it fails all is as it was.
    ///
    /// # Errors
    /// `ReadOnly`; `Refused` over an undo disk, and where another file has the old leaf's name by now; `NotFound` where that
    /// has none; `Exists`; as the host fails.
    pub fn snapshot(&self, path: &Path, options: &ChildOptions) -> Result<Created> {
        let new = NewLeaf { disk: self, path: path.to_owned(), options: options.clone() };
        Ok(snapshot_all(&[new])?.remove(0))
    }
}

/// Gives each of several disks a new leaf, all at one instant: a write that was answered before another began on any of
/// them is in the old leaf if that other one is. When one fails all are as they were.
///
/// # Errors
/// As [`LiveDisk::snapshot`]; `InvalidInput` when a disk or a path is named twice.
pub fn snapshot_all(new: &[NewLeaf<'_>]) -> Result<Vec<Created>> {
    let mut order: Vec<usize> = (0..new.len()).collect();
    // Everyone takes the locks in one order.
    order.sort_by_key(|&index| Arc::as_ptr(&new[index].disk.0).cast::<()>());
    if order.windows(2).any(|pair| Arc::ptr_eq(&new[pair[0]].disk.0, &new[pair[1]].disk.0)) {
        return Err(Error::new(ErrorKind::InvalidInput, "a disk can't get two new leaves at once"));
    }
    refuse_paths(new)?;
    let _turns: Vec<_> = order.iter().map(|&index| new[index].disk.0.turn()).collect();
    let names = new.iter().map(|leaf| leaf.disk.leaf_name()).collect::<Result<Vec<_>>>()?;
    let mut states: Vec<_> = order.iter().map(|&index| (index, new[index].disk.0.write())).collect();
    states.sort_by_key(|(index, _)| *index);
    let mut states: Vec<_> = states.into_iter().map(|(_, state)| state).collect();
    let mut prepared: Vec<Prepared> = Vec::new();
    for ((leaf, state), name) in new.iter().zip(&states).zip(&names) {
        match Prepared::new(state, leaf, name) {
            Ok(ready) => prepared.push(ready),
            Err(error) => {
                // The states of those that were prepared come first, in the same order.
                for (ready, state) in prepared.into_iter().zip(&states) {
                    ready.undo(&*state.options.host);
                }
                return Err(error);
            }
        }
    }
    Ok(states.iter_mut().zip(prepared).map(|(state, ready)| ready.switch(state)).collect())
}

/// Refuses paths at which no new leaf may be, whatever is to be replaced.
fn refuse_paths(new: &[NewLeaf<'_>]) -> Result<()> {
    let mut used = Vec::new();
    for leaf in new {
        used.extend(leaf.disk.identities()?);
    }
    let mut seen = Vec::new();
    for leaf in new {
        let path = resolve(&leaf.path);
        if seen.contains(&path) {
            return Err(Error::new(ErrorKind::InvalidInput, "can't be the new leaf of two disks").at(&leaf.path));
        }
        seen.push(path);
        // What exists is refused later, where it is not to be replaced.
        let found = leaf.options.overwrite.then(|| FileStorage::identity_at(&leaf.path)).flatten();
        if found.is_some_and(|found| used.contains(&found)) {
            let message = "is one of the images that the disk is made of, so no new leaf replaces it; name another file";
            return Err(Error::new(ErrorKind::Refused, message).at(&leaf.path));
        }
    }
    Ok(())
}

/// A new leaf that is durable, and what its chain will be.
struct Prepared {
    created: Created,
    leaf: Arc<Image>,
    file: Arc<FileStorage>,
    /// The old leaf, to be read only, with the lock of a reader.
    parent: Layer,
}

impl Prepared {
    /// `name` leads to the old leaf.
    fn new(open: &Open, new: &NewLeaf<'_>, name: &Path) -> Result<Self> {
        open.chain()?;
        let Some(old) = open.written() else {
            let message = "is open read-only, so there is nothing to keep apart";
            return Err(Error::new(ErrorKind::ReadOnly, message).at(name));
        };
        if UndoSession::of(old)?.is_some() {
            let message = "is an undo disk: commit or discard its session before a snapshot is made";
            return Err(Error::new(ErrorKind::Refused, message).at(name));
        }
        // What was written is in the old leaf for good, which is left as if it had been closed.
        old.close()?;
        let mut uuid = old.footer().uuid();
        if uuid == [0; 16] {
            uuid = Uuid::new_v4().into_bytes();
            Image::set_uuid_of(&**old.storage(), uuid).map_err(|error| {
                // As after any other failed write or sync of it.
                if error.kind() == ErrorKind::Io {
                    old.latch_for(&error);
                }
                error.at(name)
            })?;
        }
        let host = &*open.options.host;
        let created = create_over_open(host, &new.path, (old, name), uuid, &new.options)?;
        Self::open(open, name, new, created).inspect_err(|_| remove(host, &new.path, new.options.uuid))
    }

    fn open(open: &Open, name: &Path, new: &NewLeaf<'_>, created: Created) -> Result<Self> {
        if open.file.name_now(name)? != name {
            let message = "was renamed or replaced while a new leaf was made that names it; try again";
            return Err(Error::new(ErrorKind::Refused, message).at(name));
        }
        let file = open_file(&new.path, true, &open.options)?;
        file.lock(LockMode::Write)?;
        let look = OpenOptions { writable: false, ..open.options.image.clone() };
        // Seen before it is opened as what is written, which may change it.
        let seen = Image::open(Arc::clone(&file) as _, &new.path, &look)?;
        if seen.footer().uuid() != new.options.uuid {
            let message = "is another image than the one that was made there: it was replaced meanwhile";
            return Err(Error::new(ErrorKind::Refused, message).at(&new.path));
        }
        let storage = open.options.host.adopt(Arc::clone(&file));
        let leaf = Image::open(storage, &new.path, &open.options.image)?;
        let parent = Arc::new(open.file.reopen_shared(name)?);
        let parent = Layer::Image(Image::open(parent, name, &look)?);
        Ok(Self { created, leaf, file, parent })
    }

    fn undo(self, host: &dyn Host) {
        let (path, uuid) = (self.leaf.path().to_owned(), self.leaf.footer().uuid());
        drop(self);
        remove(host, &path, uuid);
    }

    /// Makes it what is used. Nothing of it can fail.
    fn switch(self, open: &mut Open) -> Created {
        // Others may read the old leaf from now on. Nobody gets to write it: the parent bears a lock of its own.
        open.file.share();
        let parents = std::iter::once(self.parent).chain(open.chain.layers()[1..].iter().cloned());
        open.chain = Arc::new(Chain::over(Layer::Image(self.leaf), parents.collect()));
        open.file = self.file;
        self.created
    }
}

/// For good: a child that came back after a power cut would be of an older moment than its parent. What is there by now and
/// is another image stays.
fn remove(host: &dyn Host, path: &Path, uuid: [u8; 16]) {
    if !uuid_of_file(path).is_ok_and(|found| found == Some(uuid)) {
        return;
    }
    if let Err(error) = host.remove(path).and_then(|()| host.sync_folder(folder_of(path))) {
        tracing::warn!("a snapshot that failed can't be removed: {error}");
    }
}
