//! What must hold of every state that a power cut leaves.

use std::path::Path;
use std::sync::Arc;

use crate::crash::{CrashState, Effort, Random, crash_states};
use crate::history::History;
use crate::record::{Journal, RecordingStorage};
use crate::tagged::Tag;
use vhd_core::image::OpenOptions;
use vhd_core::ops::check::{CheckOptions, Severity, check};
use vhd_core::storage::MemoryStorage;

use crate::session::{Run, SECTOR, Setup, open, read_all, sector, writable};

/// What a crash of ours may leave for `check` to find: nothing that repair could lose anything by.
const PERMITTED: [&str; 4] = ["leaked-space", "trailing-footer-missing", "stale-trailing-footer", "footers-disagree"];

/// How deep a state is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Depth {
    /// Every n-th state is opened for writing, written to and read again.
    pub recover_every: usize,
    /// Every n-th of those is crashed again meanwhile.
    pub second_crash_every: usize,
}

/// Counts of what was looked at.
#[derive(Debug, Default)]
pub struct Counts {
    /// States that were read.
    pub states: usize,
    /// Of those, opened for writing and written to.
    pub recovered: usize,
    /// States of a second crash meanwhile.
    pub second_states: usize,
}

/// Enumerates the states of a run and judges each.
///
/// # Errors
/// What is wrong with the first bad one, in one line.
pub fn judge_run(setup: &Setup, run: &Run, effort: Effort, depth: Depth) -> Result<Counts, String> {
    let mut counts = Counts::default();
    let mut recovered = 0;
    let mut second_states = 0;
    let mut number = 0;
    counts.states = crash_states(std::slice::from_ref(&setup.image), &run.events, effort, &mut |state| {
        number += 1;
        let found = judge_reading(setup, state, &run.history)?;
        if number % depth.recover_every == 0 {
            recovered += 1;
            let crash_again = recovered % depth.second_crash_every == 0;
            second_states += judge_recovery(setup, state, &found, number as u64, crash_again)?;
        }
        Ok(())
    })
    .map_err(|error| format!("{}: {error}", setup.name))?;
    (counts.recovered, counts.second_states) = (recovered, second_states);
    Ok(counts)
}

/// It opens without a repair, `check` finds little, and every sector reads something permitted.
fn judge_reading(setup: &Setup, state: &CrashState, history: &History) -> Result<Vec<u8>, String> {
    let bytes = &state.files[0];
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let disk =
        open(Arc::clone(&storage) as _, setup, &OpenOptions::default()).map_err(|error| format!("does not open: {error}"))?;
    let found = read_all(&disk).map_err(|error| format!("can't be read: {error}"))?;
    history.judge_disk(&found, state.cut)?;
    judge_check(setup, &storage)?;
    Ok(found)
}

fn judge_check(setup: &Setup, storage: &MemoryStorage) -> Result<(), String> {
    let report =
        check(storage, Path::new("leaf.vhd"), &CheckOptions::default()).map_err(|error| format!("check fails: {error}"))?;
    let before = check(&MemoryStorage::new(setup.image.clone()), Path::new("leaf.vhd"), &CheckOptions::default());
    // What was odd before may stay so.
    let known: Vec<_> =
        before.map(|report| report.findings.into_iter().map(|finding| finding.code).collect()).unwrap_or_default();
    let worse = report.findings.iter().find(|finding| {
        finding.severity > Severity::Note && !PERMITTED.contains(&finding.code.name()) && !known.contains(&finding.code)
    });
    worse.map_or(Ok(()), |finding| Err(format!("check finds {}: {}: {}", finding.code.name(), finding.place, finding.message)))
}

/// Opened for writing it reads the same; what is written is there, and nothing else changes (promise P8). Returns the
/// states of a second crash.
fn judge_recovery(setup: &Setup, state: &CrashState, found: &[u8], seed: u64, crash_again: bool) -> Result<usize, String> {
    let journal = Journal::new();
    let storage = Arc::new(RecordingStorage::new(state.files[0].clone(), 0, &journal));
    let disk =
        open(Arc::clone(&storage) as _, setup, &writable()).map_err(|error| format!("does not open for writing: {error}"))?;
    let same = |what: &str, now: &[u8], expected: &[u8]| match (0..(expected.len() / SECTOR) as u64)
        .find(|&lba| sector(now, lba) != sector(expected, lba))
    {
        None => Ok(()),
        Some(lba) => Err(format!(
            "{what}: sector {lba} holds {}, expected {}",
            crate::tagged::describe(&sector(now, lba)),
            crate::tagged::describe(&sector(expected, lba))
        )),
    };
    same("opened for writing", &read_all(&disk).map_err(|error| error.to_string())?, found)?;
    let sectors = (found.len() / SECTOR) as u64;
    let mut history = History::of(found);
    let mut random = Random::new(seed);
    let mut expected = found.to_vec();
    for write in 0..5 {
        let lba = random.below(sectors);
        let content = Tag { image: 99, lba, write }.sector();
        let begun = journal.mark(write);
        disk.write_at(&content, lba * SECTOR as u64).map_err(|error| error.to_string())?;
        history.wrote(lba, content, begun, Some(journal.mark(write)));
        expected[lba as usize * SECTOR..][..SECTOR].copy_from_slice(&content);
    }
    let begun = journal.mark(100);
    disk.flush().map_err(|error| error.to_string())?;
    history.flushed(begun, Some(journal.mark(100)));
    disk.close().map_err(|error| error.to_string())?;
    drop(disk);
    let closed = Arc::new(MemoryStorage::new(storage.to_vec()));
    let disk = open(Arc::clone(&closed) as _, setup, &OpenOptions::default())
        .map_err(|error| format!("does not open again: {error}"))?;
    same("written to and closed", &read_all(&disk).map_err(|error| error.to_string())?, &expected)?;
    judge_check(setup, &closed)?;
    if !crash_again {
        return Ok(0);
    }
    let effort = Effort { exhaustive: 3, samples: 2, seed };
    let start = [state.files[0].clone()];
    crash_states(&start, &journal.events(), effort, &mut |second| judge_reading(setup, second, &history).map(drop))
        .map_err(|error| format!("second {error}"))
}
