//! Opening a leaf with all its parents.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::find::{find_child, find_parent};
use super::linked::{LinkedDisk, refuse_linked};
use super::session::refuse_incomplete;
use super::{Chain, Layer, ParentPolicy, RawFile};
use crate::block::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{DiskType, Footer, Stage, Timestamp};
use crate::image::{Footers, Image, OpenOptions, Staged, refusal};
use crate::intent;
use crate::storage::{FileStorage, Host, LocalHost, LockMode, Storage};

/// Images of a chain at most. Nobody makes longer ones; a chain that does not end would never be open.
pub const MAX_DEPTH: usize = 256;

/// How a chain is opened.
#[derive(Clone, Debug)]
pub struct ChainOptions {
    /// How the leaf is. Parents are opened the same way, but read-only.
    pub image: OpenOptions,
    /// Where parents may be.
    pub parents: ParentPolicy,
    /// Through what files are written, made and removed: the host itself, but in tests.
    pub host: Arc<dyn Host>,
    /// Moves data past the host's page cache, where requests are aligned and the file systems can.
    pub direct: bool,
    /// True for the operation that an intent record beside the image belongs to: it goes on where others are refused.
    pub resuming: bool,
    /// Reads images although a record beside them says that an operation is half done; never for writing.
    pub ignore_record: bool,
    /// What is opened for reading is refused where opening it for writing would be: for a dry run. The lock is a reader's.
    pub rehearsal: bool,
}

impl Default for ChainOptions {
    fn default() -> Self {
        let (image, parents) = Default::default();
        Self { image, parents, host: Arc::new(LocalHost), direct: false, resuming: false, ignore_record: false, rehearsal: false }
    }
}

impl ChainOptions {
    /// Refuses an image that an unfinished operation has in hand; or warns, where that is to be read past.
    pub(crate) fn refuse_recorded(&self, image: &Path, uuid: Option<[u8; 16]>, above: &[[u8; 16]]) -> Result<()> {
        if self.resuming {
            return Ok(());
        }
        match intent::refuse(image, uuid, above) {
            Err(error) if self.ignore_record && error.kind() == ErrorKind::Refused => {
                tracing::warn!("{error}; it is read all the same");
                Ok(())
            }
            refused => refused,
        }
    }

    /// Refuses to read past records where something is written.
    pub(crate) fn refuse_ignoring(&self, image: &Path) -> Result<()> {
        if !self.ignore_record {
            return Ok(());
        }
        let message = "--ignore-record is for reading only: what is half done is finished first, or its record cleared";
        Err(Error::new(ErrorKind::InvalidInput, message).at(image))
    }

    /// True when the leaf is written to, or it is seen whether it could be.
    fn writes(&self) -> bool {
        self.image.writable || self.rehearsal
    }
}

impl Chain {
    /// Opens an image and its parents, and locks them: the leaf alone for writing, else shared.
    ///
    /// # Errors
    /// `Locked`, `Parent`, `Refused` and those of [`Image::open`]. No file was changed then.
    pub fn open(path: &Path, options: &ChainOptions) -> Result<Self> {
        Self::open_after(path, options, &mut |_| Ok(()))
    }

    /// As [`Self::open`] for writing; `before` sees the leaf's file once all is open, locked and mended, and before
    /// anything is kept of it that it may change.
    pub(crate) fn open_after(
        path: &Path,
        options: &ChainOptions,
        before: &mut dyn FnMut(&Arc<dyn Storage>) -> Result<()>,
    ) -> Result<Self> {
        Ok(Self::open_with_file(path, options, before)?.0)
    }

    /// As [`Self::open_after`]; tells the leaf's file, too, which bears the lock.
    pub(crate) fn open_with_file(
        path: &Path,
        options: &ChainOptions,
        before: &mut dyn FnMut(&Arc<dyn Storage>) -> Result<()>,
    ) -> Result<(Self, Arc<FileStorage>)> {
        if options.writes() {
            options.refuse_ignoring(path)?;
        }
        let (storage, image) = open_leaf(path, options)?;
        if options.writes() {
            refuse_linked(&image, "is only read")?;
        }
        options.refuse_recorded(path, Some(image.footer().uuid()), &[])?;
        if !options.resuming {
            refuse_incomplete(&image)?;
        }
        let mut layers = with_parents(image, storage.identity()?, path, options)?;
        // Only now, when nothing can fail but the leaf itself, may it be changed.
        if options.image.writable {
            let storage = options.host.adopt(Arc::clone(&storage));
            before(&storage).map_err(|error| error.at(path))?;
            layers[0] = Layer::Image(Image::open(storage, path, &options.image)?);
        } else if options.rehearsal {
            Image::rehearse(&*storage, path, &options.image)?;
        }
        let leaf = layers.remove(0);
        Ok((Self::over(leaf, layers), storage))
    }

    /// As [`Self::open`], of a leaf whose file is open and locked already, as an operation on it has it. It is read and written
    /// through `storage`.
    pub(crate) fn open_held(path: &Path, file: &FileStorage, storage: Arc<dyn Storage>, options: &ChainOptions) -> Result<Self> {
        let look = OpenOptions { writable: false, ..options.image.clone() };
        let image = Image::open(Arc::clone(&storage), path, &look)?;
        let mut layers = with_parents(image, file.identity()?, path, options)?;
        if options.image.writable {
            layers[0] = Layer::Image(Image::open(storage, path, &options.image)?);
        }
        let leaf = layers.remove(0);
        Ok(Self::over(leaf, layers))
    }

    /// A raw file that is open and locked already, as a disk.
    pub(crate) fn raw_held(path: &Path, storage: Arc<dyn Storage>, read_only: bool) -> Result<Self> {
        Ok(Self::of(Layer::Raw(Arc::new(RawFile::new(storage, path, read_only)?))))
    }

    /// Opens one image without its parents: for looking at it.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_image(path: &Path, options: &ChainOptions) -> Result<Arc<Image>> {
        let image = OpenOptions { writable: false, ..options.image.clone() };
        let options = ChainOptions { image, rehearsal: false, ..options.clone() };
        Ok(open_leaf(path, &options)?.1)
    }

    /// Opens a raw file or device as a disk.
    ///
    /// # Errors
    /// As the host fails, or the file is in use.
    pub fn open_raw(path: &Path, writable: bool) -> Result<Self> {
        Self::open_raw_with(
            path,
            &ChainOptions { image: OpenOptions { writable, ..OpenOptions::default() }, ..Default::default() },
        )
    }

    /// As [`Self::open_raw`], through a host.
    pub(crate) fn open_raw_with(path: &Path, options: &ChainOptions) -> Result<Self> {
        Ok(Self::of(Layer::Raw(open_raw(path, options, &[])?)))
    }
}

impl Disk {
    /// Opens an image with its parents as a disk.
    ///
    /// # Errors
    /// As [`Chain::open`].
    pub fn open(path: &Path, options: &ChainOptions) -> Result<Self> {
        Ok(Self::new(Chain::open(path, options)?))
    }
}

/// A leaf and all its parents. `identity` is that of the leaf's file.
fn with_parents(leaf: Arc<Image>, identity: (u64, u64), path: &Path, options: &ChainOptions) -> Result<Vec<Layer>> {
    let mut seen = HashSet::from([identity]);
    let mut above = vec![leaf.footer().uuid()];
    let mut layers = vec![Layer::Image(Arc::clone(&leaf))];
    let mut child = leaf;
    while child.footer().disk_type() == DiskType::Differencing {
        if layers.len() == MAX_DEPTH {
            let message = format!("has more than {MAX_DEPTH} images in its chain");
            return Err(Error::new(ErrorKind::Unsupported, message).at(path));
        }
        let layer = open_parent(&child, options, &mut seen, &above).map_err(|error| error.at(child.path()))?;
        layers.push(layer.clone());
        match layer {
            Layer::Image(image) => {
                above.push(image.footer().uuid());
                child = image;
            }
            Layer::Raw(_) => break,
        }
    }
    Ok(layers)
}

fn open_raw(path: &Path, options: &ChainOptions, above: &[[u8; 16]]) -> Result<Arc<RawFile>> {
    let writable = options.image.writable;
    let storage = open_file(path, writable, options)?;
    storage.lock(if writable { LockMode::Write } else { LockMode::Read })?;
    options.refuse_recorded(path, None, above)?;
    // A part of its content is in another file.
    if let Some((stage @ Stage::ConvertSource, footer)) = stage_of(&*storage).filter(|_| !options.ignore_record) {
        return Err(refusal(path, stage, &footer));
    }
    let storage = if writable { options.host.adopt(storage) } else { storage };
    Ok(Arc::new(RawFile::new(storage, path, !writable)?))
}

/// Opens a file as these options have it.
pub(crate) fn open_file(path: &Path, writable: bool, options: &ChainOptions) -> Result<Arc<FileStorage>> {
    let file = FileStorage::open(path, writable)?;
    Ok(Arc::new(if options.direct { file.with_direct_io(writable) } else { file }))
}

/// Opens the leaf to read what it says; it is locked as it will be used.
fn open_leaf(path: &Path, options: &ChainOptions) -> Result<(Arc<FileStorage>, Arc<Image>)> {
    let writable = options.image.writable;
    if options.rehearsal {
        FileStorage::rehearse(path)?;
    }
    let storage = open_file(path, writable, options)?;
    storage.lock(if writable { LockMode::Write } else { LockMode::Read })?;
    storage.refuse_renamed()?;
    let look = OpenOptions { writable: false, ..options.image.clone() };
    let image = match stage_of(&*storage) {
        // What a merge did not come to is in the child still; who reads past its record was told.
        Some((Stage::Merge, footer)) if options.ignore_record => {
            tracing::warn!("{}: a merge into it is half done; it is read all the same", path.display());
            Image::open(Staged::over(Arc::clone(&storage) as _, Stage::Merge, footer.disk_type()), path, &look)
        }
        _ => Image::open(Arc::clone(&storage) as _, path, &look),
    };
    let image = image.map_err(|error| if options.resuming { error } else { intent::explain(path, error) })?;
    let uuid = image.footer().uuid();
    if options.writes()
        && !options.image.force
        && uuid != [0; 16]
        && let Some(child) = find_child(path, &storage, uuid)
    {
        let message = format!(
            "is the parent of {}: writing to it would destroy that image; use --force if it may be lost",
            child.display()
        );
        return Err(Error::new(ErrorKind::Refused, message).at(path));
    }
    Ok((storage, image))
}

fn stage_of(storage: &dyn Storage) -> Option<(Stage, Footer)> {
    Footers::read(storage).ok().and_then(|footers| footers.stage())
}

fn open_parent(child: &Arc<Image>, options: &ChainOptions, seen: &mut HashSet<(u64, u64)>, above: &[[u8; 16]]) -> Result<Layer> {
    let Some(header) = child.header() else {
        return Err(Error::new(ErrorKind::Corrupt, "is a differencing image without a dynamic header"));
    };
    let expected = header.parent_uuid();
    if expected == [0; 16] {
        if let Some(linked) = LinkedDisk::of(child)? {
            return Ok(Layer::Raw(linked.open(child.path(), &options.parents)?));
        }
        let Some(raw) = &options.parents.raw_parent else {
            let message = "its parent is a raw file or device, and those are opened only when named: use --raw-parent PATH";
            return Err(Error::new(ErrorKind::Parent, message));
        };
        let look = ChainOptions { image: OpenOptions { writable: false, ..options.image.clone() }, ..options.clone() };
        return Ok(Layer::Raw(open_raw(raw, &look, above)?));
    }
    if expected == child.footer().uuid() {
        return Err(Error::new(ErrorKind::Parent, format!("names itself (UUID {}) as its parent", Uuid::from_bytes(expected))));
    }
    let mut storage = find_parent(child, header, &options.parents, above)?;
    if options.direct {
        storage = storage.with_direct_io(false);
    }
    if !seen.insert(storage.identity()?) {
        let message = format!("its parent {} is one of its own children: the chain is a loop", storage.path().display());
        return Err(Error::new(ErrorKind::Parent, message));
    }
    storage.lock(LockMode::Read)?;
    let path = storage.path().to_owned();
    options.refuse_recorded(&path, Some(expected), above)?;
    note_timestamp(&path, header.parent_timestamp());
    let look = OpenOptions { writable: false, ..options.image.clone() };
    let storage: Arc<dyn Storage> = Arc::new(storage);
    let storage = match stage_of(&*storage) {
        // The record was looked at above: what it lacks is still in the child through which it is opened.
        Some((Stage::Merge, footer)) if options.resuming || options.ignore_record || intent::is_merged_into(&path, above) => {
            Staged::over(storage, Stage::Merge, footer.disk_type())
        }
        Some((stage, footer)) => return Err(intent::explain(&path, refusal(&path, stage, &footer))),
        None => storage,
    };
    Ok(Layer::Image(Image::open(storage, &path, &look)?))
}

/// A time stamp that differs means little (a copied file, a change of clocks), so it is only noted.
fn note_timestamp(parent: &Path, recorded: Timestamp) {
    let modified = std::fs::metadata(parent).and_then(|metadata| metadata.modified());
    if let (true, Ok(modified)) = (recorded.0 != 0, modified)
        && let Ok(apart) = modified.duration_since(recorded.to_system_time())
        && apart.as_secs() > 1
    {
        tracing::info!(
            "{}: was modified after its child recorded it; if it was written to, the child is spoiled",
            parent.display()
        );
    }
}
