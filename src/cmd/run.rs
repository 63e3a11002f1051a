//! `vhd run`

mod terminal;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::{Args, ValueEnum};
use vhd_core::ops::undo;
use vhd_core::storage::folder_of;
use vhd_core::{Error, ErrorKind, LiveDisk, Progress};
use vhd_service::control::Control;
use vhd_service::events::Events;
use vhd_vmm::loader::Boot;
use vhd_vmm::machine::{Command, Definition, Machine, MachineDisk, SharedConsole, State, run_at_events, socket_of};
use vhd_vmm::sandbox::{self, Access, Files};
use vhd_vmm::virtio::block::{BlockOptions, Geometry, Policies, Policy};

use super::ChainArgs;
use crate::output::{Answer, Context};
use crate::sizes;

/// How often it is looked whether the machine is to end.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Arguments of `vhd run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The kernel: an ELF file or a bzImage; without it, the one that is installed on the first disk, as its boot menu says
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line; added to that of the boot menu without --kernel
    #[arg(long, value_name = "LINE", default_value = "console=ttyS0 panic=-1")]
    append: String,
    /// A disk; may be given more than once, the guest finds them in this order
    #[arg(long = "disk", value_name = "IMAGE")]
    disks: Vec<PathBuf>,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = sizes::parse)]
    memory: u64,
    /// CPUs, 1 to 8
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u8,
    /// The machine's name; that of the first disk by default
    #[arg(long)]
    name: Option<String>,
    /// Queues of each disk
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    queues: u16,
    /// Refuse all writes to the disks
    #[arg(long)]
    read_only: bool,
    /// Keep what is written apart, on an undo disk for each disk, all as one
    #[arg(long, conflicts_with = "read_only")]
    undo: bool,
    /// What becomes of the undo disks at the end; asked on a terminal, else kept
    #[arg(long, value_name = "WHAT", requires = "undo")]
    at_end: Option<AtEnd>,
    /// When a disk fails: tell the guest, or pause the machine
    #[arg(long, value_name = "POLICY", default_value = "report")]
    on_error: OnFailure,
    /// When the host's volume is full: tell the guest, or pause the machine until there is room
    #[arg(long, value_name = "POLICY", default_value = "pause")]
    on_no_space: OnFailure,
    /// Warn when fewer bytes are free on a disk's volume, and pause when a quarter of them is left; 0 for neither
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = sizes::parse)]
    low_space: u64,
    /// Where the guest goes when it is saved, and where it goes on from when there is such a file; NAME.vsv beside the first
    /// disk by default
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// A script to run at each event, with the machine's name, the event and a message
    #[arg(long, value_name = "SCRIPT")]
    on_event: Option<PathBuf>,
    /// Write even if a saved state or a child relies on a disk
    #[arg(long)]
    force: bool,
    /// Run without the sandbox, to debug
    #[arg(long)]
    no_sandbox: bool,
    #[command(flatten)]
    open: ChainArgs,
}

/// What becomes of undo disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum AtEnd {
    /// Move what was written into the disks
    Commit,
    /// Throw it away
    Discard,
    /// Leave the undo disks: the next run goes on with them
    Keep,
}

/// What is done about a failure.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum OnFailure {
    Report,
    Pause,
}

impl From<OnFailure> for Policy {
    fn from(policy: OnFailure) -> Self {
        match policy {
            OnFailure::Report => Self::Report,
            OnFailure::Pause => Self::Pause,
        }
    }
}

impl RunArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let stop = stop_signals()?;
        let name = self.name();
        let socket = socket_of(&name)?;
        let disks = self.open_disks(context)?;
        let state = self.live(&name, &socket, disks, &stop, context)?;
        // The disks are closed now. A guest that was saved needs its undo disks to go on.
        if state != State::Saved {
            self.end_undo(context)?;
        }
        if let State::Faulted(why) = state {
            return Err(Error::new(ErrorKind::Io, format!("the guest can't go on: {why}")).at(Path::new(&name)));
        }
        Ok(Answer::Yes)
    }

    fn name(&self) -> String {
        let from_disk = || Some(self.disks.first()?.file_stem()?.to_string_lossy().into_owned());
        self.name.clone().or_else(from_disk).unwrap_or_else(|| "vm".to_owned())
    }

    fn state_file(&self, name: &str) -> PathBuf {
        let folder = self.disks.first().map_or(Path::new("."), |disk| folder_of(disk));
        self.state.clone().unwrap_or_else(|| folder.join(format!("{name}.vsv")))
    }

    /// The machine, until it is off. Returns its last state.
    fn live(
        &self,
        name: &str,
        socket: &Path,
        disks: Vec<MachineDisk>,
        stop: &AtomicBool,
        context: &Context,
    ) -> Result<State, Error> {
        let boot = Boot { kernel: self.kernel.clone(), initrd: self.initrd.clone(), command_line: self.append.clone() };
        let definition = Definition {
            name: name.to_owned(),
            cpus: self.cpus,
            memory: self.memory,
            boot,
            disks,
            low_space: self.low_space,
            state_file: Some(self.state_file(name)),
            sandbox: !self.no_sandbox,
        };
        let events = Events::default();
        let hook = self.on_event.as_deref().map(|script| run_at_events(script, &events)).transpose()?;
        if !self.no_sandbox
            && let Some(note) = sandbox::confine(&self.files(&definition, socket)?)?
        {
            context.note(note);
        }
        // Unbuffered: what the guest says is seen at once, and a reader that does not read stops the guest alone.
        let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(|error| Error::io(error, "stdout can't be written"))?;
        let machine = Machine::new(definition, SharedConsole::new(File::from(stdout)), events.clone())?;
        let control = Control::bind(socket, Arc::new(machine.clone()))?;
        // A guest that was saved goes on; to begin anew, its state must be discarded.
        let begin = if machine.state() == State::Saved { Command::Restore } else { Command::Start };
        machine.command(begin)?;
        if let Some(chosen) = machine.chosen_kernel() {
            context.note(&chosen);
        }
        let terminal = terminal::Terminal::attach(machine.clone())?;
        let state = wait(&machine, stop, &terminal);
        drop((terminal, control));
        if let State::Running | State::Paused(_) | State::Faulted(_) = state {
            machine.command(Command::Off)?;
        }
        drop((machine, events));
        if let Some(hook) = hook {
            let _ = hook.join();
        }
        Ok(state)
    }

    /// What the machine needs of the host's files from now on.
    fn files(&self, definition: &Definition, socket: &Path) -> Result<Files, Error> {
        let mut files = Files::default();
        for disk in &definition.disks {
            let images = disk.live.with_chain(|chain| {
                let layers = chain.layers().iter().enumerate();
                Ok(layers.map(|(depth, layer)| (layer.path().to_owned(), depth == 0 && !self.read_only)).collect::<Vec<_>>())
            })?;
            images.iter().for_each(|(image, writable)| files.add_image(image, *writable));
        }
        // What an undo disk is committed to.
        self.disks.iter().filter(|_| self.undo).for_each(|image| files.add_image(image, true));
        let boot = &definition.boot;
        boot.initrd.iter().chain(&boot.kernel).for_each(|file| files.add(file, Access::Read));
        files.add(folder_of(&self.state_file(&definition.name)), Access::Write);
        files.add(folder_of(socket), Access::Sockets);
        files.add(Path::new("/dev/kvm"), Access::Device);
        Ok(files)
    }

    fn open_disks(&self, context: &Context) -> Result<Vec<MachineDisk>, Error> {
        let mut images = self.disks.clone();
        if self.undo {
            let undo_disks = images.iter().map(|image| undo::undo_of(image, None)).collect::<Result<Vec<_>, _>>()?;
            // A session that was kept goes on.
            if !undo_disks.iter().all(|undo| undo.exists()) {
                let (_, notes) = undo::start(&images, None, &self.open.options(false, self.force))?;
                notes.iter().for_each(|note| context.note(note));
            }
            images = undo_disks;
        }
        images.iter().map(|image| self.open_disk(image)).collect()
    }

    fn open_disk(&self, image: &Path) -> Result<MachineDisk, Error> {
        // What is tolerated is not written to.
        let writable = !self.read_only && !self.open.tolerant;
        let live = LiveDisk::open(image, &self.open.options(writable, self.force))?;
        let footer = live.with_chain(|chain| Ok(chain.layers()[0].image().map(|image| image.footer().clone())))?;
        let geometry = footer.as_ref().map(|footer| {
            let geometry = footer.geometry();
            Geometry { cylinders: geometry.cylinders, heads: geometry.heads, sectors: geometry.sectors }
        });
        let serial = footer.map_or_else(String::new, |footer| {
            let uuid = uuid::Uuid::from_bytes(footer.uuid()).simple().to_string();
            uuid[..20].to_owned()
        });
        let policies = Policies { on_error: self.on_error.into(), on_no_space: self.on_no_space.into() };
        let options = BlockOptions { serial, queues: self.queues, read_only: !writable, geometry, policies };
        Ok(MachineDisk { live, options })
    }

    /// Does with the undo disks what the user says.
    fn end_undo(&self, context: &Context) -> Result<(), Error> {
        if !self.undo || self.disks.is_empty() {
            return Ok(());
        }
        let what = match self.at_end {
            Some(what) => what,
            None if io::stdin().is_terminal() => ask()?,
            None => AtEnd::Keep,
        };
        let chain = self.open.options(true, self.force);
        match what {
            AtEnd::Keep => context.note("what was written is kept on undo disks; vhd undo commit or discard ends that"),
            AtEnd::Discard => drop(undo::discard(&self.disks, None, self.force, &chain)?),
            AtEnd::Commit => {
                let commit = |progress: &Progress| undo::commit(&self.disks, None, self.force, &chain, progress);
                context.with_progress("committing", commit)?;
            }
        }
        Ok(())
    }
}

/// Waits until the machine is off, the user or a signal says so, or it can't go on and nobody could tell it to.
fn wait(machine: &Machine, stop: &AtomicBool, terminal: &terminal::Terminal) -> State {
    loop {
        let state = machine.wait(LOOK_EVERY, |state| matches!(state, State::Off | State::Saved | State::Faulted(_)));
        let over = matches!(state, State::Off | State::Saved | State::Faulted(_));
        if over || stop.load(Ordering::SeqCst) || terminal.wants_to_end() {
            return state;
        }
    }
}

fn stop_signals() -> Result<Arc<AtomicBool>, Error> {
    let stop = Arc::<AtomicBool>::default();
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(|error| Error::io(error, "signals can't be heard"))?;
    }
    Ok(stop)
}

fn ask() -> Result<AtEnd, Error> {
    let failed = |error: io::Error| Error::io(error, "the answer can't be read");
    loop {
        write!(io::stderr(), "What was written to the disks: [c]ommit, [d]iscard or [k]eep? ").map_err(failed)?;
        let mut answer = String::new();
        let len = io::stdin().read_line(&mut answer).map_err(failed)?;
        match answer.trim() {
            "c" | "commit" => return Ok(AtEnd::Commit),
            "d" | "discard" => return Ok(AtEnd::Discard),
            "k" | "keep" => return Ok(AtEnd::Keep),
            // The terminal is gone: nothing is lost that way.
            _ if len == 0 => return Ok(AtEnd::Keep),
            _ => {}
        }
    }
}
