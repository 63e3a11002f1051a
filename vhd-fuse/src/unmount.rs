//! Ending a mount, one's own or that of another process.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use vhd_core::{Error, ErrorKind, Result};

use crate::server::Server;
use crate::{DISK_FILE, SUBTYPE, mountinfo};

/// A server that closes its image for longer than this is worth a word.
const PATIENCE: Duration = Duration::from_secs(5);

/// Unmounts what `mount` mounted, in any process, and returns when the image is flushed and closed. A mount whose
/// server died is cleared. When it takes long, `note` is told why, in one line.
///
/// # Errors
/// `InvalidInput` when there is no mount of ours; `Refused` when it is in use; what the flush failed with. After
/// `NoSpace` it is still mounted, so that nothing is lost; after another failure of the flush it is not.
pub fn unmount(target: &Path, note: &mut dyn FnMut(&str)) -> Result<()> {
    let failed = |error: io::Error, doing: &str| Error::io(error, doing).at(target);
    let place = resolve(target).map_err(|error| failed(error, "can't find it"))?;
    check_is_ours(&place)?;
    let server = match Server::of(&place) {
        Ok(server) => server,
        // The server died: nothing can be waited for, and whoever still holds a file has only errors from it.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => return detach(&place, Detach::Lazily),
        Err(error) => return Err(failed(error, "can't ask who serves it")),
    };

    // A background server has nobody to tell that its last flush failed, so it is asked for one while it can answer.
    let flushed = flush(&place);
    if flushed.as_ref().is_err_and(|error| error.kind() == ErrorKind::NoSpace) {
        return flushed;
    }
    detach(&place, Detach::Now)?;
    if let Some(server) = server {
        let waited = |timeout| server.wait(timeout).map_err(|error| failed(error, "can't wait for its server"));
        if !waited(Some(PATIENCE))? {
            note(&format!("{}: unmounted; waiting for process {} to close the image", target.display(), server.pid));
            waited(None)?;
        }
    } else {
        note(&format!("{}: unmounted; its server is out of sight and may not have closed the image yet", target.display()));
    }
    flushed
}

/// How a mount is ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Detach {
    /// At once, or not at all when it is in use.
    Now,
    /// Out of sight at once; it ends when nobody uses it any more.
    Lazily,
}

/// Takes a mount away from its place: by itself where the process may, else with the helper for ordinary users.
/// `Refused` when it is in use.
pub(crate) fn detach(target: &Path, how: Detach) -> Result<()> {
    let flags = MntFlags::UMOUNT_NOFOLLOW | if how == Detach::Lazily { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    match umount2(target, flags) {
        Ok(()) => Ok(()),
        Err(Errno::EBUSY) => Err(busy(target)),
        Err(Errno::EPERM) => detach_with_helper(target, how),
        Err(error) => Err(Error::io(error.into(), "can't unmount it").at(target)),
    }
}

fn detach_with_helper(target: &Path, how: Detach) -> Result<()> {
    let mut helper = Command::new("fusermount3");
    helper.arg("-u").args((how == Detach::Lazily).then_some("-z")).arg("--").arg(target);
    let output = helper
        .output()
        .map_err(|error| Error::io(error, "can't run fusermount3, which unmounts for ordinary users").at(target))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        Ok(())
    } else if said.contains("busy") {
        Err(busy(target))
    } else {
        Err(Error::new(ErrorKind::Io, format!("can't unmount it: {}", one_line(&said))).at(target))
    }
}

/// The first line with something in it.
pub(crate) fn one_line(text: &str) -> &str {
    text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("no reason given")
}

fn busy(target: &Path) -> Error {
    let message = format!("in use; close what uses it (`fuser -vm {}` lists that), then try again", target.display());
    Error::new(ErrorKind::Refused, message).at(target)
}

/// The path that the mount table has. A mount whose server died can't be looked at, but its folder can.
fn resolve(target: &Path) -> io::Result<PathBuf> {
    target.canonicalize().or_else(|error| match (target.parent(), target.file_name()) {
        (Some(parent), Some(name)) if error.kind() == io::ErrorKind::NotConnected => {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            Ok(parent.canonicalize()?.join(name))
        }
        _ => Err(error),
    })
}

fn check_is_ours(place: &Path) -> Result<()> {
    let entry = mountinfo::at(place).map_err(|error| Error::io(error, "can't see what is mounted").at(place))?;
    let ours = format!("fuse.{SUBTYPE}");
    let problem = match entry {
        Some(entry) if entry.kind == ours => return Ok(()),
        Some(entry) => format!("is a mount of kind {}, not {ours}; use umount", entry.kind),
        None => "nothing is mounted here; give the folder that was given to vhd mount".to_owned(),
    };
    Err(Error::new(ErrorKind::InvalidInput, problem).at(place))
}

fn flush(place: &Path) -> Result<()> {
    // What can't be opened can't be flushed either; its server still does when it ends.
    let Ok(file) = File::open(place.join(DISK_FILE)) else { return Ok(()) };
    file.sync_all().map_err(|error| Error::io(error, "the image could not be flushed").at(place))
}
