//! The undo journal: the original bytes of all that a repair changes, durable beside the image before the first change.
//!
//! One line, `vhd-repair-undo 3 CRC LENGTH CRC` in hexadecimal, JSON of that length, which has the first checksum, and then, under the
//! second: a table of the ranges that are kept, one of those that the repair wrote (offset and length, 8 bytes each), a CRC for each
//! sector that it wrote, the kept bytes. So of each sector of the image can be told whether it is as it was, as the repair left it,
//! or somebody else's, however far the repair or its undo came.
//!
//! A journal may be a stranger's. It is believed only as far as it is borne out: its tables fit each other and the file's length, what
//! is put back lies where the repair wrote or cut off, and the image holds there what the journal says.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::MAX_MOVED;
use super::table::MAX_COPIED;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{OLD_FOOTER_LEN, SECTOR};
use crate::image::Footers;
use crate::ops::copy::is_zero;
use crate::progress::Progress;
use crate::storage::{Beneath, FileStorage, Storage, folder_of, open_beneath};

/// What a journal begins with.
pub(super) const MAGIC: &str = "vhd-repair-undo";
const VERSION: &str = "3";
/// What the last release wrote: all ranges are in the JSON, and what was written has a checksum for each range.
const OLD_VERSION: &str = "2";
pub(super) const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);
/// Bytes that are looked at at once; whole sectors.
pub(super) const CHUNK: usize = 64 << 10;
/// Bytes of the first line at most.
const MAX_LINE: usize = 100;
/// Bytes of the JSON at most: it has sentences only.
const MAX_HEAD: u64 = 1 << 20;
/// As much, of the old version: two hundred thousand ranges.
const MAX_OLD_HEAD: u64 = 8 << 20;
/// Ranges of a table at most: every second sector of all that may change.
const MAX_RANGES: u64 = 256 << 10;
/// Bytes that are kept at most: what may be written, copied and cut off together, and as much again.
const MAX_KEPT: u64 = 512 << 20;
/// The longest file that is repaired: the largest fixed disks have 64 TiB.
const MAX_FILE: u64 = 128 << 40;
/// Bytes of zeros that may have been cut off the end without a byte that is kept behind them.
const MAX_ZEROS: u64 = 64 << 20;

/// What a journal says before its tables.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    /// The image's identifier before and after the repair, where it had one.
    uuids: [Option<Uuid>; 2],
    /// Bytes of the file before and after the repair.
    len: [u64; 2],
    /// Ranges that are kept, and that were written.
    ranges: [u64; 2],
    /// What was changed.
    changes: Vec<String>,
}

/// What a journal of the old version says before the bytes.
#[derive(Debug, Deserialize)]
struct OldHead {
    len: [u64; 2],
    ranges: Vec<(u64, u64)>,
    crc: u32,
    written: Vec<(u64, u64, u32)>,
    changes: Vec<String>,
}

/// A range of the image whose original bytes are kept.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) range: Range<u64>,
    /// Where in the journal.
    at: u64,
}

/// Checksums of what the repair wrote.
#[derive(Debug)]
pub(super) enum Sums {
    /// One for each sector, from this offset of the journal on.
    Sectors(u64),
    /// One for each range.
    Ranges(Vec<u32>),
}

/// A journal that was read, and is whole.
#[derive(Debug)]
pub struct Journal {
    pub(super) file: Arc<dyn Storage>,
    uuids: [Option<Uuid>; 2],
    pub(super) len: [u64; 2],
    pub(super) kept: Vec<Kept>,
    pub(super) written: Vec<Range<u64>>,
    pub(super) sums: Sums,
    changes: Vec<String>,
}

/// Opens the journal at `path`; nothing where there is none.
pub(super) fn open(path: &Path) -> Result<Option<Journal>> {
    let name = Path::new(path.file_name().unwrap_or_default());
    let Some(file) = open_beneath(folder_of(path), name, Beneath::NoLinks)? else { return Ok(None) };
    Journal::read(Arc::new(FileStorage::from_file(file, path)?)).map(Some).map_err(|error| error.at(path))
}

fn bad(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, format!("is no undo journal of a repair: {}", what.into()))
}

pub(super) fn failed(error: io::Error) -> Error {
    Error::io(error, "can't be read")
}

impl Journal {
    /// Reads a journal. In memory are its tables alone, at most 16 MiB.
    ///
    /// # Errors
    /// `Corrupt` for what is none, or not whole; as the host fails.
    pub fn read(file: Arc<dyn Storage>) -> Result<Self> {
        let len = file.len().map_err(failed)?;
        let mut line = vec![0; len.min(MAX_LINE as u64) as usize];
        file.read_at(&mut line, 0).map_err(failed)?;
        let end = line.iter().position(|byte| *byte == b'\n').ok_or_else(|| bad("it has no first line"))?;
        let text = std::str::from_utf8(&line[..end]).map_err(|_| bad("its first line is no text"))?;
        let mut fields = text.strip_prefix(MAGIC).ok_or_else(|| bad("it is of another program"))?.split_whitespace();
        let version = fields.next();
        let fields: Option<Vec<_>> = fields.map(|field| u64::from_str_radix(field, 16).ok()).collect();
        let at = end as u64 + 1;
        let journal = match (version, fields.as_deref()) {
            (Some(VERSION), Some(&[crc, head_len, body_crc])) => {
                let head = read_head(&*file, at..at.saturating_add(head_len), len, crc, MAX_HEAD)?;
                Self::from_head(&file, &head, at + head_len, body_crc)?
            }
            (Some(OLD_VERSION), Some(&[crc, head_len])) => {
                let head = read_head(&*file, at..at.saturating_add(head_len), len, crc, MAX_OLD_HEAD)?;
                Self::from_old_head(&file, &head, at + head_len)?
            }
            (Some(VERSION | OLD_VERSION), _) => return Err(bad("it has no checksum")),
            (version, _) => {
                let version = version.unwrap_or("none");
                return Err(bad(format!("it is of version {version}, this program reads {OLD_VERSION} and {VERSION}")));
            }
        };
        journal.validate()?;
        Ok(journal)
    }

    fn from_head(file: &Arc<dyn Storage>, head: &[u8], at: u64, crc: u64) -> Result<Self> {
        let head: Head = serde_json::from_slice(head).map_err(|error| bad(error.to_string()))?;
        if head.ranges.iter().any(|count| *count > MAX_RANGES) {
            return Err(bad("it has more ranges than a repair changes"));
        }
        let len = file.len().map_err(failed)?;
        let [kept, written] = head.ranges;
        let table = (kept + written) * 16;
        let mut bytes = vec![0; len.saturating_sub(at).min(table) as usize];
        file.read_at(&mut bytes, at).map_err(failed)?;
        let ranges: Option<Vec<_>> = bytes.as_chunks::<16>().0.iter().map(range_of).collect();
        let mut ranges = ranges.ok_or_else(|| bad("a range has no end"))?;
        if ranges.len() as u64 != kept + written {
            return Err(bad("it was cut short"));
        }
        let written = ranges.split_off(kept as usize);
        let sums_at = at + table;
        let sectors: u128 = written.iter().map(|range| u128::from(sectors_of(range))).sum();
        let kept_at = u128::from(sums_at) + sectors * 4;
        let end = kept_at + ranges.iter().map(|range| u128::from(range.end - range.start)).sum::<u128>();
        if end != u128::from(len) {
            return Err(bad(format!("its ranges have {end} bytes with what is before them, the file {len}")));
        }
        let kept = placed(ranges, kept_at as u64);
        let (uuids, len, sums) = (head.uuids, head.len, Sums::Sectors(sums_at));
        let journal = Self { file: Arc::clone(file), uuids, len, kept, written, sums, changes: head.changes };
        journal.refuse_large()?;
        if u64::from(checksum(&**file, at..end as u64)?) != crc {
            return Err(bad("the bytes it keeps are damaged"));
        }
        Ok(journal)
    }

    fn from_old_head(file: &Arc<dyn Storage>, head: &[u8], at: u64) -> Result<Self> {
        let head: OldHead = serde_json::from_slice(head).map_err(|error| bad(error.to_string()))?;
        let range = |(at, len): (u64, u64)| Some(at..at.checked_add(len)?);
        let kept: Option<Vec<_>> = head.ranges.iter().copied().map(range).collect();
        let written: Option<Vec<_>> = head.written.iter().map(|(at, len, _)| range((*at, *len))).collect();
        let (Some(kept), Some(written)) = (kept, written) else { return Err(bad("a range has no end")) };
        let end = u128::from(at) + kept.iter().map(|range| u128::from(range.end - range.start)).sum::<u128>();
        let len = file.len().map_err(failed)?;
        if end != u128::from(len) {
            return Err(bad("the bytes it keeps are damaged"));
        }
        let sums = Sums::Ranges(head.written.iter().map(|(_, _, crc)| *crc).collect());
        let kept = placed(kept, at);
        let journal =
            Self { file: Arc::clone(file), uuids: [None; 2], len: head.len, kept, written, sums, changes: head.changes };
        journal.refuse_large()?;
        if checksum(&**file, at..len)? != head.crc {
            return Err(bad("the bytes it keeps are damaged"));
        }
        Ok(journal)
    }

    /// Refuses more than a repair keeps, before all of it is read.
    fn refuse_large(&self) -> Result<()> {
        if self.kept_len() > MAX_KEPT {
            return Err(bad(format!("it keeps {} bytes, more than a repair changes", self.kept_len())));
        }
        Ok(())
    }

    /// Refuses what no repair writes.
    fn validate(&self) -> Result<()> {
        let [before, after] = self.len;
        let lengths = OLD_FOOTER_LEN as u64..=MAX_FILE;
        if !lengths.contains(&before) || !lengths.contains(&after) {
            return Err(bad(format!("a file of {before} bytes is none that is repaired, or of {after}")));
        }
        let kept = self.kept.iter().map(|kept| &kept.range);
        if !are_apart(kept, before) || !are_apart(self.written.iter(), after) {
            return Err(bad("its ranges are not ascending and apart, or beyond the end of the image"));
        }
        // What is put back is what was written, and what was cut off.
        let common = before.min(after);
        let kept = merged(self.kept.iter().map(|kept| kept.range.clone()), common);
        if kept != merged(self.written.iter().cloned(), common) {
            return Err(bad("it keeps other ranges than the repair wrote"));
        }
        // What an undo cuts off is copies of blocks and footers.
        let added: u64 = self.written.iter().map(|range| range.end.saturating_sub(range.start.max(before))).sum();
        if added > MAX_COPIED.max(before) + MAX_MOVED {
            return Err(bad(format!("the image had {before} bytes, and the repair is said to have added {added}")));
        }
        Ok(())
    }

    /// What the repair changed, one sentence each.
    #[must_use]
    pub fn changes(&self) -> &[String] {
        &self.changes
    }

    /// Bytes that are kept.
    pub(super) fn kept_len(&self) -> u64 {
        self.kept.iter().map(|kept| kept.range.end - kept.range.start).sum()
    }

    /// Refuses an image that is another than the one that was repaired, and a length that nothing bears out.
    ///
    /// # Errors
    /// `Refused`; as the host fails.
    pub fn prove(&self, image: &dyn Storage) -> Result<()> {
        let footers = Footers::read(image).map_err(failed)?;
        if let Ok((footer, _)) = footers.authority(true) {
            let found = Uuid::from_bytes(footer.uuid());
            let known: Vec<_> = self.uuids.iter().flatten().collect();
            if !known.is_empty() && !known.contains(&&found) {
                let message = format!("is of the image with UUID {}, and this one has {found}", known[0]);
                return Err(Error::new(ErrorKind::Refused, message));
            }
        }
        let [before, after] = self.len;
        let ends_with_data = self.kept.last().is_some_and(|kept| kept.range.end == before);
        if before > after && !ends_with_data && before - after > MAX_ZEROS {
            let message = format!("would make the image {before} bytes long, and nothing that it keeps is near that end");
            return Err(Error::new(ErrorKind::Refused, message));
        }
        Ok(())
    }

    /// True when the image is what it was before the repair.
    pub(super) fn is_put_back(&self, image: &dyn Storage) -> Result<bool> {
        let standing = self.compare(image)?;
        Ok(image.len().map_err(failed)? == self.len[0] && !standing.repaired && standing.other.is_none())
    }

    /// Makes the image what it was before the repair, and durable.
    ///
    /// # Errors
    /// As the host fails; `Cancelled`.
    pub fn put_back(&self, image: &dyn Storage, progress: &Progress) -> Result<()> {
        let failed = |error| Error::io(error, "can't be put back");
        if image.len().map_err(failed)? != self.len[0] {
            image.set_len(self.len[0]).map_err(failed)?;
        }
        let mut buffer = vec![0; CHUNK];
        for kept in &self.kept {
            for (at, len) in chunks(&kept.range) {
                let bytes = &mut buffer[..len];
                self.file.read_at(bytes, kept.at + at - kept.range.start).map_err(failed)?;
                image.write_at(bytes, at).map_err(|error| Error::io(error, format!("can't be put back at {at:#x}")))?;
                progress.advance(len as u64)?;
            }
        }
        image.sync().map_err(failed)
    }

    /// The original bytes of a range; false where not all of them are kept.
    pub(super) fn read_kept(&self, bytes: &mut [u8], at: u64) -> Result<bool> {
        let (mut at, end) = (at, at + bytes.len() as u64);
        let start = at;
        while at < end {
            let index = self.kept.partition_point(|kept| kept.range.end <= at);
            let Some(kept) = self.kept.get(index).filter(|kept| kept.range.start <= at) else { return Ok(false) };
            let until = kept.range.end.min(end);
            let part = &mut bytes[(at - start) as usize..(until - start) as usize];
            self.file.read_at(part, kept.at + at - kept.range.start).map_err(failed)?;
            at = until;
        }
        Ok(true)
    }
}

/// Reads and proves what is before the tables.
fn read_head(file: &dyn Storage, range: Range<u64>, len: u64, crc: u64, most: u64) -> Result<Vec<u8>> {
    if range.end > len || range.end - range.start > most {
        return Err(bad("it was cut short"));
    }
    let mut head = vec![0; (range.end - range.start) as usize];
    file.read_at(&mut head, range.start).map_err(failed)?;
    if u64::from(CRC.checksum(&head)) != crc {
        return Err(bad("its checksum is wrong"));
    }
    Ok(head)
}

fn range_of(entry: &[u8; 16]) -> Option<Range<u64>> {
    let (at, len) = entry.split_at(8);
    let number = |bytes: &[u8]| bytes.first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
    let (at, len) = (number(at)?, number(len)?);
    Some(at..at.checked_add(len)?)
}

/// Ranges with the place of their bytes in the journal, one after the other from `at` on.
fn placed(ranges: Vec<Range<u64>>, mut at: u64) -> Vec<Kept> {
    let place = |range: Range<u64>| {
        let kept = Kept { at, range };
        at += kept.range.end - kept.range.start;
        kept
    };
    ranges.into_iter().map(place).collect()
}

/// True for ascending ranges that share nothing and end at `len` at most.
fn are_apart<'a>(mut ranges: impl Iterator<Item = &'a Range<u64>>, len: u64) -> bool {
    let mut end = 0;
    ranges.all(|range| {
        let is_right = range.start >= end && range.start < range.end && range.end <= len;
        end = range.end;
        is_right
    })
}

pub(super) fn sectors_of(range: &Range<u64>) -> u64 {
    (range.end - range.start).div_ceil(SECTOR)
}

/// Ascending ranges up to `limit`, neighbours as one.
fn merged(ranges: impl Iterator<Item = Range<u64>>, limit: u64) -> Vec<Range<u64>> {
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges.map(|range| range.start..range.end.min(limit)).filter(|range| !range.is_empty()) {
        match merged.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => merged.push(range),
        }
    }
    merged
}

/// The pieces of a range, as places and lengths of at most [`CHUNK`].
pub(super) fn chunks(range: &Range<u64>) -> impl DoubleEndedIterator<Item = (u64, usize)> + use<> {
    let Range { start, end } = *range;
    let count = end.saturating_sub(start).div_ceil(CHUNK as u64) as usize;
    let place = move |index: usize| start + index as u64 * CHUNK as u64;
    (0..count).map(move |index| (place(index), (end - place(index)).min(CHUNK as u64) as usize))
}

fn checksum(storage: &dyn Storage, range: Range<u64>) -> Result<u32> {
    let (mut digest, mut buffer) = (CRC.digest(), vec![0; CHUNK]);
    for (at, len) in chunks(&range) {
        let bytes = &mut buffer[..len];
        storage.read_at(bytes, at).map_err(|error| Error::io(error, format!("can't be read at {at:#x}")))?;
        digest.update(bytes);
    }
    Ok(digest.finalize())
}

/// What a new journal is made of.
pub(super) struct Draft<'a> {
    /// The image before the repair, and after it.
    pub(super) images: [&'a dyn Storage; 2],
    /// What the repair writes; ascending and apart.
    pub(super) written: &'a [Range<u64>],
    pub(super) changes: &'a [String],
}

impl Draft<'_> {
    /// Writes the journal into an empty file.
    pub(super) fn write(&self, file: &dyn Storage, progress: &Progress) -> Result<()> {
        let [before, after] = self.images;
        let failed = |error| Error::io(error, "can't be read");
        let len = [before.len().map_err(failed)?, after.len().map_err(failed)?];
        // What is beyond the end was not there: cutting it off again puts it back.
        let mut kept: Vec<_> = self.written.iter().map(|range| range.start..range.end.min(len[0])).collect();
        kept.retain(|range| !range.is_empty());
        for_data(before, len[1].min(len[0])..len[0], &mut |at, bytes| {
            match kept.last_mut() {
                Some(last) if last.end == at => last.end += bytes.len() as u64,
                _ => kept.push(at..at + bytes.len() as u64),
            }
            true
        })?;
        let ranges = [kept.len() as u64, self.written.len() as u64];
        let head = Head { uuids: self.images.map(uuid_of), len, ranges, changes: self.changes.to_vec() };
        let head = serde_json::to_vec(&head).map_err(|error| Error::new(ErrorKind::InvalidInput, error.to_string()))?;
        let line = |crc| format!("{MAGIC} {VERSION} {:08x} {:x} {crc:08x}\n", CRC.checksum(&head), head.len()).into_bytes();
        let mut body = Body { file, at: (line(0).len() + head.len()) as u64, digest: CRC.digest(), waiting: Vec::new() };
        for range in kept.iter().chain(self.written) {
            body.push(&range.start.to_be_bytes())?;
            body.push(&(range.end - range.start).to_be_bytes())?;
        }
        let mut buffer = vec![0; CHUNK];
        let mut read = |image: &dyn Storage, at: u64, len: usize, visit: &mut dyn FnMut(&[u8]) -> Result<()>| {
            let bytes = &mut buffer[..len];
            image.read_at(bytes, at).map_err(|error| Error::io(error, format!("can't be read at {at:#x}")))?;
            visit(bytes)
        };
        for (at, len) in self.written.iter().flat_map(chunks) {
            read(after, at, len, &mut |bytes| {
                bytes.chunks(SECTOR as usize).try_for_each(|sector| body.push(&CRC.checksum(sector).to_be_bytes()))
            })?;
        }
        for (at, len) in kept.iter().flat_map(chunks) {
            read(before, at, len, &mut |bytes| body.push(bytes))?;
            progress.advance(len as u64)?;
        }
        let crc = body.finish()?;
        let written = file.write_at(&[line(crc), head].concat(), 0);
        written.map_err(|error| Error::io(error, "can't be written"))
    }
}

/// What is behind the head of a journal that is written.
struct Body<'a> {
    file: &'a dyn Storage,
    at: u64,
    digest: crc::Digest<'static, u32>,
    waiting: Vec<u8>,
}

impl Body<'_> {
    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() < CHUNK { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<()> {
        self.digest.update(&self.waiting);
        self.file.write_at(&self.waiting, self.at).map_err(|error| Error::io(error, "can't be written"))?;
        self.at += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }

    /// Writes the rest. Returns the checksum of all of it.
    fn finish(mut self) -> Result<u32> {
        self.flush()?;
        Ok(self.digest.finalize())
    }
}

fn uuid_of(image: &dyn Storage) -> Option<Uuid> {
    let (footer, _) = Footers::read(image).ok()?.authority(true).ok()?;
    Some(Uuid::from_bytes(footer.uuid()))
}

/// Bytes of a range that are no zeros, in runs of at most [`CHUNK`]; stops where `visit` says so.
pub(super) fn for_data(storage: &dyn Storage, range: Range<u64>, visit: &mut dyn FnMut(u64, &[u8]) -> bool) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut at = range.start;
    while at < range.end {
        let Some(data) = storage.next_data(at).map_err(failed)? else { break };
        at = at.max(data.start);
        let len = (data.end.min(range.end)).saturating_sub(at).min(CHUNK as u64) as usize;
        if len == 0 {
            break;
        }
        storage.read_at(&mut buffer[..len], at).map_err(failed)?;
        if !is_zero(&buffer[..len]) && !visit(at, &buffer[..len]) {
            break;
        }
        at += len as u64;
    }
    Ok(())
}

/// Bytes of a range that are no zeros; counted no further than `most`.
pub(super) fn data_in(storage: &dyn Storage, range: Range<u64>, most: u64) -> Result<u64> {
    let mut count = 0;
    for_data(storage, range, &mut |_, bytes| {
        count += bytes.len() as u64;
        count <= most
    })?;
    Ok(count)
}
