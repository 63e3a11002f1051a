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
mod threads;
mod traps;

use std::time::{Duration, Instant};

use vhd_testkit::crash::{CrashState, Effort, crash_states};
use vhd_testkit::judge::{Counts, Depth, judge_run};
use vhd_testkit::record::{Event, Journal};
use vhd_testkit::session::{self, BLOCK, CLOSE, SECTORS, Step, random_script, run, setups};
use vhd_testkit::tools::{QemuImg, VhdiMount};

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
    println!("crash states, sessions: {total:?}");
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
    println!("barriers, flush: {sabotaged} taken away, {} caught", sabotaged - missed.len());
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
            _ => {}
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
            let run = session::run_killed(&setup, &journal);
            (judge_run(&setup, &run, Effort::default(), Depth { recover_every: 3, second_crash_every: usize::MAX }), run)
        };
        let (judged, run) = killed(None);
        judged.unwrap();
        let opening = session::barrier_after_kill(&run.events);
        assert!(killed(Some(opening)).0.is_err(), "{}: the barrier at open is not needed", setup.name);
    }
}

/// P3 for others: what a power cut left opens in QEMU and libvhdi once it was opened here for writing, and QEMU reads what
/// we read (of a dynamic disk; it knows no parents).
#[test]
fn others_open_what_was_opened_here_after_a_power_cut() {
    let (Some(qemu), Some(libvhdi)) = (QemuImg::find(), VhdiMount::find()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut tried = 0;
    for setup in setups().into_iter().filter(|setup| setup.parent.is_none()) {
        let script = random_script(SECTORS, BLOCK, 14, 3);
        let run = run(&setup, &script, &Journal::new(), 1);
        let mut number = 0;
        let mut visit = |state: &CrashState| {
            number += 1;
            if number % 200 != 1 {
                return Ok(());
            }
            tried += 1;
            let path = folder.path().join(format!("state-{tried}.vhd"));
            std::fs::write(&path, &state.files[0]).unwrap();
            let options = vhd_core::chain::ChainOptions { image: session::writable(), ..Default::default() };
            let disk = vhd_core::Disk::open(&path, &options).map_err(|error| error.to_string())?;
            let ours = session::read_all(&disk).map_err(|error| error.to_string())?;
            disk.close().map_err(|error| error.to_string())?;
            drop(disk);
            libvhdi.to_raw(&path)?;
            let theirs = qemu.to_raw(&path)?;
            // Data under a clear bit is invisible here, and not to QEMU, which knows no bitmaps.
            let differs = |lba: &u64| session::sector(&ours, *lba) != session::sector(&theirs, *lba);
            match (0..SECTORS).find(|lba| differs(lba) && session::sector(&ours, *lba) != [0; 512]) {
                Some(lba) => Err(format!("QEMU reads sector {lba} as something else")),
                None => Ok(()),
            }
        };
        crash_states(std::slice::from_ref(&setup.image), &run.events, Effort::default(), &mut visit)
            .unwrap_or_else(|error| panic!("{}: {error}", setup.name));
    }
    println!("states that QEMU and libvhdi opened: {tried}");
    assert!(tried > 10);
}
