//! Goal: a new image is there whole or not at all, whatever happens while it is made, and what a killed process left is
//! cleaned up.
//!
//! Method: create, create over an old image, and snapshot (of a parent without an identifier, too) are recorded with names;
//! each state that a power cut may leave is put into a folder and looked at. Abandoned and living half-made files.
//! It would fail if the name were given before the content was durable: `every_barrier_is_needed` takes each away.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::path::Path;

use vhd_core::chain::{ChainOptions, create_child};
use vhd_core::format::{Creator, Timestamp};
use vhd_core::image::{CreateOptions, NewKind, create_file, create_file_on};
use vhd_core::storage::{FileStorage, LockMode};
use vhd_core::{Disk, ErrorKind};
use vhd_testkit::crash::Effort;
use vhd_testkit::fixture::{BlockFill, FixtureSpec, Kind, Layout};

use self::support::sabotage::{Barriers, Operation};
use self::support::{assert_error, child_options, files_of, new_image, open, options, read_all};

const SIZE: u64 = 10 * 4096;

fn how(uuid: u8) -> CreateOptions {
    CreateOptions {
        kind: NewKind::Dynamic,
        size: SIZE,
        block_size: 4096,
        uuid: [uuid; 16],
        creator: Creator::WINDOWS_10,
        timestamp: Timestamp(0),
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Case {
    New,
    Over,
    Snapshot,
    SnapshotOfNameless,
    /// Whose footer lies across two sectors.
    SnapshotOfUnaligned,
}

const CASES: [Case; 5] = [Case::New, Case::Over, Case::Snapshot, Case::SnapshotOfNameless, Case::SnapshotOfUnaligned];

/// The files that it begins with.
fn before(case: Case) -> tempfile::TempDir {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = |name: &str| folder.path().join(name);
    match case {
        Case::New => {}
        Case::Over => {
            create_file(&path("disk.vhd"), &how(1), false).unwrap();
            open(&path("disk.vhd"), true).write_at(&[1; 512], 0).unwrap();
        }
        Case::Snapshot | Case::SnapshotOfNameless | Case::SnapshotOfUnaligned => {
            let uuid = if case == Case::Snapshot { [9; 16] } else { [0; 16] };
            let spec = FixtureSpec { uuid, block_size: 4096, ..FixtureSpec::new(Kind::Dynamic, Layout::Classic, SIZE) };
            spec.block(2, BlockFill::tags(1, 1)).write_to(&path("base.vhd")).unwrap();
            if case == Case::SnapshotOfUnaligned {
                let mut bytes = std::fs::read(path("base.vhd")).unwrap();
                bytes.splice(bytes.len() - 512..bytes.len() - 512, [0; 100]);
                std::fs::write(path("base.vhd"), bytes).unwrap();
            }
        }
    }
    folder
}

/// Calls `visit` with each case.
fn operations(visit: &mut dyn FnMut(&Operation<'_>)) {
    for case in CASES {
        let folder = before(case);
        let base = folder.path().join("base.vhd");
        let base = base.exists().then(|| read_all(&open(&base, false)));
        let run = |folder: &Path, chain: &ChainOptions| {
            let disk = folder.join("disk.vhd");
            match case {
                Case::New | Case::Over => create_file_on(&*chain.host, &disk, &how(2), case == Case::Over),
                _ => create_child(&disk, &folder.join("base.vhd"), &child_options(), chain),
            }
            .unwrap();
        };
        let judge = |folder: &Path, done: bool| judge(case, folder, base.as_deref(), done);
        visit(&Operation::new(&format!("{case:?}"), folder, &run, &judge));
    }
}

fn judge(case: Case, folder: &Path, base: Option<&[u8]>, told: bool) -> Result<(), String> {
    let seen = |name: &str| -> Result<(Vec<u8>, [u8; 16]), String> {
        let opened =
            vhd_core::chain::Chain::open(&folder.join(name), &options(false)).map_err(|error| format!("{name}: {error}"))?;
        let uuid = opened.layers()[0].image().unwrap().footer().uuid();
        Ok((read_all(&Disk::new(opened)), uuid))
    };
    if let Some(base) = base
        && seen("base.vhd")?.0 != base
    {
        return Err("the parent reads something else".into());
    }
    let path = folder.join("disk.vhd");
    let found = path.exists().then(|| seen("disk.vhd")).transpose()?;
    match (case, found) {
        (Case::Over, None) => return Err("the old image is gone".into()),
        (Case::Over, Some((content, [1, ..]))) if !told && content[0] == 1 => {}
        (Case::New | Case::Over, Some((content, [2, ..]))) if content.iter().all(|byte| *byte == 0) => {}
        (Case::Snapshot | Case::SnapshotOfNameless | Case::SnapshotOfUnaligned, Some((content, _)))
            if Some(&*content) == base => {}
        (_, None) if !told => {}
        (_, found) => return Err(format!("neither old nor new: {:?}", found.map(|(_, uuid)| uuid))),
    }
    // A later run is not in the way of what is left, and cleans it up.
    let again = match case {
        Case::New | Case::Over => create_file(&path, &how(2), true),
        _ => create_child(
            &path,
            &folder.join("base.vhd"),
            &vhd_core::chain::ChildOptions { overwrite: true, ..child_options() },
            &options(false),
        ),
    };
    again.map_err(|error| format!("again: {error}"))?;
    seen("disk.vhd")?;
    let expected = if base.is_some() { 2 } else { 1 };
    match files_of(folder).len() {
        found if found == expected => Ok(()),
        _ => Err(format!("left: {:?}", files_of(folder).into_keys())),
    }
}

#[test]
fn a_power_cut_leaves_the_old_image_or_the_new() {
    operations(&mut |operation| {
        operation.enumerate(Effort { exhaustive: 8, samples: 20, seed: 1 });
    });
}

#[test]
fn every_barrier_is_needed() {
    let mut barriers = Barriers::default();
    operations(&mut |operation| {
        operation.sabotage(&mut barriers, Effort { exhaustive: 8, samples: 20, seed: 1 });
    });
    barriers.assert("create");
}

#[test]
fn what_a_killed_process_left_goes_and_what_a_living_one_makes_stays() {
    let folder = tempfile::tempdir().unwrap();
    let (path, passing) = (folder.path().join("disk.vhd"), folder.path().join(".disk.vhd.vhd-new"));
    std::fs::write(&passing, [7; 10_000]).unwrap();
    let living = FileStorage::open(&passing, true).unwrap();
    living.lock(LockMode::Write).unwrap();
    assert_error(&create_file(&path, &how(1), false).unwrap_err(), ErrorKind::Locked, "is being made by another process");
    assert_eq!(std::fs::read(&passing).unwrap(), [7; 10_000]);
    drop(living);
    create_file(&path, &how(1), false).unwrap();
    assert_eq!(files_of(folder.path()).into_keys().collect::<Vec<_>>(), [path]);
}

#[test]
fn a_long_name_is_no_obstacle_and_a_taken_one_is_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(format!("{}.vhd", "x".repeat(251)));
    create_file(&path, &how(1), false).unwrap();
    let before = files_of(folder.path());
    assert_error(&create_file(&path, &how(2), false).unwrap_err(), ErrorKind::Exists, "--overwrite");
    assert!(files_of(folder.path()) == before);
    new_image(&folder.path().join("other.vhd"), NewKind::Dynamic, SIZE, 4096);
}
