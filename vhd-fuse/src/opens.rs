//! What was opened just now, and by whom: so is an open with `O_TRUNC` told from truncate(2).
//!
//! Of the first the kernel says that a file is opened, without that flag, and then that its size is to be 0; of the second the
//! latter alone. (It could name the flag, but then takes the size for 0 until it asks again, and whoever has the file in
//! memory gets SIGBUS meanwhile.)

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fuser::INodeNo;

/// Opens that are remembered.
const MOST: usize = 64;
/// How long the kernel may take between the two.
const AT_ONCE: Duration = Duration::from_secs(2);

/// The last open of each thread that has asked nothing since.
#[derive(Debug, Default)]
pub(crate) struct Opens {
    list: Mutex<VecDeque<(u32, INodeNo, Instant)>>,
    /// There are some: who reads and writes need not look at the list each time.
    some: AtomicBool,
}

impl Opens {
    fn lock(&self) -> MutexGuard<'_, VecDeque<(u32, INodeNo, Instant)>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread opens a file.
    pub(crate) fn note(&self, thread: u32, number: INodeNo) {
        let mut opens = self.lock();
        opens.retain(|(other, ..)| *other != thread);
        opens.truncate(MOST - 1);
        opens.push_front((thread, number, Instant::now()));
        self.some.store(true, Ordering::Relaxed);
    }

    /// A thread asks for something else.
    pub(crate) fn forget(&self, thread: u32) {
        if self.some.load(Ordering::Relaxed) {
            let mut opens = self.lock();
            opens.retain(|(other, _, when)| *other != thread && when.elapsed() < AT_ONCE);
            self.some.store(!opens.is_empty(), Ordering::Relaxed);
        }
    }

    /// Whether a thread opened this file just now; that is forgotten.
    pub(crate) fn was_last(&self, thread: u32, number: INodeNo) -> bool {
        let mut opens = self.lock();
        let found = opens.iter().position(|(other, ..)| *other == thread).and_then(|at| opens.remove(at));
        found.is_some_and(|(_, opened, when)| opened == number && when.elapsed() < AT_ONCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_open_of_a_thread_counts_once_and_few_are_kept() {
        let opens = Opens::default();
        opens.note(1, INodeNo(2));
        opens.note(2, INodeNo(3));
        assert!(!opens.was_last(1, INodeNo(3)) && !opens.was_last(1, INodeNo(2)), "asked once");
        assert!(opens.was_last(2, INodeNo(3)) && !opens.was_last(2, INodeNo(3)));
        opens.note(1, INodeNo(2));
        opens.note(2, INodeNo(2));
        opens.forget(1);
        assert!(!opens.was_last(1, INodeNo(2)) && opens.was_last(2, INodeNo(2)), "who goes on has not just opened it");
        (0..1000).for_each(|thread| opens.note(thread, INodeNo(2)));
        assert_eq!(opens.lock().len(), MOST);
        assert!(opens.was_last(999, INodeNo(2)) && !opens.was_last(0, INodeNo(2)));
    }
}
