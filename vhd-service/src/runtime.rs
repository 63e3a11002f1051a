//! The user's folders: for sockets, and for what is to be known in later runs.

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
    make_private(&folder, "sockets", "XDG_RUNTIME_DIR")?;
    Ok(folder)
}

/// Where this user's state is, which nobody else may write to: `vhd` in `$XDG_STATE_HOME`, else `/var/lib/vhd` for root and
/// `~/.local/state/vhd` for others. It may not be there yet; `None` without a home.
#[must_use]
pub fn state_path() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    match set("XDG_STATE_HOME") {
        Some(base) => Some(base.join("vhd")),
        None if geteuid().is_root() => Some("/var/lib/vhd".into()),
        None => Some(set("HOME")?.join(".local/state/vhd")),
    }
}

/// The folder of [`state_path`], made where it is missing and closed to everyone else.
///
/// # Errors
/// `NotFound` without a home; `Refused` when it belongs to someone else; as the host fails.
pub fn state_folder() -> Result<PathBuf> {
    let missing = || Error::new(ErrorKind::NotFound, "there is no folder for the user's state: set HOME or XDG_STATE_HOME");
    let folder = state_path().ok_or_else(missing)?;
    if let Some(parent) = folder.parent() {
        std::fs::create_dir_all(parent).map_err(|error| Error::io(error, "can't be made for the user's state").at(parent))?;
    }
    make_private(&folder, "the user's state", "XDG_STATE_HOME")?;
    Ok(folder)
}

/// Whether a folder is this user's, and nobody else may write to it.
#[must_use]
pub fn is_private(folder: &Path) -> bool {
    let found = std::fs::symlink_metadata(folder);
    found.is_ok_and(|found| found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & 0o022 == 0)
}

fn make_private(folder: &Path, purpose: &str, variable: &str) -> Result<()> {
    let failed = |error: io::Error| Error::io(error, format!("can't be made for {purpose}; set {variable}")).at(folder);
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let found = std::fs::symlink_metadata(folder).map_err(failed)?;
    if !found.is_dir() || found.uid() != geteuid().as_raw() {
        let message = format!("is no folder of this user's, so {purpose} in it could be anyone's; set {variable}");
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
        let private = |folder: &Path| make_private(folder, "sockets", "XDG_RUNTIME_DIR");
        assert!(!is_private(&folder));
        private(&folder).unwrap();
        assert!(is_private(&folder));
        assert_eq!(folder.metadata().unwrap().mode() & 0o777, 0o700);
        let link = base.path().join("link");
        std::os::unix::fs::symlink(&folder, &link).unwrap();
        assert!(!is_private(&link));
        assert_eq!(private(&link).unwrap_err().kind(), ErrorKind::Refused);
    }
}
