//! Linked disks: a small image that stands for a whole disk or a raw file of this host, to make a VHD of it.
//!
//! Such an image is a differencing one without blocks, by a creator of its own, that says which device it is linked to in a
//! locator of its own: nobody else takes it for a disk that may be used. It is only read.
//!
//! A device is opened because an image says so here, and only here. So it must be the very device: its serial number, or what
//! stands for one, is recorded, compared, and never told. Where there is none, and for files outside the image's folder, the
//! user has to name what may be opened, as for every raw parent.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::stat::{major, minor};
use serde::{Deserialize, Serialize};

use super::{ParentPolicy, RawFile, is_vhd_name, link_to, uuid_of_file};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Creator, DEFAULT_BLOCK_SIZE, LocatorEntry, PlatformCode, Timestamp};
use crate::image::{CreateOptions, Created, Image, NewKind, ParentLink, create_file};
use crate::storage::{FileStorage, LockMode, Storage, folder_of};

/// The creator of linked disks.
const CREATOR: Creator = Creator { app: *b"vhdl", ..Creator::WINDOWS_10 };
/// Bytes of the text that are read.
const MAX_LEN: u32 = 64 << 10;
/// Where the kernel has what tells one device from all others, most telling first.
const SERIALS: [&str; 6] = ["device/serial", "serial", "device/wwid", "wwid", "dm/uuid", "loop/backing_file"];

/// What an image is linked to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkedDisk {
    /// The device or raw file.
    pub path: PathBuf,
    /// Its bytes.
    pub size: u64,
    /// Its serial number; of a file its inode; none where there is nothing like it.
    pub serial: Option<String>,
}

impl LinkedDisk {
    /// What the image is linked to; `None` for all that are no linked disks.
    ///
    /// # Errors
    /// `Corrupt` when what it says is not understood; as the host fails.
    pub fn of(image: &Image) -> Result<Option<Self>> {
        let mut locators = image.header().into_iter().flat_map(|header| header.locators().collect::<Vec<_>>());
        let Some(entry) = locators.find(|entry| entry.code == PlatformCode::LINKED_DISK) else { return Ok(None) };
        Self::read(&**image.storage(), &entry).map(Some).map_err(|error| error.at(image.path()))
    }

    /// What is in the locator.
    pub(crate) fn read(storage: &dyn Storage, entry: &LocatorEntry) -> Result<Self> {
        let corrupt = |what: String| Error::new(ErrorKind::Corrupt, format!("what it is linked to {what}"));
        if entry.data_length > MAX_LEN {
            return Err(corrupt(format!("takes {} bytes", entry.data_length)));
        }
        let mut bytes = vec![0; entry.data_length as usize];
        let read = storage.read_at(&mut bytes, entry.data_offset);
        read.map_err(|error| Error::io(error, format!("can't be read at {:#x}", entry.data_offset)))?;
        serde_json::from_slice(&bytes).map_err(|error| corrupt(format!("is not understood: {error}")))
    }

    /// Says whether what was linked is there. One that is in use is not looked at closely.
    ///
    /// # Errors
    /// `Parent` when it is another one; as it can't be opened.
    pub(crate) fn verify(&self) -> Result<()> {
        match Self::look(&self.path) {
            Ok((_, found)) if found == *self => Ok(()),
            Ok(_) => Err(self.is_another()),
            Err(error) if error.kind() == ErrorKind::Locked => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn is_another(&self) -> Error {
        let message = "is not what the image was linked to: its path, size or serial number is another; link it anew";
        Error::new(ErrorKind::Parent, message).at(&self.path)
    }

    /// Looks at a device or raw file, which nobody may be using.
    fn look(path: &Path) -> Result<(FileStorage, Self)> {
        let failed = |error| Error::io(error, "can't be opened").at(path);
        let real = fs::canonicalize(path).map_err(failed)?;
        let found = fs::metadata(&real).map_err(failed)?;
        let device = found.file_type().is_block_device().then(|| device_folder(found.rdev()));
        if device.as_ref().is_some_and(|device| device.join("partition").exists()) {
            let message = "is a partition; only a whole disk can be linked, as a VHD holds one";
            return Err(Error::new(ErrorKind::InvalidInput, message).at(path));
        }
        let storage = FileStorage::open_alone(&real)?;
        storage.lock(LockMode::Read)?;
        let size = storage.len().map_err(failed)?;
        let serial = device.map_or_else(|| Some(format!("inode {}", found.ino())), |device| serial_of(&device));
        Ok((storage, Self { path: real, size, serial }))
    }

    /// Opens it, if it is what was linked and may be opened.
    pub(super) fn open(&self, image: &Path, policy: &ParentPolicy) -> Result<Arc<RawFile>> {
        let path = &self.path;
        let is_named = policy.any_parent
            || policy.raw_parent.as_ref().is_some_and(|named| fs::canonicalize(named).is_ok_and(|named| named == *path));
        let is_file = fs::metadata(path).is_ok_and(|found| found.is_file());
        let is_near = fs::canonicalize(folder_of(image)).is_ok_and(|folder| path.starts_with(folder));
        if !is_named && (self.serial.is_none() || (is_file && !is_near)) {
            let message = format!("is linked to {}; name that to open it: --raw-parent {0}", path.display());
            return Err(Error::new(ErrorKind::Parent, message));
        }
        let (storage, found) = Self::look(path)?;
        if found != *self {
            return Err(self.is_another());
        }
        Ok(Arc::new(RawFile::new(Arc::new(storage), path, true)?))
    }
}

fn device_folder(device: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", major(device), minor(device)))
}

fn serial_of(device: &Path) -> Option<String> {
    SERIALS.iter().find_map(|name| {
        let text = fs::read_to_string(device.join(name)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty()).map(|text| format!("{name} {text}"))
    })
}

/// Makes a linked disk at `path` of a whole device or a raw file.
///
/// # Errors
/// `InvalidInput` for a partition and a VHD; `Locked` for a device that is mounted or held, and a file that is written; those of
/// [`create_file`].
pub fn create_link(path: &Path, target: &Path, uuid: [u8; 16], overwrite: bool) -> Result<Created> {
    let (_held, linked) = LinkedDisk::look(target)?;
    if is_vhd_name(target) && uuid_of_file(target)?.is_some() {
        let message = "is a VHD already: a linked disk is made of a device or a raw file";
        return Err(Error::new(ErrorKind::InvalidInput, message).at(target));
    }
    if linked.size == 0 {
        return Err(Error::new(ErrorKind::InvalidInput, "is empty: there is nothing to link to").at(target));
    }
    let text = serde_json::to_vec(&linked)
        .map_err(|_| Error::new(ErrorKind::InvalidInput, "is not UTF-8: an image can't name it; rename it").at(target))?;
    let own = Some((PlatformCode::LINKED_DISK, text));
    let create = CreateOptions {
        kind: NewKind::Differencing(ParentLink { own, ..link_to(path, &linked.path, [0; 16])? }),
        size: linked.size,
        block_size: DEFAULT_BLOCK_SIZE,
        uuid,
        creator: CREATOR,
        timestamp: Timestamp::now(),
    };
    let mut created = create_file(path, &create, overwrite)?;
    if linked.serial.is_none() {
        let message = format!("the device has no serial number: opening the image will need --raw-parent {}", target.display());
        created.notes.push(message);
    }
    Ok(created)
}

/// Refuses a linked disk for what would need a disk of its own.
pub(crate) fn refuse_linked(image: &Image, to: &str) -> Result<()> {
    match LinkedDisk::of(image)? {
        None => Ok(()),
        Some(linked) => {
            let message = format!("is a linked disk of {}, which {to}: vhd convert makes an image of it", linked.path.display());
            Err(Error::new(ErrorKind::ReadOnly, message).at(image.path()))
        }
    }
}
