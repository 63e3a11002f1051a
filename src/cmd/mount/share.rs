//! `vhd mount --fs` of an image that is mounted for the file system of another partition: as lines of fstab do it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vhd_core::chain::Chain;
use vhd_core::ops::undo;
use vhd_core::{Disk, Error, ErrorKind};
use vhd_fuse::SharedMount;
use vhd_service::{control, runtime};

use super::{MountArgs, Wanted, file_with, partitions};

/// How long one that is being mounted just now may take until the other finds it.
const PATIENCE: Duration = Duration::from_secs(3);

/// What came of it.
pub struct Shared {
    /// What mounted it.
    pub by: String,
    /// The mount that it is from.
    pub from: SharedMount,
}

impl Shared {
    /// The control socket of the process that serves it.
    pub fn control(&self) -> Option<PathBuf> {
        let socket = runtime::folder().ok()?.join(format!("mount-{}.{}", self.from.server(), control::EXTENSION));
        socket.exists().then_some(socket)
    }
}

impl MountArgs {
    /// Mounts from the mount of another partition, where the image is `locked` by that. Fails as it is locked where there is none.
    pub(super) fn share(&self, wanted: &Wanted, locked: Error) -> Result<Shared, Error> {
        if !self.fs || locked.kind() != ErrorKind::Locked {
            return Err(locked);
        }
        let image = wanted.image.canonicalize().unwrap_or_else(|_| wanted.image.clone());
        let leaf = if self.undo { self.undo_of(&image)? } else { image };
        let leaf = leaf.canonicalize().unwrap_or(leaf);
        let Some(from) = find(&leaf)? else { return Err(locked) };
        if self.foreground {
            let message = format!(
                "process {} serves it for another partition, so there is nothing to serve; leave out --foreground",
                from.server()
            );
            return Err(Error::new(ErrorKind::Refused, message).at(&wanted.image));
        }
        // As that mount shows it: what is refused of a disk is refused here, too.
        let disk = Disk::new(Chain::open_raw(&from.disk(), false)?);
        let name = partitions(&disk).and_then(|table| file_with(&table, wanted));
        disk.close()?;
        let by = from.mount_inside(&name?, &self.target, &wanted.inside, wanted.options.read_only)?;
        Ok(Shared { by, from })
    }

    fn undo_of(&self, image: &Path) -> Result<PathBuf, Error> {
        let dir = self.undo_dir.as_deref().map(super::absolute).transpose()?;
        undo::undo_of(image, dir.as_deref())
    }
}

fn find(image: &Path) -> Result<Option<SharedMount>, Error> {
    let (below, began) = (runtime::folder()?, Instant::now());
    let below = below.canonicalize().unwrap_or(below);
    loop {
        match SharedMount::of(image, &below)? {
            None if began.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(50)),
            found => return Ok(found),
        }
    }
}
