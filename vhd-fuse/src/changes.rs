//! Who was changed since someone last looked, noted so that those who write all the time write nothing here that others read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Changes of all views of a mount.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// How often someone looked. A view that changed since the last time is counted already.
    looks: AtomicU64,
    count: AtomicU64,
}

impl Changes {
    /// A number that stays the same for as long as nothing changes after this call.
    pub(crate) fn look(&self) -> u64 {
        // First, so that whatever changes from now on is counted.
        self.looks.fetch_add(1, Ordering::SeqCst);
        self.count.load(Ordering::SeqCst)
    }
}

/// Changes of one view.
#[derive(Debug)]
pub(crate) struct OwnChanges {
    all: Arc<Changes>,
    /// Those of `all` that are this view's.
    count: AtomicU64,
    /// How often someone had looked when this view was counted last.
    counted_at: AtomicU64,
}

impl OwnChanges {
    pub(crate) fn new(all: &Arc<Changes>) -> Self {
        Self { all: Arc::clone(all), count: AtomicU64::new(0), counted_at: AtomicU64::new(u64::MAX) }
    }

    /// Notes a change, after it was made.
    pub(crate) fn note(&self) {
        let looks = self.all.looks.load(Ordering::SeqCst);
        if self.counted_at.load(Ordering::SeqCst) == looks {
            return;
        }
        // In this order, for a reader in between must see more changes of others, not fewer.
        self.all.count.fetch_add(1, Ordering::SeqCst);
        self.count.fetch_add(1, Ordering::SeqCst);
        self.counted_at.store(looks, Ordering::SeqCst);
    }

    /// As [`Changes::look`], at all views.
    pub(crate) fn look(&self) -> u64 {
        self.all.look()
    }

    /// As [`Changes::look`], at all views but this one.
    pub(crate) fn look_at_others(&self) -> u64 {
        self.all.look().wrapping_sub(self.count.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_looks_sees_what_others_changed_since_and_nothing_else() {
        let all = Arc::default();
        let (one, other) = (OwnChanges::new(&all), OwnChanges::new(&all));
        let seen = one.look_at_others();
        one.note();
        assert_eq!(one.look_at_others(), seen);
        other.note();
        let after = one.look_at_others();
        assert_ne!(after, seen);
        assert_eq!(one.look_at_others(), after);
        // Noted again although it was counted before the last look, and once only until the next.
        for _ in 0..3 {
            other.note();
        }
        assert_eq!(one.look_at_others(), after + 1);
        let everything = one.look();
        assert_eq!(one.look(), everything);
        one.note();
        assert_ne!(one.look(), everything);
    }
}
