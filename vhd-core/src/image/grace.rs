//! Grace periods: when everything that was under way at a moment has ended.
//!
//! A block that is freed may still be read or written by requests that looked it up before. Its space is given out
//! again only after all of those have ended, and nobody waits for that: requests count themselves in and out, and
//! whoever wants the space asks whether the time has come.
//!
//! `tests/loom.rs` builds this file again with loom's atomics and tries every interleaving.

use super::{AtomicU64, Ordering, Sharded, loom_fence};

/// Counts requests under way in two alternating generations.
#[derive(Debug, Default)]
pub(super) struct Grace {
    generation: AtomicU64,
    under_way: Sharded<[AtomicU64; 2]>,
}

/// A request that is under way until this is dropped.
#[derive(Debug)]
pub(super) struct Guard<'a>(&'a AtomicU64);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Grace {
    /// Counts a request in.
    pub(super) fn enter(&self) -> Guard<'_> {
        let counters = self.under_way.mine();
        loop {
            let generation = self.generation.load(Ordering::Acquire);
            let counter = &counters[usize::from(generation % 2 == 1)];
            counter.fetch_add(1, Ordering::SeqCst);
            let guard = Guard(counter);
            // Either we see that the generation ended, or whoever ended it sees our count.
            loom_fence();
            // If it ended in between, nobody may rely on this count: take the new one.
            if self.generation.load(Ordering::SeqCst) == generation {
                return guard;
            }
        }
    }

    /// A ticket for what was unlinked before this call: [`Self::has_passed`] tells when it is out of use.
    pub(super) fn ticket(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// True when all requests that were under way at the ticket's time have ended. Moves the generation on when it
    /// can, so two calls may be needed on an idle image. Callers hold the lock that serialises them.
    pub(super) fn has_passed(&self, ticket: u64) -> bool {
        for _ in 0..2 {
            let generation = self.generation.load(Ordering::Acquire);
            if generation >= ticket + 2 {
                return true;
            }
            // The generation before this one must be drained before its counters are used again. So once the
            // generation is two further than the ticket, all that were counted up to the ticket have ended. They are looked
            // at one by one: who is found to have gone from one does not come back, but under the new generation.
            loom_fence();
            let previous = usize::from(generation % 2 == 0);
            if self.under_way.iter().any(|counters| counters[previous].load(Ordering::SeqCst) != 0) {
                return false;
            }
            self.generation.store(generation + 1, Ordering::SeqCst);
        }
        self.generation.load(Ordering::Acquire) >= ticket + 2
    }
}
