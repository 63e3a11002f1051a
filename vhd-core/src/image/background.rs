//! The background flush: what was written but not flushed is in the file a few seconds later, even if the process is
//! killed (promise P5). It sleeps unless metadata is deferred.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::Image;
use crate::error::ErrorKind;

#[derive(Debug, Default)]
struct State {
    deferred: bool,
    urgent: bool,
    stop: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The thread that flushes, started when there is something to flush for the first time.
#[derive(Debug)]
pub(super) struct Flusher {
    image: Weak<Image>,
    interval: Duration,
    /// Mirrors `State::deferred`, so that most writes need no lock.
    poked: Arc<AtomicBool>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Flusher {
    pub(super) fn new(image: Weak<Image>, interval: Duration) -> Self {
        Self { image, interval, poked: Arc::default(), shared: Arc::default(), thread: Mutex::new(None) }
    }

    /// Says that metadata waits; `urgent` when much does.
    pub(super) fn poke(&self, urgent: bool) {
        if self.poked.swap(true, Ordering::AcqRel) && !urgent {
            return;
        }
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.deferred = true;
        state.urgent |= urgent;
        drop(state);
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let (image, interval) = (self.image.clone(), self.interval);
            let (poked, shared) = (Arc::clone(&self.poked), Arc::clone(&self.shared));
            let spawned = thread::Builder::new().name("vhd-flush".into()).spawn(move || run(&image, interval, &poked, &shared));
            match spawned {
                Ok(handle) => *thread = Some(handle),
                Err(error) => tracing::warn!("no background flush: {error}"),
            }
        }
        drop(thread);
        self.shared.changed.notify_one();
    }

    /// Ends the thread and waits for it. A later [`Self::poke`] starts another.
    pub(super) fn stop(&self) {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).stop = true;
        self.shared.changed.notify_one();
        let handle = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The thread itself may hold the last reference to the image and get here: it can't wait for itself.
        if let Some(handle) = handle.filter(|handle| handle.thread().id() != thread::current().id()) {
            let _ = handle.join();
        }
        *self.shared.state.lock().unwrap_or_else(PoisonError::into_inner) = State::default();
        self.poked.store(false, Ordering::Release);
    }
}

fn run(image: &Weak<Image>, interval: Duration, poked: &AtomicBool, shared: &Shared) {
    loop {
        let state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state =
            shared.changed.wait_while(state, |state| !state.deferred && !state.stop).unwrap_or_else(PoisonError::into_inner);
        let waited = shared.changed.wait_timeout_while(state, interval, |state| !state.stop && !state.urgent);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.stop {
            return;
        }
        (state.deferred, state.urgent) = (false, false);
        poked.store(false, Ordering::Release);
        drop(state);
        let Some(image) = image.upgrade() else { return };
        if let Err(error) = image.flush() {
            tracing::warn!("background flush: {error}");
            // When there is room again, what waits is still there; a latched image stays so.
            if error.kind() == ErrorKind::NoSpace {
                shared.state.lock().unwrap_or_else(PoisonError::into_inner).deferred = true;
            }
        }
        // This may have been the last reference, whose drop closed the image and forgot this thread.
        let weak = Arc::downgrade(&image);
        drop(image);
        if weak.strong_count() == 0 {
            return;
        }
    }
}
