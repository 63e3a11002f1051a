//! What a client may take of the server, so that something is left for the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

/// Limits of a server.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// Requests of a connection that are under way at once, until their replies are sent.
    pub requests: usize,
    /// Bytes of data that a connection's requests under way hold. One request is always let in.
    pub bytes: usize,
    /// Bytes of data of all connections; each connection's first request comes on top.
    pub total_bytes: usize,
    /// How long a handshake may take.
    pub handshake: Duration,
    /// How long a client may neither ask nor take anything; zero for ever.
    pub idle: Duration,
    /// How long clients have to take their last replies when the server ends.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            requests: 64,
            bytes: 16 << 20,
            total_bytes: 256 << 20,
            handshake: Duration::from_secs(15),
            idle: Duration::ZERO,
            grace: Duration::from_secs(10),
        }
    }
}

/// Bytes that all connections share.
#[derive(Debug)]
pub struct Budget {
    used: AtomicUsize,
    most: usize,
}

impl Budget {
    /// Room for `most` bytes.
    pub fn new(most: usize) -> Self {
        Self { used: AtomicUsize::new(0), most }
    }

    fn try_take(&self, len: usize) -> bool {
        let fits = |used: usize| used.checked_add(len).filter(|used| *used <= self.most);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }
}

/// The requests of a connection that are under way.
#[derive(Debug)]
pub struct Flight {
    count: AtomicUsize,
    bytes: AtomicUsize,
    requests: usize,
    most_bytes: usize,
    budget: Arc<Budget>,
    landed: Notify,
}

impl Flight {
    /// Nothing under way.
    pub fn new(limits: &Limits, budget: Arc<Budget>) -> Arc<Self> {
        Arc::new(Self {
            count: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            requests: limits.requests,
            most_bytes: limits.bytes,
            budget,
            landed: Notify::new(),
        })
    }

    /// Lets a request in, if there is room. Only one task of a connection asks.
    pub fn try_admit(self: &Arc<Self>, len: usize) -> Option<Ticket> {
        let first = self.count.load(Ordering::Acquire) == 0;
        let room = || {
            self.count.load(Ordering::Relaxed) < self.requests
                && self.bytes.load(Ordering::Relaxed) + len <= self.most_bytes
                && self.budget.try_take(len)
        };
        if !first && !room() {
            return None;
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(len, Ordering::Relaxed);
        Some(Ticket { flight: Arc::clone(self), len, shared: !first })
    }

    /// Lets a request in when there is room.
    pub async fn admit(self: &Arc<Self>, len: usize) -> Ticket {
        loop {
            if let Some(ticket) = self.try_admit(len) {
                return ticket;
            }
            self.landed.notified().await;
        }
    }

    /// Waits until nothing is under way.
    pub async fn empty(&self) {
        while self.count.load(Ordering::Acquire) > 0 {
            self.landed.notified().await;
        }
    }
}

/// A request under way, until it is dropped.
#[derive(Debug)]
pub struct Ticket {
    flight: Arc<Flight>,
    len: usize,
    /// Its bytes are of the shared budget.
    shared: bool,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.shared {
            self.flight.budget.used.fetch_sub(self.len, Ordering::Relaxed);
        }
        self.flight.bytes.fetch_sub(self.len, Ordering::Relaxed);
        self.flight.count.fetch_sub(1, Ordering::Release);
        self.flight.landed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_is_always_let_in_and_more_while_there_is_room() {
        let limits = Limits { requests: 3, bytes: 100, ..Limits::default() };
        let budget = Arc::new(Budget::new(60));
        let (one, other) = (Flight::new(&limits, Arc::clone(&budget)), Flight::new(&limits, Arc::clone(&budget)));
        let first = one.try_admit(1000).unwrap();
        assert!(one.try_admit(1).is_none(), "the bytes of a connection are limited");
        drop(first);
        let held = (one.try_admit(10).unwrap(), one.try_admit(60).unwrap());
        assert!(one.try_admit(0).is_some());
        let first_of_other = other.try_admit(50).unwrap();
        assert!(other.try_admit(1).is_none(), "the bytes of all are limited");
        drop(held);
        let more = (other.try_admit(1).unwrap(), other.try_admit(1).unwrap());
        assert!(other.try_admit(1).is_none(), "the requests of a connection are limited");
        drop((first_of_other, more));
        assert_eq!(budget.used.load(Ordering::Relaxed), 0);
    }
}
