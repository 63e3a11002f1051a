//! Where an image's parent is, and whether it may be opened.
//!
//! An image is data from somewhere: what it says about its parent must not make us open what its owner did not
//! mean. So places are a policy, and only regular files that are VHDs with the expected identifier are taken.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{DynamicHeader, LocatorEntry, PlatformCode, Stage};
use crate::image::{Footers, Image};
use crate::intent;
use crate::storage::{FileStorage, Storage, folder_of};

/// Bytes of a locator's payload that are read: the longest path of Windows, 32,767 UTF-16 units.
const MAX_LOCATOR_LEN: u32 = 64 << 10;
/// Files of a folder that are looked at when it is searched.
const MAX_SEARCHED: usize = 10_000;

/// Where parents may be, beyond the child's own folder.
#[derive(Clone, Debug, Default)]
pub struct ParentPolicy {
    /// Anywhere the image says.
    pub any_parent: bool,
    /// Folders that are searched by identifier.
    pub parent_dirs: Vec<PathBuf>,
    /// Images that the call names: each is a parent where it has the identifier, wherever it is.
    pub images: Vec<PathBuf>,
    /// The raw file or device at the end of the chain: only ever opened because it is named here.
    pub raw_parent: Option<PathBuf>,
}

/// True for names that VHDs have: `.vhd`, `.vud`, `.avhd`.
#[must_use]
pub fn is_vhd_name(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    matches!(extension.as_str(), "vhd" | "vud" | "avhd")
}

/// A parent locator with its payload.
#[derive(Clone, Debug)]
pub struct Locator {
    /// The table's entry.
    pub entry: LocatorEntry,
    /// The path as the file has it; `None` for opaque payloads and those outside the file.
    pub path: Option<String>,
}

/// Reads the locators of an image, in the order of its table.
///
/// # Errors
/// As the host fails.
pub fn read_locators(storage: &dyn Storage, header: &DynamicHeader) -> Result<Vec<Locator>> {
    let len = storage.len().map_err(|error| Error::io(error, "can't be examined"))?;
    let mut locators = Vec::new();
    for entry in header.locators().filter(LocatorEntry::is_used) {
        let end = entry.data_offset.saturating_add(u64::from(entry.data_length));
        let mut path = None;
        if entry.data_length <= MAX_LOCATOR_LEN && end <= len {
            let mut payload = vec![0; entry.data_length as usize];
            storage.read_at(&mut payload, entry.data_offset).map_err(|error| Error::io(error, "parent locator can't be read"))?;
            path = entry.code.decode(&payload);
        }
        locators.push(Locator { entry, path });
    }
    Ok(locators)
}

/// The paths that an image gives for its parent, the most trustworthy first, each in the spellings it may mean.
fn candidates(locators: &[Locator], header: &DynamicHeader) -> Vec<PathBuf> {
    let order = [PlatformCode::W2ru, PlatformCode::W2ku, PlatformCode::MacX, PlatformCode::Wi2r, PlatformCode::Wi2k];
    let mut paths = Vec::new();
    for code in order {
        paths.extend(locators.iter().filter(|locator| locator.entry.code == code).flat_map(locator_paths));
    }
    // The header's name counts as a file name only, whatever path it has.
    paths.extend(windows_paths(&header.parent_name()).iter().filter_map(|path| path.file_name()).map(PathBuf::from));
    paths.retain(|path| !path.as_os_str().is_empty());
    let mut seen = Vec::new();
    paths.retain(|path| !seen.contains(path) && (seen.push(path.clone()), true).1);
    paths
}

/// The paths that one locator may mean.
pub(crate) fn locator_paths(locator: &Locator) -> Vec<PathBuf> {
    let Some(text) = &locator.path else { return Vec::new() };
    match locator.entry.code {
        PlatformCode::MacX => url_paths(text),
        _ => windows_paths(text),
    }
}

/// A Windows path as a path of this host: `\` is `/`, a drive letter is left out. As written, too: a name may hold `\`.
pub(crate) fn windows_paths(text: &str) -> Vec<PathBuf> {
    let without_drive = match text.as_bytes() {
        [letter, b':', ..] if letter.is_ascii_alphabetic() => &text[2..],
        _ => text,
    };
    vec![PathBuf::from(without_drive.replace('\\', "/")), PathBuf::from(text)]
}

/// The path of a file URL, as written (tapdisk escapes nothing) and unescaped.
fn url_paths(text: &str) -> Vec<PathBuf> {
    let path = text.strip_prefix("file://").unwrap_or(text);
    let path = path.strip_prefix("localhost").filter(|rest| rest.starts_with('/')).unwrap_or(path);
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let hex = |digit: &u8| char::from(*digit).to_digit(16);
        if let (b'%', [a, b, ..]) = (byte, tail)
            && let (Some(high), Some(low)) = (hex(a), hex(b))
        {
            bytes.push(u8::try_from(high * 16 + low).unwrap_or(b'?'));
            rest = &tail[2..];
            continue;
        }
        bytes.push(byte);
        rest = tail;
    }
    vec![PathBuf::from(path), PathBuf::from(String::from_utf8_lossy(&bytes).into_owned())]
}

/// What became of the candidates, for the message when none is the parent.
#[derive(Default)]
struct Tried {
    /// A file of another identifier.
    mismatch: Option<(PathBuf, [u8; 16])>,
    /// A file that exists where none may be opened.
    outside: Option<PathBuf>,
    /// A file that is no VHD.
    other: Option<PathBuf>,
}

/// Opens the parent of `image`, which is a differencing one with a parent that is a VHD.
/// `above` are the identifiers of the images from the leaf to this one.
pub(super) fn find_parent(
    image: &Image,
    header: &DynamicHeader,
    policy: &ParentPolicy,
    above: &[[u8; 16]],
) -> Result<FileStorage> {
    find_parent_below(&**image.storage(), image.path(), header, policy, above)
}

/// As [`find_parent`], of an image at `path` that is not open.
pub(crate) fn find_parent_of(
    storage: &dyn Storage,
    path: &Path,
    header: &DynamicHeader,
    policy: &ParentPolicy,
) -> Result<FileStorage> {
    let own = uuid_of(storage);
    find_parent_below(storage, path, header, policy, own.as_slice())
}

fn find_parent_below(
    storage: &dyn Storage,
    path: &Path,
    header: &DynamicHeader,
    policy: &ParentPolicy,
    above: &[[u8; 16]],
) -> Result<FileStorage> {
    let expected = header.parent_uuid();
    let locators = read_locators(storage, header)?;
    let folder = folder_of(path);
    let mut tried = Tried::default();
    for candidate in candidates(&locators, header) {
        let Some(storage) = open_candidate(folder, &candidate, policy, &mut tried) else { continue };
        match uuid_of(&storage) {
            Some(uuid) if uuid == expected => return Ok(storage),
            Some(uuid) if intent::was_renamed(storage.path(), uuid, expected, above) => return Ok(storage),
            Some(uuid) => {
                tried.mismatch.get_or_insert((storage.path().to_owned(), uuid));
            }
            None => {
                tried.other.get_or_insert_with(|| storage.path().to_owned());
            }
        }
    }
    for image in &policy.images {
        if let Ok(storage) = FileStorage::open(image, false)
            && uuid_of(&storage).is_some_and(|uuid| uuid == expected || intent::was_renamed(image, uuid, expected, above))
        {
            return Ok(storage);
        }
    }
    for dir in &policy.parent_dirs {
        if let Some(storage) = search(dir, expected) {
            return Ok(storage);
        }
    }
    if let Some((path, found)) = &tried.mismatch {
        // Perhaps a merge that was interrupted gave it another identifier.
        intent::refuse(path, Some(*found), &[])?;
    }
    let other = tried.other.take();
    let error = not_found(header, folder, tried, expected);
    // Perhaps it is half changed.
    Err(match other {
        Some(path) => intent::explain(&path, error),
        None => error,
    })
}

/// Where one locator leads.
pub(crate) enum Lead {
    /// To a VHD with this identifier.
    Vhd(PathBuf, [u8; 16]),
    /// To a file where none may be opened.
    Outside(PathBuf),
    /// To nothing that is a VHD.
    Nowhere,
}

/// Follows one locator of the image at `path`.
pub(crate) fn follow_locator(path: &Path, locator: &Locator, policy: &ParentPolicy) -> Lead {
    let folder = folder_of(path);
    let mut tried = Tried::default();
    for candidate in locator_paths(locator) {
        if let Some(storage) = open_candidate(folder, &candidate, policy, &mut tried)
            && let Some(uuid) = uuid_of(&storage)
        {
            return Lead::Vhd(storage.path().to_owned(), uuid);
        }
    }
    tried.outside.map_or(Lead::Nowhere, Lead::Outside)
}

fn not_found(header: &DynamicHeader, folder: &Path, tried: Tried, expected: [u8; 16]) -> Error {
    let expected = Uuid::from_bytes(expected);
    let message = if let Some((path, found)) = tried.mismatch {
        let found = Uuid::from_bytes(found);
        format!(
            "parent {} has UUID {found}, expected {expected}: it is another image, or was changed by a merge; --parent-dir DIR looks elsewhere",
            path.display()
        )
    } else if let Some(path) = tried.outside {
        format!(
            "parent {} is outside {}, so it is not opened unasked; allow it with --any-parent or --parent-dir DIR",
            path.display(),
            folder.display()
        )
    } else {
        format!(
            "parent \"{}\" (UUID {expected}) was not found in {}; --parent-dir DIR looks elsewhere",
            header.parent_name().escape_default(),
            folder.display()
        )
    };
    Error::new(ErrorKind::Parent, message)
}

/// Opens a candidate where the policy lets it: in the child's folder or below, or anywhere when asked.
fn open_candidate(folder: &Path, candidate: &Path, policy: &ParentPolicy, tried: &mut Tried) -> Option<FileStorage> {
    if policy.any_parent {
        return open_regular(&folder.join(candidate));
    }
    // An absolute path counts when it leads into the child's folder.
    let inside = match candidate.is_absolute() {
        true => std::fs::canonicalize(folder).ok().and_then(|folder| candidate.strip_prefix(folder).ok().map(Path::to_owned)),
        false => Some(candidate.to_owned()),
    };
    let found = inside.and_then(|inside| {
        let dir = File::open(folder).ok()?;
        let open = |flags| {
            let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_BENEATH);
            openat2(dir.as_fd(), &inside, how).ok().map(File::from)
        };
        is_regular(&open(OFlag::O_PATH)?).then_some(())?;
        regular(open(OFlag::O_RDONLY | OFlag::O_NONBLOCK)?, &tidy(&folder.join(&inside)))
    });
    if found.is_none() && folder.join(candidate).is_file() {
        tried.outside.get_or_insert_with(|| folder.join(candidate));
    }
    found
}

/// A path without the `.` that locators begin with.
fn tidy(path: &Path) -> PathBuf {
    path.components().filter(|part| *part != Component::CurDir).collect()
}

fn open_regular(path: &Path) -> Option<FileStorage> {
    let open = |flags: OFlag| {
        let mut options = std::fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::custom_flags(options.read(true), flags.bits()).open(path).ok()
    };
    is_regular(&open(OFlag::O_PATH)?).then_some(())?;
    regular(open(OFlag::O_NONBLOCK)?, &tidy(path))
}

/// Only regular files: a device is never opened because an image says so, not even to see that it is one. Opening a
/// watchdog starts it, opening a tape rewinds it. So each candidate is looked at through a path descriptor first.
fn is_regular(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.is_file())
}

/// Looks again: it may have been replaced meanwhile.
fn regular(file: File, path: &Path) -> Option<FileStorage> {
    is_regular(&file).then(|| FileStorage::from_file(file, path).ok()).flatten()
}

/// The identifier of the file at `path`, where it is a VHD.
pub(crate) fn uuid_of_file(path: &Path) -> Result<Option<[u8; 16]>> {
    Ok(uuid_of(&FileStorage::open(path, false)?))
}

/// The identifier of an image, and of one that is half made, too: but for what takes the content of another file, whose it has.
fn uuid_of(storage: &dyn Storage) -> Option<[u8; 16]> {
    let footers = Footers::read(storage).ok()?;
    match footers.stage() {
        Some((Stage::ConvertTarget, _)) => None,
        Some((_, footer)) => Some(footer.uuid()),
        None => footers.authority(true).ok().map(|(footer, _)| footer.uuid()),
    }
}

/// The VHDs of a folder, a bounded number of them.
fn vhds_in(dir: &Path) -> impl Iterator<Item = FileStorage> + use<> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().take(MAX_SEARCHED).flatten();
    entries.map(|entry| entry.path()).filter(|path| is_vhd_name(path)).filter_map(|path| open_regular(&path))
}

fn search(dir: &Path, expected: [u8; 16]) -> Option<FileStorage> {
    vhds_in(dir).find(|storage| uuid_of(storage) == Some(expected))
}

/// An image beside the one at `path`, which is open as `itself`, that is a child of it.
pub(super) fn find_child(path: &Path, itself: &FileStorage, uuid: [u8; 16]) -> Option<PathBuf> {
    children(path, itself.identity().ok(), uuid).next()
}

/// All images beside the one at `path`, which has this identifier, that are children of it.
pub(crate) fn find_children(path: &Path, uuid: [u8; 16]) -> Vec<PathBuf> {
    children(path, FileStorage::open(path, false).and_then(|file| file.identity()).ok(), uuid).collect()
}

/// A link is looked beside, and what it leads to.
fn children(path: &Path, own: Option<(u64, u64)>, uuid: [u8; 16]) -> impl Iterator<Item = PathBuf> + use<> {
    let is_child = move |storage: &FileStorage| parent_uuid_of(storage) == Some(uuid) && storage.identity().ok() != own;
    let folder = folder_of(path).to_owned();
    let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let linked_from = std::fs::canonicalize(&folder).ok().filter(|folder| *folder != folder_of(&real)).map(|_| folder.clone());
    let beside = if linked_from.is_some() { folder_of(&real).to_owned() } else { folder };
    let folders = linked_from.into_iter().chain([beside]);
    folders.flat_map(|folder| vhds_in(&folder)).filter(is_child).map(|child| child.path().to_owned())
}

/// True when the image at `path` is a child of the one with this identifier.
pub(crate) fn is_child_of(path: &Path, uuid: [u8; 16]) -> Result<bool> {
    Ok(parent_uuid_of(&FileStorage::open(path, false)?) == Some(uuid))
}

fn parent_uuid_of(storage: &dyn Storage) -> Option<[u8; 16]> {
    let footers = Footers::read(storage).ok()?;
    let footer = footers.stage().map(|(_, footer)| footer).or_else(|| footers.authority(true).ok().map(|(footer, _)| footer))?;
    let at = footer.header_offset()?;
    if footer.disk_type() != crate::format::DiskType::Differencing {
        return None;
    }
    let mut bytes = [0; crate::format::HEADER_LEN];
    storage.read_at(&mut bytes, at).ok()?;
    DynamicHeader::parse_tolerant(&bytes).ok().map(|header| header.parent_uuid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_paths_lose_their_drive() {
        assert_eq!(windows_paths(r"C:\vm\base.vhd")[0], Path::new("/vm/base.vhd"));
        assert_eq!(windows_paths(r".\base.vhd")[0], Path::new("./base.vhd"));
        assert_eq!(windows_paths("ü:x")[0], Path::new("ü:x"));
    }

    #[test]
    fn urls_of_the_specification_and_of_tapdisk() {
        assert_eq!(url_paths("file://localhost/dir/my%20base.vhd")[1], Path::new("/dir/my base.vhd"));
        assert_eq!(url_paths("file://./x.vhd")[0], Path::new("./x.vhd"));
        assert_eq!(url_paths("file:///a%2.vhd")[1], Path::new("/a%2.vhd"));
    }
}
