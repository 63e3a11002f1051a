//! The folder for sockets.

use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use vhd_core::{Error, ErrorKind, Result};

/// The folder of this user where running services have their sockets: `vhd` in `$XDG_RUNTIME_DIR`, else `/run/vhd` for
/// root and `/tmp/vhd-UID` for others. It is made when it is missing, and closed to everyone else.
///
/// # Errors
/// `Refused` when it belongs to someone else; as the host fails.
pub fn folder() -> Result<PathBuf> {
    let folder = match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir).join("vhd"),
        None if geteuid().is_root() => PathBuf::from("/run/vhd"),
        None => std::env::temp_dir().join(format!("vhd-{}", geteuid())),
    };
    make_private(&folder)?;
    Ok(folder)
}

fn make_private(folder: &Path) -> Result<()> {
    let failed = |error: io::Error| Error::io(error, "can't be made for sockets; set XDG_RUNTIME_DIR").at(folder);
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let found = std::fs::symlink_metadata(folder).map_err(failed)?;
    if !found.is_dir() || found.uid() != geteuid().as_raw() {
        let message = "is no folder of this user's, so sockets in it could be anyone's; set XDG_RUNTIME_DIR";
        return Err(Error::new(ErrorKind::Refused, message).at(folder));
    }
    if found.mode() & 0o077 != 0 {
        std::fs::set_permissions(folder, Permissions::from_mode(0o700)).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_others_could_use_is_closed_or_refused() {
        let base = tempfile::tempdir().unwrap();
        let folder = base.path().join("vhd");
        std::fs::create_dir(&folder).unwrap();
        std::fs::set_permissions(&folder, Permissions::from_mode(0o777)).unwrap();
        make_private(&folder).unwrap();
        assert_eq!(folder.metadata().unwrap().mode() & 0o777, 0o700);
        let link = base.path().join("link");
        std::os::unix::fs::symlink(&folder, &link).unwrap();
        assert_eq!(make_private(&link).unwrap_err().kind(), ErrorKind::Refused);
    }
}
