//! An operation on a folder of real files: every state that a power cut may leave of it, and the same without each of its
//! barriers.
//!
//! What was answered is durable: once the operation has returned, each state must be the folder as it was then.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use vhd_core::chain::ChainOptions;
use vhd_testkit::crash::{CrashState, Effort};
use vhd_testkit::folder::RecordingHost;
use vhd_testkit::record::{Event, Journal};

use super::{files_of, options};

/// Barriers that an operation need not show itself, by the function that asks for them, and which test does.
///
/// Opening for writing begins with one for what a killed process left in the page cache. The files of an operation begin
/// durable here, so it is missed only where it does for what the operation wrote itself.
const SHOWN_ELSEWHERE: [(&str, &str); 1] = [("open", "tests/crash: what_was_read_after_a_kill_stays")];

/// Does the operation in a folder.
type Run<'a> = dyn Fn(&Path, &ChainOptions) + 'a;
/// Judges a folder after a power cut, and finishes the operation there; true once it was answered.
type Judge<'a> = dyn Fn(&Path, bool) -> Result<(), String> + 'a;

/// An operation, the files that it begins with, and what must hold after a power cut.
pub struct Operation<'a> {
    name: String,
    folder: TempDir,
    files: BTreeMap<PathBuf, Vec<u8>>,
    run: &'a Run<'a>,
    judge: &'a Judge<'a>,
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub states: usize,
    pub taken_away: usize,
    pub caught: usize,
}

impl<'a> Operation<'a> {
    pub fn new(name: &str, folder: TempDir, run: &'a Run<'a>, judge: &'a Judge<'a>) -> Self {
        let files = files_of(folder.path());
        Self { name: name.into(), folder, files, run, judge }
    }

    /// Judges each state. `VHD_CRASH_SEED` chooses those that are sampled.
    pub fn enumerate(&self, effort: Effort) -> usize {
        let seed = std::env::var("VHD_CRASH_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(effort.seed);
        let (_, states) = self.states(&Journal::new(), Effort { seed, ..effort });
        let states = states.unwrap_or_else(|error| panic!("{}: {error}\n  replay: VHD_CRASH_SEED={seed}", self.name));
        println!("crash states, {}: {states}", self.name);
        states
    }

    /// Takes each barrier away once; fails unless some state gives it away.
    pub fn sabotage(&self, effort: Effort) -> Counts {
        self.sabotage_but(effort, &[])
    }

    /// As [`Operation::sabotage`], and then the same for what finishes the operation after it was killed at several points,
    /// as far as that has barriers of its own.
    pub fn sabotage_with_finish(&self, effort: Effort, finish: &'a Run<'a>) -> Counts {
        let mut counts = self.sabotage(effort);
        let whole = Journal::naming_barriers();
        let (host, _) = self.record(&whole);
        let mut known = whole.places();
        let events = whole.events();
        let is_barrier = |event: &Event| matches!(event, Event::Sync { .. } | Event::SyncFolder { .. });
        let cuts: Vec<_> = (1..events.len()).filter(|cut| !is_barrier(&events[cut - 1]) && is_barrier(&events[*cut])).collect();
        for cut in cuts {
            let folder = tempfile::tempdir_in("/dev/shm").unwrap();
            host.killed_at(cut).put_into(folder.path());
            let name = format!("{}, killed after {cut} of {} events", self.name, events.len());
            let finishing = Operation::new(&name, folder, finish, self.judge);
            let journal = Journal::naming_barriers();
            finishing.record(&journal);
            if journal.places().iter().any(|place| !known.contains(place) && !is_shown_elsewhere(place)) {
                counts.add(finishing.sabotage_but(effort, &known));
                known.extend(journal.places());
            }
        }
        counts
    }

    fn sabotage_but(&self, effort: Effort, known: &[String]) -> Counts {
        let whole = Journal::naming_barriers();
        let states = self.states(&whole, effort).1.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        let mut counts = Counts { states, ..Counts::default() };
        let mut missed = Vec::new();
        for (barrier, place) in whole.places().iter().enumerate().filter(|(_, place)| !known.contains(place)) {
            counts.taken_away += 1;
            match self.states(&Journal::without_barrier(barrier), effort).1 {
                Err(error) => {
                    counts.caught += 1;
                    println!("  {barrier} {place}: {}", error.chars().take(150).collect::<String>());
                }
                Ok(states) if is_shown_elsewhere(place) => println!("  {barrier} {place}: {states} states, shown elsewhere"),
                Ok(states) => missed.push(format!("{barrier} {place} ({states} states)")),
            }
        }
        println!("barriers, {}: {} taken away, {} caught", self.name, counts.taken_away, counts.caught);
        assert!(missed.is_empty(), "{}: nothing misses these barriers: {missed:#?}", self.name);
        counts
    }

    /// Does it, recorded, in the folder as it was at first.
    fn record(&self, journal: &Journal) -> (RecordingHost, usize) {
        for path in files_of(self.folder.path()).into_keys() {
            std::fs::remove_file(path).unwrap();
        }
        self.files.iter().for_each(|(path, bytes)| std::fs::write(path, bytes).unwrap());
        let host = Arc::new(RecordingHost::new(self.folder.path(), journal));
        let chain = ChainOptions { host: Arc::clone(&host) as _, ..options(false) };
        (self.run)(self.folder.path(), &chain);
        drop(chain);
        let end = journal.mark(1);
        (Arc::into_inner(host).unwrap(), end)
    }

    fn states(&self, journal: &Journal, effort: Effort) -> (RecordingHost, Result<usize, String>) {
        let (host, end) = self.record(journal);
        let answered: BTreeMap<PathBuf, Vec<u8>> = files_of(self.folder.path())
            .into_iter()
            .map(|(path, bytes)| (path.strip_prefix(self.folder.path()).unwrap().to_owned(), bytes))
            .collect();
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let states = host.crash_states(effort, &mut |state| {
            let done = state.cut > end;
            if done {
                same_as(&answered, state)?;
            }
            state.put_into(scratch.path());
            (self.judge)(scratch.path(), done)
        });
        (host, states)
    }
}

impl Counts {
    pub fn add(&mut self, other: Self) {
        self.states += other.states;
        self.taken_away += other.taken_away;
        self.caught += other.caught;
    }
}

fn is_shown_elsewhere(place: &str) -> bool {
    SHOWN_ELSEWHERE.iter().any(|(function, _)| place.split(" < ").next() == Some(function))
}

/// Fails unless the state is the folder that was there when the operation returned.
fn same_as(answered: &BTreeMap<PathBuf, Vec<u8>>, state: &CrashState) -> Result<(), String> {
    if let Some(name) = answered.keys().find(|name| !state.names.contains_key(*name)) {
        return Err(format!("answered, and {} is not there", name.display()));
    }
    match state.names.iter().find(|(name, file)| answered.get(*name) != Some(&state.files[**file])) {
        None => Ok(()),
        Some((name, _)) => Err(format!("answered, and {} is not durable", name.display())),
    }
}
