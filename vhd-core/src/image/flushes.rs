//! Flushes take turns: one at a time, and all who come while one is under way share the next.
//!
//! A flush covers what was completed before it began. Who comes while one is under way may be left out by it, and is covered by
//! the next; so nobody waits for more than these two, however many others come. (A lock that each took for itself would go to
//! those who come later as easily as to those who wait.)
//!
//! `tests/loom.rs` builds this file again with loom's locks and tries every interleaving.

use super::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
struct State<E> {
    /// Someone has the turn.
    taken: bool,
    /// Flushes that began, and how many of them had ended when the last one did.
    begun: u64,
    ended: u64,
    /// Why the last one failed, if it did.
    failure: Option<E>,
}

/// Who flushes, and who waits for that. `E` is how a flush fails.
#[derive(Debug)]
pub(super) struct Flushes<E> {
    state: Mutex<State<E>>,
    changed: Condvar,
}

/// The right to be the only one, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn<'a, E>(&'a Flushes<E>);

impl<E> Drop for Turn<'_, E> {
    fn drop(&mut self) {
        self.0.lock().taken = false;
        self.0.changed.notify_all();
    }
}

impl<E> Flushes<E> {
    /// Nobody flushes.
    pub(super) fn new() -> Self {
        Self { state: Mutex::new(State { taken: false, begun: 0, ended: 0, failure: None }), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State<E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State<E>>) -> MutexGuard<'a, State<E>> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody flushes, and keeps others from it.
    pub(super) fn turn(&self) -> Turn<'_, E> {
        let mut state = self.lock();
        while state.taken {
            state = self.wait(state);
        }
        state.taken = true;
        Turn(self)
    }
}

impl<E: Clone> Flushes<E> {
    /// Returns when a flush that covers the caller's writes has ended: `flush`, or that of another. `covered` tells whether
    /// that was so already.
    ///
    /// # Errors
    /// As the flush fails that began after this call: all who waited for it are told.
    pub(super) fn flush(&self, covered: impl Fn() -> bool, flush: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut state = self.lock();
        let mine = state.begun + 1;
        loop {
            if covered() {
                return Ok(());
            }
            // Had it succeeded, or one after it, the writes would be covered.
            if state.ended >= mine
                && let Some(failure) = &state.failure
            {
                return Err(failure.clone());
            }
            if !state.taken {
                break;
            }
            state = self.wait(state);
        }
        state.taken = true;
        state.begun += 1;
        drop(state);
        let turn = Turn(self);
        let result = flush();
        let mut state = self.lock();
        state.ended = state.begun;
        state.failure = result.as_ref().err().cloned();
        drop(state);
        drop(turn);
        result
    }
}
