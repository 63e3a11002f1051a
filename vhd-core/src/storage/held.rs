//! A file that is open: found, opened again and examined without its name, which others may give to another file.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use nix::fcntl::OFlag;
use nix::sys::statvfs::{FsFlags, fstatvfs};
use rustix::fs::{OFlags, fcntl_getfl};

use super::file::identity_of;
use super::{FileStorage, LockMode, Storage, lock};
use crate::error::{Error, ErrorKind, Result};

/// What a file takes of its volume, and what is left there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes that the host has given to the file.
    pub allocated: u64,
    /// Bytes that this user may still use.
    pub free: u64,
    /// Bytes of the volume.
    pub total: u64,
}

impl FileStorage {
    /// Where the kernel has this open file, whatever its name leads to.
    fn place(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// The identity of what a path leads to: see [`FileStorage::identity`]. `None` where there is nothing.
    #[must_use]
    pub fn identity_at(path: &Path) -> Option<(u64, u64)> {
        std::fs::metadata(path).ok().map(|found| identity_of(&found))
    }

    pub(super) fn is_at(&self, path: &Path) -> bool {
        let own = self.identity().ok();
        own.is_some() && Self::identity_at(path) == own
    }

    /// A name that leads to this very file: `known` if that still does, else the one that the kernel knows.
    ///
    /// # Errors
    /// `NotFound` when none is known: it was removed, or is where this process can't look.
    pub fn name_now(&self, known: &Path) -> Result<PathBuf> {
        if self.is_at(known) {
            return Ok(known.to_owned());
        }
        let found = std::fs::read_link(self.place()).ok().filter(|path| path.is_absolute() && self.is_at(path));
        found.ok_or_else(|| {
            let message = "is open, but no name leads to it any more: it was removed, or moved out of sight";
            Error::new(ErrorKind::NotFound, message).at(known)
        })
    }

    /// Opens this file again, which `name` leads to, for reading only, and places a reader's locks. They go together with a
    /// writer's of this one, as it is: nobody else gets to write to the file when this one is closed.
    ///
    /// # Errors
    /// `NotFound` when it is another file; as the host fails.
    pub(crate) fn reopen_shared(&self, name: &Path) -> Result<Self> {
        // Only the owner may ask for it, who has done so already.
        let flags = fcntl_getfl(&self.file).map_or(OFlags::empty(), |flags| flags & OFlags::NOATIME);
        let flags = OFlag::O_NONBLOCK.bits() | flags.bits().cast_signed();
        let open = |path: &Path| OpenOptions::new().read(true).custom_flags(flags).open(path);
        // Where there is no /proc, the name will do if it leads here.
        let file =
            open(&self.place()).or_else(|error| if error.kind() == io::ErrorKind::NotFound { open(name) } else { Err(error) });
        let mut again = Self::from_file(file.map_err(|error| Error::io(error, "can't be opened for reading").at(name))?, name)?;
        if again.identity()? != self.identity()? {
            return Err(Error::new(ErrorKind::NotFound, "is another file now than the one in use").at(name));
        }
        if self.direct.is_some() {
            again = again.with_direct_io(false);
        }
        again.locked.store(true, Ordering::Relaxed);
        lock::place(&again.file, LockMode::Read).map_err(|error| error.at(name))?;
        Ok(again)
    }

    /// When it was written last.
    ///
    /// # Errors
    /// As the host fails.
    pub fn modified(&self) -> Result<SystemTime> {
        self.metadata()?.modified().map_err(|error| Error::io(error, "can't be examined").at(&self.path))
    }

    /// Has it count as written then, for good.
    pub(crate) fn set_modified(&self, time: SystemTime) -> io::Result<()> {
        self.file.set_modified(time).and_then(|()| self.file.sync_all())
    }

    /// What it takes of its volume, and what is left there.
    ///
    /// # Errors
    /// As the host fails.
    pub fn room(&self) -> Result<Room> {
        let failed = |error| Error::io(error, "its volume can't be examined").at(&self.path);
        let found = fstatvfs(&self.file).map_err(|errno| failed(errno.into()))?;
        // A device takes none of the volume that its name is on; one that is only read, or has no size, can't become full.
        if self.is_device || found.blocks() == 0 || found.flags().contains(FsFlags::ST_RDONLY) {
            return Err(Error::new(ErrorKind::Unsupported, "is on nothing that can become full").at(&self.path));
        }
        let unit = found.fragment_size();
        let allocated = self.allocated().map_err(failed)?;
        Ok(Room { allocated, free: found.blocks_available() * unit, total: found.blocks() * unit })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_found_by_what_it_is_and_not_by_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let [name, other, moved] = ["name", "other", "moved"].map(|name| folder.path().join(name));
        std::fs::write(&name, b"mine").unwrap();
        let file = FileStorage::open(&name, true).unwrap();
        assert_eq!(file.name_now(&name).unwrap(), name);
        std::fs::rename(&name, &moved).unwrap();
        assert_eq!(file.name_now(&name).unwrap(), moved);
        std::fs::write(&name, b"other").unwrap();
        assert_eq!(file.name_now(&name).unwrap(), moved);
        // A name that leads to it is one, and stays the one that is told.
        std::fs::hard_link(&moved, &other).unwrap();
        assert_eq!(file.name_now(&other).unwrap(), other);
        std::fs::remove_file(&other).unwrap();
        std::fs::remove_file(&moved).unwrap();
        assert_eq!(file.name_now(&name).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_lock_is_handed_over_without_a_gap_whatever_the_name_leads_to() {
        let folder = tempfile::tempdir().unwrap();
        let [name, moved] = ["name", "moved"].map(|name| folder.path().join(name));
        std::fs::write(&name, b"mine").unwrap();
        let file = FileStorage::open(&name, true).unwrap();
        file.lock(LockMode::Write).unwrap();
        std::fs::rename(&name, &moved).unwrap();
        let other = |mode| FileStorage::open(&moved, mode == LockMode::Write).unwrap().lock(mode);
        let again = file.reopen_shared(&moved).unwrap();
        assert_eq!(again.identity().unwrap(), file.identity().unwrap());
        assert!(other(LockMode::Read).is_err() && other(LockMode::Write).is_err());
        file.share();
        assert!(other(LockMode::Read).is_ok() && other(LockMode::Write).is_err());
        drop(file);
        assert!(other(LockMode::Read).is_ok() && other(LockMode::Write).is_err());
        assert!(again.write_at(b"x", 0).is_err(), "it is for reading only");
        drop(again);
        other(LockMode::Write).unwrap();
    }
}
