//! What a client does to an image while everything is recorded.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use vhd_core::Disk;
use vhd_core::block::ZeroMode;
use vhd_core::chain::{Chain, Layer};
use vhd_core::image::{Image, OpenOptions};
use vhd_core::storage::{MemoryStorage, Storage};
use vhd_testkit::crash::Random;
use vhd_testkit::history::History;
use vhd_testkit::record::{Event, Journal, RecordingStorage};
use vhd_testkit::tagged::Tag;

pub const SECTOR: usize = 512;
/// Mark of the closing call.
pub const CLOSE: u64 = u64::MAX;
/// Mark of the opening after a kill.
const KILL: u64 = u64::MAX - 1;

/// An image as it is before the client opens it, and its parent.
#[derive(Clone)]
pub struct Setup {
    pub name: &'static str,
    pub image: Vec<u8>,
    pub parent: Option<Vec<u8>>,
}

/// One call of the client.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Whole sectors with tags.
    Write {
        lba: u64,
        count: u64,
    },
    /// Bytes that begin or end inside sectors.
    WriteBytes {
        offset: u64,
        len: u64,
    },
    Discard {
        lba: u64,
        count: u64,
    },
    ZeroKeep {
        lba: u64,
        count: u64,
    },
    Flush,
    /// Close, and open again for writing.
    Reopen,
}

/// What was recorded.
pub struct Run {
    pub events: Vec<Event>,
    pub history: History,
    pub syncs: usize,
}

pub fn writable() -> OpenOptions {
    OpenOptions { writable: true, background_flush: None, ..OpenOptions::default() }
}

/// A disk over a storage, and over the setup's parent.
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

pub fn read_all(disk: &Disk) -> Result<Vec<u8>, vhd_core::Error> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

pub fn sector(bytes: &[u8], lba: u64) -> [u8; SECTOR] {
    bytes[lba as usize * SECTOR..][..SECTOR].try_into().unwrap()
}

/// Runs a script on a setup. `image_id` tells the tags of this run from those of others.
pub fn run(setup: &Setup, script: &[Step], journal: &Journal, image_id: u32) -> Run {
    let storage = Arc::new(RecordingStorage::new(setup.image.clone(), 0, journal));
    let mut disk = open(Arc::clone(&storage) as _, setup, &writable()).unwrap();
    let mut history = History::default();
    let mut live: BTreeMap<u64, [u8; SECTOR]> = BTreeMap::new();
    let before = read_all(&disk).unwrap();
    for lba in 0..disk.size() / SECTOR as u64 {
        history.set_initial(lba, sector(&before, lba));
        live.insert(lba, sector(&before, lba));
    }
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
pub fn run_killed(setup: &Setup, journal: &Journal) -> Run {
    let storage = Arc::new(RecordingStorage::new(setup.image.clone(), 0, journal));
    let disk = open(Arc::clone(&storage) as _, setup, &writable()).unwrap();
    let sectors = disk.size() / SECTOR as u64;
    let mut history = History::default();
    let before = read_all(&disk).unwrap();
    (0..sectors).for_each(|lba| history.set_initial(lba, sector(&before, lba)));
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
