//! An operation on a folder of real files: every state that a power cut may leave of it, and the same without each of its
//! barriers.
//!
//! What was answered is durable: once the operation has returned, each state must be the folder as it was then.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use vhd_core::chain::ChainOptions;
use vhd_testkit::crash::{CrashState, Effort};
use vhd_testkit::folder::RecordingHost;
use vhd_testkit::record::{Event, Journal};

use super::{files_of, options};

/// Opening for writing begins with a barrier for what a killed process left in the page cache. The files of an operation
/// begin durable here, so it is missed only where it does for what the operation wrote itself.
const OPENING: (&str, &str) = ("open", "tests/crash: what_was_read_after_a_kill_stays");

/// Barriers of parts that have tests of their own, by how their functions begin, and which tests these are.
const SHOWN_ELSEWHERE: [(&str, &str); 10] = [
    // Where closing cuts the file, that has another.
    ("flush_alone < flush < close < ", "tests/crash: every_barrier_is_needed"),
    ("publish < flush_alone < ", "tests/crash: every_barrier_is_needed"),
    ("trim < close < ", "tests/crash: every_barrier_is_needed"),
    ("mend < open < before < ", "tests/opening.rs"),
    // What is removed next is in the same folder here, which is synced then.
    ("put_file < put < run < run_all", "a child in another folder than its target"),
    // Both are in one folder, which is synced with the last.
    ("replace_file < create_file_for < create_over < create_child < start", "tests/snapshots.rs"),
    ("run < set_parent < relink < ", "tests/reparent.rs"),
    ("run < set_size < mark < ", "tests/resize.rs"),
    ("write_table < clear_until < set_size < mark < ", "tests/resize.rs"),
    ("resize_fixed < mark < ", "tests/resize.rs"),
];

/// Does the operation in a folder, or what finishes it.
pub type Run<'a> = dyn Fn(&Path, &ChainOptions) + 'a;
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

/// The barriers of some operations, and which of those miss each. The same function may ask several times: each time is
/// one of its own.
#[derive(Debug, Default)]
pub struct Barriers {
    rows: BTreeMap<(String, usize), BTreeSet<String>>,
    states: usize,
    taken_away: usize,
    caught: usize,
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
        let states = states.unwrap_or_else(|error| {
            let program = std::env::current_exe().unwrap();
            let program = program.file_stem().unwrap().to_string_lossy().rsplit_once('-').unwrap().0.to_owned();
            panic!("{}: {error}\n  replay: VHD_CRASH_SEED={seed} cargo test -p vhd-core --test {program} power_cut", self.name)
        });
        println!("crash states, {}: {states}", self.name);
        states
    }

    /// Takes each barrier away once, and notes whether some state gives it away.
    pub fn sabotage(&self, barriers: &mut Barriers, effort: Effort) {
        self.sabotage_but(barriers, effort, &[]);
    }

    /// As [`Operation::sabotage`], and then the same for what finishes the operation after it was killed at any point, as
    /// far as that has barriers of its own.
    pub fn sabotage_with_finish(&self, barriers: &mut Barriers, effort: Effort, finish: &'a Run<'a>) {
        self.sabotage(barriers, effort);
        let whole = Journal::naming_barriers();
        let (host, _) = self.record(&whole);
        let (known, events) = (whole.places(), whole.events());
        let is_barrier = |event: &Event| matches!(event, Event::Sync { .. } | Event::SyncFolder { .. });
        for cut in (1..events.len()).filter(|cut| !is_barrier(&events[cut - 1]) && is_barrier(&events[*cut])) {
            let folder = tempfile::tempdir_in("/dev/shm").unwrap();
            host.killed_at(cut).put_into(folder.path());
            let finishing = Operation::new(&format!("{}, finished", self.name), folder, finish, self.judge);
            let journal = Journal::naming_barriers();
            finishing.record(&journal);
            if journal.places().iter().any(|place| !known.contains(place) && !is_opening(place)) {
                finishing.sabotage_but(barriers, effort, &known);
            }
        }
    }

    fn sabotage_but(&self, barriers: &mut Barriers, effort: Effort, known: &[String]) {
        let whole = Journal::naming_barriers();
        barriers.states += self.states(&whole, effort).1.unwrap_or_else(|error| panic!("{}: {error}", self.name));
        let mut states = 0;
        barriers.note(&self.name, whole.places(), known, &mut |barrier| {
            let judged = self.states(&Journal::without_barrier(barrier), effort).1;
            states += judged.as_ref().unwrap_or(&0);
            judged.is_err()
        });
        barriers.states += states;
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

impl Barriers {
    /// Notes what became of each barrier of a run with this name: `caught` says whether the run without it is given away.
    /// Those of parts that have tests of their own are not asked for.
    pub fn note(&mut self, name: &str, places: Vec<String>, known: &[String], caught: &mut dyn FnMut(usize) -> bool) {
        let mut asked: BTreeMap<String, usize> = BTreeMap::new();
        for (barrier, place) in places.into_iter().enumerate().filter(|(_, place)| !known.contains(place)) {
            let time = *asked.entry(place.clone()).and_modify(|time| *time += 1).or_insert(1);
            let elsewhere = shown_elsewhere(&place);
            let row = self.rows.entry((place, time)).or_default();
            if elsewhere.is_some() {
                continue;
            }
            self.taken_away += 1;
            if caught(barrier) {
                self.caught += 1;
                row.insert(name.to_owned());
            }
        }
    }

    /// Fails unless each is missed somewhere, and all are those of this section of docs/barriers.md.
    pub fn assert(&self, section: &str) {
        println!("barriers, {section}: {} taken away, {} caught, {} states", self.taken_away, self.caught, self.states);
        let mut table = String::from("\n| barrier | missed in |\n|---|---|\n");
        let mut missed = Vec::new();
        for ((place, time), by) in &self.rows {
            let mut by: Vec<_> = by.iter().map(String::as_str).collect();
            if by.is_empty() {
                match shown_elsewhere(place) {
                    Some(test) => by.push(test),
                    None if is_opening(place) => by.push(OPENING.1),
                    None => missed.push(format!("{place}, time {time}")),
                }
            }
            let time = if *time > 1 { format!(", {time}") } else { String::new() };
            let _ = writeln!(table, "| `{place}`{time} | {} |", by.join("; "));
        }
        assert!(missed.is_empty(), "{section}: nothing misses these barriers: {missed:#?}");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/barriers.md");
        let page = std::fs::read_to_string(&path).unwrap();
        let (head, rest) = page.split_once(&format!("<!-- {section} -->\n")).unwrap();
        let (old, tail) = rest.split_once("<!-- end -->\n").unwrap();
        table.push('\n');
        if std::env::var_os("BARRIERS_UPDATE").is_some() {
            std::fs::write(&path, format!("{head}<!-- {section} -->\n{table}<!-- end -->\n{tail}")).unwrap();
        } else {
            let barriers = |table: &str| -> Vec<String> {
                table.lines().filter_map(|row| row.rsplit_once(" | ")).map(|(barrier, _)| barrier.to_owned()).collect()
            };
            assert!(
                barriers(old) == barriers(&table),
                "docs/barriers.md has other barriers; BARRIERS_UPDATE=1 writes it anew:\n{table}"
            );
        }
    }
}

fn is_opening(place: &str) -> bool {
    place.split(" < ").next() == Some(OPENING.0)
}

fn shown_elsewhere(place: &str) -> Option<&'static str> {
    SHOWN_ELSEWHERE.iter().find(|(start, _)| place.starts_with(start)).map(|(_, test)| *test)
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
