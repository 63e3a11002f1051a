//! `vhd mount`

mod control;
pub mod helper;
mod share;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;
use serde_json::{Value, json};
use vhd_core::chain::ChainOptions;
use vhd_core::guestfs::refuse_writes;
use vhd_core::ops::undo;
use vhd_core::partition::{PartitionTable, PartitionType};
use vhd_core::{Disk, Error, ErrorKind, LiveDisk};
use vhd_fuse::{Contents, DISK_FILE, MountOptions, Mounted, StopSignals};
use vhd_service::{descriptors, log, runtime};

use super::{ChainArgs, info, map};
use crate::output::{Answer, Context, ShownPath};
use crate::sizes;

/// What the background process says on its stdout when the files are there, before a document. Anything else it says
/// is an error's document, with `--json`.
const READY: &str = "ready\n";

/// Type of an MBR's partition that keeps programs which know no GPT from a disk that has one.
const PROTECTIVE: u8 = 0xEE;

/// Arguments of `vhd mount`.
#[derive(Debug, Args)]
pub struct MountArgs {
    /// The image; with --fs, :pN after it names a partition
    image: PathBuf,
    /// A folder, where disk.raw, p1 and so on, and layers appear; or a file, which becomes the disk
    target: PathBuf,
    /// Mount the file system of the partition, or of a disk that has one only
    #[arg(long)]
    fs: bool,
    /// Refuse all writes
    #[arg(long)]
    read_only: bool,
    /// Keep what is written apart, in an undo disk beside the image; vhd unmount can commit or discard it
    #[arg(long, conflicts_with = "read_only")]
    undo: bool,
    /// The folder of the undo disk
    #[arg(long, value_name = "DIR", requires = "undo")]
    undo_dir: Option<PathBuf>,
    /// Serve from this process and return when it is unmounted; SIGTERM, SIGINT and SIGHUP unmount it
    #[arg(long)]
    foreground: bool,
    /// Words with commas as for mount(8): ro, rw, allow_other, sync, uid=N, gid=N, umask=N; with --fs, others are the
    /// file system's
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// Write even if a saved state or a child relies on the image
    #[arg(long)]
    force: bool,
    /// Tell of it when the image's volume has less room than this; vhd ctl list shows what was told
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse, default_value = "256M")]
    low_space: u64,
    /// Be the background process that another one started
    #[arg(long, hide = true)]
    daemon: bool,
    #[command(flatten)]
    open: ChainArgs,
}

/// How the arguments want it.
struct Wanted {
    image: PathBuf,
    /// The partition, by number.
    partition: Option<u32>,
    options: MountOptions,
    /// Words for the file system, with `--fs`.
    inside: Vec<String>,
}

impl MountArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        if !self.foreground && !self.daemon {
            // A word that is wrong is better found before there is a second process.
            self.wanted()?;
            return self.start_daemon(context);
        }
        // First of all, so that no thread is left that a signal could end.
        let stop = StopSignals::block()?;
        let wanted = self.wanted()?;
        log::serve()?;
        descriptors::raise_limit();
        // What is mounted is ended in order; until then a signal ends the process, whatever it waits for.
        let lethal = stop.lethal()?;
        let live = match self.open_image(&wanted, context) {
            Ok(live) => live,
            Err(locked) => {
                let shared = self.share(&wanted, locked)?;
                let target = self.target.canonicalize().unwrap_or_else(|_| self.target.clone());
                let (pid, socket) = (shared.from.server(), shared.control());
                return self
                    .tell_ready(context, &document(&target, &shared.from.disk(), pid, Some(&shared.by), socket.as_deref()));
            }
        };
        drop(lethal);
        let (disk, metrics) = control::counted(&live);
        let (mounted, by) = match self.fs {
            true => self.mount_inside(&disk, &wanted, context)?,
            false => (vhd_fuse::mount(contents(&live, disk)?, &self.target, &wanted.options)?, None),
        };
        let target = self.target.canonicalize().unwrap_or_else(|_| self.target.clone());
        let served_at = mounted.target().to_owned();
        let service = control::start(&live, metrics, &target, wanted.options.read_only, self.low_space)?;
        let file = if served_at.is_dir() { served_at.join(DISK_FILE) } else { served_at.clone() };
        self.tell_ready(context, &document(&target, &file, std::process::id(), by.as_deref(), service.socket.as_deref()))?;
        let ended = mounted.wait(Some(&stop));
        if self.fs {
            let _ = std::fs::remove_dir(&served_at);
        }
        ended?;
        Ok(Answer::Yes)
    }

    /// Says that the files are there; from then on this is a process of the background, if it is to be one.
    fn tell_ready(&self, context: &Context, document: &Value) -> Result<Answer, Error> {
        if self.daemon {
            leave_terminal(document).map_err(|error| Error::io(error, "can't go to the background").at(&self.target))?;
        } else {
            report(context, document)?;
        }
        Ok(Answer::Yes)
    }

    fn wanted(&self) -> Result<Wanted, Error> {
        let mut options = MountOptions::default();
        let mut inside = Vec::new();
        for list in &self.options {
            match self.fs {
                true => inside.extend(options.apply_for_inside(list)?),
                false => options.apply(list)?,
            }
        }
        // What is tolerated is not written to.
        options.read_only |= self.read_only || self.open.tolerant;
        let (image, partition) = if self.fs { split(&self.image) } else { (self.image.clone(), None) };
        // The background process leaves the folder that it was started in.
        Ok(Wanted { image: absolute(&image)?, partition, options, inside })
    }

    /// Opens the image, or its undo disk.
    fn open_image(&self, wanted: &Wanted, context: &Context) -> Result<LiveDisk, Error> {
        let mut chain = self.open.options(!wanted.options.read_only, self.force);
        for path in chain.parents.parent_dirs.iter_mut().chain(&mut chain.parents.raw_parent) {
            *path = absolute(path)?;
        }
        if !self.undo {
            return LiveDisk::open(&wanted.image, &chain);
        }
        let dir = self.undo_dir.as_deref().map(absolute).transpose()?;
        let dir = dir.as_deref();
        let undo = undo::undo_of(&wanted.image.canonicalize().unwrap_or_else(|_| wanted.image.clone()), dir)?;
        if undo.exists() {
            context.note(&format!("{}: goes on with what was written to it before", undo.display()));
        } else {
            let images = std::slice::from_ref(&wanted.image);
            let (_, notes) = undo::start(images, dir, &self.open.options(false, self.force))?;
            notes.iter().for_each(|note| context.note(note));
        }
        beside(&wanted.image, &mut chain);
        LiveDisk::open(&undo, &chain)
    }

    /// Mounts the disk where only this user sees it, and the file system of a partition on the target.
    fn mount_inside(&self, disk: &Disk, wanted: &Wanted, context: &Context) -> Result<(Mounted, Option<String>), Error> {
        let table = partitions(disk)?;
        let name = file_with(&table, wanted)?;
        let doubt = refuse_foreign(disk, &name, wanted)?;
        let hidden = runtime::folder()?.join(format!("fs-{}", std::process::id()));
        std::fs::create_dir(&hidden).map_err(|error| Error::io(error, "can't be made to mount on").at(&hidden))?;
        let mut options = wanted.options.clone();
        // A set-uid helper, as Debian's ntfs-3g is, is root to FUSE, which is another user. No more of them come this far: the
        // folder above is closed.
        options.allow_other |= !nix::unistd::geteuid().is_root() && vhd_fuse::users_may_allow_other();
        let mounted = vhd_fuse::mount(Contents::from(disk.clone()).with_partitions(&table), &hidden, &options);
        let result = mounted.and_then(|mut mounted| {
            match mounted.mount_inside(&name, &self.target, &wanted.inside, wanted.options.read_only) {
                Ok(by) => Ok((mounted, Some(by))),
                // The disk is closed, too.
                Err(error) => mounted.end().and(Err(error)),
            }
        });
        // Where the disk is mounted is no name that the user knows, and gone by now.
        let named = result.map_err(|error| match error.path() {
            Some(path) if path.starts_with(&hidden) => error.about(&wanted.image),
            _ => error,
        });
        if let (Ok(_), Some(doubt)) = (&named, doubt) {
            context.note(&doubt);
        }
        named.inspect_err(|_| drop(std::fs::remove_dir(&hidden)))
    }

    /// Runs this command again as a process of its own, and returns when it serves. (A fork would be less, but has no
    /// safe form.) What that process has to say before, it says on this one's stderr.
    fn start_daemon(&self, context: &Context) -> Result<Answer, Error> {
        let failed = |error: io::Error| Error::io(error, "can't start the background process").at(&self.target);
        let mut command = same_command("--daemon").map_err(failed)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut daemon = command.spawn().map_err(failed)?;

        // Its stdout ends when it is ready, or when it is gone.
        let mut said = Vec::new();
        if let Some(stdout) = &mut daemon.stdout {
            stdout.read_to_end(&mut said).map_err(failed)?;
        }
        if let Some(document) = said.strip_prefix(READY.as_bytes()) {
            let document = serde_json::from_slice(document).map_err(|error| failed(error.into()))?;
            report(context, &document)?;
            return Ok(Answer::Yes);
        }
        let status = daemon.wait().map_err(failed)?;
        io::stdout().write_all(&said).map_err(failed)?;
        // It has said why.
        std::process::exit(status.code().unwrap_or(2))
    }
}

/// This command as it was called, with one more flag.
pub fn same_command(flag: &str) -> io::Result<Command> {
    let mut arguments: Vec<_> = std::env::args_os().collect();
    if let Some(helper::Helped::Run(translated)) = helper::translate(&arguments) {
        arguments = translated;
    }
    let options_end = arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len());
    arguments.insert(options_end, flag.into());
    let (name, rest) = arguments.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    // By its name, for `ps`; but a file that was replaced meanwhile is not this program.
    let named = std::env::current_exe().ok().filter(|path| path.exists());
    let mut command = Command::new(named.as_deref().unwrap_or(Path::new("/proc/self/exe")));
    command.arg0(name).args(rest);
    Ok(command)
}

/// What is said of a mount with `--json`.
fn document(target: &Path, file: &Path, pid: u32, by: Option<&str>, control: Option<&Path>) -> Value {
    json!({
        "target": ShownPath(target),
        "file": ShownPath(file),
        "pid": pid,
        "filesystem": by,
        "control": control.map(ShownPath),
    })
}

/// For people only what mounted the file system: otherwise success is silent.
fn report(context: &Context, document: &Value) -> Result<(), Error> {
    if let Some(by) = document["filesystem"].as_str() {
        context.note(&format!("{}: {by}", document["target"].as_str().unwrap_or_default()));
    }
    context.print("", document)
}

/// All there is to be seen of a disk.
fn contents(live: &LiveDisk, disk: Disk) -> Result<Contents, Error> {
    let table = partitions(&disk)?;
    let (of_info, of_map) = (live.clone(), live.clone());
    Ok(Contents::from(disk)
        .with_partitions(&table)
        .with_layers(live.layers()?)
        .with_document("info.json", move |out| of_info.with_chain(|chain| info::write_document(chain, out)))
        .with_document("map.json", move |out| map::write_document(&*of_map.disk(), out)))
}

/// The partitions, without one that only stands for a GPT.
fn partitions(disk: &Disk) -> Result<PartitionTable, Error> {
    let mut table = PartitionTable::read(disk)?;
    table.partitions.retain(|partition| partition.kind != PartitionType::Mbr(PROTECTIVE));
    Ok(table)
}

/// Takes the partition off `IMAGE:pN`, unless there is a file of that name.
fn split(image: &Path) -> (PathBuf, Option<u32>) {
    let text = image.to_str().filter(|_| !image.exists());
    let parts = text.and_then(|text| text.rsplit_once(":p"));
    match parts.and_then(|(image, number)| Some((PathBuf::from(image), number.parse().ok()?))) {
        Some((image, number)) => (image, Some(number)),
        None => (image.to_owned(), None),
    }
}

/// The name of the file that holds the file system.
fn file_with(table: &PartitionTable, wanted: &Wanted) -> Result<String, Error> {
    let refused = |message: String| Err(Error::new(ErrorKind::InvalidInput, message).at(&wanted.image));
    let numbers: Vec<_> = table.partitions.iter().map(|partition| format!("p{}", partition.number)).collect();
    match (wanted.partition, numbers.as_slice()) {
        (Some(number), _) if table.get(number).is_some() => Ok(format!("p{number}")),
        (Some(number), []) => refused(format!("has no partition p{number}: no partition table was found")),
        (Some(number), _) => refused(format!("has no partition p{number}, expected one of {}", numbers.join(" "))),
        (None, []) if table.problems.is_empty() => Ok(DISK_FILE.to_owned()),
        (None, []) => {
            refused(format!("has a partition table without a partition that can be used: {}", table.problems.join("; ")))
        }
        (None, [one]) => Ok(one.clone()),
        (None, several) => refused(format!("has {} partitions, so say which with :pN: {}", several.len(), several.join(" "))),
    }
}

/// Refuses to write what may be somebody else's. To look at it harms nobody, but may show what is not so: that is returned.
fn refuse_foreign(disk: &Disk, name: &str, wanted: &Wanted) -> Result<Option<String>, Error> {
    let number = name.strip_prefix('p').and_then(|number| number.parse().ok());
    let Some(why) = refuse_writes(disk, number)? else { return Ok(None) };
    let place = number.map_or("the disk as a whole".to_owned(), |_| format!("partition {name}"));
    if wanted.options.read_only {
        return Ok(Some(format!("{}: {place}: {why}; what is shown of it may be old, or a part", wanted.image.display())));
    }
    let message = format!("{place} is not mounted to be written: {why}; --read-only shows it");
    Err(Error::new(ErrorKind::Refused, message).at(&wanted.image))
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|error| Error::io(error, "has no absolute path").at(path))
}

/// With the image's folder among those where parents are looked for: its undo disk may be elsewhere.
fn beside(image: &Path, chain: &mut ChainOptions) {
    let folder = image.canonicalize().ok().and_then(|image| image.parent().map(PathBuf::from));
    chain.parents.parent_dirs.extend(folder);
}

/// Says that the mount is ready, and lets go of the terminal, its session and the current folder.
fn leave_terminal(document: &Value) -> io::Result<()> {
    nix::unistd::setsid()?;
    nix::unistd::chdir("/")?;
    write!(io::stdout(), "{READY}{document}")?;
    io::stdout().flush()?;
    // What was said so far is for who started this.
    log::flush();
    let null = File::options().write(true).open("/dev/null")?;
    nix::unistd::dup2_stderr(&null)?;
    // Last, for this is what the other process waits for.
    nix::unistd::dup2_stdout(&null)?;
    Ok(())
}
