//! What is done to one file that may be no image meanwhile.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{FOOTER_LEN, Footer, SECTOR};
use crate::storage::Storage;

/// A change of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InPlace {
    /// The image's identifier, before and after; none for a raw file.
    pub uuid: Option<Uuid>,
    /// What is done.
    pub work: Work,
}

/// What is done to a file in place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// A fixed disk gets another size, or a raw file becomes a fixed disk.
    Footer(FooterMove),
    /// The content moves to a new file of another type, piece by piece.
    Convert(Move),
    /// A repair, whose undo journal has this name.
    Repair(PathBuf),
}

/// A footer that gets another place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FooterMove {
    /// Bytes of the disk before.
    pub from: u64,
    /// Bytes of the file before.
    pub end: u64,
    /// Bytes of the disk afterwards.
    pub to: u64,
    /// The footer, in hexadecimal.
    pub footer: String,
}

/// A content that moves to another file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// What it becomes, as `--to` has it.
    pub to: String,
    /// The new file, in the image's folder.
    pub new: PathBuf,
    /// Bytes of the disk that are in the new file for good, and may be gone from the old one.
    pub done: u64,
    /// True once all are: what is left is that the new file takes the old one's name.
    pub finishing: bool,
}

impl InPlace {
    /// The command that goes on with it.
    pub(super) fn command(&self, image: &Path) -> String {
        match &self.work {
            Work::Footer(_) if self.uuid.is_none() => format!("vhd convert {} --in-place --to fixed", image.display()),
            Work::Footer(FooterMove { to, .. }) => format!("vhd resize {} {to}", image.display()),
            Work::Repair(_) => format!("vhd check {} --repair", image.display()),
            Work::Convert(Move { to, .. }) => format!("vhd convert {} --in-place --to {to}", image.display()),
        }
    }
}

impl FooterMove {
    pub(crate) fn new(from: u64, end: u64, to: u64, footer: &Footer) -> Self {
        let footer = footer.to_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        Self { from, end, to, footer }
    }

    /// Does it, from whatever point it had come to, and makes it durable. The footer is at the end then, and what it leaves
    /// reads as zeros.
    pub(crate) fn apply(&self, storage: &dyn Storage) -> Result<()> {
        self.write(storage)?;
        storage.sync().map_err(|error| Error::io(error, format!("can't get a size of {} bytes", self.to)))
    }

    /// As [`FooterMove::apply`], without the barrier: for who opens the image next, which begins with one.
    pub(crate) fn write(&self, storage: &dyn Storage) -> Result<()> {
        let footer = self.footer_bytes().ok_or_else(|| Error::new(ErrorKind::Refused, "its intent record has no footer"))?;
        let failed = |error| Error::io(error, format!("can't get a size of {} bytes", self.to));
        let len = storage.len().map_err(failed)?;
        if self.to > self.from {
            // Length first: what it lacks is told before anything changed.
            storage.set_len((self.to + SECTOR).max(len)).map_err(failed)?;
            let zeroed = storage.zero_range(self.from..self.end.min(self.to).max(self.from));
            zeroed.map_err(|error| Error::io(error, format!("can't be zeroed at {:#x}", self.from)))?;
        }
        let written = storage.write_at(&footer, self.to);
        written.map_err(|error| Error::io(error, format!("footer can't be written at {:#x}", self.to)))?;
        storage.set_len(self.to + SECTOR).map_err(failed)
    }

    fn footer_bytes(&self) -> Option<[u8; FOOTER_LEN]> {
        let digits: Option<Vec<u8>> = self.footer.as_bytes().as_chunks::<2>().0.iter().map(hex).collect();
        digits?.try_into().ok()
    }
}

fn hex(pair: &[u8; 2]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()
}
