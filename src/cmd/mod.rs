//! The commands, one file each: its arguments, what it does, its text and its JSON. `machine` is what `run` and `vm` share,
//! `service` what `serve` and `mount` do.

mod bench;
mod check;
mod compact;
mod compare;
mod completions;
mod convert;
mod create;
mod ctl;
mod diff;
mod in_place;
mod info;
mod machine;
mod map;
mod merge;
mod mount;
mod read;
mod reparent;
mod resize;
mod run;
mod serve;
mod service;
mod undo;
mod unmount;
mod vm;
mod write;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use vhd_core::Error;
use vhd_core::chain::{ChainOptions, ParentPolicy, is_vhd_name};
use vhd_core::format::IDE_LIMIT;
use vhd_core::image::{OpenOptions, SizePolicy};

pub use mount::helper::{Helped, translate as mount_helper};

use crate::output::{Answer, Context};

/// What is done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a fixed, dynamic or differencing disk
    Create(create::CreateArgs),
    /// Say what an image is, and what is odd about it
    Info(info::InfoArgs),
    /// Say who holds each range of the disk
    Map(map::MapArgs),
    /// Look for damage; writes only to repair it
    Check(check::CheckArgs),
    /// Copy a disk into another format
    Convert(convert::ConvertArgs),
    /// Say whether a guest would see the same in two disks
    Compare(compare::CompareArgs),
    /// List the ranges that changed between two images of one chain
    Diff(diff::DiffArgs),
    /// Make images as small as what they hold
    Compact(compact::CompactArgs),
    /// Move what an image holds into one further down its chain
    Merge(merge::MergeArgs),
    /// Give an image another size
    Resize(resize::ResizeArgs),
    /// Tell an image where its parent is, or give it another
    Reparent(reparent::ReparentArgs),
    /// Keep changes apart, and commit or discard them later
    Undo(undo::UndoArgs),
    /// Write a range of the disk to stdout
    Read(read::ReadArgs),
    /// Write stdin to the disk; durable when it returns
    Write(write::WriteArgs),
    /// Show the disk as a file, for loop devices and any tool
    Mount(mount::MountArgs),
    /// End a mount; returns when the image is closed
    Unmount(unmount::UnmountArgs),
    /// Say how fast this machine reads this image
    Bench(bench::BenchArgs),
    /// Serve images over NBD
    Serve(serve::ServeArgs),
    /// Ask a running serve or mount
    Ctl(ctl::CtlArgs),
    /// Run a virtual machine whose disks these are
    Run(run::RunArgs),
    /// Tell a running virtual machine what to do
    Vm(vm::VmArgs),
    /// Print completions for a shell
    Completions(completions::CompletionsArgs),
}

impl Command {
    /// Does it.
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        match self {
            Self::Create(args) => args.run(context),
            Self::Info(args) => args.run(context),
            Self::Map(args) => args.run(context),
            Self::Check(args) => args.run(context),
            Self::Convert(args) => args.run(context),
            Self::Compare(args) => args.run(context),
            Self::Diff(args) => args.run(context),
            Self::Compact(args) => args.run(context),
            Self::Merge(args) => args.run(context),
            Self::Resize(args) => args.run(context),
            Self::Reparent(args) => args.run(context),
            Self::Undo(args) => args.run(context),
            Self::Read(args) => args.run(),
            Self::Write(args) => args.run(context),
            Self::Mount(args) => args.run(context),
            Self::Unmount(args) => args.run(context),
            Self::Bench(args) => args.run(context),
            Self::Serve(args) => args.run(context),
            Self::Ctl(args) => args.run(context),
            Self::Run(args) => args.run(context),
            Self::Vm(args) => args.run(context),
            Self::Completions(args) => args.run(),
        }
    }
}

/// What is to be said of a disk of this size.
fn too_large_for_ide(size: u64) -> Option<String> {
    let note = "larger than 127 GiB: too large for an IDE controller of Virtual PC or Virtual Server";
    (size > IDE_LIMIT).then(|| note.to_owned())
}

/// What is to be said of a new VHD that has another name than one.
fn named_otherwise(path: &Path) -> Option<String> {
    let note = "its name does not say that it is a VHD: convert and compare take it for raw bytes without --from vhd";
    (!is_vhd_name(path)).then(|| note.to_owned())
}

/// Options of every command that opens a chain.
#[derive(Clone, Debug, Default, Args)]
pub struct ChainArgs {
    /// Look for parents in this folder too, by UUID; may be given more than once
    #[arg(long, value_name = "DIR")]
    pub parent_dir: Vec<PathBuf>,
    /// Open parents anywhere the image says, not only in its folder or below
    #[arg(long)]
    pub any_parent: bool,
    /// The raw file or device at the end of the chain
    #[arg(long, value_name = "PATH")]
    pub raw_parent: Option<PathBuf>,
    /// Which size in the footer counts
    #[arg(long, value_name = "WHICH")]
    pub force_size: Option<ForceSize>,
    /// Read an image although a record beside it says that an operation is half done; read-only
    #[arg(long)]
    pub ignore_record: bool,
    /// Move data past the host's page cache, where the file system can
    #[arg(long)]
    pub direct: bool,
    /// Wrong checksums are warnings; read-only
    #[arg(long)]
    pub tolerant: bool,
}

/// The sizes that a footer has.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ForceSize {
    /// What the geometry addresses, as Virtual PC and old QEMU do
    Chs,
    /// The current size, as everyone else does
    Current,
}

impl ChainArgs {
    /// How to open an image.
    pub fn options(&self, writable: bool, force: bool) -> ChainOptions {
        ChainOptions {
            image: OpenOptions {
                writable,
                force,
                tolerant: self.tolerant,
                size: match self.force_size {
                    Some(ForceSize::Chs) => SizePolicy::Geometry,
                    Some(ForceSize::Current) | None => SizePolicy::Current,
                },
                ..OpenOptions::default()
            },
            parents: ParentPolicy {
                any_parent: self.any_parent,
                parent_dirs: self.parent_dir.clone(),
                raw_parent: self.raw_parent.clone(),
                ..ParentPolicy::default()
            },
            ignore_record: self.ignore_record,
            direct: self.direct,
            ..ChainOptions::default()
        }
    }
}
