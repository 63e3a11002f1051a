//! `--pid-file`: a file that names this process while it serves.
//!
//! It is made new. What is there already stays, but for one case: a regular file that holds nothing but the number of a
//! process, as this program writes it, where that process is gone and nobody holds the file's lock. A server that was killed
//! leaves such a file. The lock is held as long as this process serves, so two that start at once can't take it from each other.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use vhd_core::{Error, ErrorKind};

/// Bytes of a number and its line's end at most.
const LONGEST: u64 = 12;
/// How often others may take the name away in between.
const TRIES: usize = 10;

/// The file, which is removed at the end if it is still the one that was made.
#[derive(Debug)]
pub struct PidFile<'a> {
    path: &'a Path,
    /// Locked.
    file: File,
}

impl<'a> PidFile<'a> {
    pub fn make(path: &'a Path) -> Result<Self, Error> {
        let failed = |error| Error::io(error, "the file for the process's number can't be made").at(path);
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        for _ in 0..TRIES {
            let (file, is_new) = match options.clone().create_new(true).open(path) {
                Ok(made) => (made, true),
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
                Err(_) => match path.symlink_metadata() {
                    // To open a device may do something already.
                    Ok(found) if !found.is_file() => return Err(occupied(path, "exists already, and is no regular file")),
                    Ok(_) => match options.open(path) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
                        Err(_) => continue,
                        Ok(found) => (found, false),
                    },
                    // It went away meanwhile.
                    Err(_) => continue,
                },
            };
            if let Some(made) = Self::take(path, file, is_new)? {
                return Ok(made);
            }
        }
        Err(failed(Errno::EAGAIN.into()))
    }

    /// Writes the number into a file that is new, or was left by a process that is gone. `None` where the file has lost its
    /// name meanwhile.
    fn take(path: &'a Path, mut file: File, is_new: bool) -> Result<Option<Self>, Error> {
        let failed = |error| Error::io(error, "the file for the process's number can't be written").at(path);
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(occupied(path, "is that of a server that runs")),
            // Where there are no locks, what the file says is all there is.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        if !is_at(&file, path) {
            return Ok(None);
        }
        let found = file.metadata().map_err(failed)?;
        if !found.is_file() || found.nlink() != 1 {
            return Err(occupied(path, "exists already, and is no regular file with one name"));
        }
        if !is_new {
            check_left_behind(path, &mut file)?;
        }
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(&number())).map_err(failed)?;
        Ok(Some(Self { path, file }))
    }
}

impl Drop for PidFile<'_> {
    fn drop(&mut self) {
        let mut text = [0; LONGEST as usize + 1];
        let is_ours = self.file.read_at(&mut text, 0).is_ok_and(|len| text[..len] == number());
        if is_ours && is_at(&self.file, self.path) {
            let _ = std::fs::remove_file(self.path);
        }
    }
}

fn number() -> Vec<u8> {
    format!("{}\n", std::process::id()).into_bytes()
}

/// Whether the file is the one of this name.
fn is_at(file: &File, path: &Path) -> bool {
    let identity = |found: &std::fs::Metadata| (found.dev(), found.ino());
    matches!((file.metadata(), path.symlink_metadata()), (Ok(open), Ok(named)) if identity(&open) == identity(&named))
}

/// Whether it holds nothing but the number of a process that is gone.
fn check_left_behind(path: &Path, file: &mut File) -> Result<(), Error> {
    let mut text = String::new();
    let read = file.take(LONGEST + 1).read_to_string(&mut text);
    let number = text.strip_suffix('\n').and_then(|number| number.parse::<i32>().ok()).filter(|number| *number > 0);
    match number {
        Some(number) if read.is_ok() && text == format!("{number}\n") => match kill(Pid::from_raw(number), None) {
            Err(Errno::ESRCH) => Ok(()),
            // In a container, numbers come again: this process did not write it.
            _ if Pid::from_raw(number) == Pid::this() => Ok(()),
            _ => Err(occupied(path, &format!("names process {number}, which runs"))),
        },
        _ => Err(occupied(path, "exists already, and holds something else than a process's number")),
    }
}

fn occupied(path: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Exists, format!("{why}; give another file to --pid-file, or remove it")).at(path)
}
