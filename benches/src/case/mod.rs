//! The cases, by group.

mod chain;
mod convert;
pub mod files;
mod fuse;
mod looped;
mod merge;
mod nbd;
mod strides;
mod threads;
mod vmm;

use std::path::PathBuf;

use anyhow::Result;

use crate::measure::Row;

/// Where and how much.
pub struct Place {
    /// A folder in memory: what is measured there is the cost of a path.
    pub memory: PathBuf,
    /// A folder on a disk.
    pub disk: PathBuf,
    /// Large files.
    pub long: bool,
    /// Counted rounds.
    pub rounds: usize,
}

impl Place {
    /// How long a load runs that runs for a time.
    pub fn seconds(&self) -> f64 {
        if self.long { 2.0 } else { 0.4 }
    }

    /// The same for loads of requests between processes: how the scheduler lets these meet differs from run to run by a tenth,
    /// however long they are, so it is rounds that tell.
    pub fn short_seconds(&self) -> f64 {
        if self.long { 2.0 } else { 0.15 }
    }
}

type Case = fn(&Place) -> Result<Vec<Row>>;

/// All groups, in the order in which they are run.
pub const CASES: &[(&str, Case)] = &[
    ("convert-memory", convert::in_memory),
    ("convert-disk", convert::on_disk),
    ("convert-sparse", convert::sparse),
    ("strides-overwrite", strides::overwrite),
    ("strides-allocate", strides::allocate),
    ("merge", merge::merge),
    ("compact", merge::compact),
    ("nbd", nbd::nbd),
    ("fuse", fuse::fuse),
    ("loop", looped::file_systems),
    ("chain-read", chain::read),
    ("chain-open", chain::open_all),
    ("check", chain::check),
    ("threads", threads::threads),
    ("virtio-device", vmm::device),
    ("virtio-kvm", vmm::kvm),
];
