//! Goal: space is given out again only when nobody uses it any more, and a flush covers what was written before it, is shared by
//! those who wait and keeps nobody waiting for those who come later; all in every interleaving. Method: loom runs modules of the
//! core with atomics and locks of its own.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

use std::sync::PoisonError;

use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
use loom::thread;

#[path = "../src/image/flushes.rs"]
#[allow(dead_code, reason = "not all of it is tried here")]
mod flushes;
#[path = "../src/image/grace.rs"]
mod grace;

use flushes::Flushes;
use grace::Grace;

/// As the core's, with as few parts as can differ. The thread that makes the others has the first.
#[derive(Debug, Default)]
struct Sharded<T>([T; 2]);

loom::thread_local! {
    static PART: std::cell::Cell<usize> = std::cell::Cell::new(0);
}

impl<T> Sharded<T> {
    fn mine(&self) -> &T {
        &self.0[PART.with(std::cell::Cell::get)]
    }

    fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }
}

/// To loom accesses that are `SeqCst` are no more than acquire and release; only fences are what they are.
fn loom_fence() {
    fence(Ordering::SeqCst);
}

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

    /// A request of a thread that has this part: looks the block up, then uses its slot.
    fn read(&self, part: usize) {
        PART.with(|mine| mine.set(part));
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
    for part in 0..2 {
        loom::model(move || {
            let slot = Slot::new();
            let reader = {
                let slot = Arc::clone(&slot);
                thread::spawn(move || slot.read(part))
            };
            slot.free();
            reader.join().expect("reader");
        });
    }
}

#[test]
fn nor_under_one_of_two() {
    let mut model = loom::model::Builder::new();
    // Three threads have too many interleavings for all of them; two switches by force find what is known to go wrong.
    model.preemption_bound = Some(2);
    model.check(|| {
        let slot = Slot::new();
        let readers = [0, 1].map(|part| {
            let slot = Arc::clone(&slot);
            thread::spawn(move || slot.read(part))
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

/// An image that is written and flushed, as `commit.rs` does it.
struct Flushed {
    flushes: Flushes<u64>,
    completed: Sharded<AtomicU64>,
    durable: AtomicU64,
    /// Syncs that began.
    syncs: AtomicU64,
    syncing: AtomicBool,
    /// The one that fails.
    fails: u64,
}

impl Flushed {
    fn new(fails: u64) -> Arc<Self> {
        let (completed, durable, syncs, syncing) = Default::default();
        Arc::new(Self { flushes: Flushes::new(), completed, durable, syncs, syncing, fails })
    }

    /// Writes something. (Adding nothing is how to see the newest value: to loom a load may be older, whatever its order.)
    fn write(&self) -> Written {
        self.completed.mine().fetch_add(1, Ordering::SeqCst);
        Written { target: self.completed(), syncs: self.syncs.fetch_add(0, Ordering::SeqCst) }
    }

    /// Added up part by part, while others add to them.
    fn completed(&self) -> u64 {
        self.completed.iter().map(|part| part.fetch_add(0, Ordering::SeqCst)).sum()
    }

    /// Makes it durable, or says which sync failed. `arrive` is called when it is known that this wants a flush, `wait` is
    /// what a sync waits for.
    fn flush(&self, written: &Written, arrive: impl Fn(), wait: impl Fn(u64)) -> Result<(), u64> {
        let is_covered = || self.durable.load(Ordering::SeqCst) >= written.target;
        let look = || {
            arrive();
            is_covered()
        };
        let flushed = self.flushes.flush(look, || {
            let sync = self.syncs.fetch_add(1, Ordering::SeqCst) + 1;
            let completed = self.completed();
            assert!(!self.syncing.swap(true, Ordering::SeqCst), "one at a time");
            wait(sync);
            self.syncing.store(false, Ordering::SeqCst);
            if sync == self.fails {
                return Err(sync);
            }
            self.durable.store(completed, Ordering::SeqCst);
            Ok(())
        });
        assert!(flushed.is_err() || is_covered(), "what was written before is durable");
        flushed
    }
}

/// A write that was completed.
struct Written {
    target: u64,
    /// Syncs that had begun then.
    syncs: u64,
}

/// Something that happens once.
#[derive(Default)]
struct Event(Mutex<bool>, Condvar);

impl Event {
    fn happen(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }

    fn wait(&self) {
        let mut happened = self.0.lock().unwrap();
        while !*happened {
            happened = self.1.wait(happened).unwrap();
        }
    }
}

/// One flushes again and again. Another's flush is answered after the first sync that began after its write: the next one
/// waits for the answer, so that all would stand still if it were the other way round.
#[test]
fn a_flush_waits_for_the_one_under_way_and_the_next_and_for_none_that_others_want_later() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let image = Flushed::new(0);
        let (answered, begun) = (Arc::new(Event::default()), Arc::new(AtomicU64::new(u64::MAX)));
        let modest = {
            let (image, answered, begun) = (Arc::clone(&image), Arc::clone(&answered), Arc::clone(&begun));
            thread::spawn(move || {
                PART.with(|mine| mine.set(1));
                let written = image.write();
                begun.store(written.syncs, Ordering::SeqCst);
                image.flush(&written, || (), |_| ()).unwrap();
                answered.happen();
            })
        };
        for _ in 0..3 {
            let wait = |sync| {
                if sync > begun.fetch_add(0, Ordering::SeqCst).saturating_add(1) {
                    answered.wait();
                }
            };
            image.flush(&image.write(), || (), wait).unwrap();
        }
        modest.join().unwrap();
    });
}

/// While one is under way two more come.
#[test]
fn those_who_wait_share_the_next_flush_and_its_failure() {
    for fails in [0, 1, 2] {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(move || {
            let (image, arrived) = (Flushed::new(fails), Arc::new([(), (), ()].map(|()| Event::default())));
            let write = |image: &Flushed, arrived: &[Event; 3], who: usize| {
                let written = image.write();
                let wait = |sync| {
                    if sync == 1 {
                        arrived.iter().for_each(Event::wait);
                    }
                };
                (image.flush(&written, || arrived[who].happen(), wait), written.syncs)
            };
            let others = [1, 2].map(|who| {
                let (image, arrived) = (Arc::clone(&image), Arc::clone(&arrived));
                thread::spawn(move || {
                    PART.with(|mine| mine.set(who % 2));
                    write(&image, &arrived, who)
                })
            });
            let mut all = vec![write(&image, &arrived, 0)];
            all.extend(others.map(|other| other.join().unwrap()));
            let syncs = image.syncs.load(Ordering::SeqCst);
            assert!(syncs <= 2, "{syncs} syncs");
            for (result, before) in &all {
                assert!(result.is_ok() || *before < fails, "who wrote after the sync that failed began is not told");
            }
            let told = all.iter().filter(|(result, _)| result.is_err()).count();
            assert_eq!(told > 0, (1..=syncs).contains(&fails), "a failure is told");
        });
    }
}
