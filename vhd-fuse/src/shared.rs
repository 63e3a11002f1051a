//! A mount of an image for the file system of one of its partitions, which serves those of others, too.

use std::path::{Path, PathBuf};

use vhd_core::{Error, ErrorKind, Result};

use crate::mounted::device;
use crate::unmount::ours;
use crate::{DISK_FILE, inside, mountinfo, server};

/// A mount of ours that another process serves.
#[derive(Clone, Debug)]
pub struct SharedMount {
    folder: PathBuf,
    server: u32,
}

impl SharedMount {
    /// The mount of this image on a folder of `below`, where there is one that is served.
    ///
    /// # Errors
    /// As the mount table can't be read.
    pub fn of(image: &Path, below: &Path) -> Result<Option<Self>> {
        let table = mountinfo::all().map_err(|error| Error::io(error, "can't see what is mounted").at(image))?;
        let entries = table.into_iter().filter(|entry| entry.kind == ours() && entry.source == image);
        let mut found = entries.filter(|entry| entry.target.parent() == Some(below) && device(&entry.target).is_ok());
        Ok(found.find_map(|entry| {
            let identity = server::identity_of(&entry.target).ok()??;
            let server = identity.split_once(' ')?.0.parse().ok()?;
            Some(Self { folder: entry.target, server })
        }))
    }

    /// The disk as a whole.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.folder.join(DISK_FILE)
    }

    /// Who serves it.
    #[must_use]
    pub fn server(&self) -> u32 {
        self.server
    }

    /// Mounts the file system that is in one of the files on the folder `at`, and says what did it. The server goes on until all
    /// that are mounted from it are unmounted.
    ///
    /// # Errors
    /// `Refused` when it is mounted already, or is to be written and the mount is read-only; as it fails.
    pub fn mount_inside(&self, name: &str, at: &Path, options: &[String], read_only: bool) -> Result<String> {
        let at = at.canonicalize().map_err(|error| Error::io(error, "can't find it").at(at))?;
        let disk = self.disk();
        let found = disk.metadata().map_err(|error| Error::io(error, "can't be examined").at(&disk))?;
        if !read_only && found.permissions().readonly() {
            let message = format!(
                "process {} has its image read-only for other mounts: mount this read-only too, or unmount those first",
                self.server
            );
            return Err(Error::new(ErrorKind::Refused, message).at(&at));
        }
        inside::mount(&self.folder, name, &at, options, read_only)
    }
}
