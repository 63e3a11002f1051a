//! Goal: a disk in use stays what its clients found, locked, whatever its names lead to and whatever fails while it changes.
//!
//! Method: each change (a look at the files again, another size, the note of a saved state, a snapshot) of each kind of image,
//! with each call to the host failing once or for ever; before each call another description of each file tries to open it
//! for writing. And with names that lead elsewhere: moved, replaced, removed, by hard links and by symbolic ones.
//! It would fail if a change closed or unlocked a file, looked for it by its name, or left clients without what they had.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use vhd_core::chain::{Chain, ChainOptions, ChildOptions};
use vhd_core::image::NewKind;
use vhd_core::live::{LiveDisk, NewLeaf, snapshot_all};
use vhd_core::ops::check::{CheckOptions, check};
use vhd_core::ops::resize::{ResizeOptions, resize};
use vhd_core::ops::saved_state;
use vhd_core::storage::{FileStorage, LockMode};
use vhd_core::{Disk, Error, ErrorKind, Progress};
use vhd_testkit::fault_host::FaultHost;

use self::support::{assert_error, child_options, new_child, new_image, open, options, read_all};

/// An eighth of the disk.
const PART: u64 = 256 << 10;
const SIZE: u64 = 8 * PART;
/// So small that the table of a disk as large again lies where the first blocks are.
const BLOCK: u32 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Fixed,
    Dynamic,
    Child,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Refresh,
    Grow,
    Save,
    Forget,
    Snapshot,
}

const CHANGES: [Change; 5] = [Change::Refresh, Change::Grow, Change::Save, Change::Forget, Change::Snapshot];

impl Change {
    fn run(self, live: &LiveDisk, folder: &Path) -> Result<(), Error> {
        match self {
            Self::Refresh => live.refresh(),
            Self::Grow => live.grow(2 * SIZE),
            Self::Save => live.set_saved_state(true),
            Self::Forget => live.set_saved_state(false),
            Self::Snapshot => live.snapshot(&folder.join("new.vhd"), &child_options()).map(drop),
        }
    }
}

/// An image with something in it, and a second name of each of its files, by which others may always look.
struct Case {
    folder: tempfile::TempDir,
    content: Vec<u8>,
}

impl Case {
    fn new(kind: Kind) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let [disk, base] = ["disk.vhd", "base.vhd"].map(|name| folder.path().join(name));
        match kind {
            Kind::Fixed => new_image(&disk, NewKind::Fixed { preallocate: false }, SIZE, BLOCK),
            Kind::Dynamic => new_image(&disk, NewKind::Dynamic, SIZE, BLOCK),
            Kind::Child => {
                new_image(&base, NewKind::Dynamic, SIZE, BLOCK);
                open(&base, true).write_at(&[3; 4096], 3 * PART).unwrap();
                new_child(&disk, &base);
                fs::hard_link(&base, folder.path().join("own-base")).unwrap();
            }
        }
        fs::hard_link(&disk, folder.path().join("own-disk")).unwrap();
        let written = open(&disk, true);
        for block in 0..8 {
            written.write_at(&[block as u8 + 7; 700], block * u64::from(BLOCK)).unwrap();
        }
        written.close().unwrap();
        let content = read_all(&written);
        Self { folder, content }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn live(&self) -> LiveDisk {
        LiveDisk::open(&self.path("disk.vhd"), &options(true)).unwrap()
    }

    /// Clients have what they had: they read it, and nobody else gets to write.
    #[track_caller]
    fn assert_kept(&self, live: &LiveDisk, what: &dyn fmt::Debug) {
        let mut found = vec![0; self.content.len()];
        live.disk().read_at(&mut found, 0).unwrap_or_else(|error| panic!("{what:?}: {error}"));
        assert!(found == self.content, "{what:?}: clients see another disk");
        assert_locked(self.folder.path());
    }

    #[track_caller]
    fn assert_written(&self, live: &LiveDisk, what: &dyn fmt::Debug) {
        let bytes = [0xA5; 1024];
        live.disk().write_at(&bytes, 5 * PART).unwrap_or_else(|error| panic!("{what:?}: {error}"));
        live.disk().flush().unwrap();
        let mut found = [0; 1024];
        live.disk().read_at(&mut found, 5 * PART).unwrap();
        assert_eq!(found, bytes, "{what:?}");
    }
}

/// Nobody gets to write the files of the disk, whatever names they have, nor to read the one that is written.
#[track_caller]
fn assert_locked(folder: &Path) {
    for name in ["own-disk", "own-base"] {
        let own = folder.join(name);
        let taken = |mode| FileStorage::open(&own, mode == LockMode::Write).is_ok_and(|file| file.lock(mode).is_ok());
        assert!(!taken(LockMode::Write), "{name} is given up");
        // Asked last: the new leaf is there before the old one is shared.
        let is_shared = taken(LockMode::Read);
        let may_be = name == "own-base" || folder.join("new.vhd").exists();
        assert!(may_be || !is_shared, "{name} is given up to readers");
    }
}

/// Makes the files sound for the next to open them: a footer of a fixed disk whose move can't be taken back has a record.
fn finish(path: &Path, size: u64) {
    let options = ResizeOptions::default();
    resize(path, size, &options, &ChainOptions::default(), &Progress::default()).unwrap();
}

#[test]
fn each_failing_step_of_a_change_leaves_what_clients_had() {
    let (mut failed, mut looked) = (0, 0);
    for kind in [Kind::Fixed, Kind::Dynamic, Kind::Child] {
        for change in CHANGES {
            for (for_ever, no_space) in [(false, false), (true, false), (false, true), (true, true)] {
                for at in 1.. {
                    let what = (kind, change, at, for_ever, no_space);
                    match fail_at(kind, change, FaultHost::new(at, for_ever, no_space), for_ever, &what) {
                        Outcome::Early => {}
                        Outcome::Failed(looks) => (failed, looked) = (failed + 1, looked + looks),
                        Outcome::Done => break,
                    }
                }
            }
        }
    }
    println!("{failed} changes failed, and {looked} times another tried to write meanwhile");
    assert!(failed > 300 && looked > 3000, "{failed} changes failed, {looked} looks");
}

enum Outcome {
    /// Before the change.
    Early,
    /// So many times another tried to write the files meanwhile.
    Failed(usize),
    Done,
}

fn fail_at(kind: Kind, change: Change, host: FaultHost, for_ever: bool, what: &dyn fmt::Debug) -> Outcome {
    let case = Case::new(kind);
    if change == Change::Forget {
        saved_state::set(&case.path("disk.vhd"), true, &ChainOptions::default()).unwrap();
    }
    let (is_changing, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (armed, looked, folder) = (Arc::clone(&is_changing), Arc::clone(&looks), case.folder.path().to_owned());
    let host = host.calling(move || {
        if armed.load(Ordering::SeqCst) {
            assert_locked(&folder);
            looked.fetch_add(1, Ordering::SeqCst);
        }
    });
    let mut chain = ChainOptions { host: Arc::new(host.clone()), ..options(true) };
    chain.image.owns_saved_state = true;
    let path = case.path("disk.vhd");
    let Ok(live) = LiveDisk::open(&path, &chain) else { return Outcome::Early };
    // What the change has to make durable first.
    let handle = live.disk();
    let mut content = case.content.clone();
    if handle.write_at(&[9; 512], 6 * PART).is_err() {
        return Outcome::Early;
    }
    content[6 * PART as usize..][..512].fill(9);
    let mut case = Case { content, ..case };
    is_changing.store(true, Ordering::SeqCst);
    let done = change.run(&live, case.folder.path());
    is_changing.store(false, Ordering::SeqCst);
    case.assert_kept(&live, what);
    match &done {
        Ok(()) => {}
        Err(error) => {
            assert!(error.path().is_some() && live.leaf() == path, "{what:?}: {error}");
            assert!(!case.path("new.vhd").exists() || for_ever, "{what:?}");
            // After a failure of the medium no write is taken; after anything else writing goes on. What is answered is kept.
            let sector = [0xB7; 512];
            let wrote = live.disk().write_at(&sector, 0).and_then(|()| live.disk().flush());
            match wrote {
                Ok(()) => case.content[..512].copy_from_slice(&sector),
                Err(error) => assert!(error.kind() == ErrorKind::Latched || for_ever, "{what:?}: {error}"),
            }
            if error.kind() == ErrorKind::NoSpace && !for_ever {
                case.assert_written(&live, what);
                live.disk().write_at(&case.content[5 * PART as usize..][..1024], 5 * PART).unwrap();
            }
        }
    }
    let failed = host.has_failed();
    drop((live, handle));
    after(&case, &path, done.is_err(), for_ever, what);
    if failed { Outcome::Failed(looks.load(Ordering::SeqCst)) } else { Outcome::Done }
}

/// The files when nobody uses them any more.
fn after(case: &Case, path: &Path, failed: bool, for_ever: bool, what: &dyn fmt::Debug) {
    let mut own = options(false);
    own.image.owns_saved_state = true;
    let opened = Disk::open(path, &own);
    if let Err(error) = &opened {
        let message = error.to_string();
        assert!(
            failed && for_ever && error.kind() == ErrorKind::Refused && message.contains("vhd resize"),
            "{what:?}: {message}"
        );
        finish(path, 2 * SIZE);
    }
    drop(opened);
    let disk = Disk::open(path, &own).unwrap_or_else(|error| panic!("{what:?}: {error}"));
    let mut found = read_all(&disk);
    // What was never flushed may be gone with the medium that failed.
    let unflushed = &mut found[6 * PART as usize..][..512];
    if failed && unflushed.iter().all(|byte| *byte == 0) {
        unflushed.fill(9);
    }
    assert!(found[..SIZE as usize] == case.content[..], "{what:?}: the file holds another disk");
    assert!(found[SIZE as usize..].iter().all(|byte| *byte == 0), "{what:?}");
    let report = check(&FileStorage::open(path, false).unwrap(), path, &CheckOptions::default()).unwrap();
    assert!(report.ok(), "{what:?}: {report:?}");
}

/// A change of a disk whose names lead elsewhere.
#[test]
fn a_disk_whose_name_is_another_files_stays_what_it_was() {
    for kind in [Kind::Fixed, Kind::Dynamic, Kind::Child] {
        for change in [Change::Refresh, Change::Grow, Change::Snapshot] {
            let case = Case::new(kind);
            let [path, moved, new] = ["disk.vhd", "moved.vhd", "new.vhd"].map(|name| case.path(name));
            let live = case.live();
            fs::rename(&path, &moved).unwrap();
            new_image(&path, NewKind::Dynamic, SIZE, BLOCK);
            let other = fs::read(&path).unwrap();
            let error = change.run(&live, case.folder.path()).unwrap_err();
            assert_error(&error, ErrorKind::Refused, "moved.vhd");
            case.assert_kept(&live, &(kind, change));
            case.assert_written(&live, &(kind, change));
            live.disk().write_at(&case.content[5 * PART as usize..][..1024], 5 * PART).unwrap();
            assert!(fs::read(&path).unwrap() == other, "the other image was touched");
            // The note of a saved state needs no name: it is in the file that is open.
            live.set_saved_state(true).unwrap();
            live.set_saved_state(false).unwrap();
            assert!(fs::read(&path).unwrap() == other && !new.exists());
            // Back in place, the same change is made.
            fs::rename(&moved, &path).unwrap();
            change.run(&live, case.folder.path()).unwrap();
            case.assert_kept(&live, &(kind, change));
            drop(live);
            let leaf = if change == Change::Snapshot { &new } else { &path };
            assert!(read_all(&open(leaf, true))[..SIZE as usize] == case.content[..], "{kind:?} {change:?}");
        }
    }
}

#[test]
fn a_disk_that_was_moved_goes_on_under_its_new_name() {
    for kind in [Kind::Fixed, Kind::Dynamic, Kind::Child] {
        for change in CHANGES {
            let case = Case::new(kind);
            fs::create_dir(case.path("below")).unwrap();
            let [path, moved, new] = ["disk.vhd", "below/moved.vhd", "new.vhd"].map(|name| case.path(name));
            let live = case.live();
            fs::rename(&path, &moved).unwrap();
            change.run(&live, case.folder.path()).unwrap();
            case.assert_kept(&live, &(kind, change));
            case.assert_written(&live, &(kind, change));
            live.disk().write_at(&case.content[5 * PART as usize..][..1024], 5 * PART).unwrap();
            let leaf = match change {
                Change::Refresh | Change::Grow => &moved,
                Change::Snapshot => &new,
                Change::Save | Change::Forget => &path,
            };
            assert_eq!(live.leaf(), *leaf);
            drop(live);
            let mut chain = options(false);
            chain.parents.parent_dirs.push(case.folder.path().to_owned());
            let opened = Chain::open(if leaf.exists() { leaf } else { &moved }, &chain).unwrap();
            if change == Change::Snapshot {
                assert_eq!(opened.layers()[1].path(), moved, "the new leaf names its parent where that is now");
            }
            assert!(read_all(&Disk::new(opened))[..SIZE as usize] == case.content[..], "{kind:?} {change:?}");
        }
    }
}

#[test]
fn a_disk_without_a_name_is_told_of_and_kept() {
    for kind in [Kind::Fixed, Kind::Dynamic, Kind::Child] {
        let case = Case::new(kind);
        let live = case.live();
        fs::remove_file(case.path("disk.vhd")).unwrap();
        for change in [Change::Refresh, Change::Grow, Change::Snapshot] {
            let error = change.run(&live, case.folder.path()).unwrap_err();
            assert_error(&error, ErrorKind::NotFound, "no name leads to it");
            case.assert_kept(&live, &(kind, change));
            case.assert_written(&live, &(kind, change));
            live.disk().write_at(&case.content[5 * PART as usize..][..1024], 5 * PART).unwrap();
            assert!(!case.path("new.vhd").exists());
        }
        fs::hard_link(case.path("own-disk"), case.path("disk.vhd")).unwrap();
        CHANGES.iter().for_each(|change| change.run(&live, case.folder.path()).unwrap());
    }
}

#[test]
fn a_parent_that_was_moved_or_replaced_stays_the_parent() {
    let case = Case::new(Kind::Child);
    let [base, moved] = ["base.vhd", "moved.vhd"].map(|name| case.path(name));
    let live = case.live();
    fs::rename(&base, &moved).unwrap();
    live.refresh().unwrap();
    let parent = |live: &LiveDisk| live.with_chain(|chain| Ok(chain.layers()[1].path().to_owned())).unwrap();
    assert_eq!(parent(&live), moved);
    case.assert_kept(&live, &"moved");
    // Another image, and one with the same identifier: neither is the file that is open.
    for copy in [false, true] {
        fs::rename(&moved, &base).unwrap();
        live.refresh().unwrap();
        fs::rename(&base, &moved).unwrap();
        match copy {
            true => drop(fs::copy(&moved, &base).unwrap()),
            false => new_image(&base, NewKind::Dynamic, SIZE, BLOCK),
        }
        assert_error(&live.refresh().unwrap_err(), ErrorKind::Refused, "moved.vhd");
        case.assert_kept(&live, &copy);
        case.assert_written(&live, &copy);
        live.disk().write_at(&case.content[5 * PART as usize..][..1024], 5 * PART).unwrap();
        fs::remove_file(&base).unwrap();
    }
    // A snapshot is about the leaf alone.
    live.snapshot(&case.path("new.vhd"), &child_options()).unwrap();
    case.assert_kept(&live, &"a snapshot");
}

#[test]
fn what_heeds_no_lock_does_not_change_what_a_disk_is() {
    for kind in [Kind::Fixed, Kind::Dynamic, Kind::Child] {
        let case = Case::new(kind);
        let path = case.path("disk.vhd");
        let live = case.live();
        let file = FileStorage::open(&path, true).unwrap();
        let before = fs::read(&path).unwrap();
        vhd_core::image::Image::set_uuid_of(&file, [9; 16]).unwrap();
        assert_error(&live.refresh().unwrap_err(), ErrorKind::Refused, "heeds no lock");
        case.assert_kept(&live, &kind);
        fs::write(&path, &before).unwrap();
        live.refresh().unwrap();
        case.assert_kept(&live, &kind);
    }
}

#[test]
fn a_refresh_finds_a_larger_size_and_refuses_a_smaller_one() {
    for kind in [Kind::Fixed, Kind::Dynamic, Kind::Child] {
        let case = Case::new(kind);
        let [path, larger] = ["disk.vhd", "larger.vhd"].map(|name| case.path(name));
        fs::copy(&path, &larger).unwrap();
        finish(&larger, 2 * SIZE);
        let (small, large) = (fs::read(&path).unwrap(), fs::read(&larger).unwrap());
        let live = LiveDisk::open(&path, &options(false)).unwrap();
        // As on a file system without locks.
        fs::write(&path, &large).unwrap();
        live.refresh().unwrap();
        assert_eq!(live.disk().size(), 2 * SIZE);
        assert!(read_all(&live.disk())[..SIZE as usize] == case.content[..], "{kind:?}");
        fs::write(&path, &small).unwrap();
        assert_error(&live.refresh().unwrap_err(), ErrorKind::Refused, "clients rely");
        assert_eq!(live.disk().size(), 2 * SIZE);
    }
}

#[test]
fn no_new_leaf_replaces_what_the_disk_is_made_of() {
    let case = Case::new(Kind::Child);
    let live = case.live();
    let other = case.path("other.vhd");
    new_image(&other, NewKind::Dynamic, SIZE, BLOCK);
    fs::hard_link(case.path("disk.vhd"), case.path("link.vhd")).unwrap();
    std::os::unix::fs::symlink("base.vhd", case.path("symlink.vhd")).unwrap();
    let replacing = ChildOptions { overwrite: true, ..child_options() };
    for name in ["disk.vhd", "base.vhd", "link.vhd", "symlink.vhd"] {
        let error = live.snapshot(&case.path(name), &child_options()).unwrap_err();
        assert_error(&error, ErrorKind::Exists, "exists");
        let error = live.snapshot(&case.path(name), &replacing).unwrap_err();
        assert_error(&error, ErrorKind::Refused, "is made of");
        case.assert_kept(&live, &name);
    }
    let second = LiveDisk::open(&other, &options(true)).unwrap();
    let new = |disk, path: &str| NewLeaf { disk, path: case.path(path), options: child_options() };
    let twice = snapshot_all(&[new(&live, "new.vhd"), new(&second, "./new.vhd")]).unwrap_err();
    assert_error(&twice, ErrorKind::InvalidInput, "two disks");
    // Nor does it replace an image of the other disk.
    let both = NewLeaf { options: replacing.clone(), ..new(&live, "other.vhd") };
    let error = snapshot_all(&[both, new(&second, "new.vhd")]).unwrap_err();
    assert_error(&error, ErrorKind::Refused, "is made of");
    assert!(!case.path("new.vhd").exists());
    drop(second);
    live.snapshot(&other, &replacing).unwrap();
    assert!(live.leaf() == other && read_all(&live.disk()) == case.content);
}

#[test]
fn nobody_gets_in_while_a_disk_in_use_changes() {
    let case = Case::new(Kind::Child);
    let live = case.live();
    let over = AtomicBool::new(false);
    let tried = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                assert_locked(case.folder.path());
                tried.fetch_add(1, Ordering::SeqCst);
            }
        });
        scope.spawn(|| {
            let disk = live.disk();
            for turn in 0.. {
                disk.write_at(&[turn as u8; 512], 4 * PART).unwrap();
                disk.flush().unwrap();
                if over.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
        for turn in 0..100 {
            live.refresh().unwrap();
            live.set_saved_state(true).unwrap();
            live.set_saved_state(false).unwrap();
            live.grow(SIZE + turn * 512).unwrap();
        }
        live.snapshot(&case.path("new.vhd"), &child_options()).unwrap();
        live.refresh().unwrap();
        over.store(true, Ordering::SeqCst);
    });
    assert!(tried.load(Ordering::SeqCst) > 100);
    assert_locked(case.folder.path());
}
