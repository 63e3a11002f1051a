//! Goal: an operation that would destroy what someone relies on is refused, and nothing is changed; the user may insist.
//!
//! Method: each operation that changes images, on one that a saved state relies on, on one with a child, and on one that
//! someone has open.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::path::Path;

use vhd_core::format::DiskType;
use vhd_core::image::NewKind;
use vhd_core::ops::compact::{CompactOptions, compact};
use vhd_core::ops::in_place::{InPlaceOptions, convert_in_place};
use vhd_core::ops::merge::{MergeOptions, execute, plan};
use vhd_core::ops::repair::{RepairMode, repair};
use vhd_core::ops::reparent::reparent;
use vhd_core::ops::resize::{ResizeOptions, resize};
use vhd_core::ops::{saved_state, undo};
use vhd_core::storage::{FileStorage, LockMode};
use vhd_core::{Error, ErrorKind, LiveDisk, Progress};
use vhd_testkit::fixture::{BlockFill, FixtureSpec, Kind, Layout};

use self::support::{files_of, new_child, new_image, open, options, read_all};

const SIZE: u64 = 64 << 10;

/// An operation on `disk.vhd` of a folder; `bool` is force.
type Operation = fn(&Path, bool) -> Result<(), Error>;

const COMPACT: Operation = |path, force| {
    let how = CompactOptions { force, ..CompactOptions::default() };
    compact(path, &how, &mut |_| Ok(Vec::new()), &options(false), &Progress::default()).map(drop)
};
const RESIZE: Operation = |path, force| {
    let how = ResizeOptions { force, ..ResizeOptions::default() };
    resize(path, 2 * SIZE, &how, &options(false), &Progress::default()).map(drop)
};
const CONVERT: Operation = |path, force| {
    let how = InPlaceOptions { force, ..InPlaceOptions::new(DiskType::Fixed) };
    convert_in_place(path, &how, &options(false), &Progress::default()).map(drop)
};
/// Of the child that is beside it.
const MERGE: Operation = |path, force| {
    let how = MergeOptions { force, ..MergeOptions::default() };
    let child = path.with_file_name("child.vhd");
    execute(&plan(&child, &how, &options(false))?, &how, &options(false), &Progress::default())
};

/// A disk of another creator, in which a saved state may be noted.
fn disk(folder: &Path, saved_state: u8) -> std::path::PathBuf {
    let path = folder.join("disk.vhd");
    let spec = FixtureSpec { saved_state, block_size: 4096, ..FixtureSpec::new(Kind::Dynamic, Layout::Classic, SIZE) };
    spec.block(2, BlockFill::tags(1, 1)).write_to(&path).unwrap();
    path
}

#[test]
fn what_a_saved_state_relies_on_changes_by_force_alone() {
    for (name, operation) in [("compact", COMPACT), ("resize", RESIZE), ("convert in place", CONVERT), ("merge", MERGE)] {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = disk(folder.path(), 1);
        if name == "merge" {
            new_child(&folder.path().join("child.vhd"), &path);
        }
        let before = files_of(folder.path());
        let error = operation(&path, false).expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Refused, "{name}: {error}");
        assert!(error.to_string().contains("saved state") && error.to_string().contains("--force"), "{name}: {error}");
        assert!(files_of(folder.path()) == before, "{name} changed something");
        operation(&path, true).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn the_mark_of_a_saved_state_keeps_all_but_its_owner_from_writing() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("disk.vhd");
    for kind in [NewKind::Dynamic, NewKind::Fixed { preallocate: false }] {
        let _ = std::fs::remove_file(&path);
        new_image(&path, kind, SIZE, 4096);
        let (before, time) = (std::fs::read(&path).unwrap(), path.metadata().unwrap().modified().unwrap());
        let disk = LiveDisk::open(&path, &options(true)).unwrap();
        disk.set_saved_state(true).unwrap();
        assert!(saved_state::of(&path, &options(false)).unwrap());
        assert_eq!(path.metadata().unwrap().modified().unwrap(), time, "it counts as changed");
        drop(disk);
        let error = LiveDisk::open(&path, &options(true)).unwrap_err();
        assert!(error.kind() == ErrorKind::Refused && error.to_string().contains("saved state"), "{error}");
        let mut own = options(true);
        own.image.owns_saved_state = true;
        let disk = LiveDisk::open(&path, &own).unwrap();
        disk.set_saved_state(false).unwrap();
        assert!(std::fs::read(&path).unwrap() == before, "more than the mark came and went");
        assert_eq!(path.metadata().unwrap().modified().unwrap(), time, "it counts as changed");
        // What is written later, a footer behind new blocks with it, does not bring the mark back.
        disk.disk().write_at(&[1; 512], SIZE - 4096).unwrap();
        disk.disk().close().unwrap();
        drop(disk);
        assert!(!saved_state::of(&path, &options(false)).unwrap());
        LiveDisk::open(&path, &options(true)).unwrap();
    }
}

#[test]
fn a_disk_that_is_open_read_only_is_not_marked_and_one_that_is_open_elsewhere_can_not_be() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = disk(folder.path(), 0);
    let before = std::fs::read(&path).unwrap();
    let reader = LiveDisk::open(&path, &options(false)).unwrap();
    reader.set_saved_state(true).unwrap();
    assert_eq!(saved_state::set(&path, true, &options(true)).unwrap_err().kind(), ErrorKind::Locked);
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn an_undo_disk_that_a_saved_state_relies_on_is_discarded_by_force_alone() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let images = [disk(folder.path(), 0)];
    undo::start(&images, None, &options(false)).unwrap();
    let undo_disk = folder.path().join("disk.vud");
    saved_state::set(&undo_disk, true, &options(true)).unwrap();
    let commit = |force| undo::commit(&images, None, force, &options(true), &Progress::default());
    for error in [commit(false).unwrap_err(), undo::discard(&images, None, false, &options(true)).unwrap_err()] {
        assert!(error.kind() == ErrorKind::Refused && error.to_string().contains("saved state"), "{error}");
    }
    undo::discard(&images, None, true, &options(true)).unwrap();
    assert!(!undo_disk.exists());
    // Nor is a session begun over a disk that one relies on.
    saved_state::set(&images[0], true, &options(true)).unwrap();
    let error = undo::start(&images, None, &options(false)).unwrap_err();
    assert!(error.kind() == ErrorKind::Refused && !undo_disk.exists(), "{error}");
    let mut forced = options(false);
    forced.image.force = true;
    undo::start(&images, None, &forced).unwrap();
}

#[test]
fn a_parent_changes_by_force_alone_where_its_children_would_notice() {
    for (name, operation) in [("compact", COMPACT), ("resize", RESIZE)] {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = disk(folder.path(), 0);
        new_child(&folder.path().join("child.vhd"), &path);
        let before = files_of(folder.path());
        let error = operation(&path, false).expect_err(name);
        assert!(error.kind() == ErrorKind::Refused && error.to_string().contains("child.vhd"), "{name}: {error}");
        assert!(files_of(folder.path()) == before, "{name} changed something");
    }
}

#[test]
fn a_parent_is_compacted_by_force_alone_and_without_its_free_space_for_nothing() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let (path, child) = (folder.path().join("disk.vhd"), folder.path().join("child.vhd"));
    new_image(&path, NewKind::Dynamic, SIZE, 4096);
    open(&path, true).write_at(&[7; 8192], 0).unwrap();
    new_child(&child, &path);
    // A file of the child's, of the same content as one that was deleted in the parent: the parent's copy is enough.
    open(&child, true).write_at(&[7; 4096], 0).unwrap();
    COMPACT(&child, false).unwrap();
    let compact = |free_space, force| {
        let how = CompactOptions { free_space, force, ..CompactOptions::default() };
        let free: Vec<_> = std::iter::once(0..4096).filter(|_| free_space).collect();
        compact(&path, &how, &mut |_| Ok(free.clone()), &options(false), &Progress::default())
    };
    let before = files_of(folder.path());
    for (free_space, said) in [(false, "read the same"), (true, "may need what --free-space drops")] {
        let error = compact(free_space, false).unwrap_err();
        assert!(error.kind() == ErrorKind::Refused && error.to_string().contains(said), "{error}");
    }
    assert!(files_of(folder.path()) == before);
    let content = read_all(&open(&child, false));
    compact(false, true).unwrap();
    assert!(read_all(&open(&child, false)) == content, "children read the same");
    compact(true, true).unwrap();
    assert!(read_all(&open(&child, false)) != content, "what it said it might do, it does not");
}

#[test]
fn what_is_open_elsewhere_is_left_alone() {
    let operations: [(&str, Operation); 8] = [
        ("compact", COMPACT),
        ("resize", RESIZE),
        ("convert in place", CONVERT),
        ("merge", MERGE),
        ("repair", |path, _| repair(path, RepairMode::All, false, &options(false), &Progress::default()).map(drop)),
        ("undo start", |path, _| undo::start(&[path.to_owned()], None, &options(false)).map(drop)),
        ("snapshot", |path, _| {
            let child = path.with_file_name("another.vhd");
            vhd_core::chain::create_child(&child, path, &support::child_options(), &options(false)).map(drop)
        }),
        ("reparent", |path, _| reparent(&path.with_file_name("child.vhd"), path, true, false, &options(false)).map(drop)),
    ];
    for (name, operation) in operations {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("disk.vhd");
        new_image(&path, NewKind::Dynamic, SIZE, 4096);
        open(&path, true).write_at(&[1; 512], 0).unwrap();
        if ["merge", "reparent"].contains(&name) {
            new_child(&folder.path().join("child.vhd"), &path);
        }
        let before = files_of(folder.path());
        let elsewhere = FileStorage::open(&path, true).unwrap();
        elsewhere.lock(LockMode::Write).unwrap();
        let error = operation(&path, true).expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Locked, "{name}: {error}");
        assert!(files_of(folder.path()) == before, "{name} changed something");
        drop(elsewhere);
        operation(&path, true).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}
