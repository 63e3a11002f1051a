//! Goal: many threads over few blocks see what one after the other would give, and a power cut in the middle of them
//! keeps every promise.
//!
//! Method: each thread owns every n-th sector and knows what it wrote there; blocks at the end belong to one thread
//! each, which frees them too. All allocate, discard and flush at once. Then the same on a recorded storage, and
//! each state that a power cut leaves is judged.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use vhd_core::Disk;
use vhd_core::block::ZeroMode;
use vhd_core::image::OpenOptions;
use vhd_core::storage::MemoryStorage;
use vhd_testkit::crash::{Effort, Random};
use vhd_testkit::history::History;
use vhd_testkit::record::{Journal, RecordingStorage};
use vhd_testkit::tagged::Tag;

use vhd_testkit::judge::{Depth, judge_run};
use vhd_testkit::session::{BLOCK, setups};
use vhd_testkit::session::{Run, SECTOR, Setup, open, read_all, sector, writable};

const THREADS: u64 = 4;
/// Sectors that are shared, sector by sector.
const SHARED: u64 = 8 * BLOCK;

/// What a thread does next.
#[derive(Clone, Copy, Debug)]
enum Call {
    Write(u64),
    Zero(u64),
    FreeBlock(u64),
    Read(u64),
    Flush,
}

fn next_call(random: &mut Random, thread: u64) -> Call {
    let own = random.below(SHARED / THREADS) * THREADS + thread;
    let own_block = (SHARED / BLOCK + thread) * BLOCK;
    let any = match random.below(4) {
        0 => own_block + random.below(BLOCK),
        _ => own,
    };
    match random.below(20) {
        0..=9 => Call::Write(any),
        10..=11 => Call::Zero(any),
        12 => Call::FreeBlock(own_block),
        13 => Call::Flush,
        _ => Call::Read(random.below(SHARED)),
    }
}

/// What calls are noted with, when they are.
type Noted<'a> = Option<(&'a Journal, &'a Mutex<History>)>;

/// One thread's life. Returns what it knows of its sectors.
fn live(disk: &Disk, thread: u64, seed: u64, calls: u64, noted: Noted<'_>) -> BTreeMap<u64, [u8; SECTOR]> {
    let mut random = Random::new(seed * 1000 + thread);
    let mut known = BTreeMap::new();
    for number in 1..=calls {
        let call = next_call(&mut random, thread);
        let begun = noted.map(|(journal, _)| journal.mark(number));
        let changed = match call {
            Call::Write(lba) => {
                let content = Tag { image: thread as u32, lba, write: number }.sector();
                disk.write_at(&content, lba * 512).unwrap();
                vec![(lba, content)]
            }
            Call::Zero(lba) => {
                disk.zero(lba * 512..(lba + 1) * 512, ZeroMode::Free).unwrap();
                vec![(lba, [0; SECTOR])]
            }
            Call::FreeBlock(lba) => {
                disk.zero(lba * 512..(lba + BLOCK) * 512, ZeroMode::Free).unwrap();
                (lba..lba + BLOCK).map(|lba| (lba, [0; SECTOR])).collect()
            }
            Call::Flush => {
                disk.flush().unwrap();
                Vec::new()
            }
            Call::Read(lba) => {
                look(disk, lba, known.get(&lba).filter(|_| lba % THREADS == thread));
                Vec::new()
            }
        };
        if let (Some((journal, history)), Some(begun)) = (noted, begun) {
            let done = Some(journal.mark(number));
            let mut history = history.lock().unwrap();
            changed.iter().for_each(|(lba, content)| history.wrote(*lba, *content, begun, done));
            if matches!(call, Call::Flush) {
                history.flushed(begun, done);
            }
        }
        known.extend(changed);
    }
    known
}

/// A sector holds what its owner last wrote; of another's, at least something that was written there.
fn look(disk: &Disk, lba: u64, known: Option<&[u8; SECTOR]>) {
    let mut found = [0; SECTOR];
    disk.read_at(&mut found, lba * 512).unwrap();
    match known {
        Some(known) => assert!(found == *known, "sector {lba} holds {}", vhd_testkit::tagged::describe(&found)),
        None => {
            let tag = Tag::of(&found);
            let fits = found == [0; SECTOR] || tag.is_some_and(|tag| tag.lba == lba);
            // What was there before these threads may be anything, but never the rubbish of free space.
            assert!(fits || found != [0xA5; SECTOR], "sector {lba} holds {}", vhd_testkit::tagged::describe(&found));
        }
    }
}

fn run_threads(disk: &Disk, seed: u64, calls: u64, noted: Noted<'_>) -> BTreeMap<u64, [u8; SECTOR]> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || live(disk, thread, seed, calls, noted))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn threads_see_their_own_writes() {
    let options = OpenOptions { background_flush: Some(std::time::Duration::from_millis(1)), ..writable() };
    for seed in 1..6 {
        for setup in setups() {
            let storage = Arc::new(MemoryStorage::new(setup.image.clone()));
            let disk = open(Arc::clone(&storage) as _, &setup, &options).unwrap();
            let known = run_threads(&disk, seed, 3000, None);
            let agree = |disk: &Disk, when: &str| {
                let found = read_all(disk).unwrap();
                for (lba, content) in &known {
                    let held = sector(&found, *lba);
                    assert!(
                        held == *content,
                        "{} {when}: sector {lba} holds {}",
                        setup.name,
                        vhd_testkit::tagged::describe(&held)
                    );
                }
            };
            agree(&disk, "open");
            disk.close().unwrap();
            drop(disk);
            agree(&open(storage, &setup, &OpenOptions::default()).unwrap(), "opened again");
        }
    }
}

#[test]
fn a_power_cut_among_threads_keeps_the_promises() {
    for seed in 1..4 {
        for setup in setups() {
            let run = recorded(&setup, seed);
            let effort = Effort { exhaustive: 4, samples: 6, seed };
            judge_run(&setup, &run, effort, Depth { recover_every: 20, second_crash_every: usize::MAX }).unwrap();
        }
    }
}

fn recorded(setup: &Setup, seed: u64) -> Run {
    let journal = Journal::new();
    let storage = Arc::new(RecordingStorage::new(setup.image.clone(), 0, &journal));
    let disk = open(storage, setup, &writable()).unwrap();
    let history = Mutex::new(History::of(&read_all(&disk).unwrap()));
    run_threads(&disk, seed, 12, Some((&journal, &history)));
    // The close is not noted: what it makes durable is permitted either way.
    drop(disk);
    Run { events: journal.events(), syncs: journal.syncs(), history: history.into_inner().unwrap() }
}
