//! Opening a leaf with all its parents.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::find::{find_child, find_parent};
use super::{Chain, Layer, ParentPolicy, RawFile};
use crate::block::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{DiskType, Timestamp};
use crate::image::{Image, OpenOptions};
use crate::storage::{FileStorage, LockMode};

/// Images of a chain at most. Nobody makes longer ones; a chain that does not end would never be open.
pub const MAX_DEPTH: usize = 256;

/// How a chain is opened.
#[derive(Clone, Debug, Default)]
pub struct ChainOptions {
    /// How the leaf is. Parents are opened the same way, but read-only.
    pub image: OpenOptions,
    /// Where parents may be.
    pub parents: ParentPolicy,
}

impl Chain {
    /// Opens an image and its parents, and locks them: the leaf alone for writing, else shared.
    ///
    /// # Errors
    /// `Locked`, `Parent`, `Refused` and those of [`Image::open`]. No file was changed then.
    pub fn open(path: &Path, options: &ChainOptions) -> Result<Self> {
        let (storage, image) = open_leaf(path, options)?;
        let mut layers = vec![Layer::Image(Arc::clone(&image))];
        let mut seen = HashSet::from([storage.identity()?]);
        let mut child = image;
        while child.footer().disk_type() == DiskType::Differencing {
            if layers.len() == MAX_DEPTH {
                let message = format!("has more than {MAX_DEPTH} images in its chain");
                return Err(Error::new(ErrorKind::Unsupported, message).at(path));
            }
            let layer = open_parent(&child, options, &mut seen).map_err(|error| error.at(child.path()))?;
            layers.push(layer.clone());
            match layer {
                Layer::Image(image) => child = image,
                Layer::Raw(_) => break,
            }
        }
        // Only now, when nothing can fail but the leaf itself, may it be changed.
        if options.image.writable {
            drop(child);
            layers[0] = Layer::Image(Image::open(storage, path, &options.image)?);
        }
        Ok(Self { layers })
    }

    /// Opens one image without its parents: for looking at it.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_image(path: &Path, options: &ChainOptions) -> Result<Arc<Image>> {
        let options = ChainOptions { image: OpenOptions { writable: false, ..options.image.clone() }, ..options.clone() };
        Ok(open_leaf(path, &options)?.1)
    }

    /// Opens a raw file or device as a disk.
    ///
    /// # Errors
    /// As the host fails, or the file is in use.
    pub fn open_raw(path: &Path, writable: bool) -> Result<Self> {
        Ok(Self { layers: vec![Layer::Raw(open_raw(path, writable)?)] })
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

fn open_raw(path: &Path, writable: bool) -> Result<Arc<RawFile>> {
    let storage = FileStorage::open(path, writable)?;
    storage.lock(if writable { LockMode::Write } else { LockMode::Read })?;
    Ok(Arc::new(RawFile::new(Arc::new(storage), path, !writable)?))
}

/// Opens the leaf to read what it says; it is locked as it will be used.
fn open_leaf(path: &Path, options: &ChainOptions) -> Result<(Arc<FileStorage>, Arc<Image>)> {
    let writable = options.image.writable;
    let storage = Arc::new(FileStorage::open(path, writable)?);
    storage.lock(if writable { LockMode::Write } else { LockMode::Read })?;
    let look = OpenOptions { writable: false, ..options.image.clone() };
    let image = Image::open(Arc::clone(&storage) as _, path, &look)?;
    let uuid = image.footer().uuid();
    if writable
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

fn open_parent(child: &Arc<Image>, options: &ChainOptions, seen: &mut HashSet<(u64, u64)>) -> Result<Layer> {
    let Some(header) = child.header() else {
        return Err(Error::new(ErrorKind::Corrupt, "is a differencing image without a dynamic header"));
    };
    let expected = header.parent_uuid();
    if expected == [0; 16] {
        let Some(raw) = &options.parents.raw_parent else {
            let message = "its parent is a raw file or device, and those are opened only when named: use --raw-parent PATH";
            return Err(Error::new(ErrorKind::Parent, message));
        };
        return Ok(Layer::Raw(open_raw(raw, false)?));
    }
    if expected == child.footer().uuid() {
        return Err(Error::new(ErrorKind::Parent, format!("names itself (UUID {}) as its parent", Uuid::from_bytes(expected))));
    }
    let storage = find_parent(child, header, &options.parents)?;
    if !seen.insert(storage.identity()?) {
        let message = format!("its parent {} is one of its own children: the chain is a loop", storage.path().display());
        return Err(Error::new(ErrorKind::Parent, message));
    }
    storage.lock(LockMode::Read)?;
    let path = storage.path().to_owned();
    note_timestamp(&path, header.parent_timestamp());
    let look = OpenOptions { writable: false, ..options.image.clone() };
    Ok(Layer::Image(Image::open(Arc::new(storage), &path, &look)?))
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
