//! The room that is left on the host's volumes.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::statvfs::{FsFlags, statvfs};
use vhd_core::{Error, Result};

/// How often volumes are looked at. The call costs a few microseconds.
const INTERVAL: Duration = Duration::from_millis(500);

/// The room of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that this user may still use.
    pub free: u64,
    /// Bytes of the volume.
    pub total: u64,
}

/// The room of the volume that a path is on. The path itself need not exist, only its folder. `None` where there is no such
/// thing: on a volume that is only read or has no size, and for a device, which takes none of the volume that its name is on.
///
/// # Errors
/// As the host fails.
pub fn of(path: &Path) -> Result<Option<Space>> {
    let found = statvfs(path).or_else(|_| statvfs(vhd_core::storage::folder_of(path)));
    let found = found.map_err(|errno| Error::io(errno.into(), "its volume can't be examined").at(path))?;
    let is_device = path.metadata().is_ok_and(|found| found.file_type().is_block_device());
    if is_device || found.blocks() == 0 || found.flags().contains(FsFlags::ST_RDONLY) {
        return Ok(None);
    }
    let unit = found.fragment_size();
    Ok(Some(Space { free: found.blocks_available() * unit, total: found.blocks() * unit }))
}

/// What became of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Less is free than was asked for.
    Low,
    /// There is room again: a tenth more than was asked for.
    Back,
}

/// Watches volumes until it is dropped.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    stop: bool,
    volumes: Vec<Volume>,
}

#[derive(Clone, Debug)]
struct Volume {
    path: PathBuf,
    is_low: bool,
}

impl Watch {
    /// Calls `tell` from a thread of its own whenever a watched path's volume has fewer than `low` bytes free, and when
    /// it has room again.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(low: u64, tell: impl FnMut(&Path, Change, Space) + Send + 'static) -> Result<Self> {
        let shared = Arc::<Shared>::default();
        let watched = Arc::clone(&shared);
        let thread = thread::Builder::new().name("vhd-space".into()).spawn(move || run(&watched, low, tell));
        let thread = thread.map_err(|error| Error::io(error, "the free space can't be watched"))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Watches the volume of this path, too.
    pub fn add(&self, path: &Path) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.volumes.iter().any(|volume| volume.path == path) {
            state.volumes.push(Volume { path: path.to_owned(), is_low: false });
        }
        drop(state);
        self.shared.changed.notify_one();
    }

    /// Watches this path no more.
    pub fn remove(&self, path: &Path) {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).volumes.retain(|volume| volume.path != path);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).stop = true;
        self.shared.changed.notify_one();
        // What it calls may drop the watch: a thread can't wait for itself.
        if let Some(thread) = self.thread.take().filter(|thread| thread.thread().id() != thread::current().id()) {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, low: u64, mut tell: impl FnMut(&Path, Change, Space)) {
    let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
    while !state.stop {
        let volumes = state.volumes.clone();
        drop(state);
        let changes: Vec<_> = volumes.iter().filter_map(|volume| look(volume, low)).collect();
        for (path, change, space) in &changes {
            tell(path, *change, *space);
        }
        state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        for volume in &mut state.volumes {
            if let Some((_, change, _)) = changes.iter().find(|(path, ..)| *path == volume.path) {
                volume.is_low = *change == Change::Low;
            }
        }
        let nothing_new = |state: &mut State| !state.stop && state.volumes.len() == volumes.len();
        state = shared.changed.wait_timeout_while(state, INTERVAL, nothing_new).unwrap_or_else(PoisonError::into_inner).0;
    }
}

fn look(volume: &Volume, low: u64) -> Option<(PathBuf, Change, Space)> {
    let space = of(&volume.path).ok()??;
    let change = match volume.is_low {
        false if space.free < low => Change::Low,
        true if space.free >= low.saturating_add(low / 10) => Change::Back,
        _ => return None,
    };
    Some((volume.path.clone(), change, space))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_volume_below_the_limit_is_told_once() {
        let folder = tempfile::tempdir().unwrap();
        let (tell, told) = mpsc::channel();
        let watch = Watch::start(u64::MAX, move |_, change, space| tell.send((change, space)).unwrap_or(())).unwrap();
        watch.add(&folder.path().join("not there yet.vhd"));
        watch.add(&folder.path().join("not there yet.vhd"));
        let (change, space) = told.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(change, Change::Low);
        assert!(space.free <= space.total && space.total > 0);
        assert!(told.recv_timeout(INTERVAL * 3).is_err(), "told twice");
    }

    #[test]
    fn where_nothing_can_be_full_nothing_is_left_either() {
        // It has no size.
        assert_eq!(of(Path::new("/proc/self/status")).unwrap(), None);
        let folder = tempfile::tempdir().unwrap();
        assert!(of(&folder.path().join("new")).unwrap().is_some());
        let (tell, told) = mpsc::channel();
        let watch = Watch::start(u64::MAX, move |_, change, _| tell.send(change).unwrap_or(())).unwrap();
        watch.add(Path::new("/proc/self/status"));
        assert!(told.recv_timeout(INTERVAL * 2).is_err());
    }

    #[test]
    fn nothing_is_told_of_a_volume_with_room() {
        let folder = tempfile::tempdir().unwrap();
        let (tell, told) = mpsc::channel();
        let watch = Watch::start(1, move |_, change, _| tell.send(change).unwrap_or(())).unwrap();
        watch.add(folder.path());
        assert!(told.recv_timeout(INTERVAL * 2).is_err());
    }
}
