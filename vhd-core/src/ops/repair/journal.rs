//! The undo journal: the original bytes of all that a repair changes, durable beside the image before the first change.
//!
//! One line, `vhd-repair-undo 2 CRC LENGTH` in hexadecimal, JSON of that length, then the bytes of its ranges one after the
//! other, which have a CRC in the JSON. What the repair wrote has a CRC for each range, so that an undo overwrites nothing that
//! somebody else wrote there since.

use std::ffi::OsString;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Repair;
use super::overlay::Overlay;
use crate::chain::ChainOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::intent::{self, InPlace, Intent, Work};
use crate::ops::copy::is_zero;
use crate::progress::Progress;
use crate::storage::{Access, FileStorage, Host, LockMode, Storage, folder_of, put_file};

const SUFFIX: &str = ".vhd-repair-undo";
const MAGIC: &str = "vhd-repair-undo";
const VERSION: &str = "2";
/// Journals of one image at most; more is somebody's mistake.
const MAX_JOURNALS: usize = 100;
const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);
/// Bytes that are looked at at once.
const CHUNK: usize = 64 << 10;

/// What a journal says before the bytes.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    /// Bytes of the file before and after the repair.
    len: [u64; 2],
    /// Ranges of the file: where, how many bytes.
    ranges: Vec<(u64, u64)>,
    /// Of the original bytes.
    crc: u32,
    /// Ranges that the repair wrote: where, how many bytes, their checksum; ascending.
    written: Vec<(u64, u64, u32)>,
    /// What was changed.
    changes: Vec<String>,
    lost: Vec<String>,
}

/// A journal that was read.
pub(super) struct Journal {
    head: Head,
    bytes: Vec<u8>,
}

/// The journal with this name beside an image.
pub(super) fn beside(image: &Path, name: &Path) -> Result<Journal> {
    let real = std::fs::canonicalize(image).map_err(|error| Error::io(error, "can't be resolved").at(image))?;
    read(&folder_of(&real).join(name))
}

fn path_of(image: &Path, number: usize) -> Result<PathBuf> {
    let real = std::fs::canonicalize(image).map_err(|error| Error::io(error, "can't be resolved").at(image))?;
    let mut name = OsString::from(real.file_name().unwrap_or_default());
    name.push(SUFFIX);
    if number > 1 {
        name.push(format!(".{number}"));
    }
    Ok(real.with_file_name(name))
}

fn read(path: &Path) -> Result<Journal> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(error, "can't be read").at(path))?;
    parse(&bytes).map_err(|what| Error::new(ErrorKind::Corrupt, format!("is no undo journal of a repair: {what}")).at(path))
}

fn parse(bytes: &[u8]) -> Result<Journal, String> {
    let end = bytes.iter().take(200).position(|byte| *byte == b'\n').ok_or("it has no first line")?;
    let line = std::str::from_utf8(&bytes[..end]).map_err(|_| "its first line is no text")?;
    let mut fields = line.strip_prefix(MAGIC).ok_or("it is of another program")?.split_whitespace();
    match fields.next() {
        Some(VERSION) => {}
        other => return Err(format!("it is of version {}, this program reads {VERSION}", other.unwrap_or("none"))),
    }
    let mut field = || fields.next().and_then(|field| usize::from_str_radix(field, 16).ok());
    let (Some(crc), Some(len)) = (field(), field()) else { return Err("it has no checksum".into()) };
    let json = bytes.get(end + 1..).and_then(|rest| rest.get(..len)).ok_or("it was cut short")?;
    if CRC.checksum(json) as usize != crc {
        return Err("its checksum is wrong".into());
    }
    let head: Head = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    let bytes = bytes[end + 1 + len..].to_vec();
    if CRC.checksum(&bytes) != head.crc || bytes.len() as u64 != head.ranges.iter().map(|(_, len)| len).sum::<u64>() {
        return Err("the bytes it keeps are damaged".into());
    }
    Ok(Journal { head, bytes })
}

/// Writes the changes of a repair to the image, its journal first. Returns where that is; nothing when nothing changes.
pub(super) fn execute(
    overlay: &Arc<Overlay>,
    image: &Path,
    repair: &Repair,
    host: &dyn Host,
    progress: &Progress,
) -> Result<Option<PathBuf>> {
    let base = &**overlay.base();
    let failed = |error| Error::io(error, "can't be repaired").at(image);
    let (before, after) = (base.len().map_err(failed)?, overlay.len().map_err(failed)?);
    let changes = overlay.changes().map_err(failed)?;
    if changes.is_empty() && before == after {
        return Ok(None);
    }
    // Read once for the journal, written once.
    progress.set_total(changes.iter().map(|(_, bytes)| bytes.len() as u64 * 2).sum());
    remove_unused(base, image, host)?;
    let number = (1..=MAX_JOURNALS).find(|number| path_of(image, *number).is_ok_and(|path| !path.exists()));
    let number = number.ok_or_else(|| {
        Error::new(ErrorKind::Exists, "has a hundred undo journals of repairs beside it; remove those that nobody needs")
            .at(image)
    })?;
    let path = path_of(image, number)?;
    let journal = encode(base, before, after, &changes, repair, progress).map_err(|error| error.at(image))?;
    put_file(host, &path, &journal, &Access::of(image))?;
    let name = path.file_name().map(PathBuf::from).unwrap_or_default();
    intent::put(host, image, &Intent::InPlace(InPlace { uuid: None, work: Work::Repair(name) }))?;
    if after != before {
        base.set_len(after).map_err(failed)?;
    }
    for (at, bytes) in &changes {
        let written = base.write_at(bytes, *at);
        written.map_err(|error| Error::io(error, format!("can't be repaired at {at:#x}")).at(image))?;
        progress.advance(bytes.len() as u64)?;
    }
    base.sync().map_err(failed)?;
    intent::remove(host, image)?;
    Ok(Some(path))
}

fn encode(
    base: &dyn Storage,
    before: u64,
    after: u64,
    changes: &[(u64, Vec<u8>)],
    repair: &Repair,
    progress: &Progress,
) -> Result<Vec<u8>> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    // What is beyond the end was not there: cutting it off again puts it back.
    for (at, bytes) in changes.iter().filter(|(at, _)| *at < before) {
        ranges.push((*at, (bytes.len() as u64).min(before - at)));
    }
    for_data(base, after.min(before)..before, &mut |at, bytes| {
        ranges.push((at, bytes.len() as u64));
        true
    })?;
    let mut originals = Vec::new();
    for (at, len) in &ranges {
        let mut bytes = vec![0; *len as usize];
        base.read_at(&mut bytes, *at).map_err(|error| Error::io(error, format!("can't be read at {at:#x}")))?;
        originals.extend(bytes);
        progress.advance(*len)?;
    }
    let written = changes.iter().map(|(at, bytes)| (*at, bytes.len() as u64, CRC.checksum(bytes))).collect();
    let head = Head {
        len: [before, after],
        ranges,
        crc: CRC.checksum(&originals),
        written,
        changes: repair.changes.clone(),
        lost: repair.lost.clone(),
    };
    let json = serde_json::to_vec_pretty(&head).map_err(|error| Error::new(ErrorKind::InvalidInput, error.to_string()))?;
    let mut journal = format!("{MAGIC} {VERSION} {:08x} {:x}\n", CRC.checksum(&json), json.len()).into_bytes();
    journal.extend(json);
    journal.extend(originals);
    Ok(journal)
}

/// Removes the last journal where it holds what the image has: its repair never began, or was put back already.
fn remove_unused(storage: &dyn Storage, image: &Path, host: &dyn Host) -> Result<()> {
    let last = (1..=MAX_JOURNALS).rev().find_map(|number| path_of(image, number).ok().filter(|path| path.exists()));
    // One that can't be read is left to its owner.
    let Some((path, journal)) = last.and_then(|path| read(&path).ok().map(|journal| (path, journal))) else { return Ok(()) };
    if !is_put_back(storage, &journal).map_err(|error| error.at(image))? {
        return Ok(());
    }
    // Should a power cut bring it back, it is as unused as it was; once the new one is durable so is this.
    host.remove(&path)
}

/// True when the file is what it was before the repair.
fn is_put_back(storage: &dyn Storage, journal: &Journal) -> Result<bool> {
    let failed = |error| Error::io(error, "can't be read");
    if storage.len().map_err(failed)? != journal.head.len[0] {
        return Ok(false);
    }
    let mut rest = &journal.bytes[..];
    for (at, len) in &journal.head.ranges {
        let (bytes, more) = rest.split_at((*len as usize).min(rest.len()));
        let mut found = vec![0; bytes.len()];
        storage.read_at(&mut found, *at).map_err(failed)?;
        if found != bytes {
            return Ok(false);
        }
        rest = more;
    }
    Ok(true)
}

/// How the file is no longer what the repair left, where that matters: what it wrote, and what it added.
fn changed_since(storage: &dyn Storage, head: &Head) -> Result<Option<String>> {
    let [before, after] = head.len;
    let len = storage.len().map_err(|error| Error::io(error, "can't be examined"))?;
    if len != after {
        return Ok(Some(format!("has {len} bytes, {after} after the repair")));
    }
    let other =
        |range: Range<u64>| Ok(Some(format!("no longer has what the repair left from {:#x} to {:#x}", range.start, range.end)));
    // What was added and not written was zeros, as a gap before a block.
    let mut added = before;
    for &(at, len, crc) in &head.written {
        let end = at.saturating_add(len);
        if added < at && data_in(storage, added..at, 0)? > 0 {
            return other(added..at);
        }
        if checksum(storage, at..end)? != crc {
            return other(at..end);
        }
        added = added.max(end);
    }
    if added < after && data_in(storage, added..after, 0)? > 0 {
        return other(added..after);
    }
    Ok(None)
}

fn checksum(storage: &dyn Storage, range: Range<u64>) -> Result<u32> {
    let (mut digest, mut buffer, mut at) = (CRC.digest(), vec![0; CHUNK], range.start);
    while at < range.end {
        let bytes = &mut buffer[..(range.end - at).min(CHUNK as u64) as usize];
        storage.read_at(bytes, at).map_err(|error| Error::io(error, format!("can't be read at {at:#x}")))?;
        digest.update(bytes);
        at += bytes.len() as u64;
    }
    Ok(digest.finalize())
}

/// Makes the file what it was.
pub(super) fn put_back(storage: &dyn Storage, journal: &Journal, progress: &Progress) -> Result<()> {
    let failed = |error| Error::io(error, "can't be put back");
    storage.set_len(journal.head.len[0]).map_err(failed)?;
    let mut rest = &journal.bytes[..];
    for (at, len) in &journal.head.ranges {
        let (bytes, more) = rest.split_at((*len as usize).min(rest.len()));
        storage.write_at(bytes, *at).map_err(|error| Error::io(error, format!("can't be put back at {at:#x}")))?;
        progress.advance(*len)?;
        rest = more;
    }
    storage.sync().map_err(failed)
}

/// Undoes the last repair of the image at `path`: the original bytes are put back, and the journal is removed. Returns what the
/// repair had changed.
///
/// # Errors
/// `InvalidInput` without a journal; `Refused` when the image was changed since, but with `force`; as the host fails;
/// `Cancelled`, when the same call goes on.
pub fn undo_repair(path: &Path, force: bool, chain: &ChainOptions, progress: &Progress) -> Result<Vec<String>> {
    let file = Arc::new(FileStorage::open(path, true)?);
    file.lock(LockMode::Write)?;
    let storage = chain.host.adopt(file);
    let host = &*chain.host;
    let record = intent::find(path)?;
    let journal_path = match &record {
        // Of a repair under way, the one that it names.
        Some(Intent::InPlace(InPlace { work: Work::Repair(name), .. })) => Some(path_of(path, 1)?.with_file_name(name)),
        _ => (1..=MAX_JOURNALS).rev().find_map(|number| path_of(path, number).ok().filter(|path| path.exists())),
    };
    let Some(journal_path) = journal_path else {
        return Err(Error::new(ErrorKind::InvalidInput, "has no undo journal of a repair beside it").at(path));
    };
    let journal = read(&journal_path)?;
    match record {
        Some(Intent::InPlace(InPlace { work: Work::Repair(_), .. })) => {}
        Some(_) => {
            return Err(intent::explain(path, Error::new(ErrorKind::Refused, "is in the hands of another operation").at(path)));
        }
        // An undo that was interrupted came this far.
        None if is_put_back(&*storage, &journal).map_err(|error| error.at(path))? => {}
        None => {
            let changed = if force { None } else { changed_since(&*storage, &journal.head).map_err(|error| error.at(path))? };
            if let Some(what) = changed {
                let message =
                    format!("{what}: it was written since, which would be lost; --force puts the old bytes back all the same");
                return Err(Error::new(ErrorKind::Refused, message).at(path));
            }
            let name = journal_path.file_name().map(PathBuf::from).unwrap_or_default();
            intent::put(host, path, &Intent::InPlace(InPlace { uuid: None, work: Work::Repair(name) }))?;
        }
    }
    progress.set_total(journal.bytes.len() as u64);
    put_back(&*storage, &journal, progress).map_err(|error| error.at(path))?;
    intent::remove(host, path)?;
    host.remove(&journal_path)?;
    host.sync_folder(folder_of(&journal_path))?;
    Ok(journal.head.changes)
}

/// Bytes of a range that are no zeros, in runs of at most [`CHUNK`]; stops where `visit` says so.
fn for_data(storage: &dyn Storage, range: Range<u64>, visit: &mut dyn FnMut(u64, &[u8]) -> bool) -> Result<()> {
    let failed = |error| Error::io(error, "can't be read");
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
