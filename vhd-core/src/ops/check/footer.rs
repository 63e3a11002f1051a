//! Both footers: each by itself, one against the other, and what they say of the disk.

use uuid::Uuid;

use super::{Check, Code, be32, be64, checksum};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Creator, DiskType, FOOTER_COOKIE, FOOTER_LEN, Footer, FooterError, Geometry, HEADER_COOKIE, IDE_LIMIT, MAX_CREATE_SIZE,
    MAX_DISK_SIZE, SECTOR, Timestamp, WINDOWS_MIN_SIZE,
};
use crate::image::{Authority, Footers};
use crate::layout::FooterPlace;

/// A clock that is wrong by less is not worth a word: some writers record local time.
const CLOCK_SLACK: u32 = 24 * 60 * 60;
/// Where every writer puts the dynamic header.
const USUAL_HEADER: u64 = 512;

/// What the rest of the check rests on: the footer that counts, or what can be guessed without one.
pub(super) struct Basis {
    pub(super) disk_type: DiskType,
    /// Bytes of the disk, whole sectors; `None` when nothing sensible is known of it.
    pub(super) size: Option<u64>,
    pub(super) header_at: Option<u64>,
    pub(super) uuid: [u8; 16],
    pub(super) creator: Creator,
    /// Where data must end: at the trailing footer, or at the end of the file where there is none.
    pub(super) data_end: u64,
    /// The trailing footer is the one that counts.
    pub(super) trailing_counts: bool,
    /// The last sector holds no footer, not even a damaged one.
    trailing_missing: bool,
}

const TRAILING: &str = "trailing footer";
const COPY: &str = "header copy";

impl Check<'_> {
    /// Checks the footers. `None` when nothing else can be checked without one.
    pub(super) fn footers(&mut self) -> Result<Option<Basis>> {
        let failed = |error| Error::io(error, "can't be read");
        let footers = Footers::read(self.storage).map_err(failed)?;
        let trailing = self.footer_bytes(footers.trailing_at)?;
        let copy = self.footer_bytes(0)?;
        let header_is_there = self.header_is_at(USUAL_HEADER)?;
        if !trailing.starts_with(&FOOTER_COOKIE) && !copy.starts_with(&FOOTER_COOKIE) && !header_is_there {
            return Err(not_vhd(self.file_len, &trailing));
        }
        // Of a fixed disk the first sector is data, whatever it looks like.
        let counts = footers.authority(true).ok();
        let is_fixed = counts.as_ref().is_some_and(|(footer, _)| footer.disk_type() == DiskType::Fixed);
        let trailing_missing =
            matches!(footers.trailing, Err(FooterError::Cookie(_) | FooterError::Marked(_))) && !footers.is_marked_by_tapdisk();
        self.trailing_footer(&footers, &trailing);
        if !is_fixed {
            self.footer_copy(&footers, &copy, header_is_there);
        }
        if let Err(error) = footers.authority(false) {
            self.add(Code::NoValidFooter, "footers", format!("none is valid: {error}"));
            if counts.is_some()
                && let Some(last) = self.findings.list.last_mut()
            {
                last.repairable = true;
            }
        }
        if !self.file_len.is_multiple_of(SECTOR) && !footers.trailing_is_short {
            let message = format!("length is {} bytes, expected a multiple of 512", self.file_len);
            self.add(Code::FileUnaligned, "file", message);
        }
        let Some((footer, authority)) = counts else {
            return self.guess(header_is_there, trailing_missing);
        };
        let trailing_counts = authority == Authority::Trailing;
        self.values(&footer, if trailing_counts { TRAILING } else { COPY });
        let size = footer.current_size().min(MAX_DISK_SIZE);
        Ok(Some(Basis {
            disk_type: footer.disk_type(),
            size: Some(size - size % SECTOR),
            header_at: footer.header_offset(),
            uuid: footer.uuid(),
            creator: footer.creator(),
            data_end: if trailing_counts { footers.trailing_at } else { self.file_len },
            trailing_counts,
            trailing_missing,
        }))
    }

    /// The sector at `at`, as much of it as the file has.
    fn footer_bytes(&self, at: u64) -> Result<[u8; FOOTER_LEN]> {
        let mut bytes = [0; FOOTER_LEN];
        let len = self.file_len.saturating_sub(at).min(SECTOR) as usize;
        self.read(&mut bytes[..len], at)?;
        Ok(bytes)
    }

    fn header_is_at(&self, at: u64) -> Result<bool> {
        let mut cookie = [0; HEADER_COOKIE.len()];
        if at + cookie.len() as u64 > self.file_len {
            return Ok(false);
        }
        self.read(&mut cookie, at)?;
        Ok(cookie == HEADER_COOKIE)
    }

    fn trailing_footer(&mut self, footers: &Footers, bytes: &[u8; FOOTER_LEN]) {
        match &footers.trailing {
            Ok(_) => self.hidden_checksum(bytes, TRAILING),
            Err(_) if footers.is_marked_by_tapdisk() => {
                let message = "found 512 bytes of 0xC7: tapdisk has the image open, or was killed; the header copy counts";
                self.add(Code::TrailingFooterTapdisk, TRAILING, message);
            }
            // What stands there instead is told once it is known where the data ends.
            Err(FooterError::Cookie(_) | FooterError::Marked(_)) => {}
            Err(_) => self.defects(bytes, TRAILING),
        }
        if footers.trailing_is_short {
            let message = "has 511 bytes, expected 512: Virtual PC before 2004 wrote it; QEMU does not open such files";
            self.add(Code::FooterShort, TRAILING, message);
        }
    }

    fn footer_copy(&mut self, footers: &Footers, bytes: &[u8; FOOTER_LEN], header_is_there: bool) {
        match (&footers.copy, &footers.trailing) {
            (Ok(copy), Ok(trailing)) if copy != trailing => {
                let fields = differing_fields(&copy.to_bytes(), &trailing.to_bytes());
                let message = format!("says otherwise than the trailing footer, which counts: {fields}");
                self.add(Code::FootersDisagree, COPY, message);
            }
            (Ok(_), _) => self.hidden_checksum(bytes, COPY),
            (Err(FooterError::Cookie(_) | FooterError::Marked(_)), trailing) => {
                // Without a trailing footer and a header this may as well be a fixed disk, which has no copy.
                if trailing.is_ok() || header_is_there {
                    let found = bytes[..FOOTER_COOKIE.len()].escape_ascii();
                    let message = format!("found \"{found}\" at offset 0, expected \"conectix\"");
                    self.add(Code::HeaderCopyMissing, COPY, message);
                }
            }
            (Err(_), _) => self.defects(bytes, COPY),
        }
    }

    /// All that is wrong with a footer that has its cookie.
    fn defects(&mut self, bytes: &[u8; FOOTER_LEN], place: &str) {
        let (found, computed) = (be32(bytes, 64), checksum(bytes, 64));
        if found != computed {
            let message = format!("checksum is {found:#010x}, its bytes give {computed:#010x}");
            self.add(Code::FooterChecksum, place, message);
        }
        let version = be32(bytes, 12);
        if version != 0x0001_0000 {
            self.add(Code::FooterVersion, place, FooterError::Version(version).to_string());
        }
        let (disk_type, offset) = (be32(bytes, 60), be64(bytes, 16));
        if !(2..=4).contains(&disk_type) {
            self.add(Code::DiskTypeUnknown, place, FooterError::DiskType(disk_type).to_string());
        } else if disk_type != 2 && (offset < SECTOR || !offset.is_multiple_of(SECTOR) || offset > i64::MAX as u64) {
            self.add(Code::FooterDataOffset, place, FooterError::DataOffset(offset).to_string());
        }
    }

    /// A valid footer whose checksum is not that of all its bytes leaves out tapdisk's hidden byte.
    fn hidden_checksum(&mut self, bytes: &[u8; FOOTER_LEN], place: &str) {
        if be32(bytes, 64) != checksum(bytes, 64) {
            let message = "checksum leaves out byte 85 (hidden), as tapdisk 0.1 and 1.1 write it; others call it wrong";
            self.add(Code::FooterChecksumHidden, place, message);
        }
    }

    /// What the footer that counts says.
    fn values(&mut self, footer: &Footer, place: &str) {
        let features = footer.features();
        if features & 2 == 0 {
            let message = format!("features are {features:#x}, expected bit 1 set");
            self.add(Code::FeaturesReservedClear, place, message);
        }
        if features & !3 != 0 {
            self.add(Code::FeaturesUnknown, place, format!("features are {features:#x}, expected 0x2 or 0x3"));
        }
        if features & 1 != 0 {
            self.add(Code::Temporary, place, "marked as temporary: its owner may delete it when it shuts down");
        }
        if footer.has_reserved_data() {
            self.add(Code::FooterReserved, place, "reserved bytes (86 to 511) are not all zero");
        }
        self.timestamp(footer.timestamp(), place);
        if footer.saved_state() {
            let message = "a virtual machine's saved state relies on it: compacting, resizing or writing would spoil that";
            self.add(Code::SavedState, place, message);
        }
        if footer.hidden() {
            self.add(Code::Hidden, place, "marked as hidden by tapdisk: it is there for its children only");
        }
        if footer.uuid() == [0; 16] {
            self.add(Code::UuidZero, place, "UUID is all zero: no child can name it");
        }
        if footer.disk_type() == DiskType::Fixed {
            let offset = be64(&footer.to_bytes(), 16);
            if offset != u64::MAX {
                let message = format!("data offset is {offset:#x}, expected all ones in a fixed disk");
                self.add(Code::FixedDataOffset, place, message);
            }
        }
        self.sizes(footer, place);
    }

    /// A time stamp against the clock.
    pub(super) fn timestamp(&mut self, timestamp: Timestamp, place: &str) {
        let now = Timestamp::now();
        if timestamp.0 > now.0.saturating_add(CLOCK_SLACK) {
            let hours = (timestamp.0 - now.0) / 3600;
            self.add(Code::TimestampFuture, place, format!("time stamp is {hours} hours in the future"));
        }
    }

    fn sizes(&mut self, footer: &Footer, place: &str) {
        let (size, original) = (footer.current_size(), footer.original_size());
        if size < SECTOR {
            self.add(Code::SizeZero, place, format!("current size is {size} bytes, expected 512 at least"));
        } else if !size.is_multiple_of(SECTOR) {
            let message =
                format!("current size is {size}, expected a multiple of 512; the last {} bytes are lost", size % SECTOR);
            self.add(Code::SizeUnaligned, place, message);
        }
        if size > MAX_DISK_SIZE {
            let message = format!("current size is {size} bytes, expected {MAX_DISK_SIZE} at most");
            self.add(Code::SizeTooLarge, place, message);
        } else if size > MAX_CREATE_SIZE || (SECTOR..WINDOWS_MIN_SIZE).contains(&size) {
            let message = format!("current size is {size} bytes: Windows takes 3 MiB to 2040 GiB");
            self.add(Code::SizeWindows, place, message);
        }
        if size > IDE_LIMIT {
            let message = format!("current size is {size} bytes: IDE disks of Virtual PC and Virtual Server end at {IDE_LIMIT}");
            self.add(Code::SizeIdeLimit, place, message);
        }
        if original != size {
            self.add(Code::Resized, place, format!("current size is {size} bytes, it was made with {original}"));
        }
        let (found, expected) = (footer.geometry(), Geometry::for_sectors(size / SECTOR));
        if found != expected {
            let text = |chs: Geometry| format!("{}/{}/{} ({} bytes)", chs.cylinders, chs.heads, chs.sectors, chs.size());
            let message =
                format!("geometry is {}, expected {} for the current size of {size} bytes", text(found), text(expected));
            self.add(Code::GeometryMismatch, place, message);
        }
    }

    /// A fixed disk's data against its file.
    pub(super) fn fixed(&mut self, basis: &Basis) {
        let (size, room) = (basis.size.unwrap_or(0), basis.data_end);
        if size > room {
            let message = format!("disk of {size} bytes has only {room} before its footer: {} are lost", size - room);
            self.add(Code::FixedDataShort, "data", message);
        } else if size < room {
            let message = format!("{} bytes lie between the disk's end at {size:#x} and the footer", room - size);
            self.add(Code::FixedTrailingRoom, "data", message);
        }
    }

    /// Without any footer the header, where every writer puts it, is enough to look at the rest.
    fn guess(&self, header_is_there: bool, trailing_missing: bool) -> Result<Option<Basis>> {
        if !header_is_there || USUAL_HEADER + 56 > self.file_len {
            return Ok(None);
        }
        let mut parent = [0; 16];
        self.read(&mut parent, USUAL_HEADER + 40)?;
        Ok(Some(Basis {
            disk_type: if parent == [0; 16] { DiskType::Dynamic } else { DiskType::Differencing },
            size: None,
            header_at: Some(USUAL_HEADER),
            uuid: [0; 16],
            creator: Creator { app: [0; 4], version: 0, os: [0; 4] },
            data_end: self.file_len,
            trailing_counts: false,
            trailing_missing,
        }))
    }

    /// Tells of a trailing footer that is not there. `used_end` is where the last structure ends: a file that grew
    /// and lost the footer at its new end still has the old one behind that.
    pub(super) fn trailing_missing(&mut self, basis: &Basis, used_end: Option<u64>) -> Result<()> {
        if !basis.trailing_missing {
            return Ok(());
        }
        let places =
            used_end.map(|end| [FooterPlace::PageEnd.file_len(end).saturating_sub(SECTOR), end.next_multiple_of(SECTOR)]);
        for at in places.into_iter().flatten().filter(|&at| at + SECTOR < self.file_len) {
            if Footer::parse(&self.footer_bytes(at)?).is_ok_and(|footer| footer.uuid() == basis.uuid) {
                let message = format!(
                    "found at {at:#x}, expected in the last sector of {} bytes: the file grew and its end was not written",
                    self.file_len
                );
                self.add(Code::StaleTrailingFooter, TRAILING, message);
                return Ok(());
            }
        }
        let bytes = self.footer_bytes(self.file_len.saturating_sub(SECTOR))?;
        let message = format!("found \"{}\" in the last sector, expected \"conectix\"", bytes[..8].escape_ascii());
        self.add(Code::TrailingFooterMissing, TRAILING, message);
        Ok(())
    }
}

fn not_vhd(file_len: u64, trailing: &[u8; FOOTER_LEN]) -> Error {
    let message = if file_len < SECTOR {
        format!("is no VHD: it has {file_len} bytes, a footer alone has 512")
    } else {
        format!(
            "is no VHD: expected a footer that begins with \"conectix\" in the last 512 bytes or the first, found \"{}\"",
            trailing[..8].escape_ascii()
        )
    };
    Error::new(ErrorKind::NotVhd, message)
}

/// The fields in which two footers differ, with both values.
fn differing_fields(copy: &[u8; FOOTER_LEN], trailing: &[u8; FOOTER_LEN]) -> String {
    const FIELDS: [(&str, usize, usize); 15] = [
        ("features", 8, 4),
        ("version", 12, 4),
        ("data offset", 16, 8),
        ("time stamp", 24, 4),
        ("creator", 28, 4),
        ("creator version", 32, 4),
        ("creator host", 36, 4),
        ("original size", 40, 8),
        ("current size", 48, 8),
        ("geometry", 56, 4),
        ("disk type", 60, 4),
        ("UUID", 68, 16),
        ("saved state", 84, 1),
        ("hidden", 85, 1),
        ("reserved bytes", 86, 426),
    ];
    let value = |bytes: &[u8; FOOTER_LEN], at: usize, len: usize| match len {
        1 => bytes[at].to_string(),
        4 => format!("{:#x}", be32(bytes, at)),
        8 => be64(bytes, at).to_string(),
        16 => bytes[at..].first_chunk().map_or(String::new(), |uuid| Uuid::from_bytes(*uuid).to_string()),
        _ => "other bytes".into(),
    };
    let differing = FIELDS.iter().filter(|&&(_, at, len)| copy[at..at + len] != trailing[at..at + len]);
    let texts =
        differing.map(|&(name, at, len)| format!("{name} {} (trailing {})", value(copy, at, len), value(trailing, at, len)));
    texts.collect::<Vec<_>>().join(", ")
}
