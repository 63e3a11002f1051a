//! A socket with a name that is closed to others, and that goes with it.

use std::fs::Permissions;
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, UnixAddr, connect, shutdown, socket};
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
    own: OwnName,
}

/// The name of something that this process made, as long as it is that.
#[derive(Clone, Copy, Debug)]
pub struct OwnName(Option<(u64, u64)>);

impl OwnName {
    /// What is there now.
    #[must_use]
    pub fn of(path: &Path) -> Self {
        Self(path.symlink_metadata().ok().map(|found| (found.dev(), found.ino())))
    }

    /// Removes it, unless someone put something else in its place.
    pub fn remove(self, path: &Path) {
        if self.0.is_some() && Self::of(path).0 == self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Whether someone listens on a socket. Does not wait, even where that one takes no clients.
///
/// # Errors
/// As it can't be told: there is no such socket, or no right to it.
pub fn is_served(path: &Path) -> io::Result<bool> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)?;
    match connect(socket.as_raw_fd(), &UnixAddr::new(path)?) {
        // More wait already than it has room for.
        Ok(()) | Err(Errno::EAGAIN) => Ok(true),
        Err(Errno::ECONNREFUSED) => Ok(false),
        Err(error) => Err(error.into()),
    }
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
            if is_served(path).unwrap_or(false) {
                return Err(Error::new(ErrorKind::Exists, "is served already; give another path").at(path));
            }
            OwnName(Some((found.dev(), found.ino()))).remove(path);
        }
        let (listener, passing) = Self::bind_passing(path).map_err(failed)?;
        let own = OwnName::of(&passing);
        let named = std::fs::set_permissions(&passing, Permissions::from_mode(0o600)).map_err(failed);
        // Whoever was quicker has the name.
        let named = named.and_then(|()| LocalHost.rename_new(&passing, path));
        named.inspect_err(|_| own.remove(&passing))?;
        Ok(Self { listener, path: path.to_owned(), own })
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
        self.own.remove(&self.path);
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
