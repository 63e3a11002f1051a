//! Whose word a configuration is. One that this program made, or that the user has registered, is the user's. Any other may
//! be a stranger's, who wants to have a script run or a file of the user's read.
//!
//! What is registered is the hash of a file's content under its whole path. The list is in the user's state folder, where
//! whoever can write to the file's folder can't.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use ring::digest::{SHA256, digest};
use vhd_core::storage::{Access, Beneath, LocalHost, open_beneath, put_file, read_beside, resolve};
use vhd_core::{Error, ErrorKind};
use vhd_service::runtime;

use super::{Config, ConfigFile, Serial};

/// The folder of the list, in the user's state folder.
const FOLDER: &str = "machines";
/// Bytes of an entry at most: a hash and a path.
const MAX_ENTRY: u64 = 8 << 10;

/// Whose word a configuration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// The user's: registered as it is.
    Users,
    /// It was changed since it was registered: by whom is not known.
    Changed,
    /// It was never registered.
    Strangers,
}

/// What of the host's a configuration can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The disk at this position.
    Disk(u8),
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
    /// The socket of the serial port.
    Serial,
    /// The file of the saved guest.
    State,
    /// The script that runs at events.
    Script,
}

impl What {
    /// Its key in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Disk(_) => "disk",
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::Serial => "serial",
            Self::State => "saved_state",
            Self::Script => "on_event",
        }
    }

    /// Whether the machine would be another one without it.
    #[must_use]
    pub fn is_needed(self) -> bool {
        matches!(self, Self::Disk(_) | Self::Kernel | Self::Initrd)
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(position) => write!(f, "disk {position}"),
            Self::Kernel => f.write_str("kernel"),
            Self::Initrd => f.write_str("initial RAM disk"),
            Self::Serial => f.write_str("serial port"),
            Self::State => f.write_str("saved state"),
            Self::Script => f.write_str("script at events"),
        }
    }
}

/// Something of the host's that a configuration names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    /// What it is.
    pub what: What,
    /// Where.
    pub path: PathBuf,
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.what, self.path.display())
    }
}

impl Config {
    /// Everything of the host's that it names.
    #[must_use]
    pub fn reaches(&self) -> Vec<Reach> {
        let disks = self.disks.iter().map(|disk| (What::Disk(disk.position), Some(&disk.image)));
        let serial = match &self.serial {
            Some(Serial::Unix(path)) => Some(path),
            _ => None,
        };
        let others = [
            (What::Kernel, self.kernel.as_ref()),
            (What::Initrd, self.initrd.as_ref()),
            (What::Serial, serial),
            (What::State, self.state_file.as_ref()),
            (What::Script, self.on_event.as_ref()),
        ];
        disks.chain(others).filter_map(|(what, path)| Some(Reach { what, path: path?.clone() })).collect()
    }

    /// What of that a stranger's configuration may not have: scripts, devices, and what is not in its folder or below.
    ///
    /// # Errors
    /// As the folder can't be looked at.
    pub fn beyond(&self, folder: &Path) -> Result<Vec<Reach>, Error> {
        let mut beyond = Vec::new();
        for reach in self.reaches() {
            match stays(folder, &reach) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::Refused => beyond.push(reach),
                Err(error) => return Err(error),
            }
        }
        Ok(beyond)
    }

    /// Takes out what the machine can be run without.
    pub fn leave_out(&mut self, what: What) {
        match what {
            What::Serial => self.serial = None,
            What::State => self.state_file = None,
            What::Script => self.on_event = None,
            What::Disk(_) | What::Kernel | What::Initrd => {}
        }
    }
}

/// Refuses what does not stay in a folder.
fn stays(folder: &Path, reach: &Reach) -> Result<(), Error> {
    let refused = || Error::new(ErrorKind::Refused, "is not for a stranger's configuration").at(&reach.path);
    let within = within(folder, &reach.path).ok_or_else(refused)?;
    match reach.what {
        What::Disk(_) | What::Kernel | What::Initrd => {
            // What is not there is missed by whoever opens it.
            open_beneath(folder, &within, Beneath::Links).map(drop)
        }
        // These are made, so that the folder counts: one without a link or a step up on the way.
        What::Serial | What::State => {
            let is_plain = within.components().all(|part| matches!(part, Component::Normal(_)));
            let on_the_way = within.ancestors().filter(|part| *part != Path::new(""));
            let is_link = |part: &Path| folder.join(part).symlink_metadata().is_ok_and(|found| found.is_symlink());
            if is_plain && !on_the_way.into_iter().any(is_link) { Ok(()) } else { Err(refused()) }
        }
        What::Script => Err(refused()),
    }
}

/// A path as it is from a folder on.
fn within(folder: &Path, path: &Path) -> Option<PathBuf> {
    if let Ok(rest) = path.strip_prefix(folder) {
        return Some(rest.to_owned());
    }
    if path.is_relative() {
        // From the current folder, which is the one.
        return (folder == Path::new(".")).then(|| path.to_owned());
    }
    path.strip_prefix(folder.canonicalize().ok()?).ok().map(Path::to_owned)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An entry's name, by the configuration's whole path.
fn entry_name(path: &Path) -> String {
    hex(digest(&SHA256, path.as_os_str().as_bytes()).as_ref())
}

impl ConfigFile {
    /// Whose word it is, as it was read.
    ///
    /// # Errors
    /// As its entry in the list can't be read.
    pub fn word(&self) -> Result<Word, Error> {
        let Some(folder) = runtime::state_path().filter(|folder| runtime::is_private(folder)) else {
            return Ok(Word::Strangers);
        };
        let path = resolve(&self.path);
        let Some(entry) = read_beside(&folder.join(FOLDER).join(entry_name(&path)), MAX_ENTRY)? else {
            return Ok(Word::Strangers);
        };
        Ok(if entry == self.entry(&path) { Word::Users } else { Word::Changed })
    }

    /// Makes it the user's word, as it is now.
    ///
    /// # Errors
    /// As the list can't be written.
    pub fn register(&self) -> Result<(), Error> {
        let folder = runtime::state_folder()?.join(FOLDER);
        std::fs::create_dir_all(&folder).map_err(|error| Error::io(error, "can't be made for what is registered").at(&folder))?;
        let path = resolve(&self.path);
        put_file(&LocalHost, &folder.join(entry_name(&path)), &self.entry(&path), &Access::Owner)
    }

    /// As `sha256sum` has it.
    fn entry(&self, path: &Path) -> Vec<u8> {
        let hash = hex(digest(&SHA256, &self.document.to_bytes()).as_ref());
        [hash.as_bytes(), b"  ", path.as_os_str().as_bytes(), b"\n"].concat()
    }
}
