//! What all threads write and seldom anyone reads, kept in a part for each, so that they don't take lines of the
//! processor's cache from each other.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crossbeam_utils::CachePadded;

/// Threads beyond these share.
const PARTS: usize = 16;

/// A value in parts: whoever wants all of it adds them up.
#[derive(Debug, Default)]
pub struct Sharded<T>([CachePadded<T>; PARTS]);

impl<T> Sharded<T> {
    /// This thread's part. Others may have the same one.
    #[must_use]
    pub fn mine(&self) -> &T {
        &self.0[part()]
    }

    /// All parts.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|part| &**part)
    }
}

/// A count of what happened.
#[derive(Debug, Default)]
pub(crate) struct ShardedCount(Sharded<AtomicU64>);

impl ShardedCount {
    /// One more.
    pub(crate) fn add_one(&self) {
        self.0.mine().fetch_add(1, Ordering::SeqCst);
    }

    /// How many. What is added meanwhile may be in it or not, so of two such numbers the one that was begun after the other was
    /// told is no smaller, and is larger where something was added in between.
    pub(crate) fn get(&self) -> u64 {
        self.0.iter().map(|part| part.load(Ordering::SeqCst)).sum()
    }
}

fn part() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static PART: usize = NEXT.fetch_add(1, Ordering::Relaxed) % PARTS;
    }
    PART.with(|part| *part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_one_part_and_many_have_several_between_them() {
        let counts = Sharded::<AtomicU64>::default();
        std::thread::scope(|scope| {
            for _ in 0..PARTS {
                scope.spawn(|| (0..100).for_each(|_| _ = counts.mine().fetch_add(1, Ordering::Relaxed)));
            }
        });
        let parts: Vec<u64> = counts.iter().map(|part| part.load(Ordering::Relaxed)).collect();
        assert_eq!(parts.iter().sum::<u64>(), 100 * PARTS as u64);
        // Other tests' threads count too, so not each has a part of its own here.
        assert!(parts.iter().filter(|part| **part > 0).count() > 1, "{parts:?}");
        assert!(parts.iter().all(|part| part % 100 == 0), "{parts:?}");
    }
}
