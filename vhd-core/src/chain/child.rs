//! Making a differencing image over a parent.

use std::path::{Component, Path, PathBuf};

use uuid::Uuid;

use super::find::{find_children, is_vhd_name, uuid_of_file};
use super::linked::refuse_linked;
use super::{Chain, ChainOptions, Layer};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Creator, DEFAULT_BLOCK_SIZE, PlatformCode, Timestamp};
use crate::image::{CreateOptions, Created, Footers, Image, NewKind, OpenOptions, ParentLink, create_file_for, refusal};
use crate::intent;
use crate::storage::{Access, FileStorage, Host, LockMode, folder_of};

/// A new differencing image.
#[derive(Clone, Debug)]
pub struct ChildOptions {
    /// Bytes of the disk; the parent's when `None`.
    pub size: Option<u64>,
    /// Bytes of a block; the parent's when `None`, or 2 MiB.
    pub block_size: Option<u32>,
    /// Its identifier.
    pub uuid: [u8; 16],
    /// Who it says made it.
    pub creator: Creator,
    /// When it says it was made.
    pub timestamp: Timestamp,
    /// Replaces what is at the child's path.
    pub overwrite: bool,
    /// Makes the parent read-only.
    pub protect_parent: bool,
    /// What an undo disk says of its session; none for other children.
    pub session: Option<Vec<u8>>,
}

impl ChildOptions {
    /// An ordinary snapshot: the parent's size, this identifier, made now by us.
    #[must_use]
    pub fn new(uuid: [u8; 16]) -> Self {
        Self {
            size: None,
            block_size: None,
            uuid,
            creator: Creator::WINDOWS_10,
            timestamp: Timestamp::now(),
            overwrite: false,
            protect_parent: false,
            session: None,
        }
    }
}

/// Makes a differencing image at `path` over `parent`, an image or a raw file. A parent without an identifier is
/// given one first; otherwise it is not written.
///
/// # Errors
/// `Locked` when someone writes to the parent; `InvalidInput`; those of [`create_file`](crate::image::create_file).
pub fn create_child(path: &Path, parent: &Path, options: &ChildOptions, open: &ChainOptions) -> Result<Created> {
    open.refuse_ignoring(parent)?;
    // The image of an undo session is one whatever its name: it was opened as that.
    let (layer, uuid) = if is_vhd_name(parent) || options.session.is_some() {
        let image = Chain::open_image(parent, open)?;
        refuse_linked(&image, "can't be a parent")?;
        refuse_unfinished(path, parent, &image, open)?;
        let uuid = image.footer().uuid();
        (Layer::Image(image), uuid)
    } else {
        (Chain::open_raw(parent, false)?.layers()[0].clone(), [0; 16])
    };
    let size = size_over(path, layer.size(), options)?;
    let mut notes = Vec::new();
    if size > layer.size() {
        notes.push("larger than its parent: Windows refuses that".to_owned());
    }
    let uuid = match &layer {
        Layer::Image(_) if uuid == [0; 16] => {
            let block = layer.image().and_then(|image| image.layout()).map(|layout| layout.block_size());
            drop(layer);
            notes.push("the parent had no UUID and was given one".to_owned());
            let basis = Basis { uuid: give_uuid(parent, open)?, size, block };
            return create_over(&*open.host, path, parent, &basis, options, notes);
        }
        _ => uuid,
    };
    let block = layer.image().and_then(|image| image.layout()).map(|layout| layout.block_size());
    create_over(&*open.host, path, parent, &Basis { uuid, size, block }, options, notes)
}

/// Refuses to replace the file at `path` where it is an image that others need: one with children beside it, one that a saved
/// state relies on, one that an operation has in hand. With `force` it returns what is lost; nothing where nothing is there.
///
/// # Errors
/// `Refused`; as the file can't be opened.
pub fn refuse_replacing(path: &Path, force: bool) -> Result<Vec<PathBuf>> {
    if !std::fs::metadata(path).is_ok_and(|found| found.is_file()) {
        return Ok(Vec::new());
    }
    let uuid = uuid_of_file(path)?;
    let lost = uuid.filter(|uuid| *uuid != [0; 16]).map_or_else(Vec::new, |uuid| find_children(path, uuid));
    if force {
        return Ok(lost);
    }
    let refused = |message: String| Err(Error::new(ErrorKind::Refused, message).at(path));
    if let Some(child) = lost.first() {
        return refused(format!(
            "is the parent of {}: replacing it would destroy that image; use --force if it may be lost",
            child.display()
        ));
    }
    intent::refuse(path, uuid, &[])?;
    let footers = Footers::read(&FileStorage::open(path, false)?).map_err(|error| Error::io(error, "can't be read").at(path))?;
    if let Some((stage, footer)) = footers.stage() {
        return Err(refusal(path, stage, &footer));
    }
    if footers.authority(false).is_ok_and(|(footer, _)| footer.saved_state()) {
        return refused("a virtual machine's saved state relies on it; discard that first, or use --force".into());
    }
    Ok(lost)
}

/// Refuses a child that would take the place of its own parent, or of one above that: the chain would be a loop.
fn refuse_cycle(path: &Path, chain: &Chain) -> Result<()> {
    let Ok(own) = FileStorage::open(path, false).and_then(|file| file.identity()) else { return Ok(()) };
    for layer in chain.layers() {
        if FileStorage::open(layer.path(), false)?.identity()? == own {
            let message = format!(
                "is an image of the chain of {}, so it can't be replaced by a child of it",
                chain.layers()[0].path().display()
            );
            return Err(Error::new(ErrorKind::Refused, message).at(path));
        }
    }
    Ok(())
}

/// Refuses a parent that an unfinished operation has in hand, or of whose own parents one has: what it makes of them would
/// spoil the child, and it would not know of it.
fn refuse_unfinished(path: &Path, parent: &Path, image: &Image, open: &ChainOptions) -> Result<()> {
    intent::refuse(parent, Some(image.footer().uuid()), &[])?;
    let look = ChainOptions { image: OpenOptions { writable: false, ..open.image.clone() }, ..open.clone() };
    match Chain::open(parent, &look) {
        Ok(chain) => {
            refuse_cycle(path, &chain)?;
            let mut images = chain.layers().iter().filter_map(Layer::image);
            images.try_for_each(|image| intent::refuse(image.path(), Some(image.footer().uuid()), &[]))
        }
        Err(error) if error.kind() == ErrorKind::Refused => Err(error),
        // A parent whose own parents are elsewhere now may have a child all the same.
        Err(_) => Ok(()),
    }
}

/// Makes a differencing image at `path` over a leaf that this process has open, which is at `parent` now, and whose
/// identifier is `uuid`.
pub(crate) fn create_over_open(
    host: &dyn Host,
    path: &Path,
    (leaf, parent): (&Image, &Path),
    uuid: [u8; 16],
    options: &ChildOptions,
) -> Result<Created> {
    let block = leaf.layout().map(|layout| layout.block_size());
    let basis = Basis { uuid, size: size_over(path, leaf.size(), options)?, block };
    create_over(host, path, parent, &basis, options, Vec::new())
}

fn size_over(path: &Path, parent: u64, options: &ChildOptions) -> Result<u64> {
    match options.size {
        Some(size) if size < parent => {
            let message = format!("size {size} is less than the parent's {parent} bytes; a child can only be larger");
            Err(Error::new(ErrorKind::InvalidInput, message).at(path))
        }
        size => Ok(size.unwrap_or(parent)),
    }
}

/// What a child is made over.
struct Basis {
    /// The parent's identifier.
    uuid: [u8; 16],
    /// Bytes of the child.
    size: u64,
    /// Bytes of the parent's blocks.
    block: Option<u64>,
}

fn create_over(
    host: &dyn Host,
    path: &Path,
    parent: &Path,
    basis: &Basis,
    options: &ChildOptions,
    mut notes: Vec<String>,
) -> Result<Created> {
    let link = ParentLink {
        own: options.session.clone().map(|session| (PlatformCode::UNDO_SESSION, session)),
        ..link_to(path, parent, basis.uuid)?
    };
    if link.relative.starts_with("../") {
        notes.push("the parent is not in the child's folder: opening the child will need --parent-dir or --any-parent".into());
    }
    let parent_block = basis.block.and_then(|size| u32::try_from(size).ok());
    let create = CreateOptions {
        kind: NewKind::Differencing(link),
        size: basis.size,
        block_size: options.block_size.or(parent_block).unwrap_or(DEFAULT_BLOCK_SIZE),
        uuid: options.uuid,
        creator: options.creator,
        timestamp: options.timestamp,
    };
    let mut created = create_file_for(host, path, &create, options.overwrite, &Access::of(parent))?;
    if options.protect_parent {
        protect(parent)?;
    }
    notes.append(&mut created.notes);
    Ok(Created { notes, ..created })
}

/// How a child at `path` names `parent`.
///
/// # Errors
/// `NotFound`; `InvalidInput` for paths that are no text.
pub fn link_to(path: &Path, parent: &Path, uuid: [u8; 16]) -> Result<ParentLink> {
    let resolve = |path: &Path| std::fs::canonicalize(path).map_err(|error| Error::io(error, "can't be resolved").at(path));
    let absolute = resolve(parent)?;
    let relative = relative_to(&absolute, &resolve(folder_of(path))?);
    let text = |path: &Path| match path.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(Error::new(ErrorKind::InvalidInput, "is not UTF-8: a parent locator can't hold it; rename it").at(path)),
    };
    let name = text(Path::new(absolute.file_name().unwrap_or_default()))?;
    Ok(ParentLink { uuid, name, relative: text(&relative)?, absolute: text(&absolute)?, own: None })
}

/// The path of `target` from `folder`, both absolute and without links.
pub(crate) fn relative_to(target: &Path, folder: &Path) -> PathBuf {
    let (mut target, mut folder) = (target.components().peekable(), folder.components().peekable());
    while let (Some(a), Some(b)) = (target.peek(), folder.peek())
        && a == b
    {
        target.next();
        folder.next();
    }
    folder.map(|_| Component::ParentDir).chain(target).collect()
}

/// Gives an image a new identifier.
fn give_uuid(parent: &Path, open: &ChainOptions) -> Result<[u8; 16]> {
    let storage = std::sync::Arc::new(FileStorage::open(parent, true)?);
    storage.lock(LockMode::Write)?;
    let storage = open.host.adopt(storage);
    // Opening it for writing makes both footers sound first.
    let options = OpenOptions { writable: true, background_flush: None, ..open.image.clone() };
    drop(Image::open(std::sync::Arc::clone(&storage), parent, &options)?);
    let uuid = Uuid::new_v4().into_bytes();
    Image::set_uuid_of(&*storage, uuid).map_err(|error| error.at(parent))?;
    Ok(uuid)
}

/// Makes a file read-only, and immutable where the file system and our rights allow.
fn protect(path: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(error, "can't be made read-only").at(path);
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut permissions = file.metadata().map_err(failed)?.permissions();
    permissions.set_readonly(true);
    file.set_permissions(permissions).map_err(failed)?;
    if let Ok(flags) = rustix::fs::ioctl_getflags(&file) {
        // Not allowed to ordinary users, and not known to every file system: the mode has to do then.
        let _ = rustix::fs::ioctl_setflags(&file, flags | rustix::fs::IFlags::IMMUTABLE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths() {
        let relative = |target, folder| relative_to(Path::new(target), Path::new(folder));
        assert_eq!(relative("/a/b/base.vhd", "/a/b"), Path::new("base.vhd"));
        assert_eq!(relative("/a/b/base.vhd", "/a/c/d"), Path::new("../../b/base.vhd"));
        assert_eq!(relative("/a/b/c/base.vhd", "/a/b"), Path::new("c/base.vhd"));
    }
}
