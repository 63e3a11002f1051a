//! Goal: an operation of which a write, a sync or a change of a name fails says so, has lost nothing, and is finished by the
//! same call.
//!
//! Method: each operation on real files whose k-th change fails, once and for ever, for k = 1, 2, … until none does; for
//! want of space and because the medium is broken; and interrupted after every few bytes. Afterwards the disk reads as before or as it should, or refuses with
//! the command that goes on; then the same call is made on a host that works.
//! It would fail if an operation ended well although something was not done, or could not go on from where it failed.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

#[path = "support/damages.rs"]
mod damages;
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhd_core::chain::{ChainOptions, create_child};
use vhd_core::format::{Creator, DiskType, Timestamp};
use vhd_core::image::{CreateOptions, NewKind, create_file_on};
use vhd_core::ops::compact::{CompactOptions, compact};
use vhd_core::ops::in_place::{InPlaceOptions, convert_in_place};
use vhd_core::ops::merge::{MergeOptions, execute, plan};
use vhd_core::ops::repair::{RepairMode, repair};
use vhd_core::ops::reparent::reparent;
use vhd_core::ops::resize::{ResizeOptions, resize};
use vhd_core::ops::undo;
use vhd_core::{Disk, Error, ErrorKind, Progress};
use vhd_testkit::fault_host::FaultHost;

use self::support::{child_options, files_of, new_child, new_image, open, options};

const BLOCK: u64 = 4096;
const SIZE: u64 = 12 * BLOCK;

/// An operation: what it needs, what it does, and the image whose content counts.
struct Operation {
    name: &'static str,
    make: fn(&Path),
    run: fn(&Path, &ChainOptions, &Progress) -> Result<(), Error>,
    image: &'static str,
}

fn disk(folder: &Path) -> PathBuf {
    folder.join("disk.vhd")
}

fn fill(path: &Path, byte: u8, blocks: impl IntoIterator<Item = u64>) {
    let disk = open(path, true);
    blocks.into_iter().for_each(|block| disk.write_at(&[byte + block as u8; 3000], block * BLOCK).unwrap());
    disk.close().unwrap();
}

fn dynamic(folder: &Path) {
    new_image(&disk(folder), NewKind::Dynamic, SIZE, BLOCK as u32);
    fill(&disk(folder), 1, [7, 0, 3, 9, 5]);
    let opened = open(&disk(folder), true);
    opened.write_at(&[0; BLOCK as usize], 0).unwrap();
    opened.write_at(&[0; BLOCK as usize], 3 * BLOCK).unwrap();
    opened.close().unwrap();
}

fn fixed(folder: &Path) {
    new_image(&disk(folder), NewKind::Fixed { preallocate: false }, SIZE, BLOCK as u32);
    fill(&disk(folder), 1, [7, 0, 3, 9]);
}

fn chain(folder: &Path) {
    dynamic(folder);
    new_child(&folder.join("mid.vhd"), &disk(folder));
    fill(&folder.join("mid.vhd"), 50, [1, 3]);
    new_child(&folder.join("leaf.vhd"), &folder.join("mid.vhd"));
    fill(&folder.join("leaf.vhd"), 90, [3, 11]);
    new_child(&folder.join("grand.vhd"), &folder.join("leaf.vhd"));
}

fn damaged(folder: &Path) {
    let case = damages::cases().into_iter().find(|case| case.name == "both checksums").unwrap();
    std::fs::write(disk(folder), case.bytes).unwrap();
}

fn started(folder: &Path) {
    dynamic(folder);
    undo::start(&[disk(folder)], None, &options(false)).unwrap();
    fill(&folder.join("disk.vud"), 70, [2, 7]);
}

fn two_parents(folder: &Path) {
    dynamic(folder);
    new_child(&folder.join("child.vhd"), &disk(folder));
    fill(&folder.join("child.vhd"), 30, [4]);
    std::fs::create_dir(folder.join("sub")).unwrap();
    std::fs::copy(disk(folder), folder.join("sub/moved, with a longer name than the one before.vhd")).unwrap();
}

fn create(folder: &Path, on: &ChainOptions, _: &Progress) -> Result<(), Error> {
    let options = CreateOptions {
        kind: NewKind::Dynamic,
        size: SIZE,
        block_size: BLOCK as u32,
        uuid: [7; 16],
        creator: Creator::WINDOWS_10,
        timestamp: Timestamp(0),
    };
    create_file_on(&*on.host, &disk(folder), &options, true).map(drop)
}

fn convert(folder: &Path, to: DiskType, on: &ChainOptions, progress: &Progress) -> Result<(), Error> {
    let how = InPlaceOptions { block_size: BLOCK as u32, piece: 5 * BLOCK, ..InPlaceOptions::new(to) };
    convert_in_place(&disk(folder), &how, on, progress).map(drop)
}

fn to_size(folder: &Path, size: u64, on: &ChainOptions, progress: &Progress) -> Result<(), Error> {
    let how = ResizeOptions { shrink: true, discard_data: true, ..ResizeOptions::default() };
    resize(&disk(folder), size, &how, on, progress).map(drop)
}

fn merge(folder: &Path, on: &ChainOptions, progress: &Progress) -> Result<(), Error> {
    let how = MergeOptions { into: Some(disk(folder)), delete: true, ..MergeOptions::default() };
    execute(&plan(&folder.join("leaf.vhd"), &how, on)?, &how, on, progress)
}

fn operations() -> Vec<Operation> {
    let operation = |name, make, run, image| Operation { name, make, run, image };
    vec![
        operation("create", |_| (), create, "disk.vhd"),
        operation(
            "snapshot",
            dynamic,
            |folder, on, _| create_child(&folder.join("child.vhd"), &disk(folder), &child_options(), on).map(drop),
            "child.vhd",
        ),
        operation(
            "compact",
            dynamic,
            |folder, on, progress| {
                compact(&disk(folder), &CompactOptions::default(), &mut |_| Ok(Vec::new()), on, progress).map(drop)
            },
            "disk.vhd",
        ),
        operation("merge", chain, merge, "grand.vhd"),
        operation("grow", dynamic, |folder, on, progress| to_size(folder, 2000 * BLOCK, on, progress), "disk.vhd"),
        operation("shrink", dynamic, |folder, on, progress| to_size(folder, 8 * BLOCK, on, progress), "disk.vhd"),
        operation("grow a fixed disk", fixed, |folder, on, progress| to_size(folder, 20 * BLOCK, on, progress), "disk.vhd"),
        operation("shrink a fixed disk", fixed, |folder, on, progress| to_size(folder, 8 * BLOCK, on, progress), "disk.vhd"),
        operation("to dynamic", fixed, |folder, on, progress| convert(folder, DiskType::Dynamic, on, progress), "disk.vhd"),
        operation("to fixed", dynamic, |folder, on, progress| convert(folder, DiskType::Fixed, on, progress), "disk.vhd"),
        operation(
            "repair",
            damaged,
            |folder, on, progress| repair(&disk(folder), RepairMode::All, false, on, progress).map(drop),
            "disk.vhd",
        ),
        operation("undo start", dynamic, |folder, on, _| undo::start(&[disk(folder)], None, on).map(drop), "disk.vhd"),
        operation(
            "undo commit",
            started,
            |folder, on, progress| undo::commit(&[disk(folder)], None, false, on, progress),
            "disk.vhd",
        ),
        operation("undo discard", started, |folder, on, _| undo::discard(&[disk(folder)], None, false, on).map(drop), "disk.vhd"),
        operation(
            "reparent",
            two_parents,
            |folder, on, _| {
                let parent = folder.join("sub/moved, with a longer name than the one before.vhd");
                reparent(&folder.join("child.vhd"), &parent, false, false, on).map(drop)
            },
            "child.vhd",
        ),
    ]
}

/// What a guest sees; `None` where there is no image, or none that opens without a repair.
fn seen(folder: &Path, image: &str) -> Result<Option<Vec<u8>>, Error> {
    if !folder.join(image).exists() {
        return Ok(None);
    }
    let disk = match Disk::open(&folder.join(image), &options(false)) {
        Err(error) if error.kind() == ErrorKind::Corrupt => return Ok(None),
        opened => opened?,
    };
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(&mut bytes, 0).map(|()| Some(bytes))
}

fn names(folder: &Path) -> Vec<PathBuf> {
    files_of(folder).into_keys().map(|path| path.strip_prefix(folder).unwrap().to_owned()).collect()
}

fn made(operation: &Operation) -> tempfile::TempDir {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    (operation.make)(folder.path());
    folder
}

/// What the operation leaves when nothing fails.
struct Outcome {
    before: Option<Vec<u8>>,
    after: Option<Vec<u8>>,
    names: Vec<PathBuf>,
}

/// How a change fails.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Once,
    ForEver,
    NoSpaceOnce,
    NoSpaceForEver,
    /// A sync loses what was written since the last one, and the next succeeds.
    SyncLoses,
}

const FAULTS: [Fault; 5] = [Fault::Once, Fault::ForEver, Fault::NoSpaceOnce, Fault::NoSpaceForEver, Fault::SyncLoses];

impl Fault {
    fn host(self, at: usize) -> FaultHost {
        match self {
            Self::Once => FaultHost::new(at, false, false),
            Self::ForEver => FaultHost::new(at, true, false),
            Self::NoSpaceOnce => FaultHost::new(at, false, true),
            Self::NoSpaceForEver => FaultHost::new(at, true, true),
            Self::SyncLoses => FaultHost::losing(at),
        }
    }
}

/// Fails unless the error says in one line which file it is about, and where in it a write failed. (Where everything fails from
/// then on, what cleans up may be told of.)
fn judge_error(error: &Error, host: &FaultHost, fault: Fault) -> Result<(), String> {
    let text = error.to_string();
    let Some(path) = error.path().filter(|_| !text.chars().any(char::is_control)) else {
        return Err(format!("the error names no file: {text}"));
    };
    // Records and journals are written in one go. (Where a journal has no room the image can't be repaired.)
    let is_image = path.extension().is_some_and(|extension| extension == "vhd" || extension == "vud")
        && !text.contains("is kept beside it first");
    let is_one = !matches!(fault, Fault::ForEver | Fault::NoSpaceForEver);
    match host.failed_at() {
        Some(at) if is_image && is_one && !text.contains(&format!("{at:#x}")) => {
            Err(format!("the error names no offset, {at:#x}: {text}"))
        }
        _ => Ok(()),
    }
}

fn outcome_of(operation: &Operation) -> Outcome {
    let folder = made(operation);
    let before = seen(folder.path(), operation.image).unwrap();
    (operation.run)(folder.path(), &options(false), &Progress::default()).unwrap();
    let after = seen(folder.path(), operation.image).unwrap();
    Outcome { before, after, names: names(folder.path()) }
}

/// Lets change number `at` fail. False when there are not so many.
fn with_fault(operation: &Operation, expected: &Outcome, at: usize, fault: Fault) -> Result<bool, String> {
    let folder = made(operation);
    let (folder, image) = (folder.path(), operation.image);
    let host = fault.host(at);
    let failing = ChainOptions { host: Arc::new(host.clone()), ..options(false) };
    let result = (operation.run)(folder, &failing, &Progress::default());
    if !host.has_failed() {
        return Ok(false);
    }
    match (seen(folder, image), &result) {
        (Ok(found), Ok(())) if found != expected.after => return Err("ended well, and is not done".into()),
        (Ok(found), _) if found != expected.before && found != expected.after => return Err("reads something else".into()),
        (Err(error), _) if !error.to_string().contains("vhd ") => return Err(format!("does not open: {error}")),
        _ => {}
    }
    if let Err(error) = &result {
        judge_error(error, &host, fault)?;
    }
    // What was done already, but for the answer, can't be done again.
    if let Err(error) = (operation.run)(folder, &options(false), &Progress::default())
        && (seen(folder, image).ok() != Some(expected.after.clone()) || names(folder) != expected.names)
    {
        return Err(format!("does not go on: {error}, after {result:?}"));
    }
    match seen(folder, image) {
        Ok(found) if found == expected.after && names(folder) == expected.names => Ok(true),
        Ok(found) => Err(format!("is not done: {} {:?}", found == expected.after, names(folder))),
        Err(error) => Err(format!("is not done: {error}")),
    }
}

#[test]
fn an_operation_whose_change_fails_loses_nothing_and_goes_on() {
    let mut wrong = Vec::new();
    for operation in operations() {
        let expected = outcome_of(&operation);
        let mut positions = 0;
        for fault in FAULTS {
            for at in 1.. {
                match with_fault(&operation, &expected, at, fault) {
                    Ok(true) => positions += 1,
                    Ok(false) => break,
                    Err(what) => wrong.push(format!("{}: change {at}, {fault:?}: {what}", operation.name)),
                }
            }
        }
        println!("fault positions, {}: {positions}", operation.name);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Interrupts the operation after so many bytes. False when it does not have so many.
fn with_interruption(operation: &Operation, expected: &Outcome, bytes: u64) -> Result<bool, String> {
    let folder = made(operation);
    let (folder, image) = (folder.path(), operation.image);
    let progress = Progress::default();
    progress.cancel_after(bytes);
    match (operation.run)(folder, &options(false), &progress) {
        Ok(()) => return Ok(false),
        Err(error) if error.kind() != ErrorKind::Cancelled => return Err(error.to_string()),
        Err(_) => {}
    }
    match seen(folder, image) {
        Ok(found) if found != expected.before && found != expected.after => return Err("reads something else".into()),
        Err(error) if !error.to_string().contains("vhd ") => return Err(format!("does not open: {error}")),
        _ => {}
    }
    (operation.run)(folder, &options(false), &Progress::default()).map_err(|error| format!("does not go on: {error}"))?;
    match seen(folder, image) {
        Ok(found) if found == expected.after && names(folder) == expected.names => Ok(true),
        found => Err(format!("is not done: {:?}, {:?}", found.map(|_| ()), names(folder))),
    }
}

#[test]
fn an_operation_that_is_interrupted_loses_nothing_and_goes_on() {
    // What moves no data is done before anyone could interrupt it.
    let at_once =
        ["create", "snapshot", "shrink", "grow a fixed disk", "shrink a fixed disk", "undo start", "undo discard", "reparent"];
    let mut wrong = Vec::new();
    for operation in operations().into_iter().filter(|operation| !at_once.contains(&operation.name)) {
        let expected = outcome_of(&operation);
        let mut times = 0;
        for bytes in (0..).step_by(700) {
            match with_interruption(&operation, &expected, bytes) {
                Ok(true) => times += 1,
                Ok(false) => break,
                Err(what) => wrong.push(format!("{}: after {bytes} bytes: {what}", operation.name)),
            }
        }
        println!("{}: interrupted {times} times", operation.name);
        if times == 0 {
            wrong.push(format!("{}: can't be interrupted", operation.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
