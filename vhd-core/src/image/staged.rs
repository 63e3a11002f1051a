//! Files that an operation rebuilds in stages. They bear a mark in place of each footer ([`Stage`]), so that nobody takes them
//! for images until they are done. The operation itself sees footers there.

use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::Footers;
use crate::command::Command;
use crate::error::{Error, ErrorKind, Result, fail};
use crate::format::{DiskType, FOOTER_LEN, Footer, SECTOR, Stage};
use crate::storage::Storage;

/// A file with a mark, as the image that it will be.
#[derive(Debug)]
pub(crate) struct Staged {
    file: Arc<dyn Storage>,
    stage: Stage,
    /// It has a copy of the footer at its start.
    has_copy: bool,
}

impl Staged {
    /// A file that bears the mark of `stage` already, or is to become an image of this type that does.
    pub(crate) fn over(file: Arc<dyn Storage>, stage: Stage, disk_type: DiskType) -> Arc<dyn Storage> {
        Arc::new(Self { file, stage, has_copy: disk_type != DiskType::Fixed })
    }

    /// Puts the mark on an image whose footers are sound: no data may change before the next barrier.
    ///
    /// # Errors
    /// `Corrupt` for what has no footer; as the host fails.
    pub(crate) fn mark(file: &dyn Storage, stage: Stage, change: impl Fn(&mut Footer)) -> Result<()> {
        let footers = Footers::read(file).map_err(|error| Error::io(error, "can't be read"))?;
        let (mut footer, _) = footers.authority(false).map_err(|error| Error::new(ErrorKind::Corrupt, error.to_string()))?;
        change(&mut footer);
        let mark = stage.mark(&footer);
        // While only one is there the image is what it was. Readers look at the copy first, so it goes last.
        write(file, &mark, footers.trailing_at)?;
        if footer.disk_type() == DiskType::Fixed { Ok(()) } else { write(file, &mark, 0) }
    }

    /// Takes the mark away: the file is an image from then on. What it holds must be durable before.
    ///
    /// # Errors
    /// `Corrupt` for a file without a mark; as the host fails.
    pub(crate) fn finish(file: &dyn Storage, change: impl Fn(&mut Footer)) -> Result<()> {
        let footers = Footers::read(file).map_err(|error| Error::io(error, "can't be read"))?;
        let Some((_, mut footer)) = footers.stage() else { fail!(Corrupt, "has lost its mark of an unfinished operation") };
        change(&mut footer);
        let bytes = footer.to_bytes();
        // Either alone is right.
        if footer.disk_type() != DiskType::Fixed {
            write(file, &bytes, 0)?;
        }
        write(file, &bytes, footers.trailing_at)?;
        file.sync().map_err(|error| Error::io(error, "can't be synced"))
    }

    /// Whether a request of this length at `offset` is for a sector that a footer is in.
    fn is_footer(&self, offset: u64, len: usize) -> io::Result<bool> {
        Ok(len == FOOTER_LEN && ((offset == 0 && self.has_copy) || offset.checked_add(SECTOR) == Some(self.file.len()?)))
    }
}

/// What to say of a file that bears a mark, and the command that goes on. `footer` is what the mark was made of.
pub(crate) fn refusal(path: &Path, stage: Stage, footer: &Footer) -> Error {
    let finish = |what: &str, command: Command| format!("{what} was interrupted; finish it first: {command}");
    let message = match stage {
        Stage::ConvertSource => {
            let to = if footer.disk_type() == DiskType::Fixed { DiskType::Dynamic } else { DiskType::Fixed };
            let command = Command::new(&["vhd", "convert"]).path(path).words(&["--in-place", "--to", to.name()]);
            finish("a conversion in place, which moved a part of its content to another file,", command)
        }
        Stage::ConvertTarget => format!(
            "is the half-made result of a conversion in place of the image with UUID {}; `vhd convert --in-place --to {}` of that \
             one finishes it",
            Uuid::from_bytes(footer.uuid()),
            footer.disk_type().name()
        ),
        Stage::Merge => finish("a merge into it", Command::new(&["vhd", "merge", "CHILD", "--into"]).path(path)),
        Stage::Resize { from } => {
            let command = Command::new(&["vhd", "resize"]).path(path).words(&[&footer.current_size().to_string()]);
            finish("a change of its size", command.flag("--shrink", footer.current_size() < from))
        }
    };
    Error::new(ErrorKind::Refused, message).at(path)
}

fn write(file: &dyn Storage, bytes: &[u8], at: u64) -> Result<()> {
    file.write_at(bytes, at).map_err(|error| Error::io(error, format!("can't be written at {at:#x}")))
}

impl Storage for Staged {
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<()> {
        self.file.read_vectored_at(bufs, offset)?;
        if let [buf] = bufs
            && self.is_footer(offset, buf.len())?
            && let Ok(bytes) = <&mut [u8; FOOTER_LEN]>::try_from(&mut **buf)
            && let Some((_, footer)) = Stage::parse(bytes)
        {
            *bytes = footer.to_bytes();
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        if let [buf] = bufs
            && self.is_footer(offset, buf.len())?
            && let Ok(bytes) = <&[u8; FOOTER_LEN]>::try_from(&**buf)
            && let Ok(footer) = Footer::parse(bytes)
        {
            return self.file.write_at(&self.stage.mark(&footer), offset);
        }
        self.file.write_vectored_at(bufs, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        // A footer that was written for the new end, before the file is cut there.
        if let Some(at) = len.checked_sub(SECTOR)
            && len < self.file.len()?
        {
            let mut bytes = [0; FOOTER_LEN];
            self.file.read_at(&mut bytes, at)?;
            if let Ok(footer) = Footer::parse(&bytes) {
                let marked = self.file.write_at(&self.stage.mark(&footer), at);
                marked.map_err(|error| io::Error::new(error.kind(), format!("mark can't be written at {at:#x}: {error}")))?;
            }
        }
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.file.punch_hole(range)
    }

    fn zero_range(&self, range: Range<u64>) -> io::Result<()> {
        self.file.zero_range(range)
    }

    fn zeroes_fast(&self, keep: bool) -> bool {
        self.file.zeroes_fast(keep)
    }

    fn is_local(&self) -> bool {
        self.file.is_local()
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.file.allocate(range)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(offset)
    }

    fn write_early(&self) {
        self.file.write_early();
    }

    fn can_grow(&self) -> bool {
        self.file.can_grow()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }
}
