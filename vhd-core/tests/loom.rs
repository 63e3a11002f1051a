//! Goal: space is given out again only when nobody uses it any more, in every interleaving of readers and the one who
//! frees. Method: loom runs the module of the core with atomics of its own.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use loom::thread;

#[path = "../src/image/grace.rs"]
mod grace;

use grace::Grace;

/// A slot that a block's entry leads to, until it is freed and used again.
struct Slot {
    grace: Grace,
    linked: AtomicBool,
    reused: AtomicBool,
}

impl Slot {
    fn new() -> Arc<Self> {
        Arc::new(Self { grace: Grace::default(), linked: AtomicBool::new(true), reused: AtomicBool::new(false) })
    }

    /// A request: looks the block up, then uses its slot.
    fn read(&self) {
        let guard = self.grace.enter();
        if self.linked.load(Ordering::Acquire) {
            assert!(!self.reused.load(Ordering::Acquire), "the slot was given to another block");
        }
        drop(guard);
    }

    /// Frees the block; uses its slot again if that is allowed within a few looks.
    fn free(&self) {
        self.linked.store(false, Ordering::Release);
        let ticket = self.grace.ticket();
        if (0..2).any(|_| self.grace.has_passed(ticket)) {
            self.reused.store(true, Ordering::Release);
        }
    }
}

#[test]
fn a_slot_is_not_reused_under_a_reader() {
    loom::model(|| {
        let slot = Slot::new();
        let reader = {
            let slot = Arc::clone(&slot);
            thread::spawn(move || slot.read())
        };
        slot.free();
        reader.join().expect("reader");
    });
}

#[test]
fn nor_under_one_of_two() {
    let mut model = loom::model::Builder::new();
    // Three threads have too many interleavings for all of them; two switches by force find what is known to go wrong.
    model.preemption_bound = Some(2);
    model.check(|| {
        let slot = Slot::new();
        let readers = [(), ()].map(|()| {
            let slot = Arc::clone(&slot);
            thread::spawn(move || slot.read())
        });
        slot.free();
        for reader in readers {
            reader.join().expect("reader");
        }
    });
}

#[test]
fn it_passes_once_all_have_ended_and_an_endless_stream_does_not_starve_it() {
    loom::model(|| {
        let grace = Grace::default();
        let early = grace.enter();
        let ticket = grace.ticket();
        assert!(!grace.has_passed(ticket));
        drop(early);
        let mut current = grace.enter();
        let mut passed = false;
        for _ in 0..6 {
            passed |= grace.has_passed(ticket);
            let next = grace.enter();
            drop(std::mem::replace(&mut current, next));
        }
        assert!(passed);
    });
}
