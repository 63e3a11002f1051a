//! Giving an image another size.
//!
//! Dynamic and differencing images stay whole at every point (`image/resize.rs`). Of a fixed disk the footer moves, and in
//! between there may be none: so an intent record says what is done.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::copy::is_zero;
use crate::block::{Disk, ExtentState};
use crate::chain::{Chain, ChainOptions};
use crate::command::Command;
use crate::error::{Error, ErrorKind, Result, fail};
use crate::format::{DiskType, MAX_CREATE_SIZE, SECTOR, Stage};
use crate::image::{Footers, Image, OpenOptions};
use crate::intent::{self, FooterMove, InPlace, Intent, Work, finish_resize, resize_fixed};
use crate::partition::{Gpt, PartitionTable, TableKind, move_gpt, will_move_gpt};
use crate::progress::Progress;
use crate::storage::{AlignedBuffer, FileStorage, LockMode, Storage};

/// Bytes that are looked at at once.
const CHUNK: u64 = 1 << 20;

/// How an image is resized.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResizeOptions {
    /// It may become smaller.
    pub shrink: bool,
    /// What is beyond the new end may be lost, partitions too.
    pub discard_data: bool,
    /// Goes on although a saved state relies on the image or it has children.
    pub force: bool,
    /// Only says what would be done.
    pub dry_run: bool,
}

/// What resizing does, or did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resized {
    /// Bytes of the disk before.
    pub from: u64,
    /// Bytes of the disk afterwards.
    pub to: u64,
    /// Bytes of blocks that make room for a longer table.
    pub bytes_moved: u64,
    /// True when the backup of a GPT moves to the new end.
    pub moves_gpt: bool,
    /// One sentence each.
    pub notes: Vec<String>,
}

/// A size that an image may get, rounded up to a sector.
pub(crate) fn whole_size(size: u64) -> Result<u64> {
    if size == 0 || size > MAX_CREATE_SIZE {
        fail!(InvalidInput, "size is {size} bytes, expected 512 bytes to 2040 GiB");
    }
    Ok(size.next_multiple_of(SECTOR))
}

/// Refuses a size that would bring to light what a larger parent holds.
pub(crate) fn refuse_larger_parent(from: u64, to: u64, parent: Option<u64>) -> Result<()> {
    if to > from && parent.is_some_and(|parent| parent > from) {
        fail!(Refused, "its parent is larger than it is, and would show in what is new; convert it to an image of its own first");
    }
    Ok(())
}

/// Gives the image at `path` a size of `size` bytes, rounded up to a sector. New space reads as zeros. An interrupted
/// change is finished first.
///
/// # Errors
/// `InvalidInput` for sizes that can't be; `Refused` when data or partitions are in the way, or children would be
/// spoiled; `Cancelled`; those of [`Chain::open`].
pub fn resize(path: &Path, size: u64, options: &ResizeOptions, chain: &ChainOptions, progress: &Progress) -> Result<Resized> {
    chain.refuse_ignoring(path)?;
    finish(path, size, options, chain)?;
    let to = whole_size(size).map_err(|error| error.at(path))?;
    let image = OpenOptions { writable: !options.dry_run, force: options.force, background_flush: None, ..chain.image.clone() };
    let chain = ChainOptions { image, rehearsal: options.dry_run, ..chain.clone() };
    let mut resized = Resized { to, ..Resized::default() };
    if to != size {
        resized.notes.push(format!("size rounded up to a whole sector: {to} bytes"));
    }
    let shrunk = before(path, to, options, &chain, &mut resized)?;
    let mut advance = |bytes: u64| {
        resized.bytes_moved += bytes;
        progress.set_total(progress.total() + bytes);
        progress.advance(bytes)
    };
    if options.dry_run {
        let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(path, false)?);
        Image::set_size(&storage, path, to, &chain.image, true, &mut advance).map_err(|error| error.at(path))?;
        return Ok(resized);
    }
    let opened = Chain::open_after(path, &chain, &mut |storage| match is_fixed(storage, path, &chain.image)? {
        false => Image::set_size(storage, path, to, &chain.image, false, &mut advance),
        true => set_fixed_size(storage, path, to, &chain),
    })?;
    let disk = Disk::new(opened);
    if !shrunk {
        move_gpt(&disk, resized.from, to)?;
    }
    disk.close()?;
    Ok(resized)
}

/// Finishes a change that was interrupted, where this call asks for the same.
fn finish(path: &Path, size: u64, options: &ResizeOptions, chain: &ChainOptions) -> Result<()> {
    let record = match intent::in_place_of(path, crate::chain::uuid_of_file(path)?)? {
        Some(InPlace { work: Work::Footer(work), uuid: Some(_) }) => Some(work),
        _ => None,
    };
    let file = Arc::new(if options.dry_run { FileStorage::rehearse(path)? } else { FileStorage::open(path, true)? });
    let footers = Footers::read(&*file).map_err(|error| Error::io(error, "can't be read").at(path))?;
    let begun = match (footers.stage(), &record) {
        (Some((Stage::Resize { from }, footer)), _) => (from, footer.current_size()),
        (_, Some(record)) => (record.from, record.to),
        _ => return Ok(()),
    };
    let is_whole = footers.authority(false).is_ok();
    if !is_whole && (begun.1 != size.next_multiple_of(SECTOR) || (begun.1 < begun.0 && !options.shrink)) {
        let command = Command::new(&["vhd", "resize"]).path(path).words(&[&begun.1.to_string()]);
        let command = command.flag("--shrink", begun.1 < begun.0);
        let message = format!("a change of its size to {} bytes was interrupted; finish that first: {command}", begun.1);
        return Err(Error::new(ErrorKind::Refused, message).at(path));
    }
    if options.dry_run {
        return if is_whole { Ok(()) } else { intent::refuse(path, None, &[]) };
    }
    file.lock(LockMode::Write)?;
    let storage = chain.host.adopt(file);
    let growth = || match &record {
        Some(record) => record.finish_growth(&*storage).map(drop),
        None => Ok(()),
    };
    finish_resize(&*storage).and_then(|done| done.map_or_else(growth, |_| Ok(()))).map_err(|error| error.at(path))?;
    if record.is_some() { intent::remove(&*chain.host, path) } else { Ok(()) }
}

/// Looks whether the size can be had, and of a disk that shrinks moves the GPT's backup. True when it shrinks.
fn before(path: &Path, to: u64, options: &ResizeOptions, chain: &ChainOptions, resized: &mut Resized) -> Result<bool> {
    let opened = Chain::open(path, chain)?;
    let parent = opened.layers().get(1).map(crate::chain::Layer::size);
    let disk = Disk::new(opened);
    resized.from = disk.size();
    let refuse = |message: String| Err(Error::new(ErrorKind::Refused, message).at(path));
    refuse_larger_parent(disk.size(), to, parent).map_err(|error| error.at(path))?;
    let table = PartitionTable::read(&disk)?;
    let gpt = match &table.kind {
        TableKind::Gpt(gpt) => Some(gpt),
        _ => None,
    };
    resized.moves_gpt = will_move_gpt(&table, to);
    if to >= disk.size() {
        return Ok(false);
    }
    if !options.shrink {
        return refuse(format!("has {} bytes, more than {to}; --shrink makes it smaller", disk.size()));
    }
    match in_the_way(&disk, to, &table, gpt.map(|gpt| &**gpt))? {
        None => {
            if !options.dry_run {
                move_gpt(&disk, disk.size(), to)?;
            }
        }
        Some(what) if options.discard_data => {
            resized.moves_gpt = false;
            resized.notes.push(format!("{what}, and is cut off"));
        }
        Some(what) => return refuse(format!("{what}; --discard-data cuts it off")),
    }
    disk.close()?;
    Ok(true)
}

/// What a disk holds beyond `size` bytes, the backup of a GPT aside.
fn in_the_way(disk: &Disk, size: u64, table: &PartitionTable, gpt: Option<&Gpt>) -> Result<Option<String>> {
    let end = gpt.map_or(size, |gpt| gpt.backup_on(size).unwrap_or(0));
    if let Some(partition) = table.partitions.iter().find(|partition| partition.range.end > end) {
        let at = partition.range.end;
        return Ok(Some(format!("partition {} ends at byte {at}, beyond the new end of {end} bytes", partition.number)));
    }
    // That which moves is not lost.
    let backup = gpt.filter(|_| will_move_gpt(table, size)).map_or(u64::MAX..u64::MAX, Gpt::backup);
    Ok(first_data(disk, size..disk.size(), &backup)?
        .map(|at| format!("byte {at} holds data, beyond the new end of {size} bytes")))
}

/// The first sector of a range that holds anything, `but` aside.
fn first_data(disk: &Disk, range: Range<u64>, but: &Range<u64>) -> Result<Option<u64>> {
    let mut found = None;
    let mut buffer = AlignedBuffer::new(CHUNK as usize);
    disk.extents(range, &mut |extent| {
        let mut at = extent.range.start;
        while at < extent.range.end && extent.state == ExtentState::Data && found.is_none() {
            let len = (extent.range.end - at).min(CHUNK) as usize;
            disk.read_at(&mut buffer[..len], at)?;
            let mut sectors = (at..).step_by(SECTOR as usize).zip(buffer[..len].chunks(SECTOR as usize));
            found = sectors.find(|(at, bytes)| !but.contains(at) && !is_zero(bytes)).map(|(at, _)| at);
            at += len as u64;
        }
        Ok(())
    })?;
    Ok(found)
}

fn is_fixed(storage: &Arc<dyn Storage>, path: &Path, options: &OpenOptions) -> Result<bool> {
    let look = OpenOptions { writable: false, ..options.clone() };
    Ok(Image::open(Arc::clone(storage), path, &look)?.footer().disk_type() == DiskType::Fixed)
}

pub(crate) fn set_fixed_size(storage: &Arc<dyn Storage>, path: &Path, to: u64, chain: &ChainOptions) -> Result<()> {
    // Mended first: the length of the file counts.
    let image = Image::open(Arc::clone(storage), path, &chain.image)?;
    let (from, mut footer) = (image.size(), image.footer().clone());
    drop(image);
    if from == to {
        return Ok(());
    }
    if !storage.can_grow() {
        let message = "is on a device: another size needs room that it does not have; convert it to a file first";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    footer.set_size(to);
    let end = storage.len().map_err(|error| Error::io(error, "can't be examined"))?;
    let work = FooterMove::new(from, end, to, &footer);
    let record = InPlace { uuid: Some(Uuid::from_bytes(footer.uuid())), work: Work::Footer(work) };
    intent::put(&*chain.host, path, &Intent::InPlace(record))?;
    resize_fixed(&**storage, from, &footer)?;
    intent::remove(&*chain.host, path)
}
