//! What a client does to an image while everything is recorded.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::crash::{Effort, Random, crash_states};
use crate::history::History;
use crate::record::{Event, Journal, RecordingStorage};
use crate::tagged::Tag;
use vhd_core::Disk;
use vhd_core::block::ZeroMode;
use vhd_core::chain::{Chain, Layer};
use vhd_core::format::{Creator, Timestamp};
use vhd_core::image::{CreateOptions, Image, NewKind, OpenOptions, ParentLink, create};
use vhd_core::storage::{MemoryStorage, Storage};

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Mark of the closing call.
pub const CLOSE: u64 = u64::MAX;
/// Mark of the opening after a kill.
const KILL: u64 = u64::MAX - 1;

/// An image as it is before the client opens it, and its parent.
#[derive(Clone, Debug)]
pub struct Setup {
    /// For messages.
    pub name: &'static str,
    /// The file.
    pub image: Vec<u8>,
    /// The parent's file, of a differencing image.
    pub parent: Option<Vec<u8>>,
}

/// One call of the client.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Whole sectors with tags.
    Write {
        /// First sector.
        lba: u64,
        /// Sectors.
        count: u64,
    },
    /// Bytes that begin or end inside sectors.
    WriteBytes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Sectors that become zero and may be freed.
    Discard {
        /// First sector.
        lba: u64,
        /// Sectors.
        count: u64,
    },
    /// Sectors that become zero and stay allocated.
    ZeroKeep {
        /// First sector.
        lba: u64,
        /// Sectors.
        count: u64,
    },
    /// A flush.
    Flush,
    /// Close, and open again for writing.
    Reopen,
}

/// What was recorded.
#[derive(Clone, Debug)]
pub struct Run {
    /// What was done to the file.
    pub events: Vec<Event>,
    /// What the client did and was told.
    pub history: History,
    /// Barriers, those that were left out among them.
    pub syncs: usize,
}

/// For writing, with no flush but the client's.
#[must_use]
pub fn writable() -> OpenOptions {
    OpenOptions { writable: true, background_flush: None, ..OpenOptions::default() }
}

/// A disk over a storage, and over the setup's parent.
///
/// # Errors
/// As [`Image::open`].
pub fn open(storage: Arc<dyn Storage>, setup: &Setup, options: &OpenOptions) -> Result<Disk, vhd_core::Error> {
    let leaf = Layer::Image(Image::open(storage, Path::new("leaf.vhd"), options)?);
    let parents = match &setup.parent {
        None => Vec::new(),
        Some(bytes) => {
            let storage = Arc::new(MemoryStorage::new(bytes.clone()));
            vec![Layer::Image(Image::open(storage, Path::new("parent.vhd"), &OpenOptions::default())?)]
        }
    };
    Ok(Disk::new(Chain::over(leaf, parents)))
}

/// The whole disk.
///
/// # Errors
/// As reading fails.
pub fn read_all(disk: &Disk) -> Result<Vec<u8>, vhd_core::Error> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// One sector of a disk's bytes.
#[must_use]
pub fn sector(bytes: &[u8], lba: u64) -> [u8; SECTOR] {
    bytes[lba as usize * SECTOR..][..SECTOR].try_into().unwrap()
}

/// Runs a script on a setup. `image_id` tells the tags of this run from those of others.
///
/// # Panics
/// When a call fails, or the disk reads something else than was written.
#[must_use]
pub fn run(setup: &Setup, script: &[Step], journal: &Journal, image_id: u32) -> Run {
    let storage = Arc::new(RecordingStorage::new(setup.image.clone(), 0, journal));
    let mut disk = open(Arc::clone(&storage) as _, setup, &writable()).unwrap();
    let before = read_all(&disk).unwrap();
    let mut history = History::of(&before);
    let mut live: BTreeMap<u64, [u8; SECTOR]> = (0..disk.size() / SECTOR as u64).map(|lba| (lba, sector(&before, lba))).collect();
    for (number, step) in script.iter().enumerate() {
        let changes = changes_of(step, number as u64 + 1, image_id, &live);
        let begun = journal.mark(number as u64);
        match step {
            Step::Write { lba, .. } => {
                let bytes: Vec<u8> = changes.values().flatten().copied().collect();
                disk.write_at(&bytes, lba * SECTOR as u64).unwrap();
            }
            Step::WriteBytes { offset, len } => disk.write_at(&filler(*len, number as u64 + 1), *offset).unwrap(),
            Step::Discard { .. } => disk.zero(bytes_of(&changes), ZeroMode::Free).unwrap(),
            Step::ZeroKeep { .. } => disk.zero(bytes_of(&changes), ZeroMode::Keep).unwrap(),
            Step::Flush => disk.flush().unwrap(),
            Step::Reopen => {
                disk.close().unwrap();
                drop(disk);
                disk = open(Arc::clone(&storage) as _, setup, &writable()).unwrap();
            }
        }
        let done = Some(journal.mark(number as u64));
        match step {
            Step::Flush | Step::Reopen => history.flushed(begun, done),
            _ => changes.iter().for_each(|(lba, content)| history.wrote(*lba, *content, begun, done)),
        }
        live.extend(changes);
    }
    let begun = journal.mark(CLOSE);
    disk.close().unwrap();
    history.flushed(begun, Some(journal.mark(CLOSE)));
    let after = read_all(&disk).unwrap();
    for (lba, content) in &live {
        assert!(sector(&after, *lba) == *content, "{}: sector {lba} is wrong before any crash", setup.name);
    }
    Run { events: journal.events(), history, syncs: journal.syncs() }
}

/// A session that writes, flushes, writes on and is killed; then one that opens the image, reads it all, and writes.
/// What that one read is what must stay.
///
/// # Panics
/// When a call fails.
#[must_use]
pub fn run_killed(setup: &Setup, journal: &Journal) -> Run {
    let storage = Arc::new(RecordingStorage::new(setup.image.clone(), 0, journal));
    let disk = open(Arc::clone(&storage) as _, setup, &writable()).unwrap();
    let sectors = disk.size() / SECTOR as u64;
    let mut history = History::of(&read_all(&disk).unwrap());
    let write = |disk: &Disk, history: &mut History, lba: u64, number: u64| {
        let content = Tag { image: 1, lba, write: number }.sector();
        let begun = journal.mark(number);
        disk.write_at(&content, lba * SECTOR as u64).unwrap();
        history.wrote(lba, content, begun, Some(journal.mark(number)));
    };
    let flush = |disk: &Disk, history: &mut History| {
        let begun = journal.mark(100);
        disk.flush().unwrap();
        history.flushed(begun, Some(journal.mark(100)));
    };
    (0..20).for_each(|lba| write(&disk, &mut history, lba, 1));
    flush(&disk, &mut history);
    (10..30).for_each(|lba| write(&disk, &mut history, lba, 2));
    // Killed: nothing is flushed or closed any more, and the image goes as the process does.
    std::mem::forget(disk);
    let begun = journal.mark(KILL);
    let disk = open(Arc::clone(&storage) as _, setup, &writable()).unwrap();
    let found = read_all(&disk).unwrap();
    (0..sectors).for_each(|lba| history.wrote(lba, sector(&found, lba), begun, Some(begun)));
    let opened = journal.mark(KILL);
    history.flushed(opened, Some(opened));
    (5..15).for_each(|lba| write(&disk, &mut history, lba, 3));
    flush(&disk, &mut history);
    std::mem::forget(disk);
    Run { events: journal.events(), history, syncs: journal.syncs() }
}

/// The number of the first barrier after the kill.
#[must_use]
pub fn barrier_after_kill(events: &[Event]) -> usize {
    let kill = events.iter().position(|event| *event == Event::Mark(KILL)).unwrap_or(0);
    events[..kill].iter().filter(|event| matches!(event, Event::Sync { .. })).count()
}

fn filler(len: u64, number: u64) -> Vec<u8> {
    (0..len).map(|index| (number * 31 + index % 250 + 1) as u8).collect()
}

fn bytes_of(changes: &BTreeMap<u64, [u8; SECTOR]>) -> std::ops::Range<u64> {
    let first = changes.keys().next().copied().unwrap_or(0);
    first * SECTOR as u64..(first + changes.len() as u64) * SECTOR as u64
}

/// The sectors that a step changes, and their content afterwards.
fn changes_of(step: &Step, number: u64, image: u32, live: &BTreeMap<u64, [u8; SECTOR]>) -> BTreeMap<u64, [u8; SECTOR]> {
    match *step {
        Step::Write { lba, count } => (lba..lba + count).map(|lba| (lba, Tag { image, lba, write: number }.sector())).collect(),
        Step::Discard { lba, count } | Step::ZeroKeep { lba, count } => {
            (lba..lba + count).map(|lba| (lba, [0; SECTOR])).collect()
        }
        Step::WriteBytes { offset, len } => {
            let mut changes = BTreeMap::new();
            for (index, byte) in filler(len, number).into_iter().enumerate() {
                let at = offset + index as u64;
                let content = changes.entry(at / SECTOR as u64).or_insert_with_key(|lba| live[lba]);
                content[at as usize % SECTOR] = byte;
            }
            changes
        }
        Step::Flush | Step::Reopen => BTreeMap::new(),
    }
}

/// A random script for a disk of so many sectors in blocks of so many.
#[must_use]
pub fn random_script(sectors: u64, block: u64, steps: usize, seed: u64) -> Vec<Step> {
    let mut random = Random::new(seed);
    let script = (0..steps).map(|_| {
        let near_block = random.below(sectors.div_ceil(block)) * block;
        let lba = if random.below(2) == 0 { random.below(sectors) } else { near_block };
        let longest = match random.below(4) {
            0 => block * 2,
            1 => block,
            _ => 3,
        };
        let count = (1 + random.below(longest)).min(sectors - lba);
        match random.below(16) {
            0..=6 => Step::Write { lba, count },
            7..=8 => {
                let offset = lba * SECTOR as u64 + random.below(SECTOR as u64);
                Step::WriteBytes { offset, len: (1 + random.below(1200)).min(sectors * SECTOR as u64 - offset) }
            }
            9..=10 => Step::Discard { lba, count },
            11 => Step::Discard { lba: near_block, count: block.min(sectors - near_block) },
            12 => Step::ZeroKeep { lba, count },
            13 if random.below(3) == 0 => Step::Reopen,
            _ => Step::Flush,
        }
    });
    script.collect()
}

/// Sectors of a block of the [`setups`].
pub const BLOCK: u64 = 8;
/// Sectors of their disks; the last block is partial.
pub const SECTORS: u64 = 12 * BLOCK + 3;

fn new_image(kind: NewKind, uuid: u8) -> Vec<u8> {
    let storage = MemoryStorage::default();
    let options = CreateOptions {
        kind,
        size: SECTORS * 512,
        block_size: 4096,
        uuid: [uuid; 16],
        creator: Creator::WINDOWS_10,
        timestamp: Timestamp(0),
    };
    create(&storage, &options).unwrap();
    storage.to_vec()
}

/// A parent whose sectors are all written but those of every third block.
fn parent() -> Vec<u8> {
    let setup = Setup { name: "parent", image: new_image(NewKind::Dynamic, 1), parent: None };
    let storage = Arc::new(MemoryStorage::new(setup.image.clone()));
    let disk = open(Arc::clone(&storage) as _, &setup, &writable()).unwrap();
    for lba in (0..SECTORS).filter(|lba| lba / BLOCK % 3 != 2) {
        let tag = Tag { image: 50, lba, write: 0 };
        disk.write_at(&tag.sector(), lba * 512).unwrap();
    }
    disk.close().unwrap();
    storage.to_vec()
}

fn child() -> Vec<u8> {
    let link = ParentLink {
        uuid: [1; 16],
        name: "parent.vhd".into(),
        relative: "parent.vhd".into(),
        absolute: "/parent.vhd".into(),
        own: None,
    };
    new_image(NewKind::Differencing(link), 2)
}

/// What a session of ours leaves, as the start of another: no space of it is fresh any more.
fn used(name: &'static str, setup: &Setup) -> Setup {
    let journal = Journal::new();
    let script = random_script(SECTORS, BLOCK, 25, 99);
    let run = run(setup, &script, &journal, 7);
    let mut image = Vec::new();
    let last = Effort { exhaustive: 0, samples: 0, seed: 0 };
    crash_states(std::slice::from_ref(&setup.image), &run.events, last, &mut |state| {
        image.clone_from(&state.files[0]);
        Ok(())
    })
    .unwrap();
    spoil_free_space(&mut image, setup);
    Setup { name, image, parent: setup.parent.clone() }
}

/// Fills what no block holds with rubbish, as killed processes and other programs leave it.
fn spoil_free_space(image: &mut [u8], setup: &Setup) {
    let storage = Arc::new(MemoryStorage::new(image.to_vec()));
    let opened = Image::open(storage, Path::new("used.vhd"), &OpenOptions::default()).unwrap();
    let (layout, header) = (opened.layout().unwrap(), opened.header().unwrap());
    let bat = header.bat_offset() as usize;
    let bat_end = bat + (header.max_table_entries() as usize * 4).next_multiple_of(512);
    let mut held = vec![false; image.len()];
    held[..bat_end].fill(true);
    let footer_at = image.len() - 512;
    held[footer_at..].fill(true);
    for entry in image[bat..bat_end].chunks(4).map(|entry| u32::from_be_bytes(entry.try_into().unwrap())) {
        if entry != u32::MAX {
            let slot = layout.slot(entry);
            held[slot.start as usize..slot.end as usize].fill(true);
        }
    }
    assert!(setup.parent.is_none() || bat > 4096, "locators lie before the BAT");
    for (byte, _) in image.iter_mut().zip(held).filter(|(_, held)| !held) {
        *byte = 0xA5;
    }
}

/// Disks of every kind, new ones and used ones whose free space is full of rubbish.
///
/// # Panics
/// When they can't be made.
#[must_use]
pub fn setups() -> Vec<Setup> {
    let dynamic = Setup { name: "dynamic", image: new_image(NewKind::Dynamic, 3), parent: None };
    let differencing = Setup { name: "differencing", image: child(), parent: Some(parent()) };
    let fixed = Setup { name: "fixed", image: new_image(NewKind::Fixed { preallocate: false }, 4), parent: None };
    vec![used("used dynamic", &dynamic), used("used differencing", &differencing), dynamic, differencing, fixed]
}
