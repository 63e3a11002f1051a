//! What the file systems of a guest say is free, read from their own bitmaps without mounting them.
//!
//! What is called free here is lost, so every doubt is a reason to leave a partition alone: a file system that was not
//! left clean, a feature that is not known, a count that does not agree, two that claim the same place, a type of the
//! partition that says another owner. Whose a place is (`owners`) is also asked before a file system inside is mounted to be
//! written. Images are untrusted: all that is read is bounded by what the image holds.

#![allow(clippy::little_endian_bytes, reason = "these file systems are little-endian")]

mod checks;
mod ext;
mod ext_groups;
mod fat;
mod ntfs;
mod ntfs_record;
mod owners;
mod signatures;
mod swap;

pub use owners::refuse_writes;

use std::ops::Range;

use crate::block::{Disk, ExtentState};
use crate::error::{Error, Result};
use crate::format::SECTOR;
use crate::partition::{Partition, PartitionTable, TableKind};
use owners::{Survey, refuse_type};
use signatures::{Looked, Owner};

/// Bytes of one of a file system's structures that are read at once at most.
const MAX_READ: usize = 32 << 20;

/// What is free on a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FreeSpace {
    /// Each partition; the whole disk where it has none.
    pub places: Vec<Place>,
    /// Ranges of the disk that the leaf holds and that are free: ascending, apart, of whole sectors.
    pub ranges: Vec<Range<u64>>,
}

/// A partition, or a whole disk without partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The partition's number; none for the whole disk.
    pub partition: Option<u32>,
    /// Bytes of the disk.
    pub range: Range<u64>,
    /// The file system that was found: `ext4`, `NTFS`, `FAT32`, `swap`; or what else it is.
    pub file_system: Option<&'static str>,
    /// Bytes that are free and that the leaf holds, or why they are not known.
    pub free: Result<u64, String>,
}

/// Reads what is free of what the leaf of `disk` holds.
///
/// # Errors
/// As the disk can't be read. What is wrong with a file system is told of its place.
pub fn free_space(disk: &Disk) -> Result<FreeSpace> {
    let held = held_by_leaf(disk)?;
    let table = PartitionTable::read(disk)?;
    let mut found = FreeSpace::default();
    if table.kind == TableKind::None {
        let whole = Volume { disk, range: 0..disk.size() };
        found.places.push(examine(&whole, None, &held, &mut found.ranges)?);
        return Ok(found);
    }
    let survey = Survey::of(disk, &table)?;
    if table.partitions.is_empty() {
        let why = survey.everywhere.unwrap_or_else(|| "its partition table has no partitions".to_owned());
        found.places.push(Place { partition: None, range: 0..disk.size(), file_system: None, free: Err(why) });
        return Ok(found);
    }
    for partition in &table.partitions {
        let number = Some(partition.number);
        let place = match survey.doubt(partition.number).or_else(|| owners::damaged_copy(&table)) {
            Some(why) => Place { partition: number, range: partition.range.clone(), file_system: None, free: Err(why) },
            None => {
                let volume = Volume { disk, range: partition.range.clone() };
                examine(&volume, Some(partition), &held, &mut found.ranges)?
            }
        };
        found.places.push(place);
    }
    found.ranges.sort_unstable_by_key(|range| range.start);
    // The last of one partition may touch the first of the next.
    found.ranges.dedup_by(|next, last| {
        let touches = last.end == next.start;
        if touches {
            last.end = next.end;
        }
        touches
    });
    Ok(found)
}

/// The ranges that the leaf holds. Only what is free of those is worth knowing, and it bounds what all this costs.
fn held_by_leaf(disk: &Disk) -> Result<Vec<Range<u64>>> {
    let mut held: Vec<Range<u64>> = Vec::new();
    disk.extents(0..disk.size(), &mut |extent| {
        if extent.depth == 0 && extent.state != ExtentState::Absent {
            match held.last_mut() {
                Some(last) if last.end == extent.range.start => last.end = extent.range.end,
                _ => held.push(extent.range),
            }
        }
        Ok(())
    })?;
    Ok(held)
}

/// Looks at one place, and adds what is free there.
fn examine(
    volume: &Volume<'_>,
    partition: Option<&Partition>,
    held: &[Range<u64>],
    ranges: &mut Vec<Range<u64>>,
) -> Result<Place> {
    let number = partition.map(|partition| partition.number);
    let mut place = Place { partition: number, range: volume.range.clone(), file_system: None, free: Ok(0) };
    let mut all = recognise(volume)?;
    let free = match all.len() {
        0 => Err("no file system that is known here".to_owned()),
        1 => {
            let Recognised { name, what } = all.remove(0);
            place.file_system = Some(name);
            match (what, partition.and_then(|partition| refuse_type(partition.kind, name))) {
                (What::Owned(owner), _) => Err(owner.reason().to_owned()),
                (What::System(_), Some(why)) => Err(why),
                (What::System(system), None) => {
                    system.and_then(|mut system| collect(volume, &mut *system, held)).or_else(Problem::reason)?
                }
            }
        }
        _ => Err(at_once(&all)),
    };
    place.free = free.map(|free| {
        let bytes = free.iter().map(|range| range.end - range.start).sum();
        ranges.extend(free);
        bytes
    });
    Ok(place)
}

/// Says that a place looks like several things.
fn at_once(all: &[Recognised]) -> String {
    let names: Vec<_> = all.iter().map(|found| found.name).collect();
    format!("it looks like {} at once", names.join(" and "))
}

type Free = Result<Vec<Range<u64>>, String>;

/// The free ranges, of the disk, in what is held.
fn collect(volume: &Volume<'_>, system: &mut dyn FileSystem, held: &[Range<u64>]) -> Found<Free> {
    let mut free: Vec<Range<u64>> = Vec::new();
    let start = volume.range.start;
    for range in held {
        let (from, to) = (range.start.max(start), range.end.min(volume.range.end));
        if from >= to {
            continue;
        }
        let inside = from - start..to - start;
        system.free(volume, inside.clone(), &mut |found| {
            let found = found.start.max(inside.start)..found.end.min(inside.end);
            let (from, to) = (start + found.start.next_multiple_of(SECTOR), start + found.end / SECTOR * SECTOR);
            match free.last_mut() {
                _ if from >= to => {}
                Some(last) if last.end == from => last.end = to,
                _ => free.push(from..to),
            }
        })?;
    }
    Ok(Ok(free))
}

/// What was recognised.
struct Recognised {
    name: &'static str,
    what: What,
}

/// What a place may be.
enum What {
    /// A file system that is read here: how, or why not.
    System(Found<Box<dyn FileSystem>>),
    /// Somebody's whose space is not read here.
    Owned(Owner),
}

impl Recognised {
    fn system(name: &'static str, system: Found<Box<dyn FileSystem>>) -> Self {
        Self { name, what: What::System(system) }
    }
}

/// All that a volume may be: more than one where what was there before was not wiped.
fn recognise(volume: &Volume<'_>) -> Result<Vec<Recognised>> {
    let mut found = Vec::new();
    for recognise in [ext::recognise, ntfs::recognise, fat::recognise, swap::recognise] {
        match recognise(volume) {
            Ok(recognised) => found.extend(recognised),
            Err(Problem::Host(error)) => return Err(error),
            // Too small for what would say that it is one.
            Err(Problem::Doubt(_)) => {}
        }
    }
    match Looked::new(volume).and_then(|looked| looked.signatures()) {
        Ok(signatures) => {
            found.extend(signatures.iter().map(|found| Recognised { name: found.name, what: What::Owned(found.owner) }));
            Ok(found)
        }
        Err(Problem::Host(error)) => Err(error),
        // All that is looked for is inside the volume, so that this does not happen.
        Err(Problem::Doubt(_)) => {
            found.push(Recognised { name: "something else", what: What::Owned(Owner::Other("it can't be looked at")) });
            Ok(found)
        }
    }
}

/// A file system whose bitmaps can be trusted.
trait FileSystem {
    /// Calls `push` with what is free of `range`, ascending; a little more on either side does no harm. All offsets are
    /// from the volume's start. The ranges that are asked for ascend.
    fn free(&mut self, volume: &Volume<'_>, range: Range<u64>, push: &mut dyn FnMut(Range<u64>)) -> Found<()>;
}

/// What stands in the way.
#[derive(Debug)]
enum Problem {
    /// The disk can't be read.
    Host(Error),
    /// The file system is not what it should be, for people.
    Doubt(String),
}

type Found<T> = Result<T, Problem>;

impl Problem {
    fn reason(self) -> Result<Free> {
        match self {
            Self::Host(error) => Err(error),
            Self::Doubt(why) => Ok(Err(why)),
        }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Self::Host(error)
    }
}

/// Ends with a doubt.
fn doubt<T>(why: impl Into<String>) -> Found<T> {
    Err(Problem::Doubt(why.into()))
}

/// A range of a disk that may hold a file system.
struct Volume<'a> {
    disk: &'a Disk,
    range: Range<u64>,
}

impl Volume<'_> {
    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn read(&self, at: u64, len: u64) -> Found<Vec<u8>> {
        let Some(len) = usize::try_from(len).ok().filter(|len| *len <= MAX_READ) else {
            return doubt(format!("a structure of {len} bytes at byte {at} is larger than any that is known"));
        };
        match at.checked_add(len as u64) {
            Some(end) if end <= self.len() => {
                let mut bytes = vec![0; len];
                self.disk.read_at(&mut bytes, self.range.start + at)?;
                Ok(bytes)
            }
            _ => doubt(format!("it reaches beyond its end: {len} bytes at byte {at} of {}", self.len())),
        }
    }
}

/// Calls `push` with the runs of numbers of `range` for which `is_free` is true.
fn runs(range: Range<u64>, mut is_free: impl FnMut(u64) -> bool, mut push: impl FnMut(Range<u64>)) {
    let mut start = None;
    for number in range.clone() {
        match (is_free(number), start) {
            (true, None) => start = Some(number),
            (false, Some(first)) => {
                push(first..number);
                start = None;
            }
            _ => {}
        }
    }
    if let Some(first) = start {
        push(first..range.end);
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}
