//! Configurations of machines (`.vmc`): XML like Virtual Server's, with what this monitor has.
//!
//! What a file says beyond that is kept as it is when the file is changed here: elements, comments and spaces. Whose word
//! it is, `trust` knows.

mod document;
mod fields;
mod place;
mod trust;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use vhd_core::storage::{Beneath, folder_of, open_beneath};
use vhd_core::{Error, ErrorKind};

pub use document::{Document, Problem};
pub use place::{EXTENSION, configured, file_of, name_of};
pub use trust::{Reach, What, Word};

use self::document::{MAX_BYTES, Step};
use crate::layout::MAX_DISKS;
use crate::virtio::block::Policy;

/// Elements that are not known are named until there are so many.
const MAX_UNKNOWN: usize = 10;

/// What becomes of undo disks when the machine is off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtEnd {
    /// What was written moves into the disks.
    Commit,
    /// It is thrown away.
    Discard,
    /// The undo disks stay.
    Keep,
}

/// A disk of a configuration. Nothing said is the default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskConfig {
    /// Its place on the bus: the guest finds disks in this order.
    pub position: u8,
    /// The image.
    pub image: PathBuf,
    /// What the guest takes for its serial number.
    pub serial_number: Option<String>,
    /// Queues.
    pub queues: Option<u16>,
    /// The guest may not write to it.
    pub read_only: Option<bool>,
    /// What is done when it fails.
    pub on_error: Option<Policy>,
    /// What is done when its volume is full.
    pub on_no_space: Option<Policy>,
}

/// What a machine is to be. Nothing said is the default. Paths are as one would use them now, not as the file has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// vCPUs.
    pub cpus: Option<u8>,
    /// The kernel.
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub append: Option<String>,
    /// Where the serial port leads: `stdio`, `none` or `unix:PATH`.
    pub serial: Option<Serial>,
    /// Whether what is written is kept apart.
    pub undo: Option<bool>,
    /// What becomes of it.
    pub at_end: Option<AtEnd>,
    /// Free bytes on a volume below which there is a warning.
    pub low_space: Option<u64>,
    /// Where the guest is saved.
    pub state_file: Option<PathBuf>,
    /// What is run at each event.
    pub on_event: Option<PathBuf>,
    /// The disks, by position.
    pub disks: Vec<DiskConfig>,
}

/// Where a serial port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serial {
    /// The process's own input and output.
    Stdio,
    /// Nowhere.
    None,
    /// A Unix socket.
    Unix(PathBuf),
}

/// A configuration with its file.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    path: PathBuf,
    document: Document,
}

impl ConfigFile {
    /// Reads a file: a regular one. A link is followed, and the folder is that of what it leads to.
    ///
    /// # Errors
    /// `InvalidInput` with line and column; `Refused` for what is no regular file; as the host fails.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |error: std::io::Error| Error::io(error, "can't be read").at(path);
        let is_link = path.symlink_metadata().is_ok_and(|found| found.is_symlink());
        let path = &if is_link { path.canonicalize().map_err(failed)? } else { path.to_owned() };
        let name = Path::new(path.file_name().unwrap_or_default());
        let file = open_beneath(folder_of(path), name, Beneath::NoLinks)?;
        let file = file.ok_or_else(|| Error::new(ErrorKind::NotFound, "does not exist").at(path))?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| Error::io(error, "can't be read").at(path))?;
        Self::parse(path, &bytes)
    }

    /// What a file at `path` would be that holds these bytes.
    ///
    /// # Errors
    /// `InvalidInput` with line and column.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() as u64 > MAX_BYTES {
            let message = format!("has more than {MAX_BYTES} bytes, so it is no configuration of a machine");
            return Err(Error::new(ErrorKind::InvalidInput, message).at(path));
        }
        let document = Document::parse(bytes).map_err(|problem| {
            let (line, column) = document::place(&String::from_utf8_lossy(bytes), problem.at);
            wrong(path, line, column, &problem.what)
        })?;
        let file = Self { path: path.to_owned(), document };
        if file.document.root().name != fields::ROOT {
            let what = format!("the outermost element is <{}>, expected <{}>", file.document.root().name, fields::ROOT);
            return Err(file.problem(&Problem { at: file.document.root().whole.start, what }));
        }
        Ok(file)
    }

    /// A new one, for a file that is not there yet.
    ///
    /// # Errors
    /// As it can't be made.
    pub fn new(path: &Path) -> Result<Self, Error> {
        let mut file = Self { path: path.to_owned(), document: Document::new(fields::ROOT) };
        file.set(&[("version", None)], "string", "2.0")?;
        Ok(file)
    }

    /// What it says.
    ///
    /// # Errors
    /// `InvalidInput` with line and column.
    pub fn read(&self) -> Result<Config, Error> {
        fields::read(self.document.root(), folder_of(&self.path)).map_err(|problem| self.problem(&problem))
    }

    /// Names elements that are not understood where all should be, each with its place: the first of them, and how many more
    /// there are.
    #[must_use]
    pub fn unknown(&self) -> Vec<String> {
        let mut unknown = fields::unknown(self.document.root());
        let more = unknown.split_off(unknown.len().min(MAX_UNKNOWN)).len();
        let mut told: Vec<_> = unknown.iter().map(|problem| self.problem(problem).to_string()).collect();
        told.extend((more > 0).then(|| format!("{}: {more} more elements are not known here", self.path.display())));
        told
    }

    /// Changes what differs from what it says now, and nothing else.
    ///
    /// # Errors
    /// `InvalidInput` for what can't be said in such a file.
    pub fn write(&mut self, config: &Config) -> Result<(), Error> {
        let folder = folder_of(&self.path).to_owned();
        let (before, after) = (fields::texts(&self.read()?, &folder)?, fields::texts(config, &folder)?);
        // From the end: what is removed does not move what comes before it.
        for (way, _) in before.iter().filter(|(way, _)| !after.iter().any(|(other, _)| other.way == way.way)) {
            self.document.remove(&steps(&way.way)).map_err(|problem| self.problem(&problem))?;
        }
        for location in fields::gone(&self.document, config) {
            self.document.remove(&steps(&location)).map_err(|problem| self.problem(&problem))?;
        }
        for (field, text) in after.iter().filter(|entry| !before.contains(entry)) {
            self.set(&steps(&field.way), field.kind, text)?;
        }
        Ok(())
    }

    fn set(&mut self, way: &[Step<'_>], kind: &str, text: &str) -> Result<(), Error> {
        self.document.set(way, kind, text).map_err(|problem| self.problem(&problem))
    }

    /// Whether another one says the same, byte for byte.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.document.to_bytes() == other.document.to_bytes()
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts it into its file, whole or not at all; `new` refuses one that is there.
    ///
    /// # Errors
    /// `Exists`; as the host fails.
    pub fn save(&self, new: bool) -> Result<(), Error> {
        let failed = |error: std::io::Error| Error::io(error, "can't be written").at(&self.path);
        let folder = folder_of(&self.path);
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        // A name that nobody can have put something under before.
        let passing = folder.join(format!(".{name}.{}", uuid::Uuid::new_v4().simple()));
        let written = (|| {
            let mut file = File::create_new(&passing)?;
            if let Ok(found) = self.path.symlink_metadata().map(|found| found.permissions()) {
                file.set_permissions(found)?;
            }
            file.write_all(&self.document.to_bytes())?;
            file.sync_all()?;
            if new {
                std::fs::hard_link(&passing, &self.path)?;
                std::fs::remove_file(&passing)?;
            } else {
                std::fs::rename(&passing, &self.path)?;
            }
            File::open(folder)?.sync_all()
        })();
        written.map_err(failed).inspect_err(|_| drop(std::fs::remove_file(&passing)))
    }

    fn problem(&self, problem: &Problem) -> Error {
        let (line, column) = self.document.place(problem.at);
        wrong(&self.path, line, column, &problem.what)
    }
}

fn wrong(path: &Path, line: usize, column: usize, what: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("line {line}, column {column}: {what}")).at(path)
}

fn steps(way: &[(String, Option<u8>)]) -> Vec<Step<'_>> {
    way.iter().map(|(name, id)| (name.as_str(), *id)).collect()
}

impl Config {
    /// Adds a disk at the first free position.
    ///
    /// # Errors
    /// `InvalidInput` when all are taken.
    pub fn add(&mut self, mut disk: DiskConfig) -> Result<(), Error> {
        let free = (0..MAX_DISKS as u8).find(|position| self.disks.iter().all(|disk| disk.position != *position));
        disk.position = free.ok_or_else(|| {
            let message = format!("is one disk too many: a machine has {MAX_DISKS} at most");
            Error::new(ErrorKind::InvalidInput, message).at(&disk.image)
        })?;
        self.disks.push(disk);
        self.disks.sort_by_key(|disk| disk.position);
        Ok(())
    }

    /// Takes the disk at a position out.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn remove(&mut self, position: u8) -> Result<DiskConfig, Error> {
        let found = self.disks.iter().position(|disk| disk.position == position);
        found.map(|at| self.disks.remove(at)).ok_or_else(|| {
            let there: Vec<_> = self.disks.iter().map(|disk| disk.position.to_string()).collect();
            let message = format!("there is no disk at position {position}; there are disks at: {}", there.join(", "));
            Error::new(ErrorKind::NotFound, message)
        })
    }
}
