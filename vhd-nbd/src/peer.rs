//! Who clients are, as far as shares go: what a server has is shared among peers, not among connections, so that one who
//! opens a thousand of them has no more than one who opens a few.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Requests of a peer that threads do to one disk at once; the next wait in their connections.
const AT_ONCE_OF_PEER: usize = 48;
/// Requests that threads do to one disk at once, so that a disk that hangs leaves threads for the others.
const AT_ONCE_OF_DISK: usize = 64;

/// Where a connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// A machine. Who has one address of the sixth version has all of its network, so the network counts.
    Machine(IpAddr),
    /// A user of this machine.
    User(u32),
    /// Who started the server.
    Starter,
}

impl Peer {
    /// The peer with this address.
    #[must_use]
    pub fn at(address: IpAddr) -> Self {
        Self::Machine(match address.to_canonical() {
            IpAddr::V6(address) => {
                let network = u128::from(address) >> 64 << 64;
                IpAddr::V6(if address.is_loopback() { address } else { Ipv6Addr::from(network) })
            }
            address @ IpAddr::V4(_) => address,
        })
    }
}

/// What the connections of one peer have of the server together.
#[derive(Debug, Default)]
pub struct Share {
    /// Bytes of data of requests under way.
    pub bytes: AtomicUsize,
    /// By export.
    lanes: Mutex<HashMap<String, Arc<Semaphore>>>,
}

/// The way of a peer's requests to the threads that work on a disk.
#[derive(Clone, Debug)]
pub struct Lane {
    peer: Arc<Semaphore>,
    disk: Arc<Semaphore>,
}

/// The right to use a thread, until it is dropped.
#[derive(Debug)]
#[expect(dead_code, reason = "held, not read")]
pub struct Turn([Option<OwnedSemaphorePermit>; 2]);

/// What all peers share of a disk's threads.
pub fn gate() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(AT_ONCE_OF_DISK))
}

impl Share {
    /// The way to the disk of an export that has this gate.
    pub fn lane(&self, export: &str, gate: &Arc<Semaphore>) -> Lane {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let peer = lanes.entry(export.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(AT_ONCE_OF_PEER)));
        Lane { peer: Arc::clone(peer), disk: Arc::clone(gate) }
    }
}

impl Lane {
    /// A turn, where there is one without waiting.
    pub fn try_turn(&self) -> Option<Turn> {
        let peer = Arc::clone(&self.peer).try_acquire_owned().ok()?;
        let disk = Arc::clone(&self.disk).try_acquire_owned().ok()?;
        Some(Turn([Some(peer), Some(disk)]))
    }

    /// Waits for a turn: first behind the peer's own requests, so that only a few of each peer wait for the disk.
    pub async fn turn(&self) -> Turn {
        // They are never closed, so that there is always a permit in the end.
        let peer = Arc::clone(&self.peer).acquire_owned().await.ok();
        let disk = Arc::clone(&self.disk).acquire_owned().await.ok();
        Turn([peer, disk])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_one_peer_whatever_its_addresses() {
        let at = |text: &str| Peer::at(text.parse().unwrap());
        assert_eq!(at("2001:db8:1:2::3"), at("2001:db8:1:2:ffff::4"));
        assert_ne!(at("2001:db8:1:2::3"), at("2001:db8:1:3::3"));
        assert_eq!(at("::ffff:192.0.2.1"), at("192.0.2.1"));
        assert_ne!(at("192.0.2.1"), at("192.0.2.2"));
        assert_ne!(at("::1"), at("::2"));
    }

    #[test]
    fn one_peer_leaves_turns_for_others() {
        let (gate, one, other) = (gate(), Share::default(), Share::default());
        let (one, other) = (one.lane("disk", &gate), other.lane("disk", &gate));
        let taken: Vec<_> = std::iter::from_fn(|| one.try_turn()).collect();
        assert_eq!(taken.len(), AT_ONCE_OF_PEER);
        let others: Vec<_> = std::iter::from_fn(|| other.try_turn()).collect();
        assert_eq!(taken.len() + others.len(), AT_ONCE_OF_DISK);
        drop((taken, others));
        assert_eq!(gate.available_permits(), AT_ONCE_OF_DISK);
    }
}
