//! Connections that are served at once, each by a thread of its own: so many, and no more descriptors than that.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{Shutdown, shutdown};

/// How long a connection that makes room may take to end.
const LEAVING: Duration = Duration::from_secs(1);

/// Places for connections. Where all are taken, the one whose client was waited for longest makes room.
#[derive(Debug)]
pub(crate) struct Places<S> {
    most: usize,
    taken: Mutex<Vec<Arc<Place<S>>>>,
    changed: Condvar,
}

/// A connection that is served.
#[derive(Debug)]
pub(crate) struct Place<S> {
    stream: S,
    /// Since when its client is waited for; `None` while something is done for it.
    waits: Mutex<Option<Instant>>,
}

impl<S: AsFd> Place<S> {
    pub(crate) fn stream(&self) -> &S {
        &self.stream
    }

    /// Does something for the client: it is not ended meanwhile to make room.
    pub(crate) fn at_work<T>(&self, work: impl FnOnce() -> T) -> T {
        *self.waits() = None;
        let done = work();
        *self.waits() = Some(Instant::now());
        done
    }

    fn waits(&self) -> MutexGuard<'_, Option<Instant>> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, how: Shutdown) {
        // It may be at its end already.
        let _ = shutdown(self.stream.as_fd().as_raw_fd(), how);
    }
}

impl<S: AsFd + Send + Sync + 'static> Places<S> {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, taken: Mutex::default(), changed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Place<S>>>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a connection in a thread of this name. Gives it back where all places are taken by connections at work.
    pub(crate) fn serve(
        self: &Arc<Self>,
        name: &str,
        stream: S,
        serve: impl FnOnce(&Place<S>) + Send + 'static,
    ) -> Result<(), S> {
        if !self.make_room() {
            return Err(stream);
        }
        let place = Arc::new(Place { stream, waits: Mutex::new(Some(Instant::now())) });
        self.lock().push(Arc::clone(&place));
        let leaving = Leaving { places: Arc::clone(self), place };
        // Where there can be no thread, what it was to do is dropped, and its place with it.
        if let Err(error) = thread::Builder::new().name(name.into()).spawn(move || serve(&leaving.place)) {
            tracing::warn!("{name}: no thread for one more: {error}");
        }
        Ok(())
    }

    fn make_room(&self) -> bool {
        let taken = self.lock();
        if taken.len() < self.most {
            return true;
        }
        let waiting = taken.iter().filter_map(|place| Some(((*place.waits())?, place)));
        let Some((_, oldest)) = waiting.min_by_key(|(since, _)| *since) else { return false };
        oldest.end(Shutdown::Both);
        // So that no more descriptors are held than there are places.
        let full = |taken: &mut Vec<_>| taken.len() >= self.most;
        let left = self.changed.wait_timeout_while(taken, LEAVING, full).unwrap_or_else(PoisonError::into_inner);
        !left.1.timed_out()
    }

    /// Has no connection wait for its client any more: it ends when what it does is done.
    pub(crate) fn end(&self) {
        self.lock().iter().for_each(|place| place.end(Shutdown::Read));
    }

    /// Waits until all have ended, but no longer than that.
    pub(crate) fn wait(&self, patience: Duration) {
        drop(self.changed.wait_timeout_while(self.lock(), patience, |taken| !taken.is_empty()));
    }
}

/// Gives a place back when its thread ends, also by a panic.
struct Leaving<S: AsFd + Send + Sync + 'static> {
    places: Arc<Places<S>>,
    place: Arc<Place<S>>,
}

impl<S: AsFd + Send + Sync + 'static> Drop for Leaving<S> {
    fn drop(&mut self) {
        self.place.end(Shutdown::Both);
        self.places.lock().retain(|place| !Arc::ptr_eq(place, &self.place));
        self.places.changed.notify_all();
    }
}
