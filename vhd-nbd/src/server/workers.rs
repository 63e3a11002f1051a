//! The threads that serve clients: one for each processor, with a runtime of its own.
//!
//! A connection stays with its thread. A runtime of several threads would move work between them, and so wake a second
//! one for most requests: with few of them at a time that costs more than the requests themselves.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Threads that wait for disks at most, of each worker: for a few disks that hang, and some more.
const DISK_THREADS: usize = 512;

/// The threads; they end when this is dropped, and what they were at is left.
#[derive(Debug)]
pub(super) struct Workers(Vec<Worker>);

#[derive(Debug)]
struct Worker {
    handle: Handle,
    clients: Arc<AtomicUsize>,
    /// Its thread ends with this.
    _stop: oneshot::Sender<()>,
}

/// One client more, until it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Workers {
    /// Starts them.
    pub(super) fn start() -> io::Result<Self> {
        let cores = thread::available_parallelism().map_or(2, usize::from);
        (0..cores.max(2)).map(|_| Worker::start()).collect::<io::Result<Vec<_>>>().map(Self)
    }

    /// Serves a client in the thread that has the fewest.
    pub(super) fn spawn(&self, client: impl Future<Output = ()> + Send + 'static) -> Option<JoinHandle<()>> {
        let worker = self.0.iter().min_by_key(|worker| worker.clients.load(Ordering::Relaxed))?;
        worker.clients.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(Arc::clone(&worker.clients));
        Some(worker.handle.spawn(async move {
            client.await;
            drop(counted);
        }))
    }
}

impl Worker {
    fn start() -> io::Result<Self> {
        let mut builder = Builder::new_current_thread();
        let runtime = builder.max_blocking_threads(DISK_THREADS).thread_name("vhd-disk").enable_all().build()?;
        let (handle, clients) = (runtime.handle().clone(), Arc::<AtomicUsize>::default());
        let (stop, stopped) = oneshot::channel();
        thread::Builder::new().name("vhd-nbd".into()).spawn(move || {
            // What ends it is that the sender is gone.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_background();
        })?;
        Ok(Self { handle, clients, _stop: stop })
    }
}
