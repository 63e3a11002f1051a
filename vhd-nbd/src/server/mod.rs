//! The server: listens, serves each client in tasks of its own, and ends in order.

mod accept;
mod admin;
mod negotiate;

pub use accept::Listen;
pub use admin::Admin;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, Semaphore};
use tokio_rustls::TlsAcceptor;
use vhd_core::{Error, ErrorKind, Result};
use vhd_service::{descriptors, log};

use self::accept::Listener;
use crate::buffers::Pool;
use crate::client::{Clients, Phase};
use crate::connection::Shared;
use crate::export::Table;
use crate::handshake::TlsPolicy;
use crate::limits::{Budget, Limits};
use crate::pipes;

/// Descriptors of a connection: its socket, and the same again for who waits until it can be read, or written.
const OF_A_CONNECTION: usize = 3;
/// Connections that made room for others and have not ended yet, at most.
const LEAVING: usize = 8;
/// How long they may take before others are refused for it.
const LEAVE_WITHIN: Duration = Duration::from_secs(1);
/// Descriptors of the running server itself: the runtime's, the socket that is listened on, one more that is taken from it.
const RUNNING: usize = 12;
/// Threads that wait for disks at most: those of a few that hang, and some more.
const DISK_THREADS: usize = 512;
/// Signals that come within this time of the one that ends the server are of the same cause.
const ONE_CAUSE: Duration = Duration::from_secs(1);
/// How often clients are looked at.
const SWEEP: Duration = Duration::from_millis(500);
/// How long a disk may take to finish what was begun, when the server ends.
const DISK_PATIENCE: Duration = Duration::from_secs(60);

/// How clients may encrypt.
#[derive(Clone)]
pub struct Tls {
    /// What makes a stream an encrypted one.
    pub acceptor: TlsAcceptor,
    /// Plain clients are refused.
    pub required: bool,
}

/// What a server needs to know.
#[derive(Clone, Default)]
pub struct ServerOptions {
    /// What clients may take.
    pub limits: Limits,
    /// Encryption.
    pub tls: Option<Tls>,
    /// End when clients were served and all are gone.
    pub once: bool,
}

/// A server, to be shared with what controls it.
pub struct Server {
    table: Table,
    clients: Clients,
    shared: Shared,
    options: ServerOptions,
    /// How many connections there may be: [`Server::fit`].
    most: AtomicUsize,
    /// How many there are, with those that make room and have not ended.
    live: Arc<AtomicUsize>,
    stop: Notify,
    /// A client is gone.
    left: Notify,
}

impl Server {
    /// A server of these exports.
    #[must_use]
    pub fn new(table: Table, options: ServerOptions) -> Arc<Self> {
        let budget = Arc::new(Budget::new(options.limits.total_bytes));
        let threads = Arc::new(Semaphore::new(cores()));
        let shared = Shared { limits: options.limits.clone(), budget, pool: Arc::<Pool>::default(), threads };
        let (most, live) = (AtomicUsize::new(options.limits.connections), Arc::default());
        let (stop, left) = (Notify::new(), Notify::new());
        Arc::new(Self { table, clients: Clients::default(), shared, options, most, live, stop, left })
    }

    /// Fits the number of connections to the descriptors that this process may still have, `kept` of which are for others: so
    /// that clients can't take those. To be called when the images are open, before it runs. Returns how many connections there
    /// may be.
    ///
    /// # Errors
    /// `InvalidInput` when there is no place for one, or not for those that the user `asked` for.
    pub fn fit(&self, asked: Option<usize>, kept: usize) -> Result<usize> {
        let (limit, left) = (descriptors::limit(), descriptors::left());
        let room = left.saturating_sub(kept + RUNNING + LEAVING * OF_A_CONNECTION);
        let pipes = (room / 16).min(pipes::MOST);
        let most = (room - 2 * pipes) / OF_A_CONNECTION;
        let wanted = asked.unwrap_or(self.options.limits.connections);
        if most == 0 || asked.is_some_and(|asked| asked > most) {
            let message = format!(
                "{wanted} connections need {} open files, and this process may have {limit}, of which {} are left for connections: raise \
                 the limit (ulimit -n, LimitNOFILE=), or let in fewer with --max-connections",
                wanted * OF_A_CONNECTION,
                most * OF_A_CONNECTION
            );
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        self.shared.pool.limit_pipes(pipes);
        self.most.store(wanted.min(most), Ordering::Relaxed);
        Ok(wanted.min(most))
    }

    /// The exports.
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// The clients.
    #[must_use]
    pub fn clients(&self) -> &Clients {
        &self.clients
    }

    /// Asks it to end as SIGTERM does.
    pub fn stop(&self) {
        self.stop.notify_one();
    }

    fn tls_policy(&self) -> TlsPolicy {
        match &self.options.tls {
            None => TlsPolicy::Off,
            Some(tls) if tls.required => TlsPolicy::Required,
            Some(_) => TlsPolicy::Offered,
        }
    }

    /// Serves until SIGTERM, SIGINT or SIGHUP comes, [`Server::stop`] is called, or it was to serve once and has. `ready` is
    /// called with the URI when clients may come. Then what was begun is finished, and the images are closed.
    ///
    /// # Errors
    /// As the address can't be listened on; as `ready` fails; as an image can't be closed, which means that data may be lost.
    pub fn run(self: &Arc<Self>, listen: &Listen, ready: impl FnOnce(&str) -> Result<()>) -> Result<()> {
        let runtime = runtime().map_err(|error| Error::io(error, "the server can't be started"))?;
        let served = runtime.block_on(self.serve(listen, ready));
        let closed = self.close();
        // Nothing is left that matters: clients are gone, or were given up.
        runtime.shutdown_background();
        served.and(closed)
    }

    async fn serve(self: &Arc<Self>, listen: &Listen, ready: impl FnOnce(&str) -> Result<()>) -> Result<()> {
        let failed = |error: io::Error| Error::io(error, "signals can't be waited for");
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut hang_up = signal(SignalKind::hangup()).map_err(failed)?;
        // A name may have to be looked up first.
        let listener = tokio::select! {
            bound = Listener::bind(listen) => bound?,
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hang_up.recv() => return Ok(()),
        };
        ready(&listener.uri(self.tls_policy() == TlsPolicy::Required))?;
        let sweeping = tokio::spawn(Arc::clone(self).sweep());
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hang_up.recv() => {}
            () = self.stop.notified() => {}
            () = self.served_once() => {}
            () = listener.accept(self) => {}
        }
        drop(listener);
        tokio::spawn(end_at_once());
        self.end_clients().await;
        sweeping.abort();
        Ok(())
    }

    async fn served_once(&self) {
        while !(self.options.once && self.clients.are_done()) {
            self.left.notified().await;
        }
    }

    /// Waits until connections that made room have ended, but not for those that a disk holds.
    async fn room(&self) {
        let began = Instant::now();
        let full = || self.live.load(Ordering::Relaxed) >= self.most.load(Ordering::Relaxed) + LEAVING;
        while full() && began.elapsed() < LEAVE_WITHIN {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn sweep(self: Arc<Self>) {
        let mut seen = std::collections::HashMap::new();
        loop {
            tokio::time::sleep(SWEEP).await;
            self.clients.sweep(self.options.limits.handshake, self.options.limits.idle, &mut seen);
        }
    }

    /// Lets clients finish what they began, for as long as the grace lasts.
    async fn end_clients(&self) {
        let gone = async || {
            while !self.clients.all().is_empty() {
                self.left.notified().await;
            }
        };
        self.clients.end(Phase::Ending);
        if tokio::time::timeout(self.options.limits.grace, gone()).await.is_err() {
            tracing::warn!("{} clients do not take their replies and are dropped", self.clients.all().len());
            self.clients.end(Phase::Ended);
            let _ = tokio::time::timeout(Duration::from_secs(5), gone()).await;
        }
    }

    fn close(&self) -> Result<()> {
        let mut result = Ok(());
        for export in self.table.all() {
            let began = Instant::now();
            export.mark_removed();
            while export.clients() > 0 && began.elapsed() < DISK_PATIENCE {
                std::thread::sleep(Duration::from_millis(2));
            }
            result = result.and(export.disk().close());
        }
        result
    }
}

/// Whoever can't wait for clients, or for a host that hangs, says so once more: that ends the process. What was flushed is safe.
async fn end_at_once() {
    // Several signals of one cause are one.
    tokio::time::sleep(ONE_CAUSE).await;
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return;
    };
    let status = tokio::select! {
        _ = terminate.recv() => 128 + SignalKind::terminate().as_raw_value(),
        _ = interrupt.recv() => 128 + SignalKind::interrupt().as_raw_value(),
    };
    log::say("vhd: ended by a second signal, before all was done: what was not flushed may be lost");
    log::flush();
    std::process::exit(status);
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).max(2)
}

fn runtime() -> io::Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    // Who has something to ask is looked for after a few of the others' steps: each is a request or more.
    builder.event_interval(8);
    builder.worker_threads(cores()).max_blocking_threads(DISK_THREADS).thread_name("vhd-nbd").enable_all();
    builder.build()
}
