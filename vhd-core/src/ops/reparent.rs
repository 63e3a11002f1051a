//! Giving a differencing image another parent.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::{Chain, ChainOptions, find_parent_of, is_vhd_name, link_to, refuse_linked};
use crate::error::{Error, ErrorKind, Result};
use crate::format::DiskType;
use crate::image::{Image, OpenOptions, locator_texts};
use crate::storage::{FileStorage, LockMode, folder_of};

/// What a change of parent does, or did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reparented {
    /// The new parent, its path resolved.
    pub parent: PathBuf,
    /// The identifiers that the child had and has for its parent; all zero is a raw file.
    pub uuids: [[u8; 16]; 2],
    /// The locators that are written: platform code and path.
    pub locators: Vec<(String, String)>,
    /// What the user should know, one sentence each.
    pub notes: Vec<String>,
}

fn no_parent(image: &Image, path: &Path) -> Error {
    let message = format!("is a {} disk: it has no parent", image.footer().disk_type().name());
    Error::new(ErrorKind::InvalidInput, message).at(path)
}

/// Where the parent of the image at `child` is: where its locators lead, or by its identifier in the child's folder or one of
/// those that the options name.
///
/// # Errors
/// `InvalidInput` for what has no parent; `Parent` when it is not found; those of [`Image::open`].
pub fn find_parent(child: &Path, chain: &ChainOptions) -> Result<PathBuf> {
    let look = OpenOptions { writable: false, ..chain.image.clone() };
    let image = Chain::open_image(child, &ChainOptions { image: look, ..chain.clone() })?;
    let Some(header) = image.header().filter(|_| image.footer().disk_type() == DiskType::Differencing) else {
        return Err(no_parent(&image, child));
    };
    refuse_linked(&image, "has no other parent")?;
    if header.parent_uuid() == [0; 16] {
        let message = "has a raw file or device for a parent, which can't be looked for; name the parent";
        return Err(Error::new(ErrorKind::InvalidInput, message).at(child));
    }
    let mut policy = chain.parents.clone();
    policy.parent_dirs.push(folder_of(child).to_owned());
    let found = find_parent_of(&**image.storage(), child, header, &policy).map_err(|error| error.at(child))?;
    Ok(found.path().to_owned())
}

/// Makes the image at `child` a child of the image or raw file at `parent`; with `dry_run` only says what would be done.
///
/// Nothing of the data changes: what the child holds is laid over another parent. So a parent with another identifier is
/// taken only with `force`; the same one at another place, always.
///
/// # Errors
/// `InvalidInput` for parents that can't be: a child of the image, itself, or larger; `Parent` for another identifier
/// without `force`; `Locked`; those of [`Image::open`]. The child is as it was then.
pub fn reparent(child: &Path, parent: &Path, force: bool, dry_run: bool, chain: &ChainOptions) -> Result<Reparented> {
    let file = Arc::new(if dry_run { FileStorage::rehearse(child)? } else { FileStorage::open(child, true)? });
    file.lock(if dry_run { LockMode::Read } else { LockMode::Write })?;
    let look = OpenOptions { writable: false, ..chain.image.clone() };
    let image = Image::open(Arc::clone(&file) as _, child, &look)?;
    let Some(header) = image.header().filter(|_| image.footer().disk_type() == DiskType::Differencing) else {
        return Err(no_parent(&image, child));
    };
    refuse_linked(&image, "has no other parent")?;
    let invalid = |message: String| Err(Error::new(ErrorKind::InvalidInput, message).at(parent));
    // Before it is opened: the child is locked.
    if FileStorage::open(parent, false)?.identity()? == file.identity()? {
        return invalid("is the child itself".into());
    }
    let opened = if is_vhd_name(parent) {
        let look = ChainOptions { image: look, ..chain.clone() };
        Chain::open(parent, &look)?
    } else {
        Chain::open_raw(parent, false)?
    };
    for layer in opened.layers() {
        if FileStorage::open(layer.path(), false)?.identity()? == file.identity()? {
            return invalid(format!("has {} among its own parents: the chain would be a loop", child.display()));
        }
    }
    let new = &opened.layers()[0];
    let uuid = new.image().map(|image| image.footer().uuid()).unwrap_or_default();
    if new.image().is_some() && uuid == [0; 16] {
        return invalid("has no UUID, so a child can't name it; making a child of it gives it one: vhd create --parent".into());
    }
    let is_same = uuid == header.parent_uuid();
    // A child that was made smaller than its parent follows that all the same.
    if new.size() > image.size() && !is_same && !force {
        return invalid(format!("has {} bytes, more than the child's {}; --force cuts it off", new.size(), image.size()));
    }
    if !is_same && !force {
        let [found, expected] = [uuid, header.parent_uuid()].map(uuid::Uuid::from_bytes);
        let message =
            format!("has UUID {found}, the child's parent {expected}: its content may differ; --force takes it all the same");
        return Err(Error::new(ErrorKind::Parent, message).at(parent));
    }
    let link = link_to(child, parent, uuid)?;
    let uuids = [header.parent_uuid(), uuid];
    drop(image);
    if dry_run {
        Image::rehearse(&*file, child, &chain.image)?;
    } else {
        Image::set_parent(&chain.host.adopt(file), child, &link, &chain.image).map_err(|error| error.at(child))?;
    }
    let mut notes = Vec::new();
    if link.relative.starts_with("../") {
        notes.push("the parent is not in the child's folder: opening the child will need --parent-dir or --any-parent".into());
    }
    if new.image().is_none() {
        notes.push("the parent is a raw file: opening the child will need --raw-parent".into());
    }
    let locators = locator_texts(&link).map(|(code, text)| (code.name(), text)).to_vec();
    Ok(Reparented { parent: link.absolute.into(), uuids, locators, notes })
}
