//! Making another type of a disk without a second copy of its data.
//!
//! A raw file becomes a fixed disk by a footer. Otherwise the content moves to a new file piece by piece: once a piece is
//! durable there, its space in the old file is given back; at the end the new file takes the old one's name. An intent
//! record says how far it came, and until the end only this operation opens the image.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::copy::copy_range;
use crate::block::Disk;
use crate::chain::{Chain, ChainOptions, Layer, RawFile, is_vhd_name};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Creator, DEFAULT_BLOCK_SIZE, DiskType, Footer, NewFooter, SECTOR, Timestamp};
use crate::image::{CreateOptions, Image, NewKind, OpenOptions, create};
use crate::intent::{self, FooterMove, InPlace, Intent, Move, Work};
use crate::progress::Progress;
use crate::storage::{FileStorage, LockMode, Storage, folder_of};

/// Bytes that are in both files at most.
const PIECE: u64 = 256 << 20;

/// How a disk is converted where it is.
#[derive(Clone, Debug)]
pub struct InPlaceOptions {
    /// What it becomes: fixed or dynamic.
    pub to: DiskType,
    /// Whether the file is raw; without it its name says so, unless it has a VHD's footer.
    pub from_raw: Option<bool>,
    /// Bytes of a block of a dynamic disk.
    pub block_size: u32,
    /// Goes on although a saved state relies on the image.
    pub force: bool,
    /// Only says what would be done.
    pub dry_run: bool,
    /// Bytes that are in both files at most.
    pub piece: u64,
}

impl InPlaceOptions {
    /// With blocks of 2 MiB.
    #[must_use]
    pub fn new(to: DiskType) -> Self {
        Self { to, from_raw: None, block_size: DEFAULT_BLOCK_SIZE, force: false, dry_run: false, piece: PIECE }
    }
}

/// What converting in place does, or did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvertedInPlace {
    /// What it was: the type's name, or `raw`.
    pub from: &'static str,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes that have to be moved.
    pub data: u64,
    /// An interrupted conversion goes on.
    pub resumed: bool,
}

/// Makes another type of the image or raw file at `path`. Interrupted at any point, the same call goes on.
///
/// # Errors
/// `InvalidInput` for what it is already; `Unsupported` for a differencing disk; `Cancelled`, when the same call goes on;
/// those of [`Chain::open`].
pub fn convert_in_place(
    path: &Path,
    options: &InPlaceOptions,
    chain: &ChainOptions,
    progress: &Progress,
) -> Result<ConvertedInPlace> {
    // Names are changed beside the file itself, not beside a link to it.
    let path = &path.canonicalize().map_err(|error| Error::io(error, "can't be opened").at(path))?;
    let begun = begun(path, options)?;
    let begun_raw = begun.as_ref().is_some_and(|begun| begun.uuid.is_none());
    let is_raw = begun_raw || (begun.is_none() && options.from_raw.unwrap_or_else(|| !is_vhd_name(path)));
    if is_raw && options.from_raw.is_none() && begun.is_none() && crate::chain::uuid_of_file(path)?.is_some() {
        // As when it was converted before: its footer and tables would become the disk's content.
        let message = "has the footer of a VHD, but no name of one: --from vhd takes it for one, --from raw for plain bytes";
        return Err(Error::new(ErrorKind::Refused, message).at(path));
    }
    if is_raw && options.to == DiskType::Fixed {
        return raw_to_fixed(path, begun, options, chain);
    }
    if let Some(InPlace { work: Work::Convert(moving), .. }) = begun.as_ref().filter(|_| !options.dry_run)
        && moving.finishing
    {
        finish(path, &folder_of(path).join(&moving.new), chain)?;
        let size = Image::open(Arc::new(FileStorage::open(path, false)?), path, &OpenOptions::default())?.size();
        return Ok(ConvertedInPlace { from: "another type", size, data: 0, resumed: true });
    }
    let source = Source::open(path, is_raw, options, begun.is_some(), chain)?;
    if path.file_name().is_some_and(|name| name.to_str().is_none()) {
        let message = "its name is not UTF-8, so the record of a conversion can't hold it; rename it";
        return Err(Error::new(ErrorKind::InvalidInput, message).at(path));
    }
    let size = source.disk.size();
    let mut done = ConvertedInPlace { from: source.kind, size, data: 0, resumed: begun.is_some() };
    done.data = source.data()?;
    if options.dry_run {
        return Ok(done);
    }
    progress.set_total(size);
    let mut moving = match begun {
        // Before the first piece nothing is known of the new file: it is made again.
        Some(InPlace { work: Work::Convert(work), .. }) if work.done > 0 => work,
        _ => begin(path, &source, options, chain)?,
    };
    let new = folder_of(path).join(&moving.new);
    let converting = Converting { path, new: &new, source: &source, chain };
    converting.fill(&mut moving, options.piece, progress)?;
    moving.finishing = true;
    put(path, source.uuid, &moving, chain)?;
    finish(path, &new, chain)?;
    Ok(done)
}

/// What is converted.
struct Source {
    disk: Disk,
    storage: Arc<dyn Storage>,
    uuid: Option<Uuid>,
    footer: Option<Footer>,
    kind: &'static str,
}

impl Source {
    fn open(path: &Path, is_raw: bool, options: &InPlaceOptions, resuming: bool, chain: &ChainOptions) -> Result<Self> {
        let invalid = |kind, message: String| Err(Error::new(kind, message).at(path));
        let links = std::fs::metadata(path).map_err(|error| Error::io(error, "can't be opened").at(path))?.nlink();
        if links > 1 {
            return invalid(ErrorKind::Unsupported, "has other names (hard links), which would keep the old content".into());
        }
        // Its children stay right: the content and the identifier stay the same.
        let file = Arc::new(FileStorage::open(path, true)?);
        file.lock(LockMode::Write)?;
        let storage = chain.host.adopt(file);
        if is_raw {
            let raw = Arc::new(RawFile::new(Arc::clone(&storage), path, true)?);
            return Ok(Self { disk: Disk::new(Chain::of(Layer::Raw(raw))), storage, uuid: None, footer: None, kind: "raw" });
        }
        let look = OpenOptions { writable: false, ..chain.image.clone() };
        let image = Image::open(Arc::clone(&storage), path, &look).map_err(|error| intent::explain(path, error))?;
        let footer = image.footer().clone();
        let kind = footer.disk_type();
        if !resuming {
            intent::refuse(path, Some(footer.uuid()), &[])?;
        }
        crate::chain::refuse_linked(&image, "is only read")?;
        if kind == DiskType::Differencing {
            let message = "has a parent, so another file must take both: vhd convert without --in-place, or vhd merge";
            return invalid(ErrorKind::Unsupported, message.into());
        }
        if kind == options.to && !resuming {
            return invalid(ErrorKind::InvalidInput, format!("is a {} disk already", kind.name()));
        }
        if footer.saved_state() && !options.force {
            let message = "a virtual machine's saved state relies on it; restore or discard that, or use --force";
            return invalid(ErrorKind::Refused, message.into());
        }
        let uuid = Some(Uuid::from_bytes(footer.uuid()));
        let disk = Disk::new(Chain::of(Layer::Image(image)));
        Ok(Self { disk, storage, uuid, footer: Some(footer), kind: kind.name() })
    }

    fn data(&self) -> Result<u64> {
        let extents = self.disk.extents_in(0..self.disk.size())?;
        let data = extents.iter().filter(|extent| !extent.state.reads_zero());
        Ok(data.map(|extent| extent.range.end - extent.range.start).sum())
    }

    /// Gives the space of a range back to the host.
    fn give_back(&self, range: std::ops::Range<u64>) -> Result<()> {
        for extent in self.disk.extents_in(range)? {
            if let Some(offset) = extent.offset {
                let end = offset + (extent.range.end - extent.range.start);
                let emptied = self.storage.punch_hole(offset..end);
                emptied.map_err(|error| Error::io(error, format!("can't be emptied at {offset:#x}")))?;
            }
        }
        Ok(())
    }
}

/// The record of a conversion that was begun.
fn begun(path: &Path, options: &InPlaceOptions) -> Result<Option<InPlace>> {
    let Some(work) = intent::in_place_of(path, crate::chain::uuid_of_file(path)?)? else { return Ok(None) };
    let is_the_same = match &work.work {
        Work::Footer(_) => work.uuid.is_none() && options.to == DiskType::Fixed,
        Work::Convert(moving) => moving.to == options.to.name(),
        Work::Repair(_) => false,
    };
    if !is_the_same {
        intent::refuse(path, work.uuid.map(Uuid::into_bytes), &[])?;
    }
    Ok(Some(work))
}

fn put(path: &Path, uuid: Option<Uuid>, moving: &Move, chain: &ChainOptions) -> Result<()> {
    let record = InPlace { uuid, work: Work::Convert(moving.clone()) };
    intent::put(&*chain.host, path, &Intent::InPlace(record))
}

/// Makes the new file, empty, and the record.
fn begin(path: &Path, source: &Source, options: &InPlaceOptions, chain: &ChainOptions) -> Result<Move> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".vhd-converting");
    let new = path.with_file_name(&name);
    // What a killed attempt left that never came to a record.
    chain.host.remove(&new)?;
    let kind = if options.to == DiskType::Fixed { NewKind::Fixed { preallocate: false } } else { NewKind::Dynamic };
    let (creator, timestamp) =
        source.footer.as_ref().map_or((Creator::WINDOWS_10, Timestamp::now()), |footer| (footer.creator(), footer.timestamp()));
    let make = CreateOptions {
        kind,
        size: source.disk.size(),
        block_size: options.block_size,
        // An image stays the same image: its children find it.
        uuid: source.uuid.unwrap_or_else(Uuid::new_v4).into_bytes(),
        creator,
        timestamp,
    };
    let storage = chain.host.create(&new)?;
    let permissions = std::fs::metadata(path).map(|found| found.permissions());
    let given = permissions.and_then(|permissions| std::fs::set_permissions(&new, permissions));
    given.map_err(|error| Error::io(error, "can't be given the permissions of the old file").at(&new))?;
    create(&*storage, &make).map_err(|error| error.at(&new))?;
    drop(storage);
    // Its name is durable with the record's; its content with the first piece.
    let moving = Move { to: options.to.name().into(), new: PathBuf::from(name), done: 0, finishing: false };
    put(path, source.uuid, &moving, chain)?;
    Ok(moving)
}

/// A conversion under way.
struct Converting<'a> {
    path: &'a Path,
    new: &'a Path,
    source: &'a Source,
    chain: &'a ChainOptions,
}

impl Converting<'_> {
    /// Moves what is left, by pieces of so many bytes.
    fn fill(&self, moving: &mut Move, piece: u64, progress: &Progress) -> Result<()> {
        let file = Arc::new(FileStorage::open(self.new, true)?);
        file.lock(LockMode::Write)?;
        let open = OpenOptions { writable: true, background_flush: None, ..OpenOptions::default() };
        let image = Image::open(self.chain.host.adopt(file), self.new, &open)?;
        let target = Disk::new(Chain::of(Layer::Image(image)));
        let size = self.source.disk.size();
        progress.advance(moving.done)?;
        while moving.done < size {
            let range = moving.done..(moving.done + piece).min(size);
            copy_range(&self.source.disk, &target, range.clone(), true, progress)?;
            target.flush()?;
            moving.done = range.end;
            put(self.path, self.source.uuid, moving, self.chain)?;
            self.source.give_back(range).map_err(|error| error.at(self.path))?;
        }
        target.close()
    }
}

/// Gives the new file the old one's name.
fn finish(path: &Path, new: &Path, chain: &ChainOptions) -> Result<()> {
    if new.exists() {
        chain.host.rename(new, path)?;
        chain.host.sync_folder(folder_of(path))?;
    }
    intent::remove(&*chain.host, path)
}

/// Puts a footer behind a raw file.
fn raw_to_fixed(path: &Path, begun: Option<InPlace>, options: &InPlaceOptions, chain: &ChainOptions) -> Result<ConvertedInPlace> {
    let file = Arc::new(FileStorage::open(path, true)?);
    file.lock(LockMode::Write)?;
    let storage = chain.host.adopt(file);
    let failed = |error| Error::io(error, "can't be examined").at(path);
    let resumed = begun.is_some();
    let work = match begun {
        Some(InPlace { work: Work::Footer(work), .. }) => work,
        _ => {
            intent::refuse(path, None, &[])?;
            let len = storage.len().map_err(failed)?;
            let size = len.next_multiple_of(SECTOR);
            if !storage.can_grow() {
                let message = "is a device, which has no room for more; vhd convert makes an image of it elsewhere";
                return Err(Error::new(ErrorKind::Unsupported, message).at(path));
            }
            if size == 0 || size > crate::format::MAX_CREATE_SIZE {
                let message = format!("has {len} bytes, expected a file of 1 byte to 2040 GiB");
                return Err(Error::new(ErrorKind::InvalidInput, message).at(path));
            }
            let new = NewFooter {
                disk_type: DiskType::Fixed,
                size,
                uuid: Uuid::new_v4().into_bytes(),
                creator: Creator::WINDOWS_10,
                timestamp: Timestamp::now(),
            };
            FooterMove::new(len, len, size, &Footer::new(&new))
        }
    };
    let done = ConvertedInPlace { from: "raw", size: work.to, data: 0, resumed };
    if options.dry_run {
        return Ok(done);
    }
    let record = InPlace { uuid: None, work: Work::Footer(work.clone()) };
    if !resumed {
        intent::put(&*chain.host, path, &Intent::InPlace(record))?;
    }
    work.apply(&*storage).map_err(|error| error.at(path))?;
    intent::remove(&*chain.host, path)?;
    Ok(done)
}
