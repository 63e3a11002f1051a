//! What makes, names and removes files of the host.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

use super::{FileStorage, Storage};
use crate::error::{Error, Result};

/// Folders of the host, for operations over several files.
///
/// Contract: a name that was made, changed or removed may be as it was before after a power cut, until
/// [`Host::sync_folder`] returned for its folder; a rename is whole or not at all.
pub trait Host: Send + Sync + Debug {
    /// The storage through which an open file is written.
    fn adopt(&self, file: Arc<FileStorage>) -> Arc<dyn Storage>;

    /// Makes a new file.
    ///
    /// # Errors
    /// `Exists`; as the host fails.
    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>>;

    /// Makes a new file that nobody but its owner may read or write.
    ///
    /// # Errors
    /// As [`Host::create`].
    fn create_private(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        self.create(path)
    }

    /// Gives a file another name in the same folder; what had that name is gone.
    ///
    /// # Errors
    /// As the host fails.
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;

    /// As [`Host::rename`], where nothing has that name.
    ///
    /// # Errors
    /// `Exists`; as the host fails.
    fn rename_new(&self, from: &Path, to: &Path) -> Result<()>;

    /// Removes a file. One that is not there is removed already.
    ///
    /// # Errors
    /// As the host fails.
    fn remove(&self, path: &Path) -> Result<()>;

    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// As the host fails.
    fn sync_folder(&self, folder: &Path) -> Result<()>;
}

/// The host itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalHost;

impl Host for LocalHost {
    fn adopt(&self, file: Arc<FileStorage>) -> Arc<dyn Storage> {
        file
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        create(path, 0o666)
    }

    fn create_private(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        create(path, 0o600)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        std::fs::rename(from, to).map_err(|error| Error::io(error, "can't be renamed").at(from))
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<()> {
        let failed = |error: std::io::Error| Error::io(error, "can't be renamed").at(to);
        match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // Not every file system can do it in one go.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                std::fs::hard_link(from, to).map_err(failed)?;
                self.remove(from)
            }
            renamed => renamed.map_err(|error| failed(error.into())),
        }
    }

    fn remove(&self, path: &Path) -> Result<()> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(error, "can't be removed").at(path)),
            _ => Ok(()),
        }
    }

    fn sync_folder(&self, folder: &Path) -> Result<()> {
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(|error| Error::io(error, "can't be synced").at(folder))
    }
}

fn create(path: &Path, mode: u32) -> Result<Arc<dyn Storage>> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(path);
    let file = file.map_err(|error| Error::io(error, "can't be created").at(path))?;
    Ok(Arc::new(FileStorage::from_file(file, path)?))
}

/// The folder that a file is in.
#[must_use]
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A path without links and `..` in its folder; as it is, where the folder can't be found. The file need not exist.
#[must_use]
pub fn resolve(path: &Path) -> PathBuf {
    let folder = std::fs::canonicalize(folder_of(path));
    folder.map_or_else(|_| path.to_owned(), |folder| folder.join(path.file_name().unwrap_or_default()))
}

/// Puts `bytes` at `path` for good: the old content or the new is there after a power cut, never a part.
///
/// # Errors
/// As the host fails; what was at `path` is as it was then.
pub fn put_file(host: &dyn Host, path: &Path, bytes: &[u8]) -> Result<()> {
    let passing = passing_name(path);
    // What a killed attempt left.
    host.remove(&passing)?;
    let put = || {
        let file = host.create(&passing)?;
        let failed = |error| Error::io(error, "can't be written").at(path);
        file.write_at(bytes, 0).map_err(failed)?;
        file.sync().map_err(failed)?;
        host.rename(&passing, path)?;
        host.sync_folder(folder_of(path))
    };
    put().inspect_err(|_| drop(host.remove(&passing)))
}

/// The name that a file bears until it is complete.
fn passing_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    path.with_file_name(name)
}
