//! The threads that serve a disk's queues, one for each.
//!
//! A thread sleeps until its queue is kicked, and serves it while the device runs. Whoever wants the queue for itself
//! — a reset, a pause — says so and then takes the queue's lock, which the thread gives back between two requests.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::block::{Block, QueueOwner, Served, Stall};
use super::{QUEUE_SIZE, status};
use crate::memory::Memory;
use crate::sandbox::{self, Kind};

/// Bits of the interrupt status.
const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;
/// Failures of a device that are told in the log.
const MAX_TOLD: u32 = 10;

/// Who is told that a request is kept because the host can't do it.
pub trait StallObserver: Send + Sync {
    /// The disk of this index has one. It is called by the thread that serves the queue, which then waits.
    fn stalled(&self, disk: usize, stall: Stall);
}

/// A device's status and interrupt, as the transport shows them.
#[derive(Debug)]
pub struct Line {
    /// The device's status.
    pub status: AtomicU32,
    /// Why the driver was interrupted, until it acknowledges.
    pub pending: AtomicU32,
    /// Raises the interrupt.
    pub interrupt: EventFd,
}

impl Line {
    fn raise(&self, why: u32) {
        self.pending.fetch_or(why, Ordering::SeqCst);
        // Full only after 2^64 unheard interrupts.
        let _ = self.interrupt.write(1);
    }
}

/// A queue and what wakes its thread.
#[derive(Debug)]
struct Slot {
    queue: Mutex<Queue>,
    kick: EventFd,
}

struct Shared {
    index: usize,
    block: Arc<Block>,
    memory: Memory,
    line: Line,
    slots: Vec<Slot>,
    /// The driver has set the device up.
    running: AtomicBool,
    /// The machine stands still.
    paused: AtomicBool,
    ended: AtomicBool,
    observer: Arc<dyn StallObserver>,
    /// How often it has failed.
    failures: AtomicU32,
}

impl Shared {
    /// The device has failed, and its driver is told so.
    fn fail(&self, why: &str) {
        // A guest can break its devices as often as it likes, and the log has an end.
        match self.failures.fetch_add(1, Ordering::Relaxed) {
            MAX_TOLD.. => tracing::debug!("disk {}: {why}", self.index),
            _ => tracing::warn!("disk {}: {why}; it does nothing more until it is reset", self.index),
        }
        self.running.store(false, Ordering::SeqCst);
        self.line.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        self.line.raise(INTERRUPT_CONFIG);
    }
}

impl QueueOwner for Shared {
    fn stopped(&self) -> bool {
        !self.running.load(Ordering::SeqCst) || self.paused.load(Ordering::SeqCst)
    }

    fn used(&self) {
        self.line.raise(INTERRUPT_USED);
    }
}

/// The queues of one disk and their threads. They start when the driver is ready, and end when this is dropped.
pub struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts the threads of the disk with this index, fenced in or not.
    ///
    /// # Errors
    /// As the host has no more threads or event counters.
    pub fn start(
        index: usize,
        block: Arc<Block>,
        memory: Memory,
        observer: Arc<dyn StallObserver>,
        sandbox: bool,
    ) -> io::Result<Self> {
        let line = Line { status: 0.into(), pending: 0.into(), interrupt: EventFd::new(EFD_NONBLOCK)? };
        let slot = |_| {
            let queue = Queue::new(QUEUE_SIZE).map_err(io::Error::other)?;
            Ok::<_, io::Error>(Slot { queue: Mutex::new(queue), kick: EventFd::new(0)? })
        };
        let slots = (0..block.queues()).map(slot).collect::<Result<Vec<_>, _>>()?;
        let (running, paused, ended, failures) = Default::default();
        let shared = Arc::new(Shared { index, block, memory, line, slots, running, paused, ended, observer, failures });
        let mut workers = Self { threads: Vec::new(), shared };
        for number in 0..workers.shared.slots.len() {
            let shared = Arc::clone(&workers.shared);
            let thread = std::thread::Builder::new().name(format!("disk {index} queue {number}"));
            workers.threads.push(thread.spawn(move || {
                if sandbox && let Err(error) = sandbox::enter(Kind::Disk) {
                    return shared.fail(&format!("a thread has no sandbox: {error}"));
                }
                serve(&shared, number);
            })?);
        }
        Ok(workers)
    }

    /// The device behind the queues.
    #[must_use]
    pub fn block(&self) -> &Block {
        &self.shared.block
    }

    /// Status and interrupt.
    #[must_use]
    pub fn line(&self) -> &Line {
        &self.shared.line
    }

    /// What wakes the thread of a queue.
    #[must_use]
    pub fn kick_of(&self, queue: usize) -> Option<&EventFd> {
        self.shared.slots.get(queue).map(|slot| &slot.kick)
    }

    /// Wakes the thread of a queue. There may be no such queue: the guest says which.
    pub fn kick(&self, queue: usize) {
        if let Some(slot) = self.shared.slots.get(queue) {
            let _ = slot.kick.write(1);
        }
    }

    /// A queue, once its thread has finished with the request under way.
    #[must_use]
    pub fn queue(&self, queue: usize) -> Option<MutexGuard<'_, Queue>> {
        self.shared.slots.get(queue).map(lock)
    }

    /// The driver has set the device up: serve.
    pub fn run(&self) {
        self.shared.running.store(true, Ordering::SeqCst);
        self.kick_all();
    }

    /// Forgets everything that the driver has set up. Requests under way are finished first.
    pub fn reset(&self) {
        self.shared.running.store(false, Ordering::SeqCst);
        for slot in &self.shared.slots {
            lock(slot).reset();
        }
        self.shared.line.status.store(0, Ordering::SeqCst);
        self.shared.line.pending.store(0, Ordering::SeqCst);
    }

    /// Stops serving; when it returns no request is under way.
    pub fn pause(&self) {
        self.shared.paused.store(true, Ordering::SeqCst);
        for slot in &self.shared.slots {
            drop(lock(slot));
        }
    }

    /// Goes on, also with requests that were kept.
    pub fn resume(&self) {
        self.shared.paused.store(false, Ordering::SeqCst);
        self.kick_all();
    }

    fn kick_all(&self) {
        for slot in &self.shared.slots {
            let _ = slot.kick.write(1);
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.shared.running.store(false, Ordering::SeqCst);
        self.kick_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn lock(slot: &Slot) -> MutexGuard<'_, Queue> {
    slot.queue.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(shared: &Shared, number: usize) {
    let slot = &shared.slots[number];
    loop {
        if slot.kick.read().is_err() || shared.ended.load(Ordering::SeqCst) {
            return;
        }
        let mut queue = lock(slot);
        if shared.stopped() || !queue.ready() {
            continue;
        }
        match shared.block.serve(&shared.memory, &mut queue, shared) {
            Ok(Served::Answered) => {}
            Ok(Served::Stalled(stall)) => {
                // Whoever is told may want the queue.
                drop(queue);
                shared.observer.stalled(shared.index, stall);
            }
            Err(broken) => {
                drop(queue);
                shared.fail(&broken.to_string());
            }
        }
    }
}
