//! What a machine is: from a configuration, and from options that say otherwise.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use vhd_core::chain::is_vhd_name;
use vhd_core::ops::undo;
use vhd_core::storage::folder_of;
use vhd_core::{Error, ErrorKind};
use vhd_vmm::config::{AtEnd, Config, ConfigFile, DiskConfig, Reach, Serial, Word, file_of, name_of};
use vhd_vmm::life::MAX_CPUS;
use vhd_vmm::saved;
use vhd_vmm::virtio::block::Policy;

use crate::output::Context;
use crate::sizes;

/// Options that say what a machine is.
#[derive(Clone, Debug, Args)]
pub struct MachineArgs {
    /// The kernel: an ELF file or a bzImage; without it, the one that is installed on the first disk, as its boot menu says
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line; added to that of the boot menu without a kernel [default: console=ttyS0 panic=-1]
    #[arg(long, value_name = "LINE", allow_hyphen_values = true)]
    append: Option<String>,
    /// A disk; may be given more than once, the guest finds them in this order. After the image may follow, each with a
    /// comma before: serial=TEXT, queues=N, read-only, on-error=POLICY, on-no-space=POLICY
    #[arg(long = "disk", value_name = "IMAGE[,OPTION...]", value_parser = parse_disk)]
    disks: Vec<DiskConfig>,
    /// Memory [default: 512M]
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse)]
    memory: Option<u64>,
    /// CPUs, 1 to 8 [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u8>,
    /// Queues of each disk [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16))]
    queues: Option<u16>,
    /// Refuse all writes to the disks
    #[arg(long)]
    read_only: bool,
    /// Keep what is written apart, on an undo disk for each disk, all as one
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    undo: Option<bool>,
    /// What becomes of the undo disks at the end; asked on a terminal, else kept
    #[arg(long, value_name = "WHAT")]
    at_end: Option<AtEndArg>,
    /// When a disk fails: tell the guest, or pause the machine [default: report]
    #[arg(long, value_name = "POLICY")]
    on_error: Option<OnFailure>,
    /// When the host's volume is full: tell the guest, or pause the machine until there is room [default: pause]
    #[arg(long, value_name = "POLICY")]
    on_no_space: Option<OnFailure>,
    /// Warn when fewer bytes are free on a disk's volume, and pause when a quarter of them is left; 0 for neither
    /// [default: 64M]
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse)]
    low_space: Option<u64>,
    /// Where the serial port leads: stdio, none or unix:PATH, a socket [default: stdio]
    #[arg(long, value_name = "WHERE", value_parser = parse_serial)]
    serial: Option<Serial>,
    /// Where the guest goes when it is saved, and where it goes on from when there is such a file; NAME.vsv beside the
    /// configuration, else beside the first disk by default
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// A script to run at each event, with the machine's name, the event and a message
    #[arg(long, value_name = "SCRIPT")]
    on_event: Option<PathBuf>,
}

/// What becomes of undo disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum AtEndArg {
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

fn parse_serial(text: &str) -> Result<Serial, String> {
    Serial::from_text(text, Path::new("")).ok_or_else(|| "expected stdio, none or unix:PATH".to_owned())
}

/// An image and its options. A comma that no option follows belongs to the image's name.
fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let mut disk = DiskConfig::default();
    let mut rest = text;
    while let Some((before, option)) = rest.rsplit_once(',') {
        if !take_option(&mut disk, option)? {
            break;
        }
        rest = before;
    }
    disk.image = rest.into();
    if rest.is_empty() { Err("an image is missing".to_owned()) } else { Ok(disk) }
}

fn take_option(disk: &mut DiskConfig, option: &str) -> Result<bool, String> {
    let policy =
        |text: &str| OnFailure::from_str(text, false).map(Policy::from).map_err(|_| format!("{option}: report or pause"));
    match option.split_once('=') {
        None if option == "read-only" => disk.read_only = Some(true),
        Some(("serial", text)) if text.len() <= 20 => disk.serial_number = Some(text.to_owned()),
        Some(("serial", _)) => return Err(format!("{option}: a serial number has 20 bytes at most")),
        Some(("queues", text)) => {
            let queues = text.parse().ok().filter(|queues| (1..=16).contains(queues));
            disk.queues = Some(queues.ok_or_else(|| format!("{option}: 1 to 16 queues"))?);
        }
        Some(("on-error", text)) => disk.on_error = Some(policy(text)?),
        Some(("on-no-space", text)) => disk.on_no_space = Some(policy(text)?),
        _ => return Ok(false),
    }
    Ok(true)
}

impl MachineArgs {
    /// Whether disks are named.
    pub fn has_disks(&self) -> bool {
        !self.disks.is_empty()
    }

    /// Lets the options have their way over what a configuration says.
    pub fn apply(&self, config: &mut Config) -> Result<(), Error> {
        if let Some(cpus) = self.cpus.filter(|cpus| !(1..=MAX_CPUS).contains(cpus)) {
            let message = format!("{cpus} CPUs, and a machine has 1 to {MAX_CPUS}");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        for disk in &self.disks {
            config.add(disk.clone())?;
        }
        for disk in &mut config.disks {
            // What the command line says of one disk counts more than what it says of all.
            let own = self.disks.iter().find(|own| own.image == disk.image).cloned().unwrap_or_default();
            disk.read_only = if self.read_only { Some(true) } else { disk.read_only };
            disk.queues = own.queues.or(self.queues).or(disk.queues);
            disk.on_error = own.on_error.or(self.on_error.map(Policy::from)).or(disk.on_error);
            disk.on_no_space = own.on_no_space.or(self.on_no_space.map(Policy::from)).or(disk.on_no_space);
        }
        let at_end = self.at_end.map(|at_end| match at_end {
            AtEndArg::Commit => AtEnd::Commit,
            AtEndArg::Discard => AtEnd::Discard,
            AtEndArg::Keep => AtEnd::Keep,
        });
        config.memory = self.memory.or(config.memory);
        config.cpus = self.cpus.or(config.cpus);
        config.undo = self.undo.or(config.undo);
        config.at_end = at_end.or(config.at_end);
        config.low_space = self.low_space.or(config.low_space);
        let text = |new: &Option<String>, old: &mut Option<String>| *old = new.clone().or_else(|| old.take());
        text(&self.append, &mut config.append);
        let path = |new: &Option<PathBuf>, old: &mut Option<PathBuf>| *old = new.clone().or_else(|| old.take());
        path(&self.kernel, &mut config.kernel);
        path(&self.initrd, &mut config.initrd);
        path(&self.state, &mut config.state_file);
        path(&self.on_event, &mut config.on_event);
        config.serial = self.serial.clone().or_else(|| config.serial.take());
        Ok(())
    }
}

/// A machine as it is to be: its configuration with what options say, and its name.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its name.
    pub name: String,
    /// What it is.
    pub config: Config,
    /// The file that says so, and whose word that is.
    pub file: Option<(PathBuf, Word)>,
}

/// Opens the configuration of a machine: a `.vmc` file, or the name of one in the user's folder.
pub fn open_config(machine: &str) -> Result<ConfigFile, Error> {
    let path = file_of(machine)?;
    ConfigFile::open(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            let message = match is_vhd_name(Path::new(machine)) {
                true => "there is no such configuration; an image is run with --disk",
                false => "there is no such configuration; vhd vm create makes one, vhd vm list tells those that there are",
            };
            Error::new(ErrorKind::NotFound, message).at(&path)
        }
        _ => error,
    })
}

impl Plan {
    /// The machine of a configuration, with all that it says.
    pub fn of(machine: &str, context: &Context) -> Result<Self, Error> {
        let file = open_config(machine)?;
        file.unknown().iter().for_each(|unknown| context.note(unknown));
        let (config, word) = (file.read()?, file.word()?);
        Ok(Self { name: name_of(&file_of(machine)?), config, file: Some((file.path().to_owned(), word)) })
    }

    /// The machine of a configuration, to be run: one that is not the user's word has no scripts and devices, and nothing out
    /// of its folder. That is said.
    pub fn to_run(machine: &str, context: &Context) -> Result<Self, Error> {
        let mut plan = Self::of(machine, context)?;
        let Some((path, why)) = plan.strangers() else { return Ok(plan) };
        let path = path.to_owned();
        let (needed, optional): (Vec<_>, Vec<_>) = plan.beyond()?.into_iter().partition(|reach| reach.what.is_needed());
        let told = |reaches: &[Reach]| reaches.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let (here, all) = (path.display(), told(&[&needed[..], &optional[..]].concat()));
        if !needed.is_empty() {
            let message = format!(
                "{why}, and wants what is not in its folder, a device or a script: {all}; vhd vm register {here} allows it"
            );
            return Err(Error::new(ErrorKind::Refused, message).at(&path));
        }
        optional.iter().for_each(|reach| plan.config.leave_out(reach.what));
        if !optional.is_empty() {
            context.note(&format!("{here}: {why}, so it runs without: {all}; vhd vm register {here} allows it"));
        } else if matches!(plan.file, Some((_, Word::Changed))) {
            context.note(&format!("{here}: {why}; it runs, as it wants nothing out of its folder"));
        }
        Ok(plan)
    }

    /// Where its configuration is and why that is not the user's word, where it is not.
    pub fn strangers(&self) -> Option<(&Path, &'static str)> {
        match self.file.as_ref()? {
            (_, Word::Users) => None,
            (path, Word::Changed) => Some((path, "was changed since it was registered")),
            (path, Word::Strangers) => Some((path, "is not registered")),
        }
    }

    /// What its configuration may not have, as it is not the user's word.
    pub fn beyond(&self) -> Result<Vec<Reach>, Error> {
        self.strangers().map_or(Ok(Vec::new()), |(path, _)| self.config.beyond(folder_of(path)))
    }

    /// Where the guest is when it is saved.
    pub fn state_file(&self) -> PathBuf {
        let file = self.file.as_ref().map(|(path, _)| path.as_path());
        let beside = file.or_else(|| Some(self.config.disks.first()?.image.as_path()));
        let folder = beside.map_or(Path::new("."), folder_of);
        let named = self.config.state_file.as_deref().map(saved::named);
        named.unwrap_or_else(|| folder.join(format!("{}.vsv", self.name)))
    }

    /// The images whose writes go to undo disks.
    pub fn with_undo(&self) -> Vec<PathBuf> {
        let written = self.config.disks.iter().filter(|disk| !disk.read_only.unwrap_or(false));
        let images = written.map(|disk| disk.image.clone());
        if self.config.undo.unwrap_or(false) { images.collect() } else { Vec::new() }
    }

    /// The file that the guest of a disk reads and writes.
    pub fn leaf(&self, disk: &DiskConfig) -> Result<PathBuf, Error> {
        if self.with_undo().contains(&disk.image) { undo::undo_of(&disk.image, None) } else { Ok(disk.image.clone()) }
    }
    /// The images that may have the note of its saved guest: those that it names, and their undo disks.
    pub fn may_be_noted(&self) -> Result<Vec<PathBuf>, Error> {
        let mut images = Vec::new();
        for disk in &self.config.disks {
            let undo = undo::undo_of(&disk.image, None)?;
            images.push(disk.image.clone());
            images.extend(Some(undo).filter(|undo| *undo != disk.image && undo.symlink_metadata().is_ok()));
        }
        Ok(images)
    }
}
