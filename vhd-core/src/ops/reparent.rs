//! Giving a differencing image another parent.

use std::path::Path;
use std::sync::Arc;

use crate::chain::{Chain, ChainOptions, is_vhd_name, link_to, refuse_linked};
use crate::error::{Error, ErrorKind, Result};
use crate::format::DiskType;
use crate::image::{Image, OpenOptions};
use crate::storage::{FileStorage, LockMode};

/// Makes the image at `child` a child of the image or raw file at `parent`. Returns notes, one sentence each.
///
/// Nothing of the data changes: what the child holds is laid over another parent. So a parent with another identifier is
/// taken only with `force`; the same one at another place, always.
///
/// # Errors
/// `InvalidInput` for parents that can't be: a child of the image, itself, or larger; `Parent` for another identifier
/// without `force`; `Locked`; those of [`Image::open`]. The child is as it was then.
pub fn reparent(child: &Path, parent: &Path, force: bool, chain: &ChainOptions) -> Result<Vec<String>> {
    let file = Arc::new(FileStorage::open(child, true)?);
    file.lock(LockMode::Write)?;
    let look = OpenOptions { writable: false, ..chain.image.clone() };
    let image = Image::open(Arc::clone(&file) as _, child, &look)?;
    let Some(header) = image.header().filter(|_| image.footer().disk_type() == DiskType::Differencing) else {
        let message = format!("is a {} disk: it has no parent", image.footer().disk_type().name());
        return Err(Error::new(ErrorKind::InvalidInput, message).at(child));
    };
    refuse_linked(&image, "has no other parent")?;
    let invalid = |message: String| Err(Error::new(ErrorKind::InvalidInput, message).at(parent));
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
    if new.size() > image.size() && !force {
        return invalid(format!("has {} bytes, more than the child's {}; --force cuts it off", new.size(), image.size()));
    }
    if uuid != header.parent_uuid() && !force {
        let [found, expected] = [uuid, header.parent_uuid()].map(uuid::Uuid::from_bytes);
        let message =
            format!("has UUID {found}, the child's parent {expected}: its content may differ; --force takes it all the same");
        return Err(Error::new(ErrorKind::Parent, message).at(parent));
    }
    let link = link_to(child, parent, uuid)?;
    drop(image);
    Image::set_parent(&chain.host.adopt(file), child, &link, &chain.image).map_err(|error| error.at(child))?;
    let mut notes = Vec::new();
    if link.relative.starts_with("../") {
        notes.push("the parent is not in the child's folder: opening the child will need --parent-dir or --any-parent".into());
    }
    if new.image().is_none() {
        notes.push("the parent is a raw file: opening the child will need --raw-parent".into());
    }
    Ok(notes)
}
