//! A machine's control socket: the words that it understands, and its snapshots.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use uuid::Uuid;
use vhd_core::chain::ChildOptions;
use vhd_core::live::{NewLeaf, snapshot_all};
use vhd_core::storage::FileStorage;
use vhd_core::{Error, ErrorKind};
use vhd_service::control::{EXTENSION, Handler, Request};
use vhd_service::runtime;

use super::{Command, Machine};
use crate::config::ConfigFile;

/// Names of snapshots that are tried for a disk at most.
const MAX_SNAPSHOTS: u32 = 9999;
/// What control sockets of machines begin with: other services have theirs in the same folder.
const PREFIX: &str = "vm-";

/// Where the control socket of the machine of this name is.
///
/// # Errors
/// `InvalidInput` for what can't be a file's name; as there is no folder for sockets.
pub fn socket_of(name: &str) -> Result<PathBuf, Error> {
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || name.contains(['/', '\0', '\n']) {
        let message = "a machine's name has 1 to 64 bytes, no slash and no dot at its start";
        return Err(Error::new(ErrorKind::InvalidInput, message).at(Path::new(name)));
    }
    Ok(runtime::folder()?.join(format!("{PREFIX}{name}.{EXTENSION}")))
}

/// The names of machines that have a process.
///
/// # Errors
/// As the folder can't be read.
pub fn running() -> Result<Vec<String>, Error> {
    let sockets = vhd_service::control::sockets()?;
    let names = sockets.iter().filter_map(|socket| {
        let name = socket.file_name()?.to_str()?.strip_prefix(PREFIX)?.strip_suffix(EXTENSION)?.strip_suffix('.')?;
        Some(name.to_owned())
    });
    Ok(names.collect())
}

impl Machine {
    /// Everything that is to be known of it, as a document.
    #[must_use]
    pub fn show(&self) -> Value {
        let (definition, state) = (self.definition(), self.state());
        let disks = definition.disks.iter().enumerate().map(|(number, disk)| {
            json!({
                "disk": number,
                "image": disk.live.leaf().to_string_lossy(),
                "size": disk.live.disk().size(),
                "queues": disk.options.queues.max(1),
                "read_only": disk.options.read_only,
                "serial": disk.options.serial,
                "on_error": disk.options.policies.on_error.name(),
                "on_no_space": disk.options.policies.on_no_space.name(),
            })
        });
        json!({
            "name": definition.name,
            "state": state.name(),
            "reason": state.reason(),
            "pid": std::process::id(),
            "cpus": definition.cpus,
            "memory": definition.memory,
            "kernel": definition.boot.kernel.as_ref().map(|kernel| kernel.to_string_lossy()),
            "command_line": definition.boot.command_line,
            "config": definition.config_file.as_ref().map(|file| file.to_string_lossy()),
            "registered": definition.registered,
            "on_event": definition.on_event.as_ref().map(|script| script.to_string_lossy()),
            "disks": disks.collect::<Vec<_>>(),
        })
    }

    /// Gives every disk that takes writes a new leaf, all at one instant. Returns the new files.
    ///
    /// # Errors
    /// As [`snapshot_all`]; none has a new leaf then.
    pub fn snapshot(&self) -> Result<Vec<PathBuf>, Error> {
        let (old, paths) = self.standing_still(|disks| {
            let written: Vec<_> = disks.iter().filter(|disk| !disk.live.disk().capabilities().read_only).collect();
            let leaves: Vec<_> = written.iter().map(|disk| disk.live.leaf()).collect();
            let paths = free_names(&leaves)?;
            let new: Vec<_> = written
                .iter()
                .zip(&paths)
                .map(|(disk, path)| NewLeaf {
                    disk: &disk.live,
                    path: path.clone(),
                    options: ChildOptions::new(Uuid::new_v4().into_bytes()),
                })
                .collect();
            snapshot_all(&new)?;
            // The old leaves, by what they are: their names may lead elsewhere by now.
            let old = written.iter().map(|disk| Ok(disk.live.identities()?.get(1).copied())).collect::<Result<Vec<_>, Error>>();
            Ok((old, paths))
        })?;
        if let Err(error) = old.and_then(|old| self.follow(&old, &paths)) {
            tracing::warn!("the configuration still names the old leaves: {error}");
        }
        let message = format!("{} disks have new leaves", paths.len());
        self.0.shared.events.note("snapshot", self.name(), message);
        Ok(paths)
    }

    /// Lets the configuration name the new leaves: the old ones are not to be written to any more.
    fn follow(&self, old: &[Option<(u64, u64)>], new: &[PathBuf]) -> Result<(), Error> {
        let Some(path) = &self.definition().config_file else { return Ok(()) };
        let mut file = ConfigFile::open(path)?;
        let mut config = file.read()?;
        for disk in &mut config.disks {
            let found = FileStorage::identity_at(&disk.image);
            if let Some(leaf) = old.iter().position(|leaf| leaf.is_some() && *leaf == found) {
                disk.image.clone_from(&new[leaf]);
            }
        }
        file.write(&config)?;
        file.save(false)
    }
}

/// `disk-1.vhd` for `disk.vhd`: the first number that is free for all.
fn free_names(leaves: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
    for number in 1..=MAX_SNAPSHOTS {
        let names: Vec<_> = leaves.iter().map(|leaf| leaf.with_file_name(format!("{}-{number}.vhd", base_of(leaf)))).collect();
        if names.iter().all(|name| name.symlink_metadata().is_err()) {
            return Ok(names);
        }
    }
    Err(Error::new(ErrorKind::Exists, format!("its disks have {MAX_SNAPSHOTS} snapshots already; merge some")))
}

/// A snapshot of a snapshot counts on.
fn base_of(leaf: &Path) -> String {
    let stem = leaf.file_stem().unwrap_or_default().to_string_lossy();
    let is_number = |tail: &str| tail.parse::<u32>().is_ok();
    stem.rsplit_once('-').filter(|(_, tail)| is_number(tail)).map_or(&*stem, |(base, _)| base).to_owned()
}

/// Whether a file's name is that of a new leaf of an image, in the same folder.
#[must_use]
pub fn is_snapshot_of(leaf: &Path, image: &Path) -> bool {
    let is_named = leaf.extension().is_some_and(|extension| extension == "vhd") && base_of(leaf) == base_of(image);
    is_named && leaf != image && leaf.parent() == image.parent()
}

impl Handler for Machine {
    fn handle(&self, request: &Request) -> Result<Value, Error> {
        match request.command.as_str() {
            "show" => Ok(self.show()),
            "snapshot" => {
                let paths = self.snapshot()?;
                Ok(json!({ "leaves": paths.iter().map(|path| path.to_string_lossy()).collect::<Vec<_>>() }))
            }
            word => {
                let known: Vec<_> = ["show", "snapshot"].into_iter().chain(Command::ALL.into_iter().map(Command::name)).collect();
                self.command(Command::from_name(word).ok_or_else(|| request.unknown(&known))?)?;
                Ok(json!({ "state": self.state().name() }))
            }
        }
    }
}
