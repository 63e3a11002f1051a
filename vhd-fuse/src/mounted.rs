//! The life of a mount: made, served, ended.

use std::fs::File;
use std::io::{self, PipeReader};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use fuser::{Config, Session, SessionACL};
use rustix::event::{PollFd, PollFlags};
use vhd_core::{Disk, Error, ErrorKind, Result};

use crate::contents::Contents;
use crate::device::attach;
use crate::filesystem::{DiskFiles, MAX_TRANSFER};
use crate::gate::Gate;
use crate::options::MountOptions;
use crate::server::wait_readable;
use crate::signals::StopSignals;
use crate::unmount::{Detach, detach, one_line};
use crate::{SUBTYPE, inside, mountinfo};

/// How long those who still use a mount have, once it was told to end.
const GRACE: Duration = Duration::from_secs(2);

/// The same for a file system on the mount, which has to write what it has in memory.
const INSIDE_GRACE: Duration = Duration::from_secs(30);

/// Mounts a disk on `target`: as files on a folder, or the disk alone on a regular file. When this returns they are
/// there; they are served until [`Mounted::wait`] or [`Mounted::end`] returns, or what is returned here is dropped.
///
/// # Errors
/// `InvalidInput` when the target is neither, or the image itself; `Io` when it can't be mounted. The disk is closed then.
pub fn mount(contents: impl Into<Contents>, target: &Path, options: &MountOptions) -> Result<Mounted> {
    let contents = contents.into();
    let disk = contents.disk.clone();
    serve(contents, target, options).inspect_err(|_| {
        if let Err(error) = disk.close() {
            tracing::error!("{error}");
        }
    })
}

fn serve(contents: Contents, target: &Path, options: &MountOptions) -> Result<Mounted> {
    let target = target.canonicalize().map_err(|error| Error::io(error, "can't find it").at(target))?;
    let is_folder = target.is_dir();
    let disk = &contents.disk.clone();
    check_target(&target, disk)?;
    let failed = |error: io::Error| {
        let reason = error.to_string();
        Error::new(ErrorKind::Io, format!("can't mount here: {}", one_line(&reason))).at(&target)
    };

    let read_only = options.read_only || disk.capabilities().read_only;
    let tree = contents.into_tree(is_folder, options.read_only);
    // The root's path is empty, and joined with it a file would get a slash at its end.
    let join = |path: &PathBuf| if is_folder { target.join(path) } else { target.clone() };
    let files = tree.paths().iter().map(join).collect();
    let gate = Arc::new(Gate::default());
    let filesystem = DiskFiles::new(tree, Arc::clone(&gate), options.clone()).map_err(failed)?;
    let handle = attach(&target, &source(disk), options, read_only).map_err(failed)?;
    // From here on a failure leaves a mount that nobody serves.
    let undone = |error: io::Error| {
        let _ = detach(&target, Detach::Lazily);
        failed(error)
    };
    // That everybody's requests are let in is no more than that fuser need not look: the kernel has.
    let session = Session::from_fd(filesystem, handle, SessionACL::All, config(options)).map_err(undone)?;

    // The session takes the write end with it, so the read end tells when it is over.
    let (ended, ends) = io::pipe().map_err(undone)?;
    let serving = thread::Builder::new().name("fuse".to_owned()).spawn(move || {
        let result = session.run();
        drop(ends);
        result
    });
    let serving = serving.map_err(undone)?;
    // Asked of the mount itself: it answers.
    let device = device(&target).map_err(undone)?;
    raise_readahead(device);
    Ok(Mounted { disk: disk.clone(), target, files, device, gate, ended, serving: Some(serving), has_inside: false })
}

/// A folder or a regular file, and none that the image itself is.
fn check_target(target: &Path, disk: &Disk) -> Result<()> {
    let invalid = |message: &str| Err(Error::new(ErrorKind::InvalidInput, message).at(target));
    if !target.is_dir() && !target.is_file() {
        return invalid("is neither a folder nor a regular file; give one of these to mount on");
    }
    let layers = (0..disk.capabilities().layers).filter_map(|depth| disk.layer_path(depth)?.canonicalize().ok());
    if layers.into_iter().any(|path| path == target) {
        return invalid("is the image itself, which would be hidden; give a folder or another file to mount on");
    }
    Ok(())
}

fn config(options: &MountOptions) -> Config {
    let mut config = Config::default();
    config.n_threads = Some(options.threads.unwrap_or_else(default_threads));
    config.clone_fd = true;
    config
}

/// More than there are processors, for a thread waits while the host's disk does: of 2, 4, 8 and 16 threads on two
/// processors, 8 read most from a disk, and no fewer from memory.
fn default_threads() -> usize {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    (processors * 2).clamp(8, 16)
}

/// The image, as what is mounted: in the mount table, and so in `findmnt` and `df`.
fn source(disk: &Disk) -> String {
    let path = disk.layer_path(0).map(|path| path.canonicalize().unwrap_or(path));
    path.map_or_else(|| SUBTYPE.to_owned(), |path| path.to_string_lossy().into_owned())
}

pub(crate) fn device(path: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::symlink_metadata(path)?.dev())
}

/// A kernel reads ahead 128 KiB, in requests of that size, unless root says otherwise: through the page cache that
/// costs up to half the speed. Whoever can't say so goes without.
fn raise_readahead(device: u64) {
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let setting = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    if let Err(error) = std::fs::write(&setting, (MAX_TRANSFER >> 10).to_string()) {
        tracing::debug!("{setting}: readahead stays as it is: {error}");
    }
}

/// A disk that is mounted. Dropping it ends the mount too, but tells nobody what went wrong.
pub struct Mounted {
    disk: Disk,
    target: PathBuf,
    files: Vec<PathBuf>,
    /// The mount's device number, which tells it from another on the same folder.
    device: u64,
    gate: Arc<Gate>,
    ended: PipeReader,
    /// Gone once the mount has ended.
    serving: Option<JoinHandle<io::Result<()>>>,
    /// File systems are mounted from the files, and go first.
    has_inside: bool,
}

impl Mounted {
    /// Where it is mounted.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Mounts the file system that is in one of the files, given by its name, on the folder `at`. From now on this mount
    /// ends when that one does, and all that [`SharedMount`](crate::SharedMount) mounted from it; and the other way round. Returns
    /// what mounted it.
    ///
    /// # Errors
    /// `Unsupported` when nothing here can; as it fails.
    pub fn mount_inside(&mut self, name: &str, at: &Path, options: &[String], read_only: bool) -> Result<String> {
        let at = at.canonicalize().map_err(|error| Error::io(error, "can't find it").at(at))?;
        let by = inside::mount(&self.target, name, &at, options, read_only)?;
        self.has_inside = true;
        let target = self.target.clone();
        let watching = thread::Builder::new().name("fuse-inside".to_owned()).spawn(move || {
            let from_here =
                |entry: &mountinfo::MountEntry| inside::file_of(&entry.source).is_some_and(|file| file.parent() == Some(&target));
            if let Err(error) = mountinfo::wait_until_none(from_here) {
                tracing::warn!("{}: can't tell when it is unmounted: {error}", at.display());
                return;
            }
            // Who mounted it may still hold the file, to write what is left.
            if let Err(error) = detach(&target, Detach::Lazily) {
                tracing::debug!("{error}");
            }
        });
        watching.map_err(|error| Error::io(error, "can't watch it").at(&self.target))?;
        Ok(by)
    }

    /// Waits until it is unmounted from outside, or one of `signals` came and [`Mounted::end`] did its work. Then the
    /// disk is flushed and closed.
    ///
    /// # Errors
    /// As the disk can't be flushed and closed.
    pub fn wait(mut self, signals: Option<&StopSignals>) -> Result<()> {
        self.wait_for_end(signals, None)?;
        self.finish(signals)
    }

    /// Unmounts it, then flushes and closes the disk. Those who use it have two seconds to finish, during which
    /// nobody new finds it; then they get errors.
    ///
    /// # Errors
    /// As the disk can't be flushed and closed.
    pub fn end(mut self) -> Result<()> {
        self.finish(None)
    }

    /// Waits until it is unmounted, or a signal came, or time is up; true when it is unmounted.
    fn wait_for_end(&self, signals: Option<&StopSignals>, timeout: Option<Duration>) -> Result<bool> {
        let ended = PollFd::from_borrowed_fd(self.ended.as_fd(), PollFlags::IN);
        let mut handles = vec![ended];
        handles.extend(signals.map(|signals| PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN)));
        wait_readable(&handles, timeout).map_err(|error| Error::io(error, "can't wait for the mount to end"))?;
        if let Some(signal) = signals.and_then(StopSignals::take) {
            tracing::info!("{}: ending because of {signal}", self.target.display());
        }
        wait_readable(&[PollFd::from_borrowed_fd(self.ended.as_fd(), PollFlags::IN)], Some(Duration::ZERO))
            .map_err(|error| Error::io(error, "can't tell whether the mount has ended"))
    }

    /// Ends it if it has not ended, and closes the disk. A second signal ends the grace.
    fn finish(&mut self, signals: Option<&StopSignals>) -> Result<()> {
        let Some(serving) = self.serving.take() else { return Ok(()) };
        // The disk is closed whether or not the end can be waited for.
        let inside = if self.has_inside { inside::mounted_from(&self.target).unwrap_or_default() } else { Vec::new() };
        let has_ended = |signals, timeout| self.wait_for_end(signals, Some(timeout)).unwrap_or(false);
        let unmounted = has_ended(None, Duration::ZERO) || {
            let grace = if inside.is_empty() { GRACE } else { INSIDE_GRACE };
            inside.iter().rev().for_each(|(at, _)| take_away(at));
            self.unmount();
            has_ended(signals, grace)
        };
        // From here on nothing is written, whoever still holds a file: what the close makes durable is all there is.
        self.gate.close();
        // Whoever can't wait for a host that hangs may say so once more.
        let lethal = signals.and_then(|signals| signals.lethal().ok());
        let closed = self.disk.close();
        drop(lethal);
        if unmounted {
            match serving.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!("{}: serving ended early: {error}", self.target.display()),
                Err(_) => tracing::error!("{}: serving panicked", self.target.display()),
            }
        }
        // Otherwise its threads go on to answer "not connected", until the last user or this process is gone.
        closed
    }

    /// Takes it out of sight. Only a mount that nobody uses can be unmounted; any other is detached, after what was
    /// changed through memory maps was written.
    fn unmount(&self) {
        if device(&self.target).ok() != Some(self.device) {
            // Detached by someone already, or covered by another mount that is none of ours.
            return;
        }
        if detach(&self.target, Detach::Now).is_ok() {
            return;
        }
        for path in &self.files {
            if let Err(error) = File::open(path).and_then(|file| file.sync_all()) {
                tracing::warn!("{}: can't be synced before the mount ends: {error}", path.display());
            }
        }
        if let Err(error) = detach(&self.target, Detach::Lazily) {
            tracing::warn!("{error}");
        }
    }
}

/// Unmounts the file system on a mount: out of sight at least.
fn take_away(inside: &Path) {
    let gone = detach(inside, Detach::Now).or_else(|_| detach(inside, Detach::Lazily));
    if let Err(error) = gone {
        tracing::debug!("{error}");
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.finish(None) {
            tracing::error!("{error}");
        }
    }
}
