//! What lets requests through to the disk, until it is to be closed.

use std::sync::PoisonError;

use crossbeam_utils::sync::{ShardedLock, ShardedLockReadGuard};

/// Open at first; closed once, for ever.
#[derive(Default)]
pub(crate) struct Gate {
    /// Every request looks at it, from many threads at once.
    closed: ShardedLock<bool>,
}

/// A request that went through. The gate closes only when all of these are gone.
pub(crate) struct Pass<'a>(#[expect(dead_code, reason = "held, not read")] ShardedLockReadGuard<'a, bool>);

impl Gate {
    /// Goes through, or `None` when the gate is closed.
    pub(crate) fn enter(&self) -> Option<Pass<'_>> {
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        if *closed { None } else { Some(Pass(closed)) }
    }

    /// Lets no more requests through, and waits until those that went through are done.
    pub(crate) fn close(&self) {
        *self.closed.write().unwrap_or_else(PoisonError::into_inner) = true;
    }
}
