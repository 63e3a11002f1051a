//! The footers of a file: the trailing one and the copy at its start, each as it was found.

use std::io;

use super::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{DiskType, FOOTER_LEN, Footer, FooterError, OLD_FOOTER_LEN, SECTOR, Stage};
use crate::storage::Storage;

/// Both footers of a file.
#[derive(Debug)]
pub struct Footers {
    /// Bytes of the file.
    pub file_len: u64,
    /// The trailing footer. Its first byte is at [`Self::trailing_at`].
    pub trailing: std::result::Result<Footer, FooterError>,
    /// File offset of the trailing footer, or of the last sector where there is none.
    pub trailing_at: u64,
    /// True when the trailing footer is of the 511 bytes that Virtual PC wrote before 2004.
    pub trailing_is_short: bool,
    /// The copy at offset 0. Of a fixed disk these are data, and may be anything a guest put there.
    pub copy: std::result::Result<Footer, FooterError>,
    trailing_bytes: [u8; FOOTER_LEN],
    copy_bytes: [u8; FOOTER_LEN],
}

/// Which footer of a file counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authority {
    /// The trailing footer, as always when it is valid.
    Trailing,
    /// The copy at offset 0, because the trailing footer is missing or damaged.
    Copy,
}

impl Footers {
    /// Reads both. A file of fewer than 512 bytes has none.
    ///
    /// # Errors
    /// As the host fails to read.
    pub fn read(storage: &dyn Storage) -> io::Result<Self> {
        let file_len = storage.len()?;
        let mut copy_bytes = [0; FOOTER_LEN];
        let mut trailing_bytes = [0; FOOTER_LEN];
        let mut trailing_at = file_len.saturating_sub(SECTOR);
        let mut trailing_is_short = false;
        if file_len >= SECTOR {
            storage.read_at(&mut copy_bytes, 0)?;
            storage.read_at(&mut trailing_bytes, trailing_at)?;
        }
        let mut trailing = Footer::parse(&trailing_bytes);
        if trailing.is_err() && file_len >= OLD_FOOTER_LEN as u64 {
            let at = file_len - OLD_FOOTER_LEN as u64;
            let mut bytes = [0; FOOTER_LEN];
            storage.read_at(&mut bytes[..OLD_FOOTER_LEN], at)?;
            // Files of Virtual PC 5 may be this short as a whole; others hold a cookie here by chance only.
            if bytes.starts_with(&crate::format::FOOTER_COOKIE) {
                (trailing_bytes, trailing_at, trailing_is_short) = (bytes, at, true);
                trailing = Footer::parse(&bytes);
            }
        }
        Ok(Self {
            file_len,
            trailing,
            trailing_at,
            trailing_is_short,
            copy: Footer::parse(&copy_bytes),
            trailing_bytes,
            copy_bytes,
        })
    }

    /// The footer that counts: the trailing one where it is valid, else the copy where that belongs to a dynamic or
    /// differencing image. `tolerant` takes one with a wrong checksum if there is nothing better.
    ///
    /// Where the trailing footer is damaged but still says that the disk is fixed, the copy is nothing: a guest writes to
    /// the start of a fixed disk what it likes.
    ///
    /// # Errors
    /// What is wrong with the trailing footer.
    pub fn authority(&self, tolerant: bool) -> std::result::Result<(Footer, Authority), FooterError> {
        let was_fixed = self.is_damaged_fixed();
        let sparse = |footer: &Footer| footer.disk_type() != DiskType::Fixed && !was_fixed;
        match (&self.trailing, &self.copy) {
            (Ok(footer), _) => Ok((footer.clone(), Authority::Trailing)),
            (Err(_), Ok(copy)) if sparse(copy) => Ok((copy.clone(), Authority::Copy)),
            // Nothing makes an image of what is half made.
            (Err(error @ FooterError::Marked(_)), _) => Err(error.clone()),
            (Err(_), Err(error @ FooterError::Marked(_))) if !was_fixed => Err(error.clone()),
            (Err(error), _) if tolerant => match Footer::parse_tolerant(&self.trailing_bytes) {
                Ok(footer) => Ok((footer, Authority::Trailing)),
                Err(_) => match Footer::parse_tolerant(&self.copy_bytes) {
                    Ok(copy) if sparse(&copy) => Ok((copy, Authority::Copy)),
                    _ => Err(error.clone()),
                },
            },
            // Damage to a copy with the right cookie says more than the absence of a trailing footer.
            (Err(FooterError::Cookie(_)), Err(copy)) if !matches!(copy, FooterError::Cookie(_)) => Err(copy.clone()),
            (Err(error), _) => Err(error.clone()),
        }
    }

    /// The mark that the file bears, and the footer that it was made of; `None` for an image, and for what is none.
    #[must_use]
    pub fn stage(&self) -> Option<(Stage, Footer)> {
        match self.authority(false) {
            Err(FooterError::Marked(_)) => Stage::parse(&self.trailing_bytes).or_else(|| Stage::parse(&self.copy_bytes)),
            _ => None,
        }
    }

    /// The trailing footer as it was found; zeros where a short one ends early.
    pub(crate) fn trailing_bytes(&self) -> &[u8; FOOTER_LEN] {
        &self.trailing_bytes
    }

    /// The copy as it was found.
    pub(crate) fn copy_bytes(&self) -> &[u8; FOOTER_LEN] {
        &self.copy_bytes
    }

    /// True when the trailing footer, its checksum or mark aside, is that of a fixed disk: type and data offset say so both.
    fn is_damaged_fixed(&self) -> bool {
        if let Some((_, footer)) = Stage::parse(&self.trailing_bytes) {
            return footer.disk_type() == DiskType::Fixed;
        }
        matches!(self.trailing, Err(FooterError::Checksum { .. }))
            && self.trailing_bytes[20..24] == [0xFF; 4]
            && Footer::parse_tolerant(&self.trailing_bytes).is_ok_and(|footer| footer.disk_type() == DiskType::Fixed)
    }

    /// True when tapdisk overwrote the trailing footer, which it does while it has an image open.
    #[must_use]
    pub fn is_marked_by_tapdisk(&self) -> bool {
        self.trailing_bytes.iter().all(|&byte| byte == 0xC7)
    }
}

impl Image {
    /// Gives an image that has none an identifier, so that a child can name it: in both footers, then a barrier.
    ///
    /// # Errors
    /// As the host fails, or the image is not open for writing.
    pub fn set_uuid_of(storage: &dyn Storage, uuid: [u8; 16]) -> Result<()> {
        Self::write_uuid_of(storage, uuid)?;
        sync(storage)
    }

    /// As [`Image::set_uuid_of`], without the barrier: for who opens the image next, which begins with one.
    pub(crate) fn write_uuid_of(storage: &dyn Storage, uuid: [u8; 16]) -> Result<()> {
        change(storage, |footer| footer.set_uuid(uuid))
    }

    /// Notes that a virtual machine's saved state relies on an image as it is, or does not any more: in both footers,
    /// then a barrier. Whoever has it open as an [`Image`] knows the footer as it was.
    ///
    /// # Errors
    /// As the host fails, or the image is not open for writing.
    pub fn set_saved_state_of(storage: &dyn Storage, saved: bool) -> Result<()> {
        change(storage, |footer| footer.set_saved_state(saved))?;
        sync(storage)
    }
}

/// Changes what each footer says, one sector at a time.
fn change(storage: &dyn Storage, change: impl Fn(&mut Footer)) -> Result<()> {
    let footers = Footers::read(storage).map_err(|error| Error::io(error, "can't be read"))?;
    let (mut footer, _) = footers.authority(false).map_err(|error| Error::new(ErrorKind::Corrupt, error.to_string()))?;
    change(&mut footer);
    let write = |at| {
        let written = storage.write_at(&footer.to_bytes(), at);
        written.map_err(|error| Error::io(error, format!("can't be written at {at:#x}")))
    };
    // Each is right alone, and where they differ the trailing one counts: no barrier between them.
    if footer.disk_type() != DiskType::Fixed {
        write(0)?;
    }
    write(footers.trailing_at)
}

fn sync(storage: &dyn Storage) -> Result<()> {
    // Whatever the reason, nothing is known of what was written.
    storage.sync().map_err(|error| Error::io(error, "can't be synced").with_kind(ErrorKind::Io))
}
