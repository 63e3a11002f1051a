//! Intent records: what an operation over several files, or one that rebuilds a file in place, is about to do, durable
//! beside the image before the first change. Whoever opens the image here finds it, and leaves the image to the operation.
//!
//! A record is one line, `vhd-intent 1 CRC LENGTH` in hexadecimal, and then JSON of that length: people may read it. It
//! is put in place by a rename, so a torn one never bears the name; one that is damaged all the same stops everything,
//! as nobody knows how far the operation went.

mod in_place;
mod merge;

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use in_place::{FooterMove, InPlace, Move, Work};
pub use merge::{Member, Merge};

use crate::error::{Error, ErrorKind, Result, fail};
use crate::storage::{Host, folder_of, put_file};

/// What a record's name adds to the image's.
const SUFFIX: &str = ".vhd-intent";
/// What a record begins with.
const MAGIC: &str = "vhd-intent 1";
/// Bytes of a record at most: thousands of files in one operation.
const MAX_LEN: u64 = 4 << 20;
/// Checksum of the JSON.
const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);

/// What is being done to an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Intent {
    /// Merges children into parents: one, or all of an undo session.
    Merge(Merge),
    /// A part of the operation whose record is beside another image; over when that is gone.
    PartOf {
        /// The other record, from this one's folder.
        record: PathBuf,
        /// The identifiers this image may have meanwhile; none for a raw file.
        uuids: Vec<Uuid>,
    },
    /// Changes one file, which may be no image meanwhile.
    InPlace(InPlace),
}

/// Where an image's record is. Links are followed: the file itself is what the record is about.
///
/// # Errors
/// When the image is not there.
pub fn path_of(image: &Path) -> Result<PathBuf> {
    let real = std::fs::canonicalize(image).map_err(|error| Error::io(error, "can't be resolved").at(image))?;
    let mut name = OsString::from(real.file_name().unwrap_or_default());
    name.push(SUFFIX);
    Ok(real.with_file_name(name))
}

/// The record beside an image.
///
/// # Errors
/// `Refused` for one that is damaged; as the host fails.
pub fn find(image: &Path) -> Result<Option<Intent>> {
    read(&path_of(image)?)
}

/// The record at `path`.
fn read(path: &Path) -> Result<Option<Intent>> {
    let failed = |error: std::io::Error| Error::io(error, "can't be read").at(path);
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(failed)?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_LEN).read_to_end(&mut bytes).map_err(failed)?;
    decode(&bytes).map(Some).map_err(|what| {
        let advice =
            "an operation on the image may be half done: restore this file, or remove it if the image is to be taken as it is";
        Error::new(ErrorKind::Refused, format!("is an intent record, but {what}; {advice}")).at(path)
    })
}

/// Makes an image's record durable.
///
/// # Errors
/// As the host fails; nothing is recorded then.
pub fn put(host: &dyn Host, image: &Path, intent: &Intent) -> Result<()> {
    put_file(host, &path_of(image)?, &encode(intent)?)
}

/// Removes an image's record: the operation is over.
///
/// # Errors
/// As the host fails.
pub fn remove(host: &dyn Host, image: &Path) -> Result<()> {
    let path = path_of(image)?;
    host.remove(&path)?;
    host.sync_folder(folder_of(&path))
}

fn encode(intent: &Intent) -> Result<Vec<u8>> {
    let json = serde_json::to_string_pretty(intent)
        .map_err(|error| Error::new(ErrorKind::InvalidInput, format!("can't be recorded: {error}")))?;
    if json.len() as u64 + 100 > MAX_LEN {
        fail!(InvalidInput, "too many files for one operation: their record would have {} bytes", json.len());
    }
    Ok(format!("{MAGIC} {:08x} {:x}\n{json}", CRC.checksum(json.as_bytes()), json.len()).into_bytes())
}

fn decode(bytes: &[u8]) -> Result<Intent, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "not text")?;
    let (line, json) = text.split_once('\n').ok_or("cut short")?;
    let fields = line.strip_prefix(MAGIC).ok_or("of another program or version")?;
    let mut fields = fields.split_whitespace().map(|field| u64::from_str_radix(field, 16));
    let (Some(Ok(crc)), Some(Ok(len)), None) = (fields.next(), fields.next(), fields.next()) else {
        return Err("without a checksum".into());
    };
    if json.len() as u64 != len {
        return Err(format!("of {} bytes instead of {len}", json.len()));
    }
    if u64::from(CRC.checksum(json.as_bytes())) != crc {
        return Err("with a wrong checksum".into());
    }
    serde_json::from_str(json).map_err(|error| format!("not understood: {error}"))
}

/// The identifiers that the image which a record is beside may have while the operation lasts.
fn uuids_of(intent: &Intent) -> Vec<Uuid> {
    match intent {
        Intent::Merge(merge) => merge.members.first().map(Member::target_uuids).unwrap_or_default(),
        Intent::PartOf { uuids, .. } => uuids.clone(),
        Intent::InPlace(work) => work.uuid.into_iter().collect(),
    }
}

/// True when the record is about an image with this identifier. One about a raw file is about whatever has its name; and a
/// file without an identifier may be an image that is half changed.
fn is_about(intent: &Intent, uuid: Option<[u8; 16]>) -> bool {
    let uuids = uuids_of(intent);
    uuids.is_empty() || uuid.is_none_or(|uuid| uuids.contains(&Uuid::from_bytes(uuid)))
}

/// The record that governs an image: the one beside it, or the one that it is a part of, with paths that lead somewhere.
/// `None` too for a stale one, and for one of another image that had this name.
fn governing(image: &Path, uuid: Option<[u8; 16]>) -> Result<Option<Intent>> {
    let path = path_of(image)?;
    let Some(intent) = read(&path)? else { return Ok(None) };
    if !is_about(&intent, uuid) {
        tracing::warn!("{}: is the intent record of another image, so it is ignored", path.display());
        return Ok(None);
    }
    Ok(match intent {
        Intent::Merge(merge) => Some(Intent::Merge(merge.resolved(folder_of(&path)))),
        Intent::InPlace(work) => Some(Intent::InPlace(work)),
        Intent::PartOf { record, .. } => {
            let record = folder_of(&path).join(record);
            match read(&record)? {
                Some(Intent::Merge(merge)) => {
                    let merge = merge.resolved(folder_of(&record));
                    merge.names_target(image).then_some(Intent::Merge(merge))
                }
                _ => None,
            }
        }
    })
}

/// Refuses an image that an unfinished operation has in hand. `above` are the identifiers of the images through which it
/// is opened, leaf first: what is seen through the child that is merged is right at every point.
///
/// # Errors
/// `Refused`, with the command that finishes the operation.
pub(crate) fn refuse(image: &Path, uuid: Option<[u8; 16]>, above: &[[u8; 16]]) -> Result<()> {
    let merge = match governing(image, uuid)? {
        Some(Intent::Merge(merge)) => merge,
        Some(Intent::InPlace(work)) => return Err(interrupted(image, "a change of it", &work.command(image))),
        _ => return Ok(()),
    };
    if !merge.finishing && merge.members.iter().any(|member| member.is_merged_through(above)) {
        return Ok(());
    }
    Err(interrupted(image, "a merge into it", &merge.command()))
}

fn interrupted(image: &Path, what: &str, command: &str) -> Error {
    Error::new(ErrorKind::Refused, format!("{what} was interrupted; finish it first: {command}")).at(image)
}

/// What to say of a file that can't be opened: that it is half changed, where a record beside it says so.
pub(crate) fn explain(image: &Path, error: Error) -> Error {
    match governing(image, None) {
        Ok(Some(Intent::InPlace(work))) => interrupted(image, "a change of it", &work.command(image)),
        Ok(Some(Intent::Merge(merge))) => interrupted(image, "a merge into it", &merge.command()),
        Err(damaged) if damaged.kind() == ErrorKind::Refused => damaged,
        _ => error,
    }
}

/// The unfinished change of the file at `image`. `uuid` is the identifier that it has, if any.
///
/// # Errors
/// As [`find`].
pub(crate) fn in_place_of(image: &Path, uuid: Option<[u8; 16]>) -> Result<Option<InPlace>> {
    // In between it may have none, and is the right file all the same.
    Ok(match find(image)? {
        Some(Intent::InPlace(work)) if uuid.is_none_or(|uuid| work.uuid.is_none_or(|own| own.into_bytes() == uuid)) => Some(work),
        _ => None,
    })
}

/// True when the image at `path` has been given the identifier `found` instead of `expected` by a merge of an image
/// `above` it, which was not told yet.
pub(crate) fn was_renamed(path: &Path, found: [u8; 16], expected: [u8; 16], above: &[[u8; 16]]) -> bool {
    let Ok(Some(Intent::Merge(merge))) = governing(path, Some(found)) else { return false };
    merge.members.iter().any(|member| {
        member.is_merged_through(above)
            && member.names_target(path)
            && member.target_uuid.is_some_and(|(old, new)| *old.as_bytes() == expected && *new.as_bytes() == found)
    })
}

/// The unfinished merge that an image belongs to as a target, with paths as they are now.
///
/// # Errors
/// As [`find`].
pub(crate) fn merge_of(image: &Path, uuid: Option<[u8; 16]>) -> Result<Option<Merge>> {
    Ok(governing(image, uuid)?.and_then(|intent| match intent {
        Intent::Merge(merge) => Some(merge),
        _ => None,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Intent {
        Intent::PartOf { record: "other.vhd.vhd-intent".into(), uuids: vec![Uuid::from_bytes([3; 16])] }
    }

    #[test]
    fn a_record_survives_the_round_trip_and_no_damage() {
        let bytes = encode(&record()).unwrap();
        assert_eq!(decode(&bytes), Ok(record()));
        for index in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[index] ^= 1;
            assert!(decode(&damaged).is_err(), "byte {index}");
            assert!(decode(&bytes[..index]).is_err(), "cut to {index}");
        }
    }
}
