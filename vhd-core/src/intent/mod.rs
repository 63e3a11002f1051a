//! Intent records: what an operation over several files, or one that rebuilds a file in place, is about to do, durable
//! beside the image before the first change. Whoever opens the image here finds it, and leaves the image to the operation.
//!
//! Nothing of a record is believed: it may be a stranger's. Who opens the image is refused, and told the command that goes on.
//! That command is given its parameters again, takes the files that it names or that lie beside those, proves each by its
//! identifier, and sees from the images how far they came.
//!
//! A record is one line, `vhd-intent 2 CRC LENGTH` in hexadecimal, and then JSON of that length: people may read it. It
//! is put in place by a rename, so a torn one never bears the name; one that is damaged all the same stops everything,
//! as nobody knows how far the operation went.

mod in_place;
mod merge;

use std::ffi::OsString;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use in_place::{FooterMove, InPlace, Move, Work};
pub(crate) use in_place::{finish_resize, resize_fixed, undo_growth};
pub(crate) use merge::lexically;
pub use merge::{Member, Merge, Named, Protection};

use crate::command::Command;
use crate::error::{Error, ErrorKind, Result, fail};
use crate::storage::{
    Access, Beneath, FileStorage, Host, LockMode, folder_of, open_beneath, put_file, put_name, read_beside, remove_file,
};

/// What a record's name adds to the image's.
const SUFFIX: &str = ".vhd-intent";
/// What a record begins with.
const MAGIC: &str = "vhd-intent 2";
/// What records of a former version begin with, which did not know the files by their identifiers.
const FORMER_MAGIC: &str = "vhd-intent 1";
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
    /// A part of the operation whose record is beside another image; over when that is gone. A former version wrote it.
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

/// Where an image's record is put.
fn new_path_of(image: &Path) -> Result<PathBuf> {
    if is_device(image) {
        let message = "is a device, beside which no record of an operation can be kept, and this one needs one; convert the image \
                       to a file first";
        return Err(Error::new(ErrorKind::Refused, message).at(image));
    }
    path_of(image)
}

fn is_device(image: &Path) -> bool {
    std::fs::metadata(image).is_ok_and(|found| found.file_type().is_block_device())
}

/// The record beside an image, as it stands there: a stranger's word.
///
/// # Errors
/// `Refused` for one that is damaged, and for what is no regular file; as the host fails.
pub fn find(image: &Path) -> Result<Option<Intent>> {
    // Nothing lies beside a device.
    if is_device(image) { Ok(None) } else { read(&path_of(image)?) }
}

/// The record at `path`.
fn read(path: &Path) -> Result<Option<Intent>> {
    let Some(bytes) = read_beside(path, MAX_LEN)? else { return Ok(None) };
    decode(&bytes).map(Some).map_err(|what| {
        let advice = "an operation on the image may be half done: restore this file, or remove it (`vhd check --clear-record`) if \
                      the image is to be taken as it is";
        Error::new(ErrorKind::Refused, format!("is an intent record, but {what}; {advice}")).at(path)
    })
}

/// Makes an image's record durable.
///
/// # Errors
/// As the host fails; nothing is recorded then.
pub fn put(host: &dyn Host, image: &Path, intent: &Intent) -> Result<()> {
    put_file(host, &new_path_of(image)?, &encode(intent)?, &Access::of(image))
}

/// As [`put`], of an operation that is seen from the files themselves: the record is for those who look beside them, and may be
/// lost in a power cut.
pub(crate) fn tell(host: &dyn Host, image: &Path, intent: &Intent) -> Result<()> {
    put_name(host, &new_path_of(image)?, &encode(intent)?, &Access::of(image))
}

/// Removes what lies where an image's record would be, whatever it says: the operation is given up. The image is locked
/// meanwhile, so that none is under way.
///
/// # Errors
/// `Locked`; `Refused` for what is no regular file; as the host fails.
pub fn clear(host: &dyn Host, image: &Path) -> Result<()> {
    let file = FileStorage::rehearse(image)?;
    file.lock(LockMode::Write)?;
    let path = path_of(image)?;
    // Only what could be a record: a link, a folder or a FIFO is told of, and stays.
    let name = Path::new(path.file_name().unwrap_or_default());
    open_beneath(folder_of(&path), name, Beneath::NoLinks)?;
    remove(host, image)
}

/// Removes an image's record: the operation is over.
///
/// # Errors
/// As the host fails.
pub fn remove(host: &dyn Host, image: &Path) -> Result<()> {
    remove_file(host, &path_of(image)?, MAGIC.as_bytes())
}

/// What an operation recorded beside an image, in words, and the command that goes on with it.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The record.
    pub path: PathBuf,
    /// The operation: `merge`, `undo commit`, `convert --in-place`, `resize`, `repair`; or what the file is instead of a record.
    pub operation: String,
    /// The files that it names, the image aside.
    pub files: Vec<PathBuf>,
    /// The command that goes on.
    pub command: Option<String>,
}

/// What lies where an image's record would be; `None` where there is nothing.
///
/// # Errors
/// As the host fails, and `Refused` for what is no regular file.
pub fn recorded(image: &Path) -> Result<Option<Recorded>> {
    let path = path_of(image)?;
    let Some(bytes) = read_beside(&path, MAX_LEN)? else { return Ok(None) };
    let folder = folder_of(&path).to_owned();
    let told = |operation: &str, files, command: Option<Command>| {
        let command = command.map(|command| command.to_string());
        Some(Recorded { path: path.clone(), operation: operation.to_owned(), files, command })
    };
    Ok(match decode(&bytes) {
        Err(what) => told(&format!("a record that is {what}"), Vec::new(), None),
        Ok(Intent::Merge(merge)) => {
            let merge = merge.resolved(&folder);
            let named = |member: &Member| {
                let others = member.between.iter().chain(&member.children).map(|named| named.path.clone());
                [member.target.clone(), member.leaf.clone()].into_iter().chain(others).collect::<Vec<_>>()
            };
            let files = merge.members.iter().flat_map(named).collect();
            told(if merge.undo { "undo commit" } else { "merge" }, files, Some(merge.command()))
        }
        Ok(Intent::PartOf { record, .. }) => told("undo commit", vec![folder.join(record)], None),
        Ok(Intent::InPlace(work)) => {
            let (operation, files) = match &work.work {
                Work::Footer(_) if work.uuid.is_some() => ("resize", Vec::new()),
                Work::Footer(_) => ("convert --in-place", Vec::new()),
                Work::Convert(moving) => ("convert --in-place", vec![folder.join(&moving.new)]),
                Work::Repair(journal) => ("repair", vec![folder.join(journal)]),
            };
            told(operation, files, Some(work.command(image)))
        }
    })
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
    let fields = line.strip_prefix(MAGIC).or_else(|| line.strip_prefix(FORMER_MAGIC)).ok_or("of another program or version")?;
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
        Intent::Merge(merge) => merge.members.iter().flat_map(Member::target_uuids).collect(),
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

/// What governs an image: an operation with paths as the record means them, or a record that can't be followed.
enum Governing {
    Merge(Merge),
    InPlace(InPlace),
    /// The rest of the operation is recorded in another folder.
    Elsewhere(PathBuf),
}

/// The record that governs an image: the one beside it, or the one beside another image of its folder that it is a part of.
/// `None` too for a stale one, and for one of another image that had this name.
fn governing(image: &Path, uuid: Option<[u8; 16]>) -> Result<Option<Governing>> {
    let path = path_of(image)?;
    let Some(intent) = find(image)? else { return Ok(None) };
    if !is_about(&intent, uuid) {
        tracing::warn!("{}: is the intent record of another image, so it is ignored", path.display());
        return Ok(None);
    }
    let folder = folder_of(&path);
    Ok(match intent {
        Intent::Merge(merge) => Some(Governing::Merge(merge.resolved(folder))),
        Intent::InPlace(work) => Some(Governing::InPlace(work)),
        Intent::PartOf { record, .. } => match record.file_name() {
            // Other folders are none of what the user opens.
            Some(name) if Path::new(name) == record => match read(&folder.join(name))? {
                Some(Intent::Merge(merge)) => Some(Governing::Merge(merge.resolved(folder))),
                _ => None,
            },
            _ => Some(Governing::Elsewhere(folder.join(record))),
        },
    })
}

/// Refuses an image that an unfinished operation has in hand. `above` are the identifiers of the images through which it
/// is opened, leaf first: what is seen through the child that is merged is right at every point.
///
/// # Errors
/// `Refused`, with the command that finishes the operation.
pub(crate) fn refuse(image: &Path, uuid: Option<[u8; 16]>, above: &[[u8; 16]]) -> Result<()> {
    match governing(image, uuid)? {
        Some(Governing::Merge(merge))
            if !merge.finishing && merge.members.iter().any(|member| member.is_merged_through(above)) =>
        {
            Ok(())
        }
        Some(governing) => Err(interrupted(image, &governing)),
        None => Ok(()),
    }
}

fn interrupted(image: &Path, governing: &Governing) -> Error {
    let (what, command) = match governing {
        Governing::Merge(merge) => ("a merge into it", merge.command()),
        Governing::InPlace(work) => ("a change of it", work.command(image)),
        Governing::Elsewhere(record) => {
            let message = format!(
                "the commit of an undo session was interrupted, of which {} tells; finish it first: vhd undo commit, with all of its \
                 images",
                record.display()
            );
            return Error::new(ErrorKind::Refused, message).at(image);
        }
    };
    Error::new(ErrorKind::Refused, format!("{what} was interrupted; finish it first: {command}")).at(image)
}

/// What to say of a file that can't be opened: that it is half changed, where a record beside it says so.
pub(crate) fn explain(image: &Path, error: Error) -> Error {
    match governing(image, None) {
        Ok(Some(governing)) => interrupted(image, &governing),
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
    let Ok(Some(Governing::Merge(merge))) = governing(path, Some(found)) else { return false };
    merge.members.iter().any(|member| {
        member.is_merged_through(above)
            && member.target_uuid.is_some_and(|(old, new)| *old.as_bytes() == expected && *new.as_bytes() == found)
    })
}

/// True when an image `above` the one at `path` is being merged into it.
pub(crate) fn is_merged_into(path: &Path, above: &[[u8; 16]]) -> bool {
    let Ok(Some(Governing::Merge(merge))) = governing(path, None) else { return false };
    merge.members.iter().any(|member| member.is_merged_through(above))
}

/// The unfinished merge that an image belongs to as a target, with paths as the record means them.
///
/// # Errors
/// As [`find`].
pub(crate) fn merge_of(image: &Path, uuid: Option<[u8; 16]>) -> Result<Option<Merge>> {
    Ok(governing(image, uuid)?.and_then(|governing| match governing {
        Governing::Merge(merge) => Some(merge),
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
