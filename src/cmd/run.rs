//! `vhd run`

mod stop;
mod terminal;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::Args;
use vhd_core::chain::LinkedDisk;
use vhd_core::image::{Image, OpenOptions};
use vhd_core::ops::undo;
use vhd_core::storage::{FileStorage, folder_of};
use vhd_core::{Error, ErrorKind, LiveDisk, Progress};
use vhd_service::control::Control;
use vhd_service::events::Events;
use vhd_service::log;
use vhd_vmm::config::{AtEnd, Config, DiskConfig, Serial, Word};
use vhd_vmm::loader::Boot;
use vhd_vmm::machine::{
    Command, Definition, Machine, MachineDisk, SerialSocket, SerialWriter, SharedConsole, State, discard_state, run_at_events,
    socket_of,
};
use vhd_vmm::sandbox::{self, Access, Files};
use vhd_vmm::saved;
use vhd_vmm::virtio::block::{BlockOptions, Geometry, Policies, Policy};

use self::stop::Stop;
use super::ChainArgs;
use super::machine::{MachineArgs, Plan};
use crate::output::{Answer, Context};

/// How often it is looked whether the machine is to end.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long scripts are waited for when the user wants an end.
const LAST_SCRIPTS: Duration = Duration::from_secs(5);

/// The kernel's command line where nothing is said.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1";
/// Bytes of memory where nothing is said.
pub const MEMORY: u64 = 512 << 20;
/// Free bytes below which there is a warning, where nothing is said.
const LOW_SPACE: u64 = 64 << 20;

/// Arguments of `vhd run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// A configuration, or the name of one that vhd vm create made; options say otherwise for this run
    #[arg(value_name = "CONFIG.vmc|NAME")]
    config: Option<String>,
    #[command(flatten)]
    machine: MachineArgs,
    /// The machine's name; that of its configuration or of the first disk by default
    #[arg(long)]
    name: Option<String>,
    /// Forget a saved state, and begin anew
    #[arg(long)]
    discard_state: bool,
    /// Write even if a saved state or a child relies on a disk
    #[arg(long)]
    force: bool,
    /// Run without the sandbox, to debug
    #[arg(long)]
    no_sandbox: bool,
    #[command(flatten)]
    open: ChainArgs,
}

impl RunArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let mut plan = match &self.config {
            Some(config) => Plan::to_run(config, context)?,
            None => Plan { name: String::new(), config: Config::default(), file: None },
        };
        self.machine.apply(&mut plan.config)?;
        if let Some(name) = &self.name {
            plan.name.clone_from(name);
        } else if plan.name.is_empty() {
            let from_disk = plan.config.disks.first().and_then(|disk| disk.image.file_stem());
            plan.name = from_disk.map_or_else(|| "vm".to_owned(), |stem| stem.to_string_lossy().into_owned());
        }
        let run = Run { plan: &plan, open: &self.open, force: self.force, no_sandbox: self.no_sandbox };
        if self.discard_state && plan.state_file().symlink_metadata().is_ok() {
            run.discard_state(context)?;
        }
        run.run(context)
    }
}

/// One run of a machine.
pub struct Run<'a> {
    pub plan: &'a Plan,
    pub open: &'a ChainArgs,
    pub force: bool,
    pub no_sandbox: bool,
}

impl Run<'_> {
    /// From the start, or from the saved state, to the end.
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let stop = Stop::listen()?;
        let name = &self.plan.name;
        let socket = socket_of(name)?;
        let is_saved = saved::look(&self.plan.state_file())?.is_some();
        let disks = self.open_disks(is_saved, context)?;
        let state = self.live(&socket, disks, &stop, context)?;
        // The disks are closed now. A guest that was saved needs its undo disks to go on.
        if state != State::Saved {
            self.end_undo(&stop, context)?;
        }
        if let State::Faulted(why) = state {
            return Err(Error::new(ErrorKind::Io, format!("the guest can't go on: {why}")).at(Path::new(name)));
        }
        Ok(Answer::Yes)
    }

    /// Forgets the saved guest. Returns the images whose note was taken off.
    pub fn discard_state(&self, context: &Context) -> Result<Vec<PathBuf>, Error> {
        let (file, images) = (self.plan.state_file(), self.plan.may_be_noted()?);
        let discarded = discard_state(&file, &images, &self.open.options(true, self.force), self.force)?;
        discarded.notes.iter().for_each(|note| context.note(&note.to_string()));
        Ok(discarded.cleared)
    }

    fn boot(&self) -> Boot {
        let config = &self.plan.config;
        let command_line = config.append.clone().unwrap_or_else(|| COMMAND_LINE.to_owned());
        Boot { kernel: config.kernel.clone(), initrd: config.initrd.clone(), command_line }
    }

    /// The machine, until it is off. Returns its last state.
    fn live(&self, socket: &Path, disks: Vec<MachineDisk>, stop: &Stop, context: &Context) -> Result<State, Error> {
        let config = &self.plan.config;
        let definition = Definition {
            name: self.plan.name.clone(),
            cpus: config.cpus.unwrap_or(1),
            memory: config.memory.unwrap_or(MEMORY),
            boot: self.boot(),
            disks,
            low_space: config.low_space.unwrap_or(LOW_SPACE),
            state_file: Some(self.plan.state_file()),
            // Whoever asks may be in another folder.
            config_file: self.plan.file.as_ref().map(|(path, _)| std::path::absolute(path).unwrap_or_else(|_| path.clone())),
            registered: self.plan.file.as_ref().map(|(_, word)| *word == Word::Users),
            on_event: config.on_event.clone(),
            sandbox: !self.no_sandbox,
        };
        let events = Events::default();
        let hook = config.on_event.as_deref().map(|script| run_at_events(script, &events)).transpose()?;
        if !self.no_sandbox
            && let Some(note) = sandbox::confine(&self.files(&definition, socket)?)?
        {
            context.note(note);
        }
        // Its thread is fenced in, too.
        log::serve()?;
        let serial = SerialWriter::default();
        let console = match &config.serial {
            None | Some(Serial::Stdio) => SharedConsole::new(unbuffered_stdout()?),
            Some(Serial::None) => SharedConsole::new(io::sink()),
            Some(Serial::Unix(_)) => SharedConsole::new(serial.clone()),
        };
        let machine = Machine::new(definition, console, events.clone())?;
        let control = Control::bind(socket, Arc::new(machine.clone()))?;
        let port = match &config.serial {
            Some(Serial::Unix(path)) => Some(SerialSocket::serve(path, machine.clone(), serial)?),
            _ => None,
        };
        // A guest that was saved goes on; to begin anew, its state must be discarded.
        let begin = if machine.state() == State::Saved { Command::Restore } else { Command::Start };
        machine.command(begin)?;
        if let Some(chosen) = machine.chosen_kernel() {
            context.note(&chosen);
        }
        // From here on its end is one in good order.
        stop.in_order(true);
        let terminal = match &config.serial {
            None | Some(Serial::Stdio) => Some(terminal::Terminal::attach(machine.clone())?),
            _ => None,
        };
        let state = wait(&machine, stop, || terminal.as_ref().is_some_and(terminal::Terminal::wants_to_end));
        drop((terminal, control));
        if let State::Running | State::Paused(_) | State::Faulted(_) = state {
            machine.command(Command::Off)?;
        }
        drop((port, machine, events));
        stop.in_order(false);
        if let Some(hook) = hook {
            wait_for_scripts(hook, stop, context);
        }
        Ok(state)
    }

    /// What the machine needs of the host's files from now on.
    fn files(&self, definition: &Definition, socket: &Path) -> Result<Files, Error> {
        let mut files = Files::default();
        for (disk, config) in definition.disks.iter().zip(&self.plan.config.disks) {
            let written = self.writes(config);
            let images = disk.live.with_chain(|chain| {
                let layers = chain.layers().iter().enumerate();
                Ok(layers.map(|(depth, layer)| (layer.path().to_owned(), depth == 0 && written)).collect::<Vec<_>>())
            })?;
            images.iter().for_each(|(image, writable)| files.add_image(image, *writable));
        }
        // What an undo disk is committed to.
        self.plan.with_undo().iter().for_each(|image| files.add_image(image, true));
        let boot = &definition.boot;
        boot.initrd.iter().chain(&boot.kernel).for_each(|file| files.add(file, Access::Read));
        files.add(folder_of(&self.plan.state_file()), Access::Write);
        // A snapshot changes what it says.
        definition.config_file.iter().for_each(|file| files.add(folder_of(file), Access::Write));
        files.add(folder_of(socket), Access::Sockets);
        if let Some(Serial::Unix(path)) = &self.plan.config.serial {
            files.add(folder_of(path), Access::Sockets);
        }
        files.add(Path::new("/dev/kvm"), Access::Device);
        Ok(files)
    }

    fn open_disks(&self, is_saved: bool, context: &Context) -> Result<Vec<MachineDisk>, Error> {
        self.plan.config.disks.iter().try_for_each(|disk| refuse_linked(&disk.image))?;
        let images = self.plan.with_undo();
        let undo_disks = images.iter().map(|image| undo::undo_of(image, None)).collect::<Result<Vec<_>, _>>()?;
        // A session that was kept goes on.
        if !undo_disks.iter().all(|undo| undo.exists()) {
            let (_, notes) = undo::start(&images, None, &self.open.options(false, self.force))?;
            notes.iter().for_each(|note| context.note(note));
        }
        self.plan.config.disks.iter().map(|disk| self.open_disk(disk, is_saved)).collect()
    }

    /// Whether a disk is written to. What is tolerated is not.
    fn writes(&self, config: &DiskConfig) -> bool {
        !config.read_only.unwrap_or(false) && !self.open.tolerant
    }

    fn open_disk(&self, config: &DiskConfig, is_saved: bool) -> Result<MachineDisk, Error> {
        let mut options = self.open.options(self.writes(config), self.force);
        // A disk that waits for this machine's saved guest is not refused to it.
        options.image.owns_saved_state = is_saved;
        let live = LiveDisk::open(&self.plan.leaf(config)?, &options)?;
        let footer = live.with_chain(|chain| Ok(chain.layers()[0].image().map(|image| image.footer().clone())))?;
        let geometry = footer.as_ref().map(|footer| {
            let geometry = footer.geometry();
            Geometry { cylinders: geometry.cylinders, heads: geometry.heads, sectors: geometry.sectors }
        });
        let uuid = footer.map(|footer| uuid::Uuid::from_bytes(footer.uuid()).simple().to_string());
        let serial = config.serial_number.clone().or_else(|| Some(uuid?[..20].to_owned())).unwrap_or_default();
        let policies = Policies {
            on_error: config.on_error.unwrap_or(Policy::Report),
            on_no_space: config.on_no_space.unwrap_or(Policy::Pause),
        };
        let options =
            BlockOptions { serial, queues: config.queues.unwrap_or(1), read_only: !self.writes(config), geometry, policies };
        Ok(MachineDisk { live, options })
    }

    /// Does with the undo disks what the user says.
    fn end_undo(&self, stop: &Stop, context: &Context) -> Result<(), Error> {
        let images = self.plan.with_undo();
        if images.is_empty() {
            return Ok(());
        }
        let what = match self.plan.config.at_end {
            Some(what) => what,
            None if io::stdin().is_terminal() => ask()?,
            None => AtEnd::Keep,
        };
        let chain = self.open.options(true, self.force);
        match what {
            AtEnd::Keep => context.note("what was written is kept on undo disks; vhd undo commit or discard ends that"),
            AtEnd::Discard => drop(undo::discard(&images, None, self.force, &chain)?),
            AtEnd::Commit => {
                stop.in_order(true);
                let commit = |progress: &Progress| undo::commit(&images, None, self.force, &chain, progress);
                context.with_progress("committing", commit)?;
            }
        }
        Ok(())
    }
}

/// A linked disk is there to be converted: a guest must not depend on a device that someone else may be writing to.
fn refuse_linked(image: &Path) -> Result<(), Error> {
    // What can't be opened is said by whoever opens it.
    let opened = FileStorage::open(image, false)
        .and_then(|file| Image::open(Arc::new(file), image, &OpenOptions { tolerant: true, ..OpenOptions::default() }));
    let Ok(opened) = opened else { return Ok(()) };
    match LinkedDisk::of(&opened)? {
        None => Ok(()),
        Some(linked) => {
            let path = linked.path.display();
            let message =
                format!("is linked to {path}, and no machine starts with a linked disk: vhd convert makes an image of it");
            Err(Error::new(ErrorKind::Refused, message).at(image))
        }
    }
}

/// Waits until the machine is off, the user or a signal says so, or it can't go on and nobody could tell it to.
fn wait(machine: &Machine, stop: &Stop, wants_to_end: impl Fn() -> bool) -> State {
    loop {
        let state = machine.wait(LOOK_EVERY, |state| matches!(state, State::Off | State::Saved | State::Faulted(_)));
        let over = matches!(state, State::Off | State::Saved | State::Faulted(_));
        if over || stop.is_wanted() || wants_to_end() {
            return state;
        }
    }
}

/// Waits for the scripts of a machine that is over; not for long where the user wants an end. They go on by themselves then.
fn wait_for_scripts(hook: JoinHandle<()>, stop: &Stop, context: &Context) {
    let begin = Instant::now();
    while !hook.is_finished() {
        if stop.is_wanted() && begin.elapsed() > LAST_SCRIPTS {
            return context.note("scripts at events are not done yet, and are not waited for any longer");
        }
        std::thread::sleep(LOOK_EVERY / 10);
    }
    let _ = hook.join();
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

/// What the guest says is seen at once, and a reader that does not read stops the guest alone.
fn unbuffered_stdout() -> Result<File, Error> {
    let stdout = io::stdout().as_fd().try_clone_to_owned();
    Ok(File::from(stdout.map_err(|error| Error::io(error, "stdout can't be written"))?))
}
