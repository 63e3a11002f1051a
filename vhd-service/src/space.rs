//! The room that is left on the host's volumes, of disks in use: their open files are asked, as their names may lead
//! elsewhere by now, and after a snapshot it is another file.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vhd_core::storage::Room;
use vhd_core::{Disk, Error, Result};

/// How often volumes are looked at. The call costs a few microseconds.
const INTERVAL: Duration = Duration::from_millis(500);

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
    disks: Vec<Watched>,
}

struct Watched {
    disk: Disk,
    is_low: bool,
}

impl Watched {
    fn is(&self, disk: &Disk) -> bool {
        std::ptr::addr_eq(&raw const *self.disk, &raw const **disk)
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watched").field(&self.disk.layer_path(0)).finish()
    }
}

impl Watch {
    /// Calls `tell` from a thread of its own whenever the volume of a watched disk's leaf has fewer than `low` bytes free, and
    /// when it has room again.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(low: u64, tell: impl FnMut(&Path, Change, Room) + Send + 'static) -> Result<Self> {
        let shared = Arc::<Shared>::default();
        let watched = Arc::clone(&shared);
        let thread = thread::Builder::new().name("vhd-space".into()).spawn(move || run(&watched, low, tell));
        let thread = thread.map_err(|error| Error::io(error, "the free space can't be watched"))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Watches the volume of this disk's leaf, too, whichever that is.
    pub fn add(&self, disk: &Disk) {
        let mut state = self.shared.lock();
        if !state.disks.iter().any(|watched| watched.is(disk)) {
            state.disks.push(Watched { disk: disk.clone(), is_low: false });
        }
        drop(state);
        self.shared.changed.notify_one();
    }

    /// Watches this disk no more.
    pub fn remove(&self, disk: &Disk) {
        self.shared.lock().disks.retain(|watched| !watched.is(disk));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_one();
        // What it calls may drop the watch: a thread can't wait for itself.
        if let Some(thread) = self.thread.take().filter(|thread| thread.thread().id() != thread::current().id()) {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, low: u64, mut tell: impl FnMut(&Path, Change, Room)) {
    let mut state = shared.lock();
    while !state.stop {
        let count = state.disks.len();
        let mut next = 0;
        // One at a time, so that a volume that does not answer keeps no other disk open.
        while let Some((disk, is_low)) = state.disks.get(next).map(|watched| (watched.disk.clone(), watched.is_low)) {
            drop(state);
            let change = look(&disk, is_low, low);
            state = shared.lock();
            next += 1;
            if let (Some((path, change, room)), Some(watched)) =
                (change, state.disks.iter_mut().find(|watched| watched.is(&disk)))
            {
                watched.is_low = change == Change::Low;
                drop(state);
                tell(&path, change, room);
                state = shared.lock();
            }
        }
        let nothing_new = |state: &mut State| !state.stop && state.disks.len() == count;
        state = shared.changed.wait_timeout_while(state, INTERVAL, nothing_new).unwrap_or_else(PoisonError::into_inner).0;
    }
}

fn look(disk: &Disk, is_low: bool, low: u64) -> Option<(PathBuf, Change, Room)> {
    let room = disk.room()?;
    let change = match is_low {
        false if room.free < low => Change::Low,
        true if room.free >= low.saturating_add(low / 10) => Change::Back,
        _ => return None,
    };
    Some((disk.layer_path(0)?, change, room))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use vhd_core::LiveDisk;
    use vhd_core::chain::{ChainOptions, ChildOptions};
    use vhd_core::image::{CreateOptions, NewKind, OpenOptions, create_file};

    use super::*;

    fn disk(folder: &Path) -> LiveDisk {
        let (path, child) = (folder.join("disk.vhd"), ChildOptions::new([1; 16]));
        let (creator, timestamp) = (child.creator, child.timestamp);
        let new = CreateOptions { kind: NewKind::Dynamic, size: 8 << 20, block_size: 2 << 20, uuid: [1; 16], creator, timestamp };
        create_file(&path, &new, false).unwrap();
        let image = OpenOptions { writable: true, ..OpenOptions::default() };
        LiveDisk::open(&path, &ChainOptions { image, ..ChainOptions::default() }).unwrap()
    }

    #[test]
    fn a_volume_below_the_limit_is_told_once() {
        let folder = tempfile::tempdir().unwrap();
        let live = disk(folder.path());
        let (tell, told) = mpsc::channel();
        let told_of = move |path: &Path, change, room| tell.send((path.to_owned(), change, room)).unwrap_or(());
        let watch = Watch::start(u64::MAX, told_of).unwrap();
        // What its name leads to by now is another matter.
        std::fs::rename(folder.path().join("disk.vhd"), folder.path().join("moved.vhd")).unwrap();
        watch.add(&live.disk());
        watch.add(&live.disk());
        let (_, change, room) = told.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(change, Change::Low);
        assert!(room.free <= room.total && room.total > 0);
        assert!(told.recv_timeout(INTERVAL * 3).is_err(), "told twice");
    }

    #[test]
    fn the_leaf_that_is_written_now_is_watched_and_nothing_that_was_removed() {
        let folder = tempfile::tempdir().unwrap();
        let live = disk(folder.path());
        let leaf = folder.path().join("leaf.vhd");
        live.snapshot(&leaf, &ChildOptions::new([2; 16])).unwrap();
        let (tell, told) = mpsc::channel();
        let watch = Watch::start(u64::MAX, move |path, _, _| tell.send(path.to_owned()).unwrap_or(())).unwrap();
        watch.add(&live.disk());
        assert_eq!(told.recv_timeout(Duration::from_secs(20)).unwrap(), leaf);
        watch.remove(&live.disk());
        watch.add(&live.disk());
        assert_eq!(told.recv_timeout(Duration::from_secs(20)).unwrap(), leaf);
        watch.remove(&live.disk());
        drop(live);
        thread::sleep(Duration::from_millis(20));
        assert!(LiveDisk::open(&leaf, &ChainOptions::default()).is_ok(), "it is kept open");
    }

    #[test]
    fn nothing_is_told_of_a_volume_with_room() {
        let folder = tempfile::tempdir().unwrap();
        let (tell, told) = mpsc::channel();
        let watch = Watch::start(1, move |_, change, _| tell.send(change).unwrap_or(())).unwrap();
        watch.add(&disk(folder.path()).disk());
        assert!(told.recv_timeout(INTERVAL * 2).is_err());
    }
}
