//! The note in an image's footers that a virtual machine's saved state relies on it as it is.
//!
//! Whoever opens the image for writing is refused then, and so are operations. The file keeps the time of its last write:
//! a saved state knows its disks by that too, and the note changes nothing that a guest sees.

use std::path::Path;
use std::sync::Arc;

use crate::chain::{ChainOptions, open_file};
use crate::error::{Error, Result};
use crate::image::{Image, OpenOptions};
use crate::storage::{FileStorage, LockMode, Storage};

/// Makes the note, or takes it away; durable when it returns. An image that says so already is not written to.
///
/// # Errors
/// `Locked` when someone has the image open; as it can't be opened for writing.
pub fn set(path: &Path, saved: bool, open: &ChainOptions) -> Result<()> {
    let file = open_file(path, true, open)?;
    file.lock(LockMode::Write)?;
    let storage = open.host.adopt(Arc::clone(&file));
    set_of(&storage, &file, path, saved, &open.image)
}

/// As [`set`], of an image that is open for writing and locked, and not written meanwhile.
pub(crate) fn set_of(
    storage: &Arc<dyn Storage>,
    file: &FileStorage,
    path: &Path,
    saved: bool,
    options: &OpenOptions,
) -> Result<()> {
    let before = file.modified()?;
    // Opening it for writing makes both footers sound first.
    let options = OpenOptions { writable: true, owns_saved_state: true, background_flush: None, ..options.clone() };
    let image = Image::open(Arc::clone(storage), path, &options)?;
    if image.footer().saved_state() == saved {
        return Ok(());
    }
    drop(image);
    Image::set_saved_state_of(&**storage, saved).map_err(|error| error.at(path))?;
    if file.can_grow() {
        file.set_modified(before).map_err(|error| Error::io(error, "can't be kept as old as it is").at(path))?;
    }
    Ok(())
}

/// Whether an image has the note.
///
/// # Errors
/// As it can't be read.
pub fn of(path: &Path, open: &ChainOptions) -> Result<bool> {
    let file = open_file(path, false, open)?;
    let look = OpenOptions { writable: false, ..open.image.clone() };
    let image = Image::open(open.host.adopt(file), path, &look)?;
    Ok(image.footer().saved_state())
}
