//! A virtual machine with its name: states, what leads from one to another, and what happens meanwhile.

mod console;
mod control;
mod hook;
mod identity;
mod incidents;
mod saving;
mod serial;
mod state;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhd_core::{Error, ErrorKind, LiveDisk};
use vhd_service::events::Events;
use vhd_service::space::Watch;

pub use console::SharedConsole;
pub use control::{is_snapshot_of, running, socket_of};
pub use hook::run_at_events;
pub use saving::{Discarded, discard_state};
pub use serial::{SerialSocket, SerialWriter};
pub use state::{Command, Reason, State};

use crate::life::{Hardware, Incident, Life, Reporter, StartError};
use crate::loader::Boot;
use crate::virtio::block::{Block, BlockOptions};

/// How long input waits for a port that is busy.
const BUSY_PORT: Duration = Duration::from_millis(200);

/// A disk of a machine.
#[derive(Clone, Debug)]
pub struct MachineDisk {
    /// The disk, whose leaf may change while the machine runs.
    pub live: LiveDisk,
    /// How the guest sees it.
    pub options: BlockOptions,
}

/// What a machine is.
#[derive(Clone, Debug)]
pub struct Definition {
    /// Its name: what scripts and commands know it by.
    pub name: String,
    /// vCPUs.
    pub cpus: u8,
    /// Bytes of memory.
    pub memory: u64,
    /// What is started.
    pub boot: Boot,
    /// Its disks, in the order in which the guest finds them.
    pub disks: Vec<MachineDisk>,
    /// Bytes that must be free on the volumes of its disks: with fewer there is a warning, with a quarter of them left
    /// the machine is paused. Zero turns both off.
    pub low_space: u64,
    /// Where its saved state goes; without it, it can't be saved.
    pub state_file: Option<PathBuf>,
    /// Whether the threads that the guest speaks to are fenced in: see [`crate::sandbox`].
    pub sandbox: bool,
    /// The configuration that it is of: after a snapshot it names the new leaves.
    pub config_file: Option<PathBuf>,
    /// Whether that is registered; nothing without a configuration.
    pub registered: Option<bool>,
    /// The script that is run at events, for whoever asks: see [`run_at_events`].
    pub on_event: Option<PathBuf>,
}

/// A machine. A cheap clone; the guest ends when the last one is dropped.
#[derive(Clone)]
pub struct Machine(Arc<Owner>);

/// What the last handle takes with it. Nobody has the disks open any more when it is gone.
struct Owner {
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
    /// What is watched for too little space.
    watches: Vec<Watch>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.watches.clear();
        self.shared.lock().life = None;
        let _ = self.shared.reports.send((0, Incident::Over));
        // What it hears may drop the machine: a thread can't wait for itself.
        if let Some(listener) = self.listener.take().filter(|thread| thread.thread().id() != std::thread::current().id()) {
            let _ = listener.join();
        }
    }
}

struct Shared {
    definition: Definition,
    hardware: Hardware,
    console: SharedConsole,
    events: Events,
    reports: Sender<(u64, Incident)>,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    state: State,
    life: Option<Life>,
    /// Lives so far: what an old one still reports is not heard.
    lives: u64,
    /// Free bytes of the full volume when the machine was paused for it, and which disk it was.
    full: Option<(usize, u64)>,
}

impl Machine {
    /// A machine that is off. Its serial port writes to `console`.
    ///
    /// # Errors
    /// As the host has no thread for it.
    pub fn new(definition: Definition, console: SharedConsole, events: Events) -> Result<Self, Error> {
        let blocks = definition.disks.iter().map(|disk| Arc::new(Block::new(disk.live.disk(), &disk.options)));
        let (cpus, memory, sandbox) = (definition.cpus, definition.memory, definition.sandbox);
        let hardware = Hardware { cpus, memory, disks: blocks.collect(), sandbox };
        let (reports, incidents) = channel();
        // Whatever is there: a guest that is to be saved needs the place.
        let saved = definition.state_file.as_ref().is_some_and(|file| file.symlink_metadata().is_ok());
        let state = if saved { State::Saved } else { State::Off };
        let inner = Inner { state, life: None, lives: 0, full: None };
        let (inner, changed) = (Mutex::new(inner), Condvar::new());
        let shared = Arc::new(Shared { definition, hardware, console, events, reports, inner, changed });
        let listener = incidents::listen(&shared, incidents)?;
        let watches = if shared.definition.low_space > 0 { incidents::watch_space(&shared)? } else { Vec::new() };
        Ok(Self(Arc::new(Owner { shared, listener: Some(listener), watches })))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.shared.definition.name
    }

    /// What it is.
    #[must_use]
    pub fn definition(&self) -> &Definition {
        &self.0.shared.definition
    }

    /// How it is with it now.
    #[must_use]
    pub fn state(&self) -> State {
        self.0.shared.lock().state.clone()
    }

    /// Waits until its state is such, at most so long. Returns the state.
    pub fn wait(&self, patience: Duration, mut such: impl FnMut(&State) -> bool) -> State {
        let end = Instant::now() + patience;
        let mut inner = self.0.shared.lock();
        while !such(&inner.state) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            inner = self.0.shared.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        inner.state.clone()
    }

    /// Does a command.
    ///
    /// # Errors
    /// `Refused` where the state does not allow it; as it fails. The state is as it was then, but for a machine whose
    /// new life does not begin: that one is off.
    pub fn command(&self, command: Command) -> Result<(), Error> {
        let mut inner = self.0.shared.lock();
        inner.state.check(command).map_err(|error| error.at(Path::new(self.name())))?;
        match command {
            Command::Start => self.0.shared.begin(&mut inner, "started")?,
            Command::Reset => self.0.shared.begin(&mut inner, "reset")?,
            Command::Pause => self.0.shared.pause(&mut inner, Reason::Asked),
            Command::Resume => self.0.shared.resume(&mut inner),
            Command::Off => self.0.shared.end(&mut inner),
            Command::Save => self.0.shared.save(&mut inner)?,
            Command::Restore => self.0.shared.restore(&mut inner)?,
            Command::DiscardState => self.0.shared.discard(&mut inner)?,
            Command::Shutdown => self.0.shared.press_power_button(&inner)?,
        }
        Ok(())
    }

    /// Which kernel the guest that is on was started with, where it was found on a disk.
    #[must_use]
    pub fn chosen_kernel(&self) -> Option<String> {
        self.0.shared.lock().life.as_ref()?.chosen().map(str::to_owned)
    }

    /// Bytes for the guest's serial port. They are lost, as on a wire, when the port waits for its console.
    pub fn input(&self, bytes: &[u8]) {
        // What is told to the machine must not wait for that.
        let Some(port) = self.0.shared.lock().life.as_ref().map(Life::serial) else { return };
        let begin = Instant::now();
        while begin.elapsed() < BUSY_PORT {
            match port.try_lock() {
                Ok(mut port) => return port.input(bytes),
                Err(TryLockError::Poisoned(port)) => return port.into_inner().input(bytes),
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Does something while the guest stands still, and lets it go on if it ran.
    ///
    /// # Errors
    /// As `act` fails.
    pub fn standing_still<T>(&self, act: impl FnOnce(&[MachineDisk]) -> Result<T, Error>) -> Result<T, Error> {
        let inner = self.0.shared.lock();
        let running = inner.state == State::Running;
        if let (true, Some(life)) = (running, &inner.life) {
            life.pause();
        }
        let answer = act(&self.0.shared.definition.disks);
        if let (true, Some(life)) = (running, &inner.life) {
            life.resume();
        }
        answer
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, inner: &mut Inner, state: State) {
        inner.state = state;
        self.changed.notify_all();
    }

    /// A new life.
    fn begin(&self, inner: &mut Inner, kind: &'static str) -> Result<(), Error> {
        inner.life = None;
        inner.full = None;
        inner.lives += 1;
        let reporter = Reporter { life: inner.lives, to: self.reports.clone() };
        let life = Life::boot(&self.hardware, &self.definition.boot, self.console.writer(), reporter);
        match life {
            Ok(life) => {
                life.resume();
                inner.life = Some(life);
                self.set(inner, State::Running);
                self.events.note(kind, &self.definition.name, format!("the machine was {kind}"));
                Ok(())
            }
            Err(error) => {
                self.set(inner, State::Off);
                Err(start_error(&error))
            }
        }
    }

    fn pause(&self, inner: &mut Inner, reason: Reason) {
        if let Some(life) = &inner.life {
            life.pause();
        }
        let message = format!("the machine stands still: {reason}");
        let name = &self.definition.name;
        if reason == Reason::Asked {
            self.events.note("paused", name, message)
        } else {
            self.events.warn("paused", name, message)
        }
        self.set(inner, State::Paused(reason));
    }

    /// Asks the guest to turn itself off; it may take its time, or not listen.
    fn press_power_button(&self, inner: &Inner) -> Result<(), Error> {
        let Some(life) = &inner.life else { return Ok(()) };
        life.press_power_button().map_err(|error| Error::io(error, "the power button is stuck"))?;
        self.events.note("shutdown", &self.definition.name, "the guest is asked to turn itself off");
        Ok(())
    }

    fn resume(&self, inner: &mut Inner) {
        inner.full = None;
        if let Some(life) = &inner.life {
            life.resume();
        }
        self.events.note("resumed", &self.definition.name, "the machine goes on");
        self.set(inner, State::Running);
    }

    fn end(&self, inner: &mut Inner) {
        inner.life = None;
        inner.full = None;
        for disk in &self.definition.disks {
            // What the guest did not flush may be lost, and is not if it can be helped.
            if let Err(error) = disk.live.disk().flush() {
                tracing::warn!("{error}");
            }
        }
        self.events.note("off", &self.definition.name, "the machine is off");
        self.set(inner, State::Off);
    }
}

/// One error type for all who command machines.
fn start_error(error: &StartError) -> Error {
    use crate::kvm::KvmError;
    match error {
        StartError::Kvm(KvmError::Missing) => Error::new(ErrorKind::NotFound, error.to_string()),
        StartError::Kvm(KvmError::Forbidden) => Error::new(ErrorKind::Refused, error.to_string()),
        StartError::Kvm(_) => Error::new(ErrorKind::Io, error.to_string()),
        StartError::Load(load) => Error::new(ErrorKind::InvalidInput, load.why.clone()).at(&load.path),
        StartError::Hardware(why) => Error::new(ErrorKind::InvalidInput, why.clone()),
    }
}
