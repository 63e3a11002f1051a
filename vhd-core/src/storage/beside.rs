//! Files that lie beside an image: records, journals, sessions. A stranger may have put them there.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::{Component, Path};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

use super::folder_of;
use crate::error::{Error, ErrorKind, Result};

/// How far a path may lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beneath {
    /// The folder and those below it; symbolic links that stay there are followed.
    Links,
    /// The folder and those below it; symbolic links are refused.
    NoLinks,
}

/// Opens a regular file in `folder`, or below it, for reading; `None` where there is nothing. A FIFO, a socket, a folder or
/// a device is never opened, and no path leads out of the folder.
///
/// # Errors
/// `Refused` for what is no regular file, a link that is not allowed, or a path that leads out; `Unsupported` where the
/// kernel has no `openat2`; as the host fails.
pub fn open_beneath(folder: &Path, name: &Path, beneath: Beneath) -> Result<Option<File>> {
    let resolve = match beneath {
        Beneath::Links => ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
        Beneath::NoLinks => ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    };
    let path = folder.join(name);
    let directory = match File::open(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        directory => directory.map_err(|error| Error::io(error, "can't be opened").at(folder))?,
    };
    // A name alone leads nowhere else, and needs no help of a newer kernel.
    let is_name = matches!(name.components().collect::<Vec<_>>()[..], [Component::Normal(_)]) && beneath == Beneath::NoLinks;
    let open = |flags: OFlags| loop {
        let opened = match is_name {
            true => openat(directory.as_fd(), name, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty()),
            false => openat2(directory.as_fd(), name, flags | OFlags::CLOEXEC, Mode::empty(), resolve),
        };
        match opened {
            // AGAIN: a folder on the way was renamed meanwhile.
            Err(Errno::INTR | Errno::AGAIN) => {}
            opened => return opened.map(File::from),
        }
    };
    // Opening a device may already do something, and opening a FIFO may wait: what it is, is seen first.
    let seen = match open(OFlags::PATH) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        seen => seen.map_err(|errno| open_error(errno, &path))?,
    };
    refuse_irregular(&seen, &path)?;
    let file = match open(OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        file => file.map_err(|errno| open_error(errno, &path))?,
    };
    // It may have been replaced meanwhile.
    refuse_irregular(&file, &path)?;
    Ok(Some(file))
}

/// Reads a file that lies beside an image: a regular one of `max` bytes at most, under its own name and not through a link.
/// `None` where there is none.
///
/// # Errors
/// `Refused` for a larger one; those of [`open_beneath`].
pub fn read_beside(path: &Path, max: u64) -> Result<Option<Vec<u8>>> {
    let name = path.file_name().unwrap_or_default();
    let Some(file) = open_beneath(folder_of(path), Path::new(name), Beneath::NoLinks)? else { return Ok(None) };
    let mut bytes = Vec::new();
    file.take(max.saturating_add(1)).read_to_end(&mut bytes).map_err(|error| Error::io(error, "can't be read").at(path))?;
    if bytes.len() as u64 > max {
        let message = format!("has more than {max} bytes, too many for a record beside an image; move it away if it is none");
        return Err(Error::new(ErrorKind::Refused, message).at(path));
    }
    Ok(Some(bytes))
}

fn open_error(errno: Errno, path: &Path) -> Error {
    let refused = |message| Error::new(ErrorKind::Refused, message).at(path);
    match errno {
        Errno::LOOP => refused("is a symbolic link, expected a regular file; move it away"),
        Errno::XDEV => refused("leads out of its folder"),
        Errno::NOSYS => {
            Error::new(ErrorKind::Unsupported, "can't be opened safely: the kernel has no openat2 (Linux 5.6)").at(path)
        }
        errno => Error::io(errno.into(), "can't be opened").at(path),
    }
}

fn refuse_irregular(file: &File, path: &Path) -> Result<()> {
    let found = file.metadata().map_err(|error| Error::io(error, "can't be examined").at(path))?;
    if found.is_file() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Refused, "is no regular file, so it is not opened; move it away").at(path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    #[test]
    fn only_regular_files_beneath_the_folder_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("in");
        std::fs::create_dir_all(folder.join("below")).unwrap();
        std::fs::write(dir.path().join("outside"), b"o").unwrap();
        std::fs::write(folder.join("file"), b"0123").unwrap();
        symlink("file", folder.join("link")).unwrap();
        symlink("../outside", folder.join("out")).unwrap();
        mkfifo(&folder.join("fifo"), Mode::S_IRWXU).unwrap();
        let kind = |name: &str, beneath| open_beneath(&folder, Path::new(name), beneath).map(|file| file.is_some());
        let refused = |name, beneath| assert_eq!(kind(name, beneath).unwrap_err().kind(), ErrorKind::Refused, "{name}");
        for beneath in [Beneath::Links, Beneath::NoLinks] {
            assert!(kind("file", beneath).unwrap());
            assert!(!kind("none", beneath).unwrap() && !kind("file/none", beneath).unwrap());
            for name in ["fifo", "below", "../outside", "out", "/dev/null"] {
                refused(name, beneath);
            }
        }
        assert!(kind("link", Beneath::Links).unwrap());
        refused("link", Beneath::NoLinks);
    }

    #[test]
    fn no_more_is_read_than_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        assert_eq!(read_beside(&path, 4).unwrap(), None);
        std::fs::write(&path, b"0123").unwrap();
        assert_eq!(read_beside(&path, 4).unwrap().unwrap(), b"0123");
        assert_eq!(read_beside(&path, 3).unwrap_err().kind(), ErrorKind::Refused);
    }
}
