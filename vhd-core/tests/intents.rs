//! Goal: an intent record governs the image that it is about, and nothing else: a torn one stops everything, a stale one and
//! one beside the wrong image stop nothing.
//!
//! Method: records of merges and in-place changes that were interrupted, then cut, altered, left over, moved and copied, beside
//! images of the same and of another identifier. Each trap that a first design falls into has its test.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vhd_core::chain::{Chain, ChainOptions};
use vhd_core::format::DiskType;
use vhd_core::image::NewKind;
use vhd_core::intent::{self, Intent};
use vhd_core::ops::check::{CheckOptions, Code, check};
use vhd_core::ops::compact::{CompactOptions, compact};
use vhd_core::ops::in_place::{InPlaceOptions, convert_in_place};
use vhd_core::ops::merge::{MergeOptions, execute, plan};
use vhd_core::ops::repair::{RepairMode, repair};
use vhd_core::ops::reparent::reparent;
use vhd_core::ops::resize::{ResizeOptions, resize};
use vhd_core::ops::undo;
use vhd_core::storage::{FileStorage, LocalHost};
use vhd_core::{Disk, Error, ErrorKind, Progress};

use self::support::{assert_error, files_of, new_child, new_image, open, options, read_all};

/// A base and its child, whose merge was interrupted; the record, and what the child shows.
struct Interrupted {
    folder: TempDir,
    content: Vec<u8>,
}

impl Interrupted {
    fn new() -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = |name: &str| folder.path().join(name);
        new_image(&path("base.vhd"), NewKind::Dynamic, 64 << 10, 4096);
        open(&path("base.vhd"), true).write_at(&[1; 20_000], 0).unwrap();
        new_child(&path("child.vhd"), &path("base.vhd"));
        open(&path("child.vhd"), true).write_at(&[2; 9_000], 5_000).unwrap();
        let content = read_all(&open(&path("child.vhd"), false));
        let stopped = Progress::default();
        stopped.cancel();
        let it = Self { folder, content };
        assert_eq!(it.merge(&stopped).unwrap_err().kind(), ErrorKind::Cancelled);
        assert!(it.record().exists());
        it
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn record(&self) -> PathBuf {
        self.path("base.vhd.vhd-intent")
    }

    fn merge(&self, progress: &Progress) -> Result<(), Error> {
        let how = MergeOptions::default();
        execute(&plan(&self.path("child.vhd"), &how, &options(false))?, &how, &options(false), progress)
    }

    fn assert_merged(&self) {
        self.merge(&Progress::default()).unwrap();
        assert!(read_all(&open(&self.path("base.vhd"), false)) == self.content);
        assert!(!self.record().exists());
    }
}

fn disk(path: &Path, chain: &ChainOptions) -> Result<(), Error> {
    Disk::open(path, chain).map(drop)
}

/// Everything that could touch a base and its child, by name.
type Touch = fn(&Path, &Path) -> Result<(), Error>;

const ALL: [(&str, Touch); 13] = [
    ("open", |base, _| disk(base, &options(false))),
    ("open for writing", |base, _| disk(base, &forced())),
    ("open the child", |_, child| disk(child, &options(false))),
    ("merge", |_, child| {
        let how = MergeOptions::default();
        execute(&plan(child, &how, &options(false))?, &how, &options(false), &Progress::default())
    }),
    ("compact", |base, _| {
        let how = CompactOptions { force: true, ..CompactOptions::default() };
        compact(base, &how, &mut |_| Ok(Vec::new()), &options(false), &Progress::default()).map(drop)
    }),
    ("resize", |base, _| {
        let how = ResizeOptions { force: true, ..ResizeOptions::default() };
        resize(base, 128 << 10, &how, &options(false), &Progress::default()).map(drop)
    }),
    ("convert in place", |base, _| {
        convert_in_place(base, &InPlaceOptions::new(DiskType::Fixed), &options(false), &Progress::default()).map(drop)
    }),
    ("repair", |base, _| repair(base, RepairMode::All, false, &options(false), &Progress::default()).map(drop)),
    ("undo start", |base, _| undo::start(&[base.to_owned()], None, &options(false)).map(drop)),
    ("undo commit", |base, _| undo::commit(&[base.to_owned()], None, true, &options(false), &Progress::default())),
    ("snapshot", |base, _| snapshot(base, "s.vhd")),
    ("snapshot of the child", |_, child| snapshot(child, "s.vhd")),
    ("reparent", |base, child| reparent(child, base, true, false, &options(false)).map(drop)),
];

fn snapshot(of: &Path, name: &str) -> Result<(), Error> {
    vhd_core::chain::create_child(&of.with_file_name(name), of, &support::child_options(), &options(false)).map(drop)
}

/// For writing, although there are children.
fn forced() -> ChainOptions {
    let mut chain = options(true);
    chain.image.force = true;
    chain
}

#[test]
fn a_torn_record_stops_everything_and_changes_nothing() {
    let it = Interrupted::new();
    let whole = fs::read(it.record()).unwrap();
    let mut altered = whole.clone();
    *altered.last_mut().unwrap() ^= 1;
    for torn in [&b""[..], &whole[..10], &whole[..whole.len() / 2], &whole[..whole.len() - 1], &altered, &[0; 512]] {
        fs::write(it.record(), torn).unwrap();
        let before = files_of(it.folder.path());
        for (name, touch) in ALL {
            let error = touch(&it.path("base.vhd"), &it.path("child.vhd")).expect_err(name);
            assert_eq!(error.kind(), ErrorKind::Refused, "{name}: {error}");
            assert!(error.to_string().contains("restore this file, or remove it"), "{name}: {error}");
        }
        assert!(files_of(it.folder.path()) == before, "something was changed");
        let storage = FileStorage::open(&it.path("base.vhd"), false).unwrap();
        let found = check(&storage, &it.path("base.vhd"), &CheckOptions::default()).unwrap().findings;
        assert!(found.iter().any(|finding| finding.code == Code::Interrupted), "{found:?}");
    }
    // It was damaged by who restores it.
    fs::write(it.record(), &whole).unwrap();
    it.assert_merged();
}

#[test]
fn a_record_stops_all_but_its_own_operation() {
    let it = Interrupted::new();
    let before = files_of(it.folder.path());
    for (name, touch) in ALL {
        let result = touch(&it.path("base.vhd"), &it.path("child.vhd"));
        match name {
            // The content through the child is right at every point.
            "open the child" => result.unwrap(),
            "merge" => {
                result.unwrap();
                // As it was, for the next.
                before.iter().for_each(|(path, bytes)| fs::write(path, bytes).unwrap());
            }
            _ => {
                let error = result.expect_err(name);
                let expected = if name == "undo commit" { "has no undo disk" } else { "vhd merge" };
                assert!(error.to_string().contains(expected), "{name}: {error}");
                assert!(files_of(it.folder.path()) == before, "{name} changed something");
            }
        }
    }
    it.assert_merged();
}

#[test]
fn a_stale_record_of_a_merge_that_was_done_is_finished_by_the_same_command_and_harms_nothing() {
    let it = Interrupted::new();
    let record = fs::read(it.record()).unwrap();
    it.assert_merged();
    // The removal of the name was lost.
    fs::write(it.record(), &record).unwrap();
    assert!(disk(&it.path("base.vhd"), &forced()).unwrap_err().to_string().contains("vhd merge"));
    it.assert_merged();
    // The image was replaced since: by one with another identifier, that the record is not about.
    fs::write(it.record(), &record).unwrap();
    fs::remove_file(it.path("base.vhd")).unwrap();
    new_image(&it.path("base.vhd"), NewKind::Dynamic, 64 << 10, 4096);
    open(&it.path("base.vhd"), true).write_at(&[9; 512], 0).unwrap();
    assert_eq!(read_all(&open(&it.path("base.vhd"), false))[..512], [9; 512]);
}

#[test]
fn a_record_beside_the_wrong_image_is_passed_over() {
    let it = Interrupted::new();
    let other = it.path("other.vhd");
    new_image(&other, NewKind::Dynamic, 64 << 10, 4096);
    fs::copy(it.record(), it.path("other.vhd.vhd-intent")).unwrap();
    open(&other, true).write_at(&[5; 512], 0).unwrap();
    resize(&other, 128 << 10, &ResizeOptions::default(), &options(false), &Progress::default()).unwrap();
    assert_eq!(read_all(&open(&other, false))[..512], [5; 512]);
    // What its own operation does afterwards is not led astray either.
    it.assert_merged();
    assert_eq!(read_all(&open(&other, false))[..512], [5; 512]);
}

#[test]
fn a_record_that_moved_with_its_images_is_finished_where_they_are_now() {
    let it = Interrupted::new();
    let moved = tempfile::tempdir_in("/dev/shm").unwrap();
    for path in files_of(it.folder.path()).into_keys() {
        fs::rename(&path, moved.path().join(path.file_name().unwrap())).unwrap();
    }
    Interrupted { folder: moved, content: it.content.clone() }.assert_merged();
}

#[test]
fn a_record_without_its_child_leaves_the_target_alone() {
    let it = Interrupted::new();
    let base = fs::read(it.path("base.vhd")).unwrap();
    fs::remove_file(it.path("child.vhd")).unwrap();
    assert!(disk(&it.path("base.vhd"), &forced()).unwrap_err().to_string().contains("vhd merge"));
    let how = MergeOptions { into: Some(it.path("base.vhd")), ..MergeOptions::default() };
    let error = plan(&it.path("child.vhd"), &how, &options(false)).unwrap_err();
    assert_error(&error, ErrorKind::NotFound, "child.vhd");
    assert!(fs::read(it.path("base.vhd")).unwrap() == base && it.record().exists());
}

/// Two images whose common undo session has a commit that was interrupted.
fn interrupted_commit() -> (TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let images: Vec<_> = ["one.vhd", "two.vhd"].map(|name| folder.path().join(name)).into();
    images.iter().for_each(|image| new_image(image, NewKind::Dynamic, 64 << 10, 4096));
    undo::start(&images, None, &options(false)).unwrap();
    images.iter().for_each(|image| open(&image.with_extension("vud"), true).write_at(&[3; 9_000], 0).unwrap());
    let stopped = Progress::default();
    stopped.cancel();
    undo::commit(&images, None, false, &options(false), &stopped).unwrap_err();
    (folder, images)
}

#[test]
fn the_record_beside_one_image_of_a_commit_is_enough() {
    for gone in ["one.vhd.vhd-intent", "two.vhd.vhd-intent"] {
        let (folder, images) = interrupted_commit();
        fs::remove_file(folder.path().join(gone)).unwrap();
        let left = &images[usize::from(gone.starts_with("one"))];
        assert!(disk(left, &forced()).unwrap_err().to_string().contains("vhd undo commit"));
        undo::commit(&images, None, false, &options(false), &Progress::default()).unwrap();
        images.iter().for_each(|image| assert_eq!(read_all(&open(image, false))[..9_000], [3; 9_000]));
        assert_eq!(files_of(folder.path()).len(), 2);
    }
}

#[test]
fn a_former_pointer_whose_record_is_gone_stops_nothing() {
    let (folder, images) = interrupted_commit();
    let uuid = Chain::open_image(&images[1], &ChainOptions { resuming: true, ..options(false) }).unwrap().footer().uuid();
    fs::remove_file(folder.path().join("one.vhd.vhd-intent")).unwrap();
    let pointer = |record: &str| {
        let part = Intent::PartOf { record: record.into(), uuids: vec![uuid::Uuid::from_bytes(uuid)] };
        intent::put(&LocalHost, &images[1], &part).unwrap();
    };
    pointer("one.vhd.vhd-intent");
    disk(&images[1], &options(false)).unwrap();
    // Another folder is not looked at, whatever is there.
    pointer("../elsewhere/one.vhd.vhd-intent");
    assert!(disk(&images[1], &options(false)).unwrap_err().to_string().contains("vhd undo commit"));
}
