//! The clients of a server: who they are, what they do, and the word to end.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

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
    /// Where it comes from.
    pub peer: String,
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
}

impl Default for Clients {
    fn default() -> Self {
        let (list, next, served_one) = (Mutex::default(), AtomicU64::new(1), AtomicBool::new(false));
        Self { list, began: Instant::now(), next, served_one }
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

    /// A new connection. Where there are `most` already, the oldest that is still in its handshake makes room; `None` when
    /// there is no such one.
    #[must_use]
    pub fn add(&self, peer: String, most: usize) -> Option<Arc<Client>> {
        let mut list = self.lock();
        if list.len() >= most {
            let oldest = list.iter().position(|client| !client.chosen.load(Ordering::Acquire))?;
            list.remove(oldest).end(Phase::Ended);
        }
        let client = Arc::new(Client {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            peer,
            began: Instant::now(),
            phase: watch::Sender::new(Phase::Serving),
            export: Mutex::default(),
            chosen: AtomicBool::new(false),
            encrypted: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            heard: AtomicU64::new(0),
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
    pub fn sweep(&self, handshake: Duration, idle: Duration, seen: &mut std::collections::HashMap<u64, u64>) {
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
