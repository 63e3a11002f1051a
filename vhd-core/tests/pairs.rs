//! Goal: two operations on one chain at one time lose nothing: one is refused, or both are done as if one after the other.
//!
//! Method: each operation against each, on the same image, its parent and its child, in one process. The second is begun and
//! ended at a change that the first asks its host for: at each of them in the long form, at some that a seed chooses otherwise.
//! One that reads or writes may stay open until the first has ended. Afterwards every image opens, and reads as one of the two
//! orders would have it; so do the names of all files. What was refused, done or given up is what docs/concurrency.md says.
//! It would fail if an image were orphaned, removed or overwritten under a child, a reader or a writer that came meanwhile.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vhd_core::chain::{ChainOptions, create_child, is_vhd_name};
use vhd_core::format::{Creator, DiskType, Timestamp};
use vhd_core::image::{CreateOptions, NewKind, create_file_on};
use vhd_core::live::LiveDisk;
use vhd_core::ops::compact::{CompactOptions, compact};
use vhd_core::ops::in_place::{InPlaceOptions, convert_in_place};
use vhd_core::ops::merge::{MergeOptions, execute, plan};
use vhd_core::ops::repair::{RepairMode, repair};
use vhd_core::ops::reparent::reparent;
use vhd_core::ops::resize::{ResizeOptions, resize};
use vhd_core::ops::{saved_state, undo};
use vhd_core::storage::FileStorage;
use vhd_core::{Disk, Error, ErrorKind, Progress};
use vhd_testkit::fault_host::FaultHost;

use self::support::{child_options, files_of, new_child, new_image, open, options, read_all};

const BLOCK: u64 = 4096;
const SIZE: u64 = 12 * BLOCK;
/// Moments of a pair that are tried where not all are.
const SOME: usize = 3;

type Run = fn(&Path, &ChainOptions) -> Result<Option<Disk>, Error>;

/// An operation on one image of a chain.
struct Operation {
    name: &'static str,
    /// What is to be there before.
    prepare: fn(&Path),
    /// Does it; a disk that is to stay open until the other operation has ended.
    run: Run,
}

fn fill(path: &Path, byte: u8, blocks: impl IntoIterator<Item = u64>) {
    let disk = open(path, true);
    blocks.into_iter().for_each(|block| disk.write_at(&[byte + block as u8; 3000], block * BLOCK).unwrap());
    disk.close().unwrap();
}

/// `base`, its child `mid`, and its child `leaf`. Base has a gap to be compacted.
fn chain(folder: &Path) {
    let [base, mid, leaf] = ["base.vhd", "mid.vhd", "leaf.vhd"].map(|name| folder.join(name));
    new_image(&base, NewKind::Dynamic, SIZE, BLOCK as u32);
    fill(&base, 1, [7, 0, 3, 9, 5]);
    let opened = open(&base, true);
    opened.write_at(&[0; BLOCK as usize], 3 * BLOCK).unwrap();
    opened.close().unwrap();
    drop(opened);
    new_child(&mid, &base);
    fill(&mid, 50, [1, 3]);
    new_child(&leaf, &mid);
    fill(&leaf, 90, [3, 11]);
}

fn nothing(_: &Path) {}

fn done<T>(result: Result<T, Error>) -> Result<Option<Disk>, Error> {
    result.map(|_| None)
}

fn forced(on: &ChainOptions, force: bool) -> ChainOptions {
    let mut chain = on.clone();
    (chain.image.force, chain.image.writable) = (force, false);
    chain
}

fn child_of(folder: &Path, image: &str, on: &ChainOptions) -> Result<Option<Disk>, Error> {
    done(create_child(&folder.join(format!("of-{image}")), &folder.join(image), &child_options(), on))
}

fn read(folder: &Path, image: &str, on: &ChainOptions) -> Result<Option<Disk>, Error> {
    Disk::open(&folder.join(image), &forced(on, false)).map(Some)
}

fn write(folder: &Path, image: &str, force: bool, on: &ChainOptions) -> Result<Option<Disk>, Error> {
    let mut chain = forced(on, force);
    chain.image.writable = true;
    let disk = Disk::open(&folder.join(image), &chain)?;
    disk.write_at(&[0xA1; 1000], 2 * BLOCK + 100)?;
    disk.write_at(&[0xA2; 1000], 3 * BLOCK + 100)?;
    disk.flush()?;
    Ok(Some(disk))
}

fn snapshot(folder: &Path, image: &str, on: &ChainOptions) -> Result<Option<Disk>, Error> {
    let mut chain = forced(on, false);
    chain.image.writable = true;
    let live = LiveDisk::open(&folder.join(image), &chain)?;
    live.disk().write_at(&[0xB1; 1000], 4 * BLOCK)?;
    live.snapshot(&folder.join(format!("after-{image}")), &child_options())?;
    live.disk().write_at(&[0xB2; 1000], 4 * BLOCK + 2000)?;
    live.disk().close()?;
    Ok(None)
}

fn merge(folder: &Path, image: &str, into: Option<&str>, on: &ChainOptions) -> Result<Option<Disk>, Error> {
    let how = MergeOptions { into: into.map(|name| folder.join(name)), delete: true, ..MergeOptions::default() };
    done(execute(&plan(&folder.join(image), &how, on)?, &how, on, &Progress::default()))
}

fn compacted(folder: &Path, image: &str, force: bool, on: &ChainOptions) -> Result<Option<Disk>, Error> {
    let how = CompactOptions { force, ..CompactOptions::default() };
    done(compact(&folder.join(image), &how, &mut |_| Ok(Vec::new()), &forced(on, force), &Progress::default()))
}

fn resized(folder: &Path, image: &str, on: &ChainOptions) -> Result<Option<Disk>, Error> {
    // So large that the table takes the place of blocks.
    done(resize(&folder.join(image), 2000 * BLOCK, &ResizeOptions::default(), on, &Progress::default()))
}

fn to_fixed(folder: &Path, image: &str, on: &ChainOptions) -> Result<Option<Disk>, Error> {
    let how = InPlaceOptions { block_size: BLOCK as u32, piece: 5 * BLOCK, ..InPlaceOptions::new(DiskType::Fixed) };
    done(convert_in_place(&folder.join(image), &how, on, &Progress::default()))
}

/// The copy of a footer at the start is wrong, which all can live with and a repair puts right.
fn damage(folder: &Path, image: &str) {
    let mut bytes = fs::read(folder.join(image)).unwrap();
    bytes[100] ^= 1;
    fs::write(folder.join(image), bytes).unwrap();
}

fn repaired(folder: &Path, image: &str, on: &ChainOptions) -> Result<Option<Disk>, Error> {
    done(repair(&folder.join(image), RepairMode::All, false, on, &Progress::default()))
}

fn session(folder: &Path, image: &str) {
    undo::start(&[folder.join(image)], None, &options(false)).unwrap();
    fill(&folder.join(image).with_extension("vud"), 70, [2, 7]);
}

fn copied_mid(folder: &Path) {
    fs::copy(folder.join("mid.vhd"), folder.join("copy of mid with a longer name.vhd")).unwrap();
}

fn overwritten(folder: &Path, image: &str, on: &ChainOptions) -> Result<Option<Disk>, Error> {
    let (kind, creator, timestamp) = (NewKind::Dynamic, Creator::WINDOWS_10, Timestamp(0));
    let new = CreateOptions { kind, size: SIZE, block_size: BLOCK as u32, uuid: [7; 16], creator, timestamp };
    done(create_file_on(&*on.host, &folder.join(image), &new, true))
}

/// All operations that are possible on the chain as it is, by what they lock and change.
fn operations() -> Vec<Operation> {
    let operation = |name, prepare, run| Operation { name, prepare, run };
    vec![
        operation("child of leaf", nothing, |folder, on| child_of(folder, "leaf.vhd", on)),
        operation("child of mid", nothing, |folder, on| child_of(folder, "mid.vhd", on)),
        operation("child of base", nothing, |folder, on| child_of(folder, "base.vhd", on)),
        operation("read leaf", nothing, |folder, on| read(folder, "leaf.vhd", on)),
        operation("read mid", nothing, |folder, on| read(folder, "mid.vhd", on)),
        operation("read base", nothing, |folder, on| read(folder, "base.vhd", on)),
        operation("write leaf", nothing, |folder, on| write(folder, "leaf.vhd", false, on)),
        operation("write base by force", nothing, |folder, on| write(folder, "base.vhd", true, on)),
        operation("serve leaf, snapshot", nothing, |folder, on| snapshot(folder, "leaf.vhd", on)),
        operation("merge leaf", nothing, |folder, on| merge(folder, "leaf.vhd", None, on)),
        operation("merge mid", nothing, |folder, on| merge(folder, "mid.vhd", None, on)),
        operation("merge leaf into base", nothing, |folder, on| merge(folder, "leaf.vhd", Some("base.vhd"), on)),
        operation("compact leaf", nothing, |folder, on| compacted(folder, "leaf.vhd", false, on)),
        operation("compact base by force", nothing, |folder, on| compacted(folder, "base.vhd", true, on)),
        operation("resize leaf", nothing, |folder, on| resized(folder, "leaf.vhd", on)),
        operation("convert base in place", nothing, |folder, on| to_fixed(folder, "base.vhd", on)),
        operation("repair leaf", |folder| damage(folder, "leaf.vhd"), |folder, on| repaired(folder, "leaf.vhd", on)),
        operation("repair base", |folder| damage(folder, "base.vhd"), |folder, on| repaired(folder, "base.vhd", on)),
        operation("undo start leaf", nothing, |folder, on| done(undo::start(&[folder.join("leaf.vhd")], None, on))),
        operation(
            "undo commit leaf",
            |folder| session(folder, "leaf.vhd"),
            |folder, on| done(undo::commit(&[folder.join("leaf.vhd")], None, false, on, &Progress::default())),
        ),
        operation(
            "undo discard leaf",
            |folder| session(folder, "leaf.vhd"),
            |folder, on| done(undo::discard(&[folder.join("leaf.vhd")], None, false, on)),
        ),
        operation("reparent leaf", copied_mid, |folder, on| {
            let parent = folder.join("copy of mid with a longer name.vhd");
            done(reparent(&folder.join("leaf.vhd"), &parent, false, false, on))
        }),
        operation("note a saved state of leaf", nothing, |folder, on| done(saved_state::set(&folder.join("leaf.vhd"), true, on))),
        operation("overwrite leaf", nothing, |folder, on| overwritten(folder, "leaf.vhd", on)),
    ]
}

/// What a file is to its user: what a disk reads, why it does not open, or that it is something else.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Disk(Vec<u8>),
    Refused(ErrorKind),
    Other,
}

type State = BTreeMap<PathBuf, Seen>;

fn state_of(folder: &Path) -> State {
    let see = |path: &Path| {
        if !is_vhd_name(path) {
            return Seen::Other;
        }
        let read = Disk::open(path, &options(false)).map(|disk| read_all(&disk));
        read.map_or_else(|error| Seen::Refused(error.kind()), Seen::Disk)
    };
    let files = files_of(folder).into_keys();
    files.map(|path| (path.strip_prefix(folder).unwrap().to_owned(), see(&path))).collect()
}

/// Both operations' places, made once.
struct Place {
    files: BTreeMap<PathBuf, Vec<u8>>,
}

impl Place {
    /// `None` where what one needs is not to be had beside what the other needs.
    fn new(first: &Operation, second: &Operation) -> Option<Self> {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        chain(folder.path());
        (first.prepare)(folder.path());
        if first.name != second.name && !(first.name.starts_with("undo") && second.name.starts_with("undo")) {
            (second.prepare)(folder.path());
        } else if first.name == "undo start leaf" && second.name != first.name {
            return None;
        }
        let files = files_of(folder.path());
        let files = files.into_iter().map(|(path, bytes)| (path.strip_prefix(folder.path()).unwrap().to_owned(), bytes));
        Some(Self { files: files.collect() })
    }

    fn folder(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        for (name, bytes) in &self.files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        folder
    }

    /// Does these one after the other; which were done, and what is there then.
    fn in_turn(&self, operations: &[&Operation]) -> (Vec<bool>, State) {
        let folder = self.folder();
        let on = options(false);
        let done = operations.iter().map(|operation| (operation.run)(folder.path(), &on).is_ok()).collect();
        (done, state_of(folder.path()))
    }
}

/// What became of the first operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum First {
    Done,
    /// It was refused, and the same command was done when the second had ended.
    GaveWay,
    Refused,
}

/// What became of the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Second {
    Done,
    Refused,
    /// It stopped in the middle, and the same command went on when the first had ended.
    Stopped,
}

type Outcome = (First, Second);
type Outcomes = BTreeMap<(usize, usize), BTreeSet<Outcome>>;

/// A disk that stays open while the first operation goes on.
struct Held {
    disk: Disk,
    content: Vec<u8>,
    file: Option<(u64, u64)>,
}

impl Held {
    fn of(disk: Disk) -> Self {
        let path = disk.layer_path(0).unwrap();
        Self { content: read_all(&disk), file: FileStorage::identity_at(&path), disk }
    }

    /// It sees what it saw, and what it writes yet is not lost.
    fn end(self) -> Result<(), String> {
        let path = self.disk.layer_path(0).unwrap();
        if read_all(&self.disk) != self.content {
            return Err("what is open reads as another disk".to_owned());
        }
        if FileStorage::identity_at(&path) != self.file {
            return Err(format!("{} is open, and was removed or replaced", path.file_name().unwrap().display()));
        }
        if !self.disk.capabilities().read_only {
            self.disk.write_at(&[0xA1; 1000], 2 * BLOCK + 100).map_err(|error| error.to_string())?;
        }
        self.disk.close().map_err(|error| error.to_string())
    }
}

/// The second operation within the first, at this change of it. `None` where it has not so many.
fn at_moment(place: &Place, pair: [&Operation; 2], moment: usize) -> Option<(Outcome, Result<State, String>, String)> {
    let [first, second] = pair;
    let folder = place.folder();
    let path = folder.path().to_owned();
    let came = Arc::new(Mutex::new(None));
    let (count, run, to) = (AtomicUsize::new(0), second.run, Arc::clone(&came));
    let host = FaultHost::new(usize::MAX, false, false).calling_at_changes(move || {
        if count.fetch_add(1, Ordering::SeqCst) + 1 == moment {
            let held = run(&path, &options(false)).map(|disk| disk.map(Held::of));
            *to.lock().unwrap() = Some(held);
        }
    });
    let on = ChainOptions { host: Arc::new(host), ..options(false) };
    let result = (first.run)(folder.path(), &on).map(drop);
    let came = came.lock().unwrap().take()?;
    let mut told = format!("first: {}, second: {}", said(&result), said(&came));
    let mut then = if came.is_ok() { Second::Done } else { Second::Refused };
    let kept = match came {
        Ok(Some(held)) => held.end(),
        _ => Ok(()),
    };
    // What was begun is finished by the same command.
    let mut finish = |operation: &Operation| {
        let again = (operation.run)(folder.path(), &options(false)).map(drop);
        let _ = write!(told, ", {} again: {}", operation.name, said(&again));
        again.is_ok()
    };
    if then == Second::Refused && has_record(folder.path()) && finish(second) {
        then = Second::Stopped;
    }
    let became = match result {
        Ok(()) => First::Done,
        Err(_) if finish(first) => First::GaveWay,
        Err(_) => First::Refused,
    };
    Some(((became, then), kept.map(|()| state_of(folder.path())), told))
}

/// Whether something was begun here and is not finished.
fn has_record(folder: &Path) -> bool {
    files_of(folder).keys().any(|path| path.extension().is_some_and(|ending| ending == "vhd-intent"))
}

fn said<T>(result: &Result<T, Error>) -> String {
    result.as_ref().map_or_else(ToString::to_string, |_| "done".to_owned())
}

/// The states that a pair may leave, each with which of both were done.
struct Orders(Vec<([bool; 2], State)>);

impl Orders {
    fn of(place: &Place, [first, second]: [&Operation; 2]) -> Self {
        let (none, one, other) = (place.in_turn(&[]), place.in_turn(&[first]), place.in_turn(&[second]));
        let (ab, ba) = (place.in_turn(&[first, second]), place.in_turn(&[second, first]));
        let same = if first.name == second.name { Some(([one.0[0]; 2], one.1.clone())) } else { None };
        // Of two that are the same the one may finish what the other began.
        Self(
            same.into_iter()
                .chain([
                    ([false, false], none.1),
                    ([one.0[0], false], one.1),
                    ([false, other.0[0]], other.1),
                    ([ab.0[0], ab.0[1]], ab.1),
                    ([ba.0[1], ba.0[0]], ba.1),
                ])
                .collect(),
        )
    }

    fn judge(&self, (first, second): Outcome, state: &State) -> Result<(), String> {
        let done = [first != First::Refused, second != Second::Refused];
        let fitting: Vec<_> = self.0.iter().filter(|(what, _)| *what == done).collect();
        if fitting.iter().any(|(_, expected)| expected == state) {
            return Ok(());
        }
        let orders = fitting.iter().map(|(_, expected)| differences(expected, state));
        Err(format!("of no order: {:?}", orders.collect::<Vec<_>>()))
    }
}

/// What is not as it should be, by file.
fn differences(expected: &State, found: &State) -> Vec<String> {
    let names: BTreeSet<_> = expected.keys().chain(found.keys()).collect();
    let show = |seen: Option<&Seen>| match seen {
        None => "nothing".to_owned(),
        Some(Seen::Disk(bytes)) => format!("a disk of {} bytes", bytes.len()),
        Some(other) => format!("{other:?}"),
    };
    let differ = names.into_iter().filter(|name| expected.get(*name) != found.get(*name));
    differ.map(|name| format!("{}: {}, expected {}", name.display(), show(found.get(name)), show(expected.get(name)))).collect()
}

/// Changes that an operation asks its host for.
fn changes_of(place: &Place, operation: &Operation) -> usize {
    let folder = place.folder();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let host = FaultHost::new(usize::MAX, false, false).calling_at_changes(move || {
        counted.fetch_add(1, Ordering::SeqCst);
    });
    (operation.run)(folder.path(), &ChainOptions { host: Arc::new(host), ..options(false) }).map(drop).unwrap_or_default();
    count.load(Ordering::SeqCst)
}

/// Some of the moments, others for each seed and pair; the first and the last among them.
fn some_of(moments: usize, seed: u64) -> BTreeSet<usize> {
    let mut random = seed;
    let mut chosen = BTreeSet::from([1, moments]);
    while chosen.len() < SOME.min(moments) {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        chosen.insert(1 + (random >> 33) as usize % moments);
    }
    chosen
}

/// What may come of a pair, as the page has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Both,
    Refused,
    /// One or the other, by the moment.
    Either,
    /// The first is refused at some moment, as the second came before it had what it needs.
    GivesWay,
}

const CLASSES: [Class; 4] = [Class::Both, Class::Refused, Class::Either, Class::GivesWay];

impl Class {
    fn of(outcomes: &BTreeSet<Outcome>) -> Self {
        let is_done = |(_, second): &Outcome| *second == Second::Done;
        match outcomes {
            _ if outcomes.iter().any(|(first, _)| *first != First::Done) => Self::GivesWay,
            _ if outcomes.iter().all(is_done) => Self::Both,
            _ if outcomes.iter().any(is_done) => Self::Either,
            _ => Self::Refused,
        }
    }

    /// Whether what was seen at some moments is of this class.
    fn holds(self, seen: Self) -> bool {
        self == seen || self == Self::GivesWay || self == Self::Either && seen != Self::GivesWay
    }
}

/// The page's table: for each operation, what others may do while it is under way.
fn table(operations: &[Operation], outcomes: &Outcomes) -> String {
    let mut text = String::from(
        "\n| while this is under way | these are done | refused | by the moment done or refused | make it give way |\n",
    );
    text.push_str("|---|---|---|---|---|\n");
    for (a, first) in operations.iter().enumerate() {
        let of_class = |class: Class| {
            let seconds = operations
                .iter()
                .enumerate()
                .filter(|(b, _)| outcomes.get(&(a, *b)).is_some_and(|outcomes| Class::of(outcomes) == class));
            let names: Vec<_> = seconds.map(|(_, second)| second.name).collect();
            if names.is_empty() { "–".to_owned() } else { names.join("; ") }
        };
        if outcomes.keys().any(|(first, _)| *first == a) {
            let cells = CLASSES.map(of_class);
            let _ = writeln!(text, "| **{}** | {} |", first.name, cells.join(" | "));
        }
    }
    text.push('\n');
    text
}

/// Compares the page with what was found, or writes it anew.
fn compare_page(operations: &[Operation], outcomes: &Outcomes, all: bool) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/concurrency.md");
    let page = fs::read_to_string(&path).unwrap();
    let (head, rest) = page.split_once("<!-- pairs -->\n").unwrap();
    let (old, tail) = rest.split_once("<!-- end -->").unwrap();
    let advice = "PAIRS_UPDATE=1 VHD_PAIRS_ALL=1 writes docs/concurrency.md anew";
    if all {
        let new = table(operations, outcomes);
        if std::env::var_os("PAIRS_UPDATE").is_some() {
            fs::write(&path, format!("{head}<!-- pairs -->\n{new}<!-- end -->{tail}")).unwrap();
        } else {
            assert!(old == new, "{advice}:\n{new}");
        }
        return;
    }
    for ((a, b), seen) in outcomes {
        let (first, second) = (operations[*a].name, operations[*b].name);
        let row =
            old.lines().find(|line| line.starts_with(&format!("| **{first}** |"))).unwrap_or_else(|| panic!("{advice}: {first}"));
        let cells = row.split(" | ").skip(1).map(|cell| cell.trim_end_matches(" |").split("; ").collect::<Vec<_>>());
        let said = cells.zip(CLASSES).find(|(cell, _)| cell.contains(&second)).map(|(_, class)| class);
        let found = Class::of(seen);
        assert!(said.is_some_and(|said| said.holds(found)), "{advice}: {first} / {second} is {found:?}, there {said:?}");
    }
}

#[test]
fn two_operations_at_once_are_two_in_some_order_or_one() {
    let seed: u64 = std::env::var("VHD_PAIRS_SEED").map_or(1, |seed| seed.parse().unwrap());
    let all = std::env::var_os("VHD_PAIRS_ALL").is_some();
    let only = std::env::var("VHD_PAIRS_ONLY").unwrap_or_default();
    let operations = operations();
    let mut outcomes = Outcomes::new();
    let (mut runs, mut wrong) = (0, BTreeMap::<(&str, &str), Vec<String>>::new());
    for (a, first) in operations.iter().enumerate() {
        for (b, second) in operations.iter().enumerate() {
            let is_meant = format!("{} / {}", first.name, second.name).contains(&only);
            let Some(place) = is_meant.then(|| Place::new(first, second)).flatten() else { continue };
            let moments = changes_of(&place, first);
            if moments == 0 {
                continue;
            }
            let orders = Orders::of(&place, [first, second]);
            let chosen = if all { (1..=moments).collect() } else { some_of(moments, seed + (a * 100 + b) as u64) };
            for moment in chosen {
                let Some((outcome, state, told)) = at_moment(&place, [first, second], moment) else { continue };
                runs += 1;
                outcomes.entry((a, b)).or_default().insert(outcome);
                if let Err(error) = state.and_then(|state| orders.judge(outcome, &state)) {
                    let error = format!("change {moment} of {moments}: {told}: {error}");
                    wrong.entry((first.name, second.name)).or_default().push(error);
                }
            }
        }
    }
    println!("{runs} times one operation came within another, of {} pairs", outcomes.len());
    for ((first, second), errors) in &wrong {
        println!("{first} / {second}: {} times, as {}", errors.len(), errors[0]);
    }
    assert!(wrong.is_empty(), "VHD_PAIRS_SEED={seed}: {:?}", wrong.keys());
    if only.is_empty() {
        compare_page(&operations, &outcomes, all);
    }
}
