//! Files that are protected from being written, made writable for a while.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, IFlags, accessat, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::intent::Protection;

/// Bits of a mode that let somebody write.
const WRITE_BITS: u32 = 0o222;

/// True for a file that nobody may write, whoever asks.
pub(super) fn is_protected(path: &Path) -> bool {
    is_read_only(path) || is_immutable(path)
}

pub(super) fn is_read_only(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().readonly())
}

pub(super) fn is_immutable(path: &Path) -> bool {
    accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS) == Err(Errno::PERM)
}

/// How a file is protected; `None` where it is not.
pub(super) fn of(path: &Path) -> Option<Protection> {
    is_protected(path).then(|| Protection { read_only: is_read_only(path), immutable: is_immutable(path) })
}

/// Makes the file writable.
pub(super) fn lift(path: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(error, "can't be made writable").at(path);
    let file = File::open(path).map_err(failed)?;
    if let Ok(flags) = ioctl_getflags(&file)
        && flags.contains(IFlags::IMMUTABLE)
    {
        ioctl_setflags(&file, flags - IFlags::IMMUTABLE).map_err(|error| failed(error.into()))?;
    }
    let permissions = file.metadata().map_err(failed)?.permissions();
    if permissions.readonly() {
        file.set_permissions(Permissions::from_mode(permissions.mode() | 0o200)).map_err(failed)?;
    }
    Ok(())
}

/// Protects the file as it was. This only ever closes it: what a record says opens nothing.
pub(super) fn restore(path: &Path, protection: Protection) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(error, "can't be protected again").at(path);
    let file = File::open(path).map_err(failed)?;
    if protection.read_only {
        let mode = file.metadata().map_err(failed)?.permissions().mode();
        file.set_permissions(Permissions::from_mode(mode & !WRITE_BITS)).map_err(failed)?;
    }
    if protection.immutable {
        let flags = ioctl_getflags(&file).map_err(|error| failed(error.into()))?;
        ioctl_setflags(&file, flags | IFlags::IMMUTABLE).map_err(|error| failed(error.into()))?;
    }
    Ok(())
}
