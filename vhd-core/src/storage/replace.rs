//! Making a file under a passing name, so that a half-made one never bears the right one.

use std::ffi::OsString;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Access as Asked, AtFlags, CWD, accessat};

use super::unnamed::Unnamed;
use super::{Access, FileStorage, Host, LockMode, Storage, folder_of};
use crate::error::{Error, ErrorKind, Result};

/// What a passing name ends with.
const SUFFIX: &str = ".vhd-new";
/// Bytes of a file's name from which on the passing one has a number in its place: 255 is what file systems take.
const LONG_NAME: usize = 240;
/// That number.
const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);

/// Makes a file at `path` out of what `fill` writes: under a passing name in the same folder, renamed when it is
/// complete and durable. On a failure nothing is left, and what was at `path` is as it was. What a killed process left
/// under the passing name goes. Nobody can find the file before, so what `fill` syncs is not synced each time, but once at the
/// end. A device is written in place. Who may read a file that was not there before, `access` says.
///
/// # Errors
/// `Exists` when something is at `path` and `overwrite` is not set; `Locked` when another process makes the same file; as
/// `fill` or the host fails.
pub fn replace_file(
    host: &dyn Host,
    path: &Path,
    overwrite: bool,
    access: &Access,
    fill: impl FnOnce(&Arc<dyn Storage>) -> Result<()>,
) -> Result<()> {
    refuse_at_once(path, overwrite)?;
    let found = std::fs::metadata(path).ok();
    // Nobody opens what is replaced until it is gone.
    let mut replaced = None;
    match &found {
        Some(found) if found.file_type().is_block_device() => {
            let storage = Arc::new(FileStorage::open(path, true)?);
            storage.lock(LockMode::Write)?;
            let device = host.adopt(storage);
            fill(&device).map_err(|error| error.at(path))?;
            return device.sync().map_err(|error| Error::io(error, "can't be synced").at(path));
        }
        // Opening it finds folders, and images that are in use.
        Some(_) => {
            let old = FileStorage::open(path, true)?;
            old.lock(LockMode::Write)?;
            old.refuse_renamed()?;
            replaced = Some(old);
        }
        None => {}
    }
    let passing = passing_name(path);
    remove_abandoned(host, &passing, path)?;
    let storage = host.create(&passing).map_err(|error| match error.kind() {
        ErrorKind::Exists => made_elsewhere(path),
        // Nobody knows the passing name.
        _ => error.about(path),
    })?;
    let made = || {
        let _held = hold(&passing, path)?;
        match &found {
            // Who may read what is replaced may read what replaces it, and nobody else.
            Some(found) => std::fs::set_permissions(&passing, found.permissions())
                .map_err(|error| Error::io(error, "can't be created").at(path))?,
            None => access.give(&passing).map_err(|error| error.about(path))?,
        }
        storage.write_early();
        let unnamed: Arc<dyn Storage> = Arc::new(Unnamed(Arc::clone(&storage)));
        fill(&unnamed).map_err(|error| error.at(path))?;
        storage.sync().map_err(|error| Error::io(error, "can't be synced").at(path))?;
        let renamed = if overwrite { host.rename(&passing, path) } else { host.rename_new(&passing, path) };
        drop(replaced);
        renamed.map_err(|error| if error.kind() == ErrorKind::Exists { exists(path) } else { error.about(path) })
    };
    made().inspect_err(|_| drop(host.remove(&passing)))?;
    host.sync_folder(folder_of(path)).inspect_err(|_| {
        // Nobody may take for made what the caller was told is not. What was replaced is gone already.
        if !overwrite {
            drop(host.remove(path));
        }
    })
}

/// Refuses what [`replace_file`] would before it begins to fill the file, and makes nothing: for a dry run.
///
/// # Errors
/// As there.
pub fn rehearse_replace(path: &Path, overwrite: bool) -> Result<()> {
    refuse_at_once(path, overwrite)?;
    if path.exists() {
        return FileStorage::rehearse(path)?.lock(LockMode::Write);
    }
    may_change_names_beside(path).map_err(|error| Error::io(error, "can't be created").at(path))
}

/// Whether this user may make and remove files in the folder of this one.
pub(crate) fn may_change_names_beside(path: &Path) -> std::io::Result<()> {
    // By this name it is a folder, or nothing.
    let folder = folder_of(path).join(".");
    Ok(accessat(CWD, &folder, Asked::WRITE_OK | Asked::EXEC_OK, AtFlags::EACCESS)?)
}

/// Refuses what can be seen to be wrong with a name before the work is done.
fn refuse_at_once(path: &Path, overwrite: bool) -> Result<()> {
    // A link that leads nowhere is something, too.
    if !overwrite && path.symlink_metadata().is_ok() {
        return Err(exists(path));
    }
    if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(Error::new(ErrorKind::InvalidInput, "is the name of a folder, expected a file").at(path));
    }
    Ok(())
}

fn exists(path: &Path) -> Error {
    Error::new(ErrorKind::Exists, "exists already; --overwrite replaces it").at(path)
}

fn made_elsewhere(path: &Path) -> Error {
    Error::new(ErrorKind::Locked, "is being made by another process").at(path)
}

/// The name that a file at `path` bears until it is complete: the same each time, so that a later run finds what a killed
/// one left.
fn passing_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default();
    let mut passing = OsString::from(".");
    if name.len() < LONG_NAME {
        passing.push(name);
    } else {
        passing.push(format!("{:08x}", CRC.checksum(name.as_encoded_bytes())));
    }
    passing.push(SUFFIX);
    path.with_file_name(passing)
}

/// Removes what a process left that was killed. One that lives holds a lock.
fn remove_abandoned(host: &dyn Host, passing: &Path, path: &Path) -> Result<()> {
    match FileStorage::open(passing, true) {
        // Where the folder itself is in the way, making the file tells so.
        Err(_) if std::fs::symlink_metadata(passing).is_err() => Ok(()),
        Err(error) => Err(error),
        Ok(left) => {
            left.lock(LockMode::Write)
                .map_err(|error| if error.kind() == ErrorKind::Locked { made_elsewhere(path) } else { error })?;
            host.remove(passing)
        }
    }
}

/// Locks the file under its passing name, which another process may just have taken for an abandoned one.
fn hold(passing: &Path, path: &Path) -> Result<FileStorage> {
    let held = FileStorage::open(passing, true).map_err(|_| made_elsewhere(path))?;
    held.lock(LockMode::Write).map_err(|_| made_elsewhere(path))?;
    match FileStorage::open(passing, false).and_then(|again| again.identity()) {
        Ok(identity) if identity == held.identity()? => Ok(held),
        _ => Err(made_elsewhere(path)),
    }
}
