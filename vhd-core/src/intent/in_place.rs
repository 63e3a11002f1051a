//! What is done to one file that may be no image meanwhile.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::command::Command;
use crate::error::{Error, ErrorKind, Result, fail};
use crate::format::{DiskType, FOOTER_LEN, Footer, SECTOR, Stage};
use crate::image::Footers;
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

/// A content that moves to another file. What is done is seen from the files; this says it to people, and to those who look
/// at the image's name alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// What it becomes, as `--to` has it.
    pub to: String,
    /// The new file, in the image's folder.
    pub new: PathBuf,
    /// Bytes of the disk that are in the new file for good, and may be gone from the old one.
    pub done: u64,
    /// True once all are: what is left is that the new file takes the old one's name.
    pub finishing: bool,
    /// Bytes of a block of the dynamic disk that it becomes.
    #[serde(default)]
    pub block_size: Option<u32>,
    /// Bytes of the raw file that it was.
    #[serde(default)]
    pub len: Option<u64>,
    /// The identifier of the image that it becomes.
    #[serde(default)]
    pub becomes: Option<Uuid>,
}

impl InPlace {
    /// The command that goes on with it.
    pub(super) fn command(&self, image: &Path) -> Command {
        match &self.work {
            Work::Footer(_) if self.uuid.is_none() => crate::ops::in_place::command(image, "fixed", None),
            Work::Footer(FooterMove { from, to, .. }) => {
                Command::new(&["vhd", "resize"]).path(image).words(&[&to.to_string()]).flag("--shrink", to < from)
            }
            Work::Repair(_) => Command::new(&["vhd", "check"]).path(image).words(&["--repair"]),
            Work::Convert(Move { to, block_size, .. }) => crate::ops::in_place::command(image, to, *block_size),
        }
    }
}

impl FooterMove {
    pub(crate) fn new(from: u64, end: u64, to: u64, footer: &Footer) -> Self {
        let footer = footer.to_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        Self { from, end, to, footer }
    }

    /// Puts the footer behind a raw file, from whatever point it had come to, and makes it durable.
    ///
    /// # Errors
    /// `Refused` for a record that does not fit the file; as the host fails.
    pub(crate) fn append(&self, storage: &dyn Storage) -> Result<()> {
        let failed = |error| Error::io(error, format!("can't get a size of {} bytes", self.to));
        let len = storage.len().map_err(failed)?;
        let fits = self.from == self.end && self.to == self.end.next_multiple_of(SECTOR);
        if !fits || len < self.end || len > self.to + SECTOR {
            fail!(Refused, "its record is of a raw file of {} bytes, and it has {len}; {CLEAR}", self.end);
        }
        self.put_footer(storage)
    }

    /// Gives a fixed disk its size where a power cut left the new length without the mark, or a former version of this program
    /// no footer at all. False for a file that has a footer or a mark, which needs nothing of the record.
    ///
    /// # Errors
    /// `Refused` for a record that does not fit the file; as the host fails.
    pub(crate) fn finish_growth(&self, storage: &dyn Storage) -> Result<bool> {
        let footers = Footers::read(storage).map_err(|error| Error::io(error, "can't be read"))?;
        if footers.authority(false).is_ok() || footers.stage().is_some() {
            return Ok(false);
        }
        // All that lies between is the old footer, and what may be before it.
        let fits = self.from < self.to && self.from < self.end && self.end - self.from <= 2 * SECTOR;
        if !fits || footers.file_len < self.end {
            fail!(Refused, "has no footer, and its record does not fit its {} bytes; {CLEAR}", footers.file_len);
        }
        let failed = |error| Error::io(error, format!("can't be zeroed at {:#x}", self.from));
        storage.set_len((self.to + SECTOR).max(footers.file_len)).map_err(failed)?;
        storage.zero_range(self.from..self.end.min(self.to)).map_err(failed)?;
        self.put_footer(storage).map(|()| true)
    }

    fn put_footer(&self, storage: &dyn Storage) -> Result<()> {
        let failed = |error| Error::io(error, format!("can't get a size of {} bytes", self.to));
        let footer = self.footer().ok_or_else(|| Error::new(ErrorKind::Refused, format!("its record has no footer; {CLEAR}")))?;
        storage.set_len(self.to + SECTOR).map_err(failed)?;
        let written = storage.write_at(&footer.to_bytes(), self.to);
        written.map_err(|error| Error::io(error, format!("footer can't be written at {:#x}", self.to)))?;
        storage.sync().map_err(failed)
    }

    /// The footer of a fixed disk of the size that it gets.
    fn footer(&self) -> Option<Footer> {
        let digits: Option<Vec<u8>> = self.footer.as_bytes().as_chunks::<2>().0.iter().map(hex).collect();
        let bytes: [u8; FOOTER_LEN] = digits?.try_into().ok()?;
        let footer = Footer::parse(&bytes).ok()?;
        (footer.disk_type() == DiskType::Fixed && footer.current_size() == self.to).then_some(footer)
    }
}

/// Gives a fixed disk of `from` bytes, whose footer is sound, the size and the footer of `footer`. What is new reads as zeros.
/// In between it bears a mark, and is no image to anyone; [`finish_resize`] goes on then.
///
/// # Errors
/// As the host fails.
pub(crate) fn resize_fixed(storage: &dyn Storage, from: u64, footer: &Footer) -> Result<()> {
    let to = footer.current_size();
    let failed = |error| Error::io(error, format!("can't get a size of {to} bytes"));
    let at = if to > from {
        // Length first: what it lacks is told before anything changed. The last sector is a footer's already.
        storage.set_len(to + SECTOR).map_err(failed)?;
        to
    } else {
        Footers::read(storage).map_err(failed)?.trailing_at
    };
    let marked = storage.write_at(&Stage::Resize { from }.mark(footer), at);
    marked.map_err(|error| Error::io(error, format!("mark can't be written at {at:#x}")))?;
    storage.sync().map_err(failed)?;
    finish_resize(storage).map(drop)
}

/// Goes on with a change of size of which the file bears the mark. The new size; `None` for a file without that mark. It is
/// durable with the next barrier, with which opening for writing begins.
///
/// # Errors
/// `Corrupt` for a mark that does not fit the file; as the host fails.
pub(crate) fn finish_resize(storage: &dyn Storage) -> Result<Option<u64>> {
    let footers = Footers::read(storage).map_err(|error| Error::io(error, "can't be read"))?;
    let Some((Stage::Resize { from }, footer)) = footers.stage() else { return Ok(None) };
    let to = footer.current_size();
    let failed = |error| Error::io(error, format!("can't get a size of {to} bytes"));
    let fits = if to > from { footers.trailing_at == to } else { footers.trailing_at >= from };
    if !fits {
        fail!(Corrupt, "the mark of its change of size from {from} to {to} bytes is at {:#x}", footers.trailing_at);
    }
    let put = || {
        let written = storage.write_at(&footer.to_bytes(), to);
        written.map_err(|error| Error::io(error, format!("footer can't be written at {to:#x}")))
    };
    if to > from {
        // The old footer lies in the disk now.
        storage.punch_hole(from..to).map_err(|error| Error::io(error, format!("can't be zeroed at {from:#x}")))?;
        storage.sync().map_err(failed)?;
        put()?;
    } else {
        put()?;
        storage.sync().map_err(failed)?;
        storage.set_len(to + SECTOR).map_err(failed)?;
    }
    Ok(Some(to))
}

/// Takes a change of size back, from whatever point it had come to: the data of a disk that was to grow stay where they are.
///
/// # Errors
/// As the host fails.
pub(crate) fn undo_growth(storage: &dyn Storage, footer: &Footer) -> Result<()> {
    let at = footer.current_size();
    let failed = |error| Error::io(error, format!("can't get its size of {at} bytes back"));
    storage.write_at(&footer.to_bytes(), at).map_err(failed)?;
    storage.set_len(at + SECTOR).map_err(failed)?;
    storage.sync().map_err(failed)
}

/// What to do with a record that can't be gone on with.
const CLEAR: &str = "`vhd check --clear-record` shows and removes it";

fn hex(pair: &[u8; 2]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()
}
