//! Whether a disk answers so fast that waiting for it costs less than asking another thread.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

/// What a request to memory takes at most.
const SLOW: Duration = Duration::from_micros(60);
/// Bytes that memory moves in a microsecond, at least.
const BYTES_A_MICROSECOND: usize = 1000;
/// Requests that are looked at closely after one that took long.
const CLOSE_LOOKS: u32 = 32;
/// What a request that slept counts, against 1 for one that did not.
const WEIGHT: u32 = 8;
/// From here on requests go to other threads.
const LIMIT: u32 = 24;
/// However often it slept, after so many requests that did not it is fast again.
const MOST: u32 = 128;

/// A score that requests raise which sleep, and others lower.
///
/// Time alone does not tell a disk that is slow from a machine that is busy. So a request that took long has the next
/// ones looked at closely: whether their thread gave up the processor by itself.
#[derive(Debug, Default)]
pub struct Pace {
    score: AtomicU32,
    close_looks: AtomicU32,
}

/// A request of which it will be known how long it took.
pub struct Timed {
    began: Instant,
    /// How often this thread slept before, where that is looked at.
    slept: Option<i64>,
}

fn sleeps_of_this_thread() -> Option<i64> {
    getrusage(UsageWho::RUSAGE_THREAD).ok().map(|usage| usage.voluntary_context_switches())
}

impl Pace {
    /// True when requests may be done at once, in the task that read them.
    pub fn is_fast(&self) -> bool {
        self.score.load(Ordering::Relaxed) < LIMIT
    }

    /// A request begins.
    pub fn begin(&self) -> Timed {
        let close = self.close_looks.load(Ordering::Relaxed) > 0 || !self.is_fast();
        Timed { began: Instant::now(), slept: close.then(sleeps_of_this_thread).flatten() }
    }

    /// The request of `len` bytes is done, by the thread that began it.
    pub fn end(&self, request: &Timed, len: usize) {
        let Some(before) = request.slept else {
            if request.began.elapsed() > SLOW + Duration::from_micros((len / BYTES_A_MICROSECOND) as u64) {
                self.close_looks.store(CLOSE_LOOKS, Ordering::Relaxed);
            }
            return;
        };
        // Which of two that come at once counts does not matter.
        let looks = self.close_looks.load(Ordering::Relaxed);
        self.close_looks.store(looks.saturating_sub(1), Ordering::Relaxed);
        self.count(sleeps_of_this_thread() > Some(before));
    }

    fn count(&self, slept: bool) {
        let score = self.score.load(Ordering::Relaxed);
        let score = if slept { (score + WEIGHT).min(MOST) } else { score.saturating_sub(1) };
        self.score.store(score, Ordering::Relaxed);
        if slept {
            self.close_looks.store(CLOSE_LOOKS, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(pace: &Pace, time: Duration) {
        let timed = pace.begin();
        std::thread::sleep(time);
        pace.end(&timed, 4096);
    }

    #[test]
    fn a_disk_that_sleeps_is_slow_until_it_does_not() {
        let pace = Pace::default();
        (0..2).for_each(|_| request(&pace, Duration::from_millis(1)));
        assert!(pace.is_fast(), "one slow request is chance");
        (0..6).for_each(|_| request(&pace, Duration::from_millis(1)));
        assert!(!pace.is_fast());
        (0..MOST).for_each(|_| pace.count(false));
        assert!(pace.is_fast());
    }

    #[test]
    fn a_request_that_only_takes_long_is_no_sign_of_a_slow_disk() {
        let pace = Pace::default();
        for _ in 0..20 {
            let timed = pace.begin();
            while timed.began.elapsed() < Duration::from_micros(500) {}
            pace.end(&timed, 4096);
        }
        assert!(pace.is_fast());
    }
}
