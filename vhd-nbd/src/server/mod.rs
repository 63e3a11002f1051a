//! The server: listens, serves each client in tasks of its own, and ends in order.

mod accept;
mod admin;
mod negotiate;

pub use accept::Listen;
pub use admin::Admin;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, Semaphore};
use tokio_rustls::TlsAcceptor;
use vhd_core::{Error, Result};

use self::accept::Listener;
use crate::buffers::Pool;
use crate::client::{Clients, Phase};
use crate::connection::Shared;
use crate::export::Table;
use crate::handshake::TlsPolicy;
use crate::limits::{Budget, Limits};

/// Threads that wait for disks at most: those of a few that hang, and some more.
const DISK_THREADS: usize = 512;
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
        Arc::new(Self { table, clients: Clients::default(), shared, options, stop: Notify::new(), left: Notify::new() })
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
        raise_descriptor_limit();
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
        let listener = Listener::bind(listen).await?;
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
        self.end_clients().await;
        sweeping.abort();
        Ok(())
    }

    async fn served_once(&self) {
        while !(self.options.once && self.clients.are_done()) {
            self.left.notified().await;
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

/// A connection is a descriptor: what the user may have, the server may use.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::debug!("the number of open files is limited: {error}");
    }
}
