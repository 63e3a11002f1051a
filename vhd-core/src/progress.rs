//! How far an operation is, and whether to stop it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};

/// Shared between an operation and whoever shows it or stops it.
#[derive(Debug)]
pub struct Progress {
    total: AtomicU64,
    done: AtomicU64,
    cancelled: Arc<AtomicBool>,
    /// Bytes after which it stops by itself.
    most: AtomicU64,
}

impl Default for Progress {
    fn default() -> Self {
        Self::stopped_by(Arc::default())
    }
}

impl Progress {
    /// One that stops when `flag` is set: by the handler of a signal, for one.
    #[must_use]
    pub fn stopped_by(flag: Arc<AtomicBool>) -> Self {
        Self { total: AtomicU64::new(0), done: AtomicU64::new(0), cancelled: flag, most: AtomicU64::new(u64::MAX) }
    }

    /// Asks the operation to stop once it has done so many bytes.
    pub fn cancel_after(&self, bytes: u64) {
        self.most.store(bytes, Ordering::Relaxed);
    }

    /// Sets how many bytes there are to do.
    pub fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that are done.
    ///
    /// # Errors
    /// `Cancelled`, when someone asked for it.
    pub fn advance(&self, bytes: u64) -> Result<()> {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        if done > self.most.load(Ordering::Relaxed) {
            self.cancel();
        }
        if self.is_cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, "interrupted"));
        }
        Ok(())
    }

    /// Bytes to do; 0 while nobody knows.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Bytes that are done.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// True once someone asked the operation to stop.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Asks the operation to stop where it can.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}
