//! The clients of a server: who they are, what they do, and the word to end.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::peer::{Peer, Share};

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It goes on.
    Serving,
    /// What was begun is finished, then it ends.
    Ending,
    /// It ends now.
    Ended,
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    /// Its number.
    pub id: u64,
    /// Where it comes from, for people.
    pub from: String,
    /// Who it is one connection of.
    peer: Peer,
    /// What that one has.
    pub share: Arc<Share>,
    began: Instant,
    phase: watch::Sender<Phase>,
    /// The export, once it was chosen.
    export: Mutex<Option<String>>,
    chosen: AtomicBool,
    encrypted: AtomicBool,
    requests: AtomicU64,
    /// When it was heard of, in milliseconds after the list of clients was made.
    heard: AtomicU64,
}

impl Client {
    /// What the connection is to do; it may wait for changes.
    #[must_use]
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Waits until it ends now.
    pub async fn given_up(&self) {
        // What `wait_for` gives locks the phase, and the client's end looks at that.
        drop(self.phase().wait_for(|phase| *phase == Phase::Ended).await);
    }

    /// True when new requests are refused.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        *self.phase.borrow() != Phase::Serving
    }

    /// Asks the connection to end; there is no way back.
    pub fn end(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let later = phase > *now;
            *now = phase.max(*now);
            later
        });
    }

    /// Notes that the handshake is done.
    pub fn chose(&self, export: &str, encrypted: bool) {
        *self.export.lock().unwrap_or_else(PoisonError::into_inner) = Some(export.to_owned());
        self.encrypted.store(encrypted, Ordering::Relaxed);
        self.chosen.store(true, Ordering::Release);
    }

    /// The export that it uses.
    #[must_use]
    pub fn export(&self) -> Option<String> {
        self.export.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// True when it went over to TLS.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.encrypted.load(Ordering::Relaxed)
    }

    /// Requests so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// How long it is connected.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// Notes that requests came.
    pub fn asked(&self, count: u64) {
        self.requests.fetch_add(count, Ordering::Relaxed);
    }
}

/// All connections.
#[derive(Debug)]
pub struct Clients {
    list: Mutex<Vec<Arc<Client>>>,
    began: Instant,
    next: AtomicU64,
    /// One client chose an export.
    pub served_one: AtomicBool,
    /// One was refused, and there was no place since.
    full: AtomicBool,
}

impl Default for Clients {
    fn default() -> Self {
        let (served_one, full) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { list: Mutex::default(), began: Instant::now(), next: AtomicU64::new(1), served_one, full }
    }
}

impl Clients {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Client>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All as they are now.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Client>> {
        self.lock().clone()
    }

    /// A new connection. Where there are `most` already, another makes room (`who_goes`); `None` when none has to.
    #[must_use]
    pub fn add(&self, peer: Peer, from: String, most: usize) -> Option<Arc<Client>> {
        let mut list = self.lock();
        if list.len() >= most {
            let Some(at) = who_goes(&list, peer, self.now()) else {
                // Who comes again and again should not fill the log.
                if !self.full.swap(true, Ordering::Relaxed) {
                    tracing::warn!("{most} clients are connected: more of {from} are refused");
                }
                return None;
            };
            let gone = list.remove(at);
            tracing::info!("client {} ({}): makes room for {from}", gone.id, gone.from);
            gone.end(Phase::Ended);
        } else {
            self.full.store(false, Ordering::Relaxed);
        }
        let same = list.iter().find(|client| client.peer == peer);
        let client = Arc::new(Client {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            from,
            peer,
            share: same.map(|client| Arc::clone(&client.share)).unwrap_or_default(),
            began: Instant::now(),
            phase: watch::Sender::new(Phase::Serving),
            export: Mutex::default(),
            chosen: AtomicBool::new(false),
            encrypted: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            heard: AtomicU64::new(self.now()),
        });
        list.push(Arc::clone(&client));
        Some(client)
    }

    /// One is gone.
    pub fn remove(&self, client: &Client) {
        self.lock().retain(|other| other.id != client.id);
        if client.chosen.load(Ordering::Acquire) {
            self.served_one.store(true, Ordering::Release);
        }
    }

    /// True when clients were served and all are gone.
    #[must_use]
    pub fn are_done(&self) -> bool {
        let none = self.lock().is_empty();
        none && self.served_one.load(Ordering::Acquire)
    }

    /// Asks all to end.
    pub fn end(&self, phase: Phase) {
        self.lock().iter().for_each(|client| client.end(phase));
    }

    /// Asks those of an export to end.
    pub fn end_of(&self, export: &str, phase: Phase) {
        self.lock().iter().filter(|client| client.export().as_deref() == Some(export)).for_each(|client| client.end(phase));
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Ends the handshakes that take too long, and clients that ask nothing for too long.
    pub fn sweep(&self, handshake: Duration, idle: Duration, seen: &mut HashMap<u64, u64>) {
        let now = self.now();
        let list = self.lock();
        for client in &*list {
            if !client.chosen.load(Ordering::Acquire) {
                if client.age() > handshake {
                    tracing::debug!("client {}: its handshake takes too long", client.id);
                    client.end(Phase::Ended);
                }
                continue;
            }
            let requests = client.requests();
            if seen.insert(client.id, requests) != Some(requests) {
                client.heard.store(now, Ordering::Relaxed);
            }
            let silent = now.saturating_sub(client.heard.load(Ordering::Relaxed));
            if !idle.is_zero() && Duration::from_millis(silent) > idle {
                tracing::info!("client {}: asked nothing for {} s", client.id, silent / 1000);
                client.end(Phase::Ended);
            }
        }
        seen.retain(|id, _| list.iter().any(|client| client.id == *id));
    }
}

/// Which of the connections makes room for one more of `peer`: one of the peer that has the most, if that has more than
/// `peer` would have then; else one that is still in its handshake, of `peer` itself or of who has more. The oldest
/// handshake goes before the connection that was not heard of for longest.
fn who_goes(list: &[Arc<Client>], peer: Peer, now: u64) -> Option<usize> {
    let mut counts = HashMap::<Peer, usize>::new();
    list.iter().for_each(|client| *counts.entry(client.peer).or_default() += 1);
    let count = |peer: &Peer| counts.get(peer).copied().unwrap_or(0);
    let mine = count(&peer);
    let too_many = |client: &Client| Some(count(&client.peer)).filter(|count| *count > mine + 1);
    let in_handshake = |client: &Client| !client.chosen.load(Ordering::Acquire);
    let may_go = |client: &Client| {
        too_many(client).is_some() || in_handshake(client) && (client.peer == peer || count(&client.peer) > mine)
    };
    let silent = |client: &Client| now.saturating_sub(client.heard.load(Ordering::Relaxed));
    let candidates = list.iter().enumerate().filter(|(_, client)| may_go(client));
    // The list is in the order in which they came: of equals, the last that is looked at counts.
    candidates.rev().max_by_key(|(_, client)| (too_many(client), in_handshake(client), silent(client))).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = 10;

    fn add(clients: &Clients, user: u32, chosen: bool) -> Option<Arc<Client>> {
        let client = clients.add(Peer::User(user), format!("user {user}"), MOST)?;
        if chosen {
            client.chose("disk", false);
        }
        Some(client)
    }

    fn is_gone(client: &Client) -> bool {
        *client.phase.borrow() == Phase::Ended
    }

    #[test]
    fn who_has_the_most_makes_room_and_none_gets_more_than_its_share_that_way() {
        let clients = Clients { began: Instant::now() - Duration::from_secs(10), ..Clients::default() };
        let greedy: Vec<_> = (0..MOST).map(|_| add(&clients, 1, true).unwrap()).collect();
        // All but the first were not heard of for ten seconds.
        greedy[1..].iter().for_each(|client| client.heard.store(0, Ordering::Relaxed));
        assert!(add(&clients, 1, true).is_none(), "its own others stay");
        let others: Vec<_> = std::iter::from_fn(|| add(&clients, 2, true)).collect();
        assert_eq!(others.len(), MOST / 2);
        let gone: Vec<_> = greedy.iter().map(|client| is_gone(client)).collect();
        assert_eq!(
            gone,
            [false, true, true, true, true, true, false, false, false, false],
            "those that were silent, oldest first"
        );
        let third: Vec<_> = std::iter::from_fn(|| add(&clients, 3, true)).collect();
        assert_eq!(third.len(), MOST / 3, "two took from one after the other");
        assert!(others.iter().filter(|client| is_gone(client)).count() <= 2);
        assert!(Arc::ptr_eq(&others[0].share, &others[4].share) && !Arc::ptr_eq(&others[0].share, &third[0].share));
    }

    #[test]
    fn handshakes_make_room_before_sessions_and_nobodys_but_of_who_has_more() {
        let clients = Clients::default();
        let sessions: Vec<_> = (0..4).map(|_| add(&clients, 1, true).unwrap()).collect();
        let handshakes: Vec<_> = (0..6).map(|_| add(&clients, 1, false).unwrap()).collect();
        let other = add(&clients, 2, false).unwrap();
        assert!(is_gone(&handshakes[0]) && !is_gone(&handshakes[1]));
        add(&clients, 1, false).unwrap();
        assert!(is_gone(&handshakes[1]) && !is_gone(&other), "who floods pushes out its own");
        assert!(sessions.iter().all(|client| !is_gone(client)));
    }

    #[test]
    fn many_peers_with_a_handshake_each_leave_a_place() {
        let clients = Clients::default();
        let flood: Vec<_> = (0..MOST as u32).map(|user| add(&clients, user, user == 0).unwrap()).collect();
        add(&clients, 99, true).unwrap();
        assert!(!is_gone(&flood[0]) && is_gone(&flood[1]));
    }
}
