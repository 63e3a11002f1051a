//! What a client may take of the server, so that something is left for the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

use crate::peer::Share;

/// Limits of a server.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// Requests of a connection that are under way at once, until their replies are sent.
    pub requests: usize,
    /// Bytes of data that a connection's requests under way hold. One request is always let in.
    pub bytes: usize,
    /// Bytes of data of all connections; each connection's first request comes on top. A peer's connections have no more
    /// of them than they leave to others.
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

/// A connection that takes descriptors, until all that hold one are gone: what waits for a disk may hold it for longer than
/// the connection lasts.
#[derive(Debug, Default)]
pub struct Live(Arc<AtomicUsize>);

impl Live {
    /// One more, where there are fewer than `most`.
    pub fn one_more(count: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let before = count.fetch_add(1, Ordering::Relaxed);
        let live = Self(Arc::clone(count));
        (before < most).then_some(live)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
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

    /// Takes `len` bytes for a peer that has `share` already.
    fn try_take(&self, len: usize, share: &AtomicUsize) -> bool {
        let mine = share.fetch_add(len, Ordering::Relaxed) + len;
        let fits = |used: usize| {
            let left = self.most.checked_sub(used.checked_add(len)?)?;
            (mine <= left).then_some(used + len)
        };
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok();
        if !taken {
            share.fetch_sub(len, Ordering::Relaxed);
        }
        taken
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
    peer: Arc<Share>,
    landed: Notify,
}

impl Flight {
    /// Nothing under way.
    pub fn new(limits: &Limits, budget: Arc<Budget>, peer: Arc<Share>) -> Arc<Self> {
        Arc::new(Self {
            count: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            requests: limits.requests,
            most_bytes: limits.bytes,
            budget,
            peer,
            landed: Notify::new(),
        })
    }

    /// Lets a request in, if there is room. Only one task of a connection asks.
    pub fn try_admit(self: &Arc<Self>, len: usize) -> Option<Ticket> {
        let first = self.count.load(Ordering::Acquire) == 0;
        let room = || {
            self.count.load(Ordering::Relaxed) < self.requests
                && self.bytes.load(Ordering::Relaxed) + len <= self.most_bytes
                && self.budget.try_take(len, &self.peer.bytes)
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
            self.flight.peer.bytes.fetch_sub(self.len, Ordering::Relaxed);
        }
        self.flight.bytes.fetch_sub(self.len, Ordering::Relaxed);
        self.flight.count.fetch_sub(1, Ordering::Release);
        self.flight.landed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flight(limits: &Limits, budget: &Arc<Budget>, peer: &Arc<Share>) -> Arc<Flight> {
        Flight::new(limits, Arc::clone(budget), Arc::clone(peer))
    }

    #[test]
    fn one_request_is_always_let_in_and_more_while_there_is_room() {
        let limits = Limits { requests: 3, bytes: 100, ..Limits::default() };
        let (budget, peers) = (Arc::new(Budget::new(120)), [Arc::<Share>::default(), Arc::default()]);
        let (one, other) = (flight(&limits, &budget, &peers[0]), flight(&limits, &budget, &peers[1]));
        let first = one.try_admit(1000).unwrap();
        assert!(one.try_admit(1).is_none(), "the bytes of a connection are limited");
        drop(first);
        let held = (one.try_admit(10).unwrap(), one.try_admit(60).unwrap());
        assert!(one.try_admit(0).is_some());
        let first_of_other = other.try_admit(50).unwrap();
        assert!(other.try_admit(60).is_none(), "the bytes of all are limited");
        drop(held);
        let more = (other.try_admit(1).unwrap(), other.try_admit(1).unwrap());
        assert!(other.try_admit(1).is_none(), "the requests of a connection are limited");
        drop((first_of_other, more));
        assert_eq!(budget.used.load(Ordering::Relaxed), 0);
        assert_eq!(peers.map(|peer| peer.bytes.load(Ordering::Relaxed)), [0, 0]);
    }

    #[test]
    fn a_peer_leaves_others_as_many_bytes_as_it_has() {
        let limits = Limits { bytes: 1000, ..Limits::default() };
        let (budget, greedy, modest) = (Arc::new(Budget::new(1000)), Arc::<Share>::default(), Arc::<Share>::default());
        let of_greedy: Vec<_> = (0..100).map(|_| flight(&limits, &budget, &greedy)).collect();
        let mut tickets: Vec<_> = of_greedy.iter().map(|flight| flight.try_admit(10).unwrap()).collect();
        tickets.extend(of_greedy.iter().filter_map(|flight| flight.try_admit(10)));
        assert_eq!(greedy.bytes.load(Ordering::Relaxed), 500);
        let flight = flight(&limits, &budget, &modest);
        tickets.push(flight.try_admit(10).unwrap());
        tickets.extend(std::iter::from_fn(|| flight.try_admit(10)));
        assert_eq!(modest.bytes.load(Ordering::Relaxed), 250);
    }
}
