//! Making new images, in the layout of Windows 8 and later.

use std::path::Path;

use crate::error::{Error, Result, fail};
use crate::format::{
    BAT_ENTRY_LEN, Creator, DiskType, DynamicHeader, FOOTER_LEN, Footer, HEADER_LEN, LocatorEntry, MAX_BLOCK_SIZE,
    MAX_CREATE_SIZE, MIN_BLOCK_SIZE, NewFooter, NewHeader, PlatformCode, SECTOR, Timestamp, WINDOWS_MIN_SIZE, encode_locator,
};
use crate::layout::{FooterPlace, Layout};
use crate::storage::{Access, Host, LocalHost, Storage};

/// Where the first parent locator's payload goes, and the unit of room for each: Windows does the same.
const LOCATOR_UNIT: u64 = 4096;

/// What kind of image is made.
#[derive(Clone, Debug)]
pub enum NewKind {
    /// All data, then the footer.
    Fixed {
        /// The host gives all space now.
        preallocate: bool,
    },
    /// Blocks as they are written.
    Dynamic,
    /// Over a parent.
    Differencing(ParentLink),
}

/// How a differencing image names its parent.
#[derive(Clone, Debug)]
pub struct ParentLink {
    /// The parent's identifier; all zero when it is a raw file.
    pub uuid: [u8; 16],
    /// The parent's file name.
    pub name: String,
    /// The parent's path from the child's folder, with `/`.
    pub relative: String,
    /// The parent's absolute path, with `/`.
    pub absolute: String,
    /// What an undo disk or a linked disk says besides, in a locator of its own.
    pub own: Option<(PlatformCode, Vec<u8>)>,
}

/// A new image.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Its kind.
    pub kind: NewKind,
    /// Bytes of the disk; rounded up to a sector.
    pub size: u64,
    /// Bytes of a block: a power of two from 4 KiB to 256 MiB. Only 512 KiB and 2 MiB are known to Windows.
    pub block_size: u32,
    /// Its identifier.
    pub uuid: [u8; 16],
    /// Who it says made it.
    pub creator: Creator,
    /// When it says it was made.
    pub timestamp: Timestamp,
}

/// What was made, where it differs from what one may expect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Created {
    /// Bytes of the disk.
    pub size: u64,
    /// One sentence each.
    pub notes: Vec<String>,
}

/// Makes an image at `path`: under another name first, so that a half-made one never bears it.
///
/// # Errors
/// `Exists` when something is there and `overwrite` is not set; `InvalidInput`; as the host fails.
pub fn create_file(path: &Path, options: &CreateOptions, overwrite: bool) -> Result<Created> {
    create_file_on(&LocalHost, path, options, overwrite)
}

/// As [`create_file`], through a host.
///
/// # Errors
/// As there.
pub fn create_file_on(host: &dyn Host, path: &Path, options: &CreateOptions, overwrite: bool) -> Result<Created> {
    create_file_for(host, path, options, overwrite, &Access::Umask)
}

/// As [`create_file_on`]; `access` says who may read the file.
pub(crate) fn create_file_for(
    host: &dyn Host,
    path: &Path,
    options: &CreateOptions,
    overwrite: bool,
    access: &Access,
) -> Result<Created> {
    let mut created = Created::default();
    crate::storage::replace_file(host, path, overwrite, access, |storage| {
        created = create(&**storage, options)?;
        Ok(())
    })?;
    Ok(created)
}

/// Makes an image in a new file, or on a device that holds it. It is durable once the caller has synced that.
///
/// # Errors
/// `InvalidInput` for sizes that can't be; as the host fails.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<Created> {
    // The limit is a whole number of sectors, so what is below it can be rounded up.
    if options.size == 0 || options.size > MAX_CREATE_SIZE {
        fail!(InvalidInput, "size is {} bytes, expected 512 bytes to 2040 GiB", options.size);
    }
    let mut created = Created { size: options.size.next_multiple_of(SECTOR), notes: Vec::new() };
    if !options.block_size.is_power_of_two() || !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&options.block_size) {
        fail!(InvalidInput, "block size is {}, expected a power of two from 4 KiB to 256 MiB", options.block_size);
    }
    if created.size != options.size {
        created.notes.push(format!("size rounded up to a whole sector: {} bytes", created.size));
    }
    if created.size < WINDOWS_MIN_SIZE {
        created.notes.push("smaller than 3 MiB: Windows refuses it".into());
    }
    match &options.kind {
        NewKind::Fixed { preallocate } => create_fixed(storage, options, created.size, *preallocate)?,
        NewKind::Dynamic => create_sparse(storage, options, created.size, None)?,
        NewKind::Differencing(link) => create_sparse(storage, options, created.size, Some(link))?,
    }
    Ok(created)
}

fn footer(options: &CreateOptions, size: u64) -> Footer {
    let disk_type = match options.kind {
        NewKind::Fixed { .. } => DiskType::Fixed,
        NewKind::Dynamic => DiskType::Dynamic,
        NewKind::Differencing(_) => DiskType::Differencing,
    };
    Footer::new(&NewFooter { disk_type, size, uuid: options.uuid, creator: options.creator, timestamp: options.timestamp })
}

/// Gives the file its length, or finds out whether a device has room. Returns where the trailing footer goes.
fn reserve(storage: &dyn Storage, len: u64) -> Result<u64> {
    if storage.can_grow() {
        storage.set_len(len).map_err(|error| Error::io(error, format!("can't grow to {len} bytes")))?;
        return Ok(len - SECTOR);
    }
    let room = storage.len().map_err(|error| Error::io(error, "can't be examined"))?;
    if room < len {
        fail!(NoSpace, "the device has {room} bytes, the image needs {len}");
    }
    Ok(room - room % SECTOR - SECTOR)
}

fn write(storage: &dyn Storage, bytes: &[u8], at: u64) -> Result<()> {
    storage.write_at(bytes, at).map_err(|error| Error::io(error, format!("can't be written at {at:#x}")))
}

fn create_fixed(storage: &dyn Storage, options: &CreateOptions, size: u64, preallocate: bool) -> Result<()> {
    let footer_at = reserve(storage, size + SECTOR)?;
    if preallocate {
        storage.allocate(0..size + SECTOR).map_err(|error| Error::io(error, format!("no room for {size} bytes")))?;
    }
    write(storage, &footer(options, size).to_bytes(), footer_at)
}

fn create_sparse(storage: &dyn Storage, options: &CreateOptions, size: u64, parent: Option<&ParentLink>) -> Result<()> {
    let layout = Layout::new(size, options.block_size);
    let blocks = layout.blocks();
    let header_at = FOOTER_LEN as u64;
    let header_end = header_at + HEADER_LEN as u64;
    let (locators, locators_end) = parent.map_or_else(Default::default, place_locators);
    let bat_offset = locators_end.max(header_end);
    let bat_len = (u64::from(blocks) * BAT_ENTRY_LEN).next_multiple_of(SECTOR);
    let mut header = DynamicHeader::new(&NewHeader { bat_offset, max_table_entries: blocks, block_size: options.block_size });
    if let Some(parent) = parent {
        // Windows 10 writes no time stamp of the parent either: copying a file changes it and means nothing.
        header.set_parent(parent.uuid, Timestamp(0), &parent.name);
        header.set_locators(&locators.iter().map(|(entry, _)| entry.clone()).collect::<Vec<_>>());
    }
    let footer = footer(options, size).to_bytes();
    let footer_at = reserve(storage, FooterPlace::PageEnd.file_len(bat_offset + bat_len))?;
    write(storage, &footer, 0)?;
    write(storage, &header.to_bytes(), header_at)?;
    for (entry, payload) in &locators {
        write(storage, payload, entry.data_offset)?;
    }
    let unused = vec![0xFF; usize::try_from(bat_len.min(1 << 20)).unwrap_or(1 << 20)];
    let mut done = 0;
    while done < bat_len {
        let len = unused.len().min(usize::try_from(bat_len - done).unwrap_or(usize::MAX));
        write(storage, &unused[..len], bat_offset + done)?;
        done += len as u64;
    }
    write(storage, &footer, footer_at)
}

/// What the three locators of a child say.
///
/// Paths are those of this host with `\`, because Windows needs that and everyone who reads them elsewhere maps it.
/// `MacX` holds `file://` and the relative path, as tapdisk writes and expects it.
pub(crate) fn locator_texts(link: &ParentLink) -> [(PlatformCode, String); 3] {
    let relative = if link.relative.starts_with("../") { link.relative.clone() } else { format!("./{}", link.relative) };
    [
        (PlatformCode::W2ku, link.absolute.replace('/', "\\")),
        (PlatformCode::W2ru, relative.replace('/', "\\")),
        (PlatformCode::MacX, format!("file://{relative}")),
    ]
}

/// The locators of a new child, each with its payload, and the end of the room they take.
fn place_locators(link: &ParentLink) -> (Vec<(LocatorEntry, Vec<u8>)>, u64) {
    let mut at = LOCATOR_UNIT;
    let paths = locator_texts(link).map(|(code, text)| (code, encode_locator(code, &text)));
    let placed = paths.into_iter().chain(link.own.clone()).map(|(code, payload)| {
        let space = (payload.len() as u64).next_multiple_of(LOCATOR_UNIT);
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        let entry = LocatorEntry { code, data_space: narrow(space), data_length: narrow(payload.len() as u64), data_offset: at };
        at += space;
        (entry, payload)
    });
    let placed = placed.collect();
    (placed, at)
}
