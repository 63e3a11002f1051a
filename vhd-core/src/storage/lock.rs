//! Image locks: open-file-description byte-range locks in the way of QEMU's file driver, so that each honours the
//! other's.
//!
//! QEMU takes only read locks: on byte 100 + p for each permission p that it holds, and on 200 + p for each that it
//! does not share. It then asks, for each permission held, whether someone locked the opposite byte.

use std::fs::File;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::error::{Error, ErrorKind, Result};

/// First byte of the permissions that are held.
const HELD: i64 = 100;
/// First byte of the permissions that are not shared with others.
const NOT_SHARED: i64 = 200;
/// QEMU's permission numbers.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// How a file is used, which decides who else may use it at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// A leaf that is only read, or a parent: others may read it too, nobody may write it.
    Read,
    /// A leaf that is written: nobody else may read or write it.
    Write,
}

impl LockMode {
    fn held(self) -> &'static [i64] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    fn not_shared(self) -> &'static [i64] {
        &[WRITE, RESIZE]
    }
}

/// Places the locks, then looks for others that they do not go together with.
pub(super) fn acquire(file: &File, mode: LockMode) -> Result<()> {
    if !place(file, mode)? {
        return Ok(());
    }
    let theirs = mode.held().iter().map(|p| NOT_SHARED + p).chain(mode.not_shared().iter().map(|p| HELD + p));
    for byte in theirs {
        let mut probe = one_byte(libc::F_WRLCK, byte);
        fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut probe)).map_err(|errno| Error::io(errno.into(), "can't be locked"))?;
        if i32::from(probe.l_type) != libc::F_UNLCK {
            release(file);
            return Err(in_use(mode));
        }
    }
    Ok(())
}

/// Places the locks, and looks for no others. False where the file system has none.
pub(super) fn place(file: &File, mode: LockMode) -> Result<bool> {
    let ours = mode.held().iter().map(|p| HELD + p).chain(mode.not_shared().iter().map(|p| NOT_SHARED + p));
    for byte in ours {
        match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&one_byte(libc::F_RDLCK, byte))) {
            Ok(_) => {}
            // A file system without locks: nothing can be promised, and nothing else would work there either.
            Err(Errno::EOPNOTSUPP | Errno::ENOLCK | Errno::ENOSYS) => {
                tracing::warn!("the file system has no locks; take care that nothing else uses the image");
                return Ok(false);
            }
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(in_use(mode)),
            Err(errno) => return Err(Error::io(errno.into(), "can't be locked")),
        }
    }
    Ok(true)
}

/// Gives up the permission to write, without a moment at which someone else could get it.
pub(super) fn share(file: &File) {
    for permission in LockMode::Write.held().iter().filter(|held| !LockMode::Read.held().contains(held)) {
        let _ = fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&one_byte(libc::F_UNLCK, HELD + permission)));
    }
}

/// Takes all our locks off, as a failed attempt must not stand in the way of others.
pub(super) fn release(file: &File) {
    let all = libc::flock { l_type: libc::F_UNLCK as libc::c_short, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
    let _ = fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&all));
}

fn one_byte(kind: libc::c_int, byte: i64) -> libc::flock {
    let l_type = kind as libc::c_short;
    libc::flock { l_type, l_whence: 0, l_start: byte, l_len: 1, l_pid: 0 }
}

fn in_use(mode: LockMode) -> Error {
    let message = match mode {
        LockMode::Read => "is open for writing elsewhere (here or in QEMU); close it there first",
        LockMode::Write => "is in use elsewhere (here or in QEMU), so it can't be opened for writing; close it there first",
    };
    Error::new(ErrorKind::Locked, message)
}
