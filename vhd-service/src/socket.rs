//! A socket with a name that is closed to others, and that goes with it.

use std::fs::Permissions;
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{Shutdown, shutdown};
use vhd_core::storage::{Host, LocalHost};
use vhd_core::{Error, ErrorKind, Result};

/// Passing names that are tried at most: what a killed process left has one.
const MAX_NAMES: u32 = 100;

/// A listening socket that nobody else may connect to, not even for a moment: it gets its name when it is closed to others.
/// Its name goes with it, unless something else has it by then.
#[derive(Debug)]
pub struct PrivateListener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the name.
    identity: (u64, u64),
}

fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    let found = path.symlink_metadata()?;
    Ok((found.dev(), found.ino()))
}

impl PrivateListener {
    /// Listens at `path`. A socket that a dead process left there is replaced.
    ///
    /// # Errors
    /// `Exists` when someone serves it, or it is no socket; as the host fails.
    pub fn bind(path: &Path) -> Result<Self> {
        let failed = |error: io::Error| Error::io(error, "can't be made a socket").at(path);
        if let Ok(found) = std::fs::symlink_metadata(path) {
            if !found.file_type().is_socket() {
                return Err(Error::new(ErrorKind::Exists, "exists already and is no socket; give another path").at(path));
            }
            if UnixStream::connect(path).is_ok() {
                return Err(Error::new(ErrorKind::Exists, "is served already; give another path").at(path));
            }
            if identity_of(path).map_err(failed)? == (found.dev(), found.ino()) {
                std::fs::remove_file(path).map_err(failed)?;
            }
        }
        let (listener, passing) = Self::bind_passing(path).map_err(failed)?;
        let named = std::fs::set_permissions(&passing, Permissions::from_mode(0o600)).and_then(|()| identity_of(&passing));
        let named = named.map_err(failed).and_then(|identity| {
            // Whoever was quicker has the name.
            LocalHost.rename_new(&passing, path)?;
            Ok(identity)
        });
        let identity = named.inspect_err(|_| drop(std::fs::remove_file(&passing)))?;
        Ok(Self { listener, path: path.to_owned(), identity })
    }

    fn bind_passing(path: &Path) -> io::Result<(UnixListener, PathBuf)> {
        let mut tried = 0;
        loop {
            let mut name = std::ffi::OsString::from(".");
            name.push(path.file_name().unwrap_or_default());
            name.push(format!(".{}.{tried}", std::process::id()));
            let passing = path.with_file_name(name);
            match UnixListener::bind(&passing) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && tried < MAX_NAMES => tried += 1,
                bound => return Ok((bound?, passing)),
            }
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ends it: who waits for a client gets an error, and its name is gone.
    pub fn end(&self) {
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        if identity_of(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Deref for PrivateListener {
    type Target = UnixListener;

    fn deref(&self) -> &UnixListener {
        &self.listener
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn the_end_wakes_who_waits_and_removes_its_own_name_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        for replaced in [false, true] {
            let listener = Arc::new(PrivateListener::bind(&path).unwrap());
            assert_eq!(PrivateListener::bind(&path).unwrap_err().kind(), ErrorKind::Exists);
            let waiting = Arc::clone(&listener);
            // Whoever asked whether someone listens is a client, too.
            let thread = std::thread::spawn(move || while waiting.accept().is_ok() {});
            if replaced {
                std::fs::remove_file(&path).unwrap();
                std::fs::write(&path, b"precious").unwrap();
            }
            listener.end();
            thread.join().unwrap();
            assert_eq!(path.exists(), replaced);
        }
        assert_eq!(PrivateListener::bind(&path).unwrap_err().kind(), ErrorKind::Exists);
        std::fs::remove_file(&path).unwrap();
        // One that a dead process left.
        drop(UnixListener::bind(&path).unwrap());
        PrivateListener::bind(&path).unwrap().end();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
