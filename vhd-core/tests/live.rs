//! Goal: a disk gets new leaves and other sizes while it is read and written, and nobody notices but by the files.
//!
//! Method: threads that write counters, each to sectors of its own, while snapshots are made; afterwards each frozen image
//! must hold what had been written when its snapshot began, nothing that was written after it ended, and check clean.
//! It would fail if a write were lost, went to a frozen image, or came between the images of one instant.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use vhd_core::chain::ChainOptions;
use vhd_core::image::NewKind;
use vhd_core::live::{LiveDisk, NewLeaf, snapshot_all};
use vhd_core::ops::check::{CheckOptions, check};
use vhd_core::ops::undo;
use vhd_core::storage::FileStorage;
use vhd_core::{Disk, ErrorKind};
use vhd_testkit::fault_host::FaultHost;

use self::support::{assert_error, child_options, files_of, new_image, open, options};

const MIB: u64 = 1 << 20;
const WRITERS: u64 = 4;
/// Bytes from a writer's first sector to its next, so that blocks are allocated all the time.
const STRIDE: u64 = 256 << 10;

fn live(path: &Path) -> LiveDisk {
    LiveDisk::open(path, &options(true)).unwrap()
}

/// Writes a counter into the writer's sector of this turn.
fn count(disk: &Disk, writer: u64, value: u64) {
    disk.write_at(&value.to_be_bytes().repeat(64), place(writer, value)).unwrap();
}

fn place(writer: u64, value: u64) -> u64 {
    (value % 16) * STRIDE + writer * 512
}

/// The highest counter of a writer.
fn counter(disk: &Disk, writer: u64) -> u64 {
    let read = |turn| {
        let mut sector = [0; 512];
        disk.read_at(&mut sector, place(writer, turn)).unwrap();
        let (words, _) = sector.as_chunks::<8>();
        assert!(words.iter().all(|word| word == &words[0]), "a torn sector");
        u64::from_be_bytes(words[0])
    };
    (0..16).map(read).max().unwrap()
}

fn assert_clean(path: &Path) {
    let file = FileStorage::open(path, false).unwrap();
    let report = check(&file, path, &CheckOptions { deep: true, ..CheckOptions::default() }).unwrap();
    assert!(report.ok(), "{report:?}");
}

#[test]
fn a_snapshot_under_load_is_a_moment() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.vhd");
    new_image(&base, NewKind::Dynamic, 8 * MIB, 512 << 10);
    let live = live(&base);
    let counts: Vec<AtomicU64> = (0..WRITERS).map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    let mut frozen: Vec<(PathBuf, Vec<u64>, Vec<u64>)> = Vec::new();
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (disk, counts, stop) = (live.disk(), &counts, &stop);
            scope.spawn(move || {
                for value in 1.. {
                    count(&disk, writer, value);
                    counts[writer as usize].store(value, Ordering::SeqCst);
                    assert!(value % 64 > 0 || counter(&disk, writer) == value);
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                }
            });
        }
        for turn in 0..12 {
            thread::sleep(std::time::Duration::from_millis(20));
            let old = live.leaf();
            let now = || counts.iter().map(|count| count.load(Ordering::SeqCst)).collect::<Vec<_>>();
            let before = now();
            live.snapshot(&folder.path().join(format!("leaf{turn}.vhd")), &child_options()).unwrap();
            // A write that is not answered yet may be in it.
            frozen.push((old, before, now().iter().map(|count| count + 1).collect()));
        }
        stop.store(true, Ordering::SeqCst);
    });
    let last = live.leaf();
    for writer in 0..WRITERS {
        assert_eq!(counter(&live.disk(), writer), counts[writer as usize].load(Ordering::SeqCst));
    }
    live.disk().close().unwrap();
    drop(live);
    for (path, before, after) in &frozen {
        let disk = open(path, false);
        for writer in 0..WRITERS {
            let found = counter(&disk, writer);
            let (low, high) = (before[writer as usize], after[writer as usize]);
            assert!((low..=high).contains(&found), "{}: {found}, expected {low} to {high}", path.display());
        }
        assert_clean(path);
    }
    assert_clean(&last);
    assert_eq!(open(&last, false).capabilities().layers, 13);
}

#[test]
fn snapshots_of_several_disks_are_one_instant() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let disks: Vec<LiveDisk> = ["a.vhd", "b.vhd"]
        .iter()
        .map(|name| {
            new_image(&path(name), NewKind::Dynamic, 8 * MIB, 512 << 10);
            live(&path(name))
        })
        .collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let handles: Vec<Disk> = disks.iter().map(LiveDisk::disk).collect();
            for value in 1.. {
                handles.iter().for_each(|disk| count(disk, 0, value));
                if stop.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
        for turn in 0..10 {
            thread::sleep(std::time::Duration::from_millis(10));
            let leaf = |name: &str, disk| NewLeaf { disk, path: path(&format!("{name}{turn}.vhd")), options: child_options() };
            snapshot_all(&[leaf("a", &disks[0]), leaf("b", &disks[1])]).unwrap();
        }
        stop.store(true, Ordering::SeqCst);
    });
    drop(disks);
    let pair = |a: &str, b: &str| {
        let (a, b) = (counter(&open(&path(a), false), 0), counter(&open(&path(b), false), 0));
        assert!(a == b || a == b + 1, "{a} and {b} are not of one instant");
    };
    pair("a.vhd", "b.vhd");
    (0..10).for_each(|turn| pair(&format!("a{turn}.vhd"), &format!("b{turn}.vhd")));
}

#[test]
fn a_snapshot_that_fails_leaves_all_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a.vhd"), folder.path().join("b.vhd"));
    for path in [&a, &b] {
        new_image(path, NewKind::Dynamic, 8 * MIB, 512 << 10);
    }
    let (first, second) = (live(&a), live(&b));
    count(&first.disk(), 0, 1);
    first.disk().flush().unwrap();
    let before = files_of(folder.path());
    let new = |disk, path: &str| NewLeaf { disk, path: folder.path().join(path), options: child_options() };
    let error = snapshot_all(&[new(&first, "a1.vhd"), new(&second, "b.vhd")]).unwrap_err();
    assert_error(&error, ErrorKind::Exists, "b.vhd");
    let error = first.snapshot(&folder.path().join("missing/a1.vhd"), &child_options()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let twice = snapshot_all(&[new(&first, "a1.vhd"), new(&first, "a2.vhd")]).unwrap_err();
    assert_eq!(twice.kind(), ErrorKind::InvalidInput);
    assert_eq!(files_of(folder.path()).keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
    // It is still written, and still nobody else's.
    count(&first.disk(), 0, 2);
    assert_eq!(counter(&first.disk(), 0), 2);
    assert_eq!(Disk::open(&a, &options(false)).unwrap_err().kind(), ErrorKind::Locked);
    first.snapshot(&folder.path().join("a1.vhd"), &child_options()).unwrap();
    assert_eq!(counter(&open(&a, false), 0), 2);
}

#[test]
fn a_frozen_image_may_be_read_by_all_and_written_by_none() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.vhd");
    new_image(&base, NewKind::Fixed { preallocate: false }, 8 * MIB, 512 << 10);
    let live = live(&base);
    count(&live.disk(), 0, 7);
    live.snapshot(&folder.path().join("leaf.vhd"), &child_options()).unwrap();
    let frozen = std::fs::read(&base).unwrap();
    count(&live.disk(), 0, 8);
    let mut forced = options(true);
    forced.image.force = true;
    assert_eq!(Disk::open(&base, &forced).unwrap_err().kind(), ErrorKind::Locked);
    assert_eq!(counter(&open(&base, false), 0), 7);
    live.disk().close().unwrap();
    drop(live);
    assert!(std::fs::read(&base).unwrap() == frozen, "a parent was written");
    assert_eq!(counter(&open(&folder.path().join("leaf.vhd"), false), 0), 8);
}

#[test]
fn what_can_have_no_snapshot_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.vhd");
    new_image(&base, NewKind::Dynamic, 8 * MIB, 512 << 10);
    let reader = LiveDisk::open(&base, &options(false)).unwrap();
    let error = reader.snapshot(&folder.path().join("leaf.vhd"), &child_options()).unwrap_err();
    assert_error(&error, ErrorKind::ReadOnly, "read-only");
    drop(reader);
    undo::start(std::slice::from_ref(&base), None, &ChainOptions::default()).unwrap();
    let error = live(&folder.path().join("base.vud")).snapshot(&folder.path().join("leaf.vhd"), &child_options());
    assert_error(&error.unwrap_err(), ErrorKind::Refused, "undo disk");
}

#[test]
fn a_disk_in_use_gets_another_size() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.vhd");
    new_image(&base, NewKind::Dynamic, 8 * MIB, 512 << 10);
    let live = live(&base);
    let old = live.disk();
    count(&old, 0, 1);
    live.grow(64 * MIB - 1).unwrap();
    assert_eq!((old.size(), live.disk().size()), (8 * MIB, 64 * MIB));
    count(&old, 0, 2);
    live.disk().write_at(b"beyond", 60 * MIB).unwrap();
    assert_error(&live.grow(MIB).unwrap_err(), ErrorKind::Refused, "only made larger");
    assert_eq!(live.grow(0).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(counter(&live.disk(), 0), 2, "a change that failed lost the disk");
    live.grow(64 * MIB).unwrap();
    drop((live, old));
    assert_eq!((open(&base, false).size(), counter(&open(&base, false), 0)), (64 * MIB, 2));
    assert_clean(&base);
}

#[test]
fn a_snapshot_is_made_over_what_is_durable_or_not_at_all() {
    let mut failed = 0;
    for at in 1.. {
        let folder = tempfile::tempdir().unwrap();
        let (base, leaf) = (folder.path().join("base.vhd"), folder.path().join("leaf.vhd"));
        new_image(&base, NewKind::Dynamic, 8 * MIB, 512 << 10);
        let host = FaultHost::new(at, false, false);
        let Ok(live) = LiveDisk::open(&base, &ChainOptions { host: Arc::new(host.clone()), ..options(true) }) else { continue };
        if live.disk().write_at(&[7; 512], 0).is_err() {
            continue;
        }
        let made = live.snapshot(&leaf, &child_options());
        let mut found = [0; 512];
        live.disk().read_at(&mut found, 0).unwrap();
        assert_eq!(found, [7; 512]);
        match made {
            Ok(_) => assert_eq!(live.leaf(), leaf),
            Err(error) => {
                failed += 1;
                assert!(error.path().is_some() && !leaf.exists() && live.leaf() == base, "change {at}: {error}");
            }
        }
        if !host.has_failed() {
            break;
        }
    }
    assert!(failed >= 3, "only {failed} changes of a snapshot can fail");
}
