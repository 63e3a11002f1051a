//! Ending a mount, one's own or that of another process.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use vhd_core::{Error, ErrorKind, Result};

use crate::server::{self, Server};
use crate::{DISK_FILE, SUBTYPE, inside, mountinfo};

/// A server that closes its image for longer than this is worth a word.
const PATIENCE: Duration = Duration::from_secs(5);

/// The kernel lets go of a loop device's file a little after `losetup --detach` or `umount` returned.
const LETTING_GO: Duration = Duration::from_secs(2);

/// What an unmount has to say before it is done.
#[derive(Clone, Copy, Debug)]
pub enum Told<'a> {
    /// Who serves the mount, for [`Server::find`]; nothing when that is out of sight. From here on it may take as long as
    /// that process lets it.
    Server(&'a str),
    /// Why it takes long, in one line.
    Note(&'a str),
}

/// A mount that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmounted {
    /// The image that was shown, as the mount table had it.
    pub image: PathBuf,
}

/// The image that is shown by a mount of ours at `target`, or by the one below the file system that is there.
///
/// # Errors
/// `InvalidInput` when there is no mount of ours.
pub fn image_at(target: &Path) -> Result<PathBuf> {
    Ok(Found::at(target)?.image)
}

/// Unmounts what `mount` mounted, in any process, and returns when the image is flushed and closed; a file system that is
/// mounted from it goes first. A mount whose server died is cleared. With `force` it is ended at once, and what its server
/// did not write is lost.
///
/// While a server is stopped (SIGSTOP), whoever has asked it for something waits, and not even SIGKILL ends that. So this
/// is for a process of its own, which another one watches that knows the server by what it was `tell`ed.
///
/// # Errors
/// `InvalidInput` when there is no mount of ours; `Refused` when it is in use, or its server was stopped while it closed the
/// image; what the flush failed with. After `NoSpace` it is still mounted, so that nothing is lost; after another failure of
/// the flush it is not.
pub fn unmount(target: &Path, force: bool, tell: &mut dyn FnMut(Told<'_>)) -> Result<Unmounted> {
    let found = Found::at(target)?;
    let image = found.image.clone();
    if force {
        found.give_up()?;
        return Ok(Unmounted { image });
    }
    let identity = match server::identity_of(&found.place) {
        Ok(identity) => identity,
        // The server died: nothing can be waited for, and whoever still holds a file has only errors from it.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => {
            found.give_up()?;
            return Ok(Unmounted { image });
        }
        Err(error) => return Err(Error::io(error, "can't ask who serves it").at(target)),
    };
    tell(Told::Server(identity.as_deref().unwrap_or_default()));
    let server = identity.as_deref().and_then(Server::find);
    if let Some(inside) = &found.inside {
        detach(inside, Detach::Now)?;
        let others = inside::mounted_from(&found.place).unwrap_or_default();
        if let Some((other, _)) = others.first() {
            let (target, other) = (target.display(), other.display());
            tell(Told::Note(&format!("{target}: unmounted; the image stays open for {other}, which is mounted from it, too")));
            return Ok(Unmounted { image });
        }
        wait_for(server.as_ref(), target, tell)?;
        // A server that died meanwhile leaves it.
        found.clear_place()?;
        return Ok(Unmounted { image });
    }

    // A background server has nobody to tell that its last flush failed, so it is asked for one while it can answer.
    let flushed = flush(&found.place);
    if flushed.as_ref().is_err_and(|error| error.kind() == ErrorKind::NoSpace) {
        return flushed.map(|()| Unmounted { image });
    }
    detach(&found.place, Detach::Now)?;
    wait_for(server.as_ref(), target, tell)?;
    flushed.map(|()| Unmounted { image })
}

/// Waits until the server of a mount that is gone has closed the image.
fn wait_for(server: Option<&Server>, target: &Path, tell: &mut dyn FnMut(Told<'_>)) -> Result<()> {
    let mut note = |text: String| tell(Told::Note(&text));
    let target = target.display();
    let Some(server) = server else {
        note(format!("{target}: unmounted; its server is out of sight and may not have closed the image yet"));
        return Ok(());
    };
    let mut said = false;
    loop {
        let ended = server.wait(Some(PATIENCE));
        if ended.map_err(|error| Error::io(error, format!("{target}: can't wait for its server")))? {
            return Ok(());
        }
        server.check_runs()?;
        if !std::mem::replace(&mut said, true) {
            note(format!("{target}: unmounted; waiting for process {} to close the image", server.pid()));
        }
    }
}

/// A mount of ours.
struct Found {
    /// Where.
    place: PathBuf,
    image: PathBuf,
    /// The file system on it, where that is what was asked for.
    inside: Option<PathBuf>,
}

impl Found {
    fn at(target: &Path) -> Result<Self> {
        let failed = |error: io::Error| Error::io(error, "can't see what is mounted").at(target);
        let place = resolve(target).map_err(|error| Error::io(error, "can't find it").at(target))?;
        let Some(entry) = mountinfo::at(&place).map_err(failed)? else {
            let problem = "nothing is mounted here; give the folder that was given to vhd mount";
            return Err(Error::new(ErrorKind::InvalidInput, problem).at(&place));
        };
        if entry.kind == ours() {
            return Ok(Self { place, image: entry.source, inside: None });
        }
        let below = inside::file_of(&entry.source).and_then(|file| Some(file.parent()?.to_owned()));
        let below = below.map(|folder| mountinfo::at(&folder)).transpose().map_err(failed)?.flatten();
        match below.filter(|below| below.kind == ours()) {
            Some(below) => Ok(Self { place: below.target, image: below.source, inside: Some(place) }),
            None => {
                let problem = format!("is a mount of kind {}, not {}; use umount", entry.kind, ours());
                Err(Error::new(ErrorKind::InvalidInput, problem).at(&place))
            }
        }
    }

    /// Takes it away without its server.
    fn give_up(&self) -> Result<()> {
        // Whoever waits for an answer gets an error instead, if this process may say so.
        let _ = umount2(&self.place, MntFlags::MNT_FORCE);
        if let Some(inside) = &self.inside {
            detach(inside, Detach::Lazily)?;
        }
        self.clear_place()
    }

    /// Takes away what is left of ours, and the folder that was made for a file system's disk.
    fn clear_place(&self) -> Result<()> {
        if mountinfo::at(&self.place).is_ok_and(|entry| entry.is_some_and(|entry| entry.kind == ours())) {
            detach(&self.place, Detach::Lazily)?;
        }
        if self.inside.is_some() {
            let _ = std::fs::remove_dir(&self.place);
        }
        Ok(())
    }
}

/// The kind of our mounts.
pub(crate) fn ours() -> String {
    format!("fuse.{SUBTYPE}")
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
/// `Refused` when it is in use, and stays so for a moment.
pub(crate) fn detach(target: &Path, how: Detach) -> Result<()> {
    let began = Instant::now();
    loop {
        match detach_once(target, how) {
            Err(error) if error.kind() == ErrorKind::Refused && began.elapsed() < LETTING_GO => {
                thread::sleep(Duration::from_millis(20));
            }
            done => return done,
        }
    }
}

fn detach_once(target: &Path, how: Detach) -> Result<()> {
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

/// The path that the mount table has. The mount itself is looked at last, for its server may be dead or stopped.
fn resolve(target: &Path) -> io::Result<PathBuf> {
    if let (Some(parent), Some(name)) = (target.parent(), target.file_name()) {
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let place = parent.canonicalize()?.join(name);
        if mountinfo::at(&place)?.is_some() {
            return Ok(place);
        }
    }
    target.canonicalize()
}

/// Flushes the disk.
fn flush(place: &Path) -> Result<()> {
    let disk = if place.is_dir() { place.join(DISK_FILE) } else { place.to_owned() };
    // What can't be opened can't be flushed either; its server still does when it ends.
    let flushed = File::open(disk).map_or(Ok(()), |file| file.sync_all());
    flushed.map_err(|error| Error::io(error, "the image could not be flushed").at(place))
}
