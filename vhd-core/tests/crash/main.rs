//! Goal: no power cut loses flushed data or shows what was never there: promises P1, P2, P3 and P8.
//!
//! Method: a client's calls on a recorded storage; then every state that a power cut may leave of it, by enumeration and
//! by seeded sampling, is opened, read, checked, written to, and crashed again.
//! It would fail if a barrier were missing, if metadata were published before its data, or if space were reused too
//! early: `every_barrier_is_needed` takes each barrier away to show it.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod barriers;
mod faults;
mod gate;
mod judge;
mod scenario;
mod threads;
mod traps;

use std::time::{Duration, Instant};

use vhd_core::format::{Creator, Timestamp};
use vhd_core::image::{CreateOptions, Image, NewKind, OpenOptions, ParentLink, create};
use vhd_core::storage::MemoryStorage;
use vhd_testkit::crash::{CrashState, Effort, crash_states};
use vhd_testkit::record::{Event, Journal};

use crate::judge::{Counts, Depth, judge_run};
use crate::scenario::{CLOSE, Setup, Step, random_script, run};

const BLOCK: u64 = 8;
const SECTORS: u64 = 12 * BLOCK + 3;

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
    let storage = std::sync::Arc::new(MemoryStorage::new(setup.image.clone()));
    let disk = scenario::open(std::sync::Arc::clone(&storage) as _, &setup, &scenario::writable()).unwrap();
    for lba in (0..SECTORS).filter(|lba| lba / BLOCK % 3 != 2) {
        let tag = vhd_testkit::tagged::Tag { image: 50, lba, write: 0 };
        disk.write_at(&tag.sector(), lba * 512).unwrap();
    }
    disk.close().unwrap();
    storage.to_vec()
}

fn child() -> Vec<u8> {
    let link =
        ParentLink { uuid: [1; 16], name: "parent.vhd".into(), relative: "parent.vhd".into(), absolute: "/parent.vhd".into() };
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
    let storage = std::sync::Arc::new(MemoryStorage::new(image.to_vec()));
    let opened = Image::open(storage, std::path::Path::new("used.vhd"), &OpenOptions::default()).unwrap();
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

fn setups() -> Vec<Setup> {
    let dynamic = Setup { name: "dynamic", image: new_image(NewKind::Dynamic, 3), parent: None };
    let differencing = Setup { name: "differencing", image: child(), parent: Some(parent()) };
    let fixed = Setup { name: "fixed", image: new_image(NewKind::Fixed { preallocate: false }, 4), parent: None };
    vec![used("used dynamic", &dynamic), used("used differencing", &differencing), dynamic, differencing, fixed]
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Seeds of the random sessions: `VHD_CRASH_RUNS` of them from `VHD_CRASH_SEED` on, or as many as fit in
/// `VHD_CRASH_MINUTES`.
fn seeds() -> impl Iterator<Item = u64> {
    let first = number("VHD_CRASH_SEED", 1);
    let minutes = number("VHD_CRASH_MINUTES", 0);
    let runs = number("VHD_CRASH_RUNS", if minutes == 0 { 6 } else { u64::MAX - first });
    let deadline = Instant::now() + Duration::from_secs(60 * minutes);
    (first..first + runs).take_while(move |_| minutes == 0 || Instant::now() < deadline)
}

#[test]
fn flushed_data_survives_and_nothing_else_appears() {
    let setups = setups();
    let mut total = Counts::default();
    for seed in seeds() {
        for setup in &setups {
            let script = random_script(SECTORS, BLOCK, 14, seed);
            let run = run(setup, &script, &Journal::new(), 1);
            let effort = Effort { seed, ..Effort::default() };
            let depth = Depth { recover_every: 5, second_crash_every: 7 };
            let counts = judge_run(setup, &run, effort, depth).unwrap_or_else(|error| {
                let replay = "cargo test -p vhd-core --test crash flushed_data";
                panic!("{error}\n  replay: VHD_CRASH_SEED={seed} VHD_CRASH_RUNS=1 {replay}\n  script: {script:?}")
            });
            total.states += counts.states;
            total.recovered += counts.recovered;
            total.second_states += counts.second_states;
        }
    }
    println!("crash states: {total:?}");
}

/// Scripts in which each barrier of each flush matters.
fn telling_scripts() -> Vec<Vec<Step>> {
    let write = |lba, count| Step::Write { lba, count };
    let discard = |index: u64| Step::Discard { lba: index * BLOCK, count: BLOCK };
    vec![
        // New blocks, overwrites, partial blocks.
        vec![write(0, 3), Step::Flush, write(1, 1), Step::Flush, write(40, 20), Step::Flush, write(3, 2), Step::Flush],
        // Freed blocks, and others that take their space.
        vec![write(0, BLOCK * 4), Step::Flush, discard(0), discard(2), Step::Flush, write(29, 60), Step::Flush],
    ]
}

/// A test that can't fail shows nothing: each barrier that a flush makes is taken away once, and some state must give
/// it away. Opening and closing have barriers of their own, with tests of their own below.
#[test]
fn every_barrier_is_needed() {
    let effort = Effort::default();
    let depth = Depth { recover_every: 3, second_crash_every: usize::MAX };
    let (mut sabotaged, mut missed) = (0, Vec::new());
    for setup in setups() {
        for (number, script) in telling_scripts().iter().enumerate() {
            let whole = run(&setup, script, &Journal::new(), 1);
            judge_run(&setup, &whole, effort, depth).unwrap();
            for barrier in barriers_of_flushes(&whole.events) {
                sabotaged += 1;
                let run = run(&setup, script, &Journal::without_barrier(barrier), 1);
                if judge_run(&setup, &run, effort, depth).is_ok() {
                    missed.push(format!("{} script {number} barrier {barrier}", setup.name));
                }
            }
        }
    }
    println!("barriers taken away and found: {} of {sabotaged}", sabotaged - missed.len());
    assert!(missed.is_empty(), "no test misses these barriers: {missed:?}");
}

/// Numbers of the barriers between the first call and the closing one.
fn barriers_of_flushes(events: &[Event]) -> Vec<usize> {
    let mut number = 0;
    let (mut begun, mut closing) = (false, false);
    let mut barriers = Vec::new();
    for event in events {
        match event {
            Event::Mark(mark) => (begun, closing) = (true, closing || *mark == CLOSE),
            Event::Sync { .. } => {
                if begun && !closing {
                    barriers.push(number);
                }
                number += 1;
            }
            Event::Write { .. } | Event::SetLen { .. } => {}
        }
    }
    barriers
}

/// A closed image has both footers: libvhdi opens nothing else. (Sabotage: without the last barrier it may lack one.)
#[test]
fn a_closed_image_has_its_trailing_footer() {
    let setup = setups().into_iter().find(|setup| setup.name == "dynamic").unwrap();
    let script = [Step::Write { lba: 0, count: 30 }];
    let without_footer = |journal: &Journal| {
        let run = run(&setup, &script, journal, 1);
        let mut missing = 0;
        let count = run.events.len();
        let mut visit = |state: &CrashState| {
            let footer = state.files[0].last_chunk::<512>().map(vhd_core::format::Footer::parse);
            missing += usize::from(state.cut == count && !matches!(footer, Some(Ok(_))));
            Ok(())
        };
        crash_states(std::slice::from_ref(&setup.image), &run.events, Effort::default(), &mut visit).unwrap();
        (missing, run.syncs)
    };
    let (missing, syncs) = without_footer(&Journal::new());
    assert_eq!(missing, 0);
    assert!(without_footer(&Journal::without_barrier(syncs - 1)).0 > 0, "the closing barrier is not needed");
}

/// What a killed process wrote is in the page cache. Whoever opens the image next reads it, and builds on it: it must
/// not be lost by a power cut afterwards. (Sabotage: without the barrier at open it is.)
#[test]
fn what_was_read_after_a_kill_stays() {
    for setup in setups() {
        let killed = |without: Option<usize>| {
            let journal = without.map_or_else(Journal::new, Journal::without_barrier);
            let run = scenario::run_killed(&setup, &journal);
            (judge_run(&setup, &run, Effort::default(), Depth { recover_every: 3, second_crash_every: usize::MAX }), run)
        };
        let (judged, run) = killed(None);
        judged.unwrap();
        let opening = scenario::barrier_after_kill(&run.events);
        assert!(killed(Some(opening)).0.is_err(), "{}: the barrier at open is not needed", setup.name);
    }
}
