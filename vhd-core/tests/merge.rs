//! Goal: a merge leaves what a guest sees through the child in the parent, whatever happens meanwhile; nothing that it
//! spoils opens silently.
//!
//! Method: small chains of tagged sectors in real folders. The operation is recorded with all its files and names; each
//! state that a power cut may leave is put into a folder, looked at, and the merge finished there.
//! It would fail if the parent were written before the record or its new identifier, or anything removed before the data
//! was durable: `every_barrier_is_needed` takes each barrier away to show it.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use vhd_core::chain::{Chain, ChainOptions, ChildOptions, create_child};
use vhd_core::image::NewKind;
use vhd_core::ops::check::{CheckOptions, Code, Finding, Severity, check};
use vhd_core::ops::merge::{MergeOptions, execute, plan};
use vhd_core::ops::resize::{ResizeOptions, resize};
use vhd_core::storage::FileStorage;
use vhd_core::{Disk, Error, ErrorKind, Progress};
use vhd_testkit::crash::{Effort, Random};
use vhd_testkit::folder::RecordingHost;
use vhd_testkit::record::{Event, Journal};
use vhd_testkit::tagged::Tag;

use self::support::sabotage::{Barriers, Operation, Run};
use self::support::{child_options, files_of, new_child, new_image, open, options, read_all};

const SECTORS: u64 = 100;
const BLOCK: u32 = 4096;

/// A folder with a base, a middle image, a leaf, and a child of that.
struct Folder {
    folder: TempDir,
    /// What a guest sees through the leaf.
    content: Vec<u8>,
}

impl Folder {
    fn new(base: NewKind) -> Self {
        Self::with(base, SECTORS)
    }

    /// With a leaf of so many sectors.
    fn with(base: NewKind, sectors: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        new_image(&path("base.vhd"), base, SECTORS * 512, BLOCK);
        scribble(&path("base.vhd"), 1, 60);
        for (image, (parent, child)) in [("base.vhd", "mid.vhd"), ("mid.vhd", "leaf.vhd")].into_iter().enumerate() {
            let size = (child == "leaf.vhd").then_some(sectors * 512);
            create_child(&path(child), &path(parent), &ChildOptions { size, ..child_options() }, &options(false)).unwrap();
            scribble(&path(child), image as u32 + 2, 25);
        }
        let disk = open(&path("leaf.vhd"), true);
        let lba = sectors - 1;
        disk.write_at(&Tag { image: 3, lba, write: 99 }.sector(), lba * 512).unwrap();
        disk.close().unwrap();
        drop(disk);
        let content = read_all(&open(&path("leaf.vhd"), false));
        new_child(&path("grand.vhd"), &path("leaf.vhd"));
        Self { folder, content }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Writes some sectors, whole runs and single ones, and discards some.
fn scribble(path: &Path, image: u32, count: u64) {
    let disk = open(path, true);
    let mut random = Random::new(u64::from(image));
    for write in 0..count {
        let lba = random.below(SECTORS);
        disk.write_at(&Tag { image, lba, write }.sector(), lba * 512).unwrap();
    }
    let lba = random.below(SECTORS - 12);
    disk.zero(lba * 512..(lba + 12) * 512, vhd_core::block::ZeroMode::Free).unwrap();
    disk.close().unwrap();
}

fn merge(leaf: &Path, how: &MergeOptions, chain: &ChainOptions) -> Result<(), Error> {
    execute(&plan(leaf, how, chain)?, how, chain, &Progress::default())
}

fn into(target: &Path) -> MergeOptions {
    MergeOptions { into: Some(target.to_owned()), ..MergeOptions::default() }
}

#[track_caller]
fn assert_clean(path: &Path) {
    let storage = FileStorage::open(path, false).unwrap();
    let report = check(&storage, path, &CheckOptions { deep: true, ..CheckOptions::default() }).unwrap();
    // Discards leave space behind, which compacting gives back.
    let is_bad = |finding: &&Finding| finding.severity > Severity::Note && finding.code.name() != "leaked-space";
    let bad: Vec<_> = report.findings.iter().filter(is_bad).collect();
    assert!(bad.is_empty(), "{bad:?}");
}

#[track_caller]
fn assert_reads(path: &Path, content: &[u8]) {
    let found = read_all(&open(path, false));
    vhd_testkit::tagged::compare(&found, content, 0).unwrap();
}

#[test]
fn a_merge_into_the_parent_keeps_what_is_seen_through_the_child_and_its_children() {
    let it = Folder::new(NewKind::Dynamic);
    merge(&it.path("leaf.vhd"), &MergeOptions::default(), &options(false)).unwrap();
    for name in ["mid.vhd", "leaf.vhd", "grand.vhd"] {
        assert_reads(&it.path(name), &it.content);
        assert_clean(&it.path(name));
    }
    // The child's own child is the target's now.
    assert_eq!(Chain::open(&it.path("grand.vhd"), &options(false)).unwrap().layers().len(), 3);
    assert!(!it.path("mid.vhd.vhd-intent").exists());
}

#[test]
fn several_images_merge_in_one_pass_into_every_kind_of_base() {
    for base in [NewKind::Dynamic, NewKind::Fixed { preallocate: false }] {
        let it = Folder::new(base);
        let how = MergeOptions { delete: true, ..into(&it.path("base.vhd")) };
        let plan = plan(&it.path("leaf.vhd"), &how, &options(false)).unwrap();
        let held = held_above_base(&it.path("leaf.vhd"));
        assert_eq!(plan.data + plan.zeros, held, "each sector once");
        execute(&plan, &how, &options(false), &Progress::default()).unwrap();
        let names: Vec<_> = files_of(it.folder.path()).into_keys().collect();
        assert_eq!(names, [it.path("base.vhd"), it.path("grand.vhd")]);
        assert_reads(&it.path("base.vhd"), &it.content);
        assert_reads(&it.path("grand.vhd"), &it.content);
        assert_clean(&it.path("base.vhd"));
    }
}

#[test]
fn ten_snapshots_merge_in_one_pass_that_moves_what_it_must() {
    const SIZE: u64 = 64 << 20;
    const PIECE: u64 = 4096;
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = |number: usize| folder.path().join(format!("{number}.vhd"));
    new_image(&path(0), NewKind::Dynamic, SIZE, 2 << 20);
    let mut model = vec![0; SIZE as usize];
    let mut random = Random::new(10);
    let mut must_move = std::collections::BTreeSet::new();
    for number in 0..=10 {
        if number > 0 {
            new_child(&path(number), &path(number - 1));
        }
        let disk = open(&path(number), true);
        // The base is full; each snapshot changes 5 % of it, anywhere.
        let places: Vec<u64> = match number {
            0 => (0..SIZE / PIECE).collect(),
            _ => (0..SIZE / PIECE / 20).map(|_| random.below(SIZE / PIECE)).collect(),
        };
        for place in places {
            let bytes = [number as u8 + 1 + place as u8 % 200; PIECE as usize];
            disk.write_at(&bytes, place * PIECE).unwrap();
            model[(place * PIECE) as usize..][..PIECE as usize].copy_from_slice(&bytes);
            if number > 0 {
                must_move.insert(place);
            }
        }
        disk.close().unwrap();
    }
    let must_move = must_move.len() as u64 * PIECE;
    let journal = Journal::new();
    let chain = ChainOptions { host: Arc::new(RecordingHost::new(folder.path(), &journal)), ..options(false) };
    let how = MergeOptions { delete: true, ..into(&path(0)) };
    let planned = plan(&path(10), &how, &chain).unwrap();
    assert_eq!(planned.data, must_move, "each sector once, however many images hold it");
    execute(&planned, &how, &chain, &Progress::default()).unwrap();
    let of_event = |event: &Event| if let Event::Write { data, .. } = event { data.len() as u64 } else { 0 };
    let written: u64 = journal.events().iter().map(of_event).sum();
    println!("{must_move} bytes must move, {written} bytes written");
    assert!(written <= must_move + must_move / 20, "{written} bytes written for {must_move}");
    assert!(read_all(&open(&path(0), false)) == model);
    assert_eq!(files_of(folder.path()).len(), 1);
}

fn held_above_base(leaf: &Path) -> u64 {
    let disk = open(leaf, false);
    let extents = disk.extents_in(0..disk.size()).unwrap();
    let above = |extent: &&vhd_core::block::Extent| extent.depth < 2 && extent.state != vhd_core::block::ExtentState::Absent;
    extents.iter().filter(above).map(|extent| extent.range.end - extent.range.start).sum()
}

#[test]
fn a_base_that_is_smaller_than_the_child_grows() {
    for (kind, sectors) in [(NewKind::Dynamic, 130), (NewKind::Dynamic, 9000), (NewKind::Fixed { preallocate: false }, 130)] {
        let it = Folder::with(kind, sectors);
        let how = into(&it.path("base.vhd"));
        let planned = plan(&it.path("leaf.vhd"), &how, &options(false)).unwrap();
        assert_eq!(planned.grow_to, Some(sectors * 512));
        execute(&planned, &how, &options(false), &Progress::default()).unwrap();
        for name in ["base.vhd", "leaf.vhd", "grand.vhd"] {
            assert_reads(&it.path(name), &it.content);
            assert_clean(&it.path(name));
        }
    }
}

/// Nothing lies behind the end of a parent that is smaller than its child, whatever its own parents hold there.
#[test]
fn what_a_smaller_image_between_hides_stays_hidden() {
    for (leaf_sectors, target) in
        [(SECTORS, "base.vhd"), (SECTORS - 30, "base.vhd"), (SECTORS + 50, "base.vhd"), (SECTORS, "mid.vhd")]
    {
        let it = Folder::with(NewKind::Dynamic, SECTORS);
        std::fs::remove_file(it.path("grand.vhd")).unwrap();
        std::fs::remove_file(it.path("leaf.vhd")).unwrap();
        let cut = ResizeOptions { shrink: true, discard_data: true, ..ResizeOptions::default() };
        resize(&it.path("mid.vhd"), (SECTORS - 60) * 512, &cut, &options(false), &Progress::default()).unwrap();
        let size = Some(leaf_sectors * 512);
        create_child(&it.path("leaf.vhd"), &it.path("mid.vhd"), &ChildOptions { size, ..child_options() }, &options(false))
            .unwrap();
        let disk = open(&it.path("leaf.vhd"), true);
        disk.write_at(&Tag { image: 3, lba: 60, write: 99 }.sector(), 60 * 512).unwrap();
        disk.close().unwrap();
        drop(disk);
        let content = read_all(&open(&it.path("leaf.vhd"), false));
        assert!(content[61 * 512..].iter().all(|byte| *byte == 0));
        let base = read_all(&open(&it.path("base.vhd"), false));
        assert!(base[61 * 512..70 * 512].iter().any(|byte| *byte != 0));
        let how = MergeOptions { delete: true, ..into(&it.path(target)) };
        if target == "mid.vhd" {
            // It would have to grow over what its own parent holds.
            assert_eq!(merge(&it.path("leaf.vhd"), &how, &options(false)).unwrap_err().kind(), ErrorKind::Refused);
            // Without it, its child would show that.
            let error = merge(&it.path("mid.vhd"), &MergeOptions::default(), &options(false)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused);
            assert!(error.to_string().contains("leaf.vhd is larger"), "{error}");
            assert_reads(&it.path("leaf.vhd"), &content);
            continue;
        }
        let planned = plan(&it.path("leaf.vhd"), &how, &options(false)).unwrap();
        execute(&planned, &how, &options(false), &Progress::default()).unwrap();
        let found = read_all(&open(&it.path("base.vhd"), false));
        assert!(found[..content.len()] == content, "{leaf_sectors} sectors, {planned:?}");
        // What no image above reached is as it was.
        assert!(base.len() <= content.len() || found[content.len()..] == base[content.len()..]);
        assert_clean(&it.path("base.vhd"));
    }
}

#[test]
fn a_raw_base_takes_a_merge_and_grows() {
    for larger in [false, true] {
        raw_base_takes_a_merge(larger);
    }
}

fn raw_base_takes_a_merge(larger: bool) {
    let folder = tempfile::tempdir().unwrap();
    let (raw, child) = (folder.path().join("base.img"), folder.path().join("child.vhd"));
    let before: Vec<u8> = (0..SECTORS).flat_map(|lba| Tag { image: 1, lba, write: 0 }.sector()).collect();
    std::fs::write(&raw, &before).unwrap();
    let mut chain = options(true);
    chain.parents.raw_parent = Some(raw.clone());
    let size = larger.then_some((SECTORS + 50) * 512);
    create_child(&child, &raw, &ChildOptions { size, ..child_options() }, &options(false)).unwrap();
    let disk = Disk::open(&child, &chain).unwrap();
    disk.write_at(&[7; 5000], 3000).unwrap();
    disk.close().unwrap();
    let content = read_all(&disk);
    drop(disk);
    merge(&child, &MergeOptions::default(), &chain).unwrap();
    assert!(std::fs::read(&raw).unwrap() == content);
    assert!(content != before);
}

#[test]
fn other_children_are_named_and_refuse_to_open_afterwards() {
    let it = Folder::new(NewKind::Dynamic);
    new_child(&it.path("sibling.vhd"), &it.path("mid.vhd"));
    let before = files_of(it.folder.path());
    let error = merge(&it.path("leaf.vhd"), &MergeOptions::default(), &options(false)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("sibling.vhd"), "{error}");
    assert!(files_of(it.folder.path()) == before);
    let force = MergeOptions { force: true, ..MergeOptions::default() };
    let planned = plan(&it.path("leaf.vhd"), &force, &options(false)).unwrap();
    assert_eq!(planned.lost, [it.path("sibling.vhd")]);
    execute(&planned, &force, &options(false), &Progress::default()).unwrap();
    assert_eq!(Disk::open(&it.path("sibling.vhd"), &options(false)).unwrap_err().kind(), ErrorKind::Parent);
    assert_reads(&it.path("mid.vhd"), &it.content);
}

#[test]
fn a_write_protected_parent_is_written_by_force_alone() {
    let it = Folder::new(NewKind::Dynamic);
    let mut permissions = std::fs::metadata(it.path("mid.vhd")).unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(it.path("mid.vhd"), permissions).unwrap();
    let error = merge(&it.path("leaf.vhd"), &MergeOptions::default(), &options(false)).unwrap_err();
    assert!(error.to_string().contains("write-protected"), "{error}");
    merge(&it.path("leaf.vhd"), &MergeOptions { force: true, ..MergeOptions::default() }, &options(false)).unwrap();
    assert_reads(&it.path("mid.vhd"), &it.content);
    assert!(std::fs::metadata(it.path("mid.vhd")).unwrap().permissions().readonly(), "protected again");
}

#[test]
fn a_merge_that_was_cancelled_leaves_the_child_readable_and_is_finished_by_the_same_command() {
    let it = Folder::new(NewKind::Dynamic);
    let how = into(&it.path("base.vhd"));
    let stopped = Progress::default();
    stopped.cancel();
    let planned = plan(&it.path("leaf.vhd"), &how, &options(false)).unwrap();
    let error = execute(&planned, &how, &options(false), &stopped).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_reads(&it.path("leaf.vhd"), &it.content);
    assert_reads(&it.path("grand.vhd"), &it.content);
    for (name, writable) in [("base.vhd", false), ("base.vhd", true), ("mid.vhd", false)] {
        let error = Disk::open(&it.path(name), &options(writable)).unwrap_err();
        assert!(error.to_string().contains("vhd merge"), "{name}: {error}");
    }
    let storage = FileStorage::open(&it.path("base.vhd"), false).unwrap();
    let report = check(&storage, &it.path("base.vhd"), &CheckOptions::default()).unwrap();
    let found = report.findings.iter().find(|finding| finding.code == Code::Interrupted).unwrap();
    assert!(found.message.contains("vhd merge") && !report.ok(), "{}", found.message);
    merge(&it.path("leaf.vhd"), &how, &options(false)).unwrap();
    assert_reads(&it.path("base.vhd"), &it.content);
    assert_reads(&it.path("leaf.vhd"), &it.content);
    assert_clean(&it.path("base.vhd"));
}

/// What is merged, and what was seen before.
struct Case {
    target: &'static str,
    delete: bool,
    /// What a guest saw through the leaf, and through the target.
    content: Vec<u8>,
    before: Vec<u8>,
    uuid: [u8; 16],
}

impl Case {
    fn of(it: &Folder, target: &'static str, delete: bool) -> Self {
        let before = read_all(&open(&it.path(target), false));
        let uuid = Chain::open_image(&it.path(target), &options(false)).unwrap().footer().uuid();
        Self { target, delete, content: it.content.clone(), before, uuid }
    }

    fn merge(&self, folder: &Path, chain: &ChainOptions) -> Result<(), Error> {
        let how = MergeOptions { delete: self.delete, ..into(&folder.join(self.target)) };
        merge(&folder.join("leaf.vhd"), &how, chain)
    }

    /// What must hold of a state, and of the same once the merge was finished there.
    fn judge(&self, folder: &Path, done: bool) -> Result<(), String> {
        let path = |name: &str| folder.join(name);
        let read = |name: &str| -> Result<Vec<u8>, String> {
            let disk = Disk::open(&path(name), &options(false)).map_err(|error| error.to_string())?;
            let mut bytes = vec![0; disk.size() as usize];
            disk.read_at(&mut bytes, 0).map_err(|error| error.to_string())?;
            Ok(bytes)
        };
        let same = |what: &str, found: &[u8], expected: &[u8]| {
            vhd_testkit::tagged::compare(found, expected, 0).map_err(|error| format!("{what}: {error}"))
        };
        for name in ["leaf.vhd", "grand.vhd"] {
            match read(name) {
                Ok(found) => same(name, &found, &self.content)?,
                // It says how to go on. What is to be removed may be gone, or what is between it and the target.
                Err(error) if error.contains("vhd merge") && !done => {}
                Err(_) if name == "leaf.vhd" && self.delete && (!done || !path(name).exists()) => {}
                Err(error) => return Err(format!("{name} does not open: {error}")),
            }
        }
        match read(self.target) {
            Ok(found) if found == self.before && !done => {}
            Ok(found) => same("target", &found, &self.content)?,
            Err(error) if error.contains("vhd merge") && !done => {}
            Err(error) => return Err(format!("target: {error}")),
        }
        self.judge_uuid(&path(self.target))?;
        let unfinished = path(&format!("{}.vhd-intent", self.target)).exists();
        if unfinished || (self.before != self.content && read(self.target)? == self.before) {
            self.merge(folder, &options(false)).map_err(|error| format!("again: {error}"))?;
        }
        same("finished target", &read(self.target)?, &self.content)?;
        same("finished grandchild", &read("grand.vhd")?, &self.content)?;
        if self.delete == path("leaf.vhd").exists() {
            return Err("the leaf is not as it should be".into());
        }
        self.judge_uuid(&path(self.target))?;
        let left = files_of(folder).into_keys().find(|path| path.to_string_lossy().contains("intent"));
        left.map_or(Ok(()), |path| Err(format!("{} is left", path.display())))
    }

    /// Who does not know the record sees by the identifier that the target is not what its children were made over.
    fn judge_uuid(&self, target: &Path) -> Result<(), String> {
        let chain = ChainOptions { resuming: true, ..options(false) };
        // While it takes the data it bears a mark, and a fixed disk that grows one of its own: it is no image to anyone.
        let opened = match Chain::open(target, &chain) {
            Err(error) if matches!(error.kind(), ErrorKind::Refused | ErrorKind::NotVhd) => return Ok(()),
            opened => opened.map_err(|error| error.to_string())?,
        };
        let uuid = opened.layers()[0].image().unwrap().footer().uuid();
        if uuid != self.uuid {
            return Ok(());
        }
        let found = read_all(&Disk::new(opened));
        // It may have grown already: by zeros.
        match found.strip_prefix(&self.before[..]) {
            Some(rest) if rest.iter().all(|byte| *byte == 0) => Ok(()),
            _ => Err("the target has changed under its old identifier".into()),
        }
    }
}

/// Calls `visit` with each case, and what finishes it.
fn operations(visit: &mut dyn FnMut(&Operation<'_>, &Run<'_>)) {
    let fixed = NewKind::Fixed { preallocate: false };
    for (name, it, target, delete) in [
        ("into the parent", Folder::new(NewKind::Dynamic), "mid.vhd", false),
        ("into the base, deleting", Folder::new(NewKind::Dynamic), "base.vhd", true),
        ("into a fixed base", Folder::new(fixed.clone()), "base.vhd", false),
        ("into a base that grows", Folder::with(NewKind::Dynamic, 2000), "base.vhd", false),
        ("into a fixed base that grows", Folder::with(fixed, 130), "base.vhd", false),
    ] {
        let case = Case::of(&it, target, delete);
        let run = |folder: &Path, chain: &ChainOptions| case.merge(folder, chain).unwrap();
        // Where all is done the leaf may be gone, and it says so.
        let finish = |folder: &Path, chain: &ChainOptions| drop(case.merge(folder, chain));
        let judge = |folder: &Path, done: bool| case.judge(folder, done);
        visit(&Operation::new(&format!("merge, {name}"), it.folder, &run, &judge), &finish);
    }
    // Nothing but its length changes.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let [raw, child] = ["base.img", "child.vhd"].map(|name| folder.path().join(name));
    let mut content = vec![7; SECTORS as usize * 512];
    std::fs::write(&raw, &content).unwrap();
    content.resize((SECTORS as usize + 50) * 512, 0);
    let size = Some(content.len() as u64);
    create_child(&child, &raw, &ChildOptions { size, ..child_options() }, &options(false)).unwrap();
    let finish = |folder: &Path, chain: &ChainOptions| {
        let mut chain = chain.clone();
        chain.parents.raw_parent = Some(folder.join("base.img"));
        drop(merge(&folder.join("child.vhd"), &MergeOptions::default(), &chain));
    };
    let judge = |folder: &Path, _done: bool| {
        finish(folder, &options(false));
        let found = std::fs::read(folder.join("base.img")).map_err(|error| error.to_string())?;
        if found == content { Ok(()) } else { Err("the raw file is not what the child was".into()) }
    };
    visit(&Operation::new("merge, into a raw base that grows", folder, &finish, &judge), &finish);
}

#[test]
fn a_power_cut_at_any_point_loses_nothing_and_the_merge_goes_on() {
    operations(&mut |operation, _| {
        operation.enumerate(Effort { exhaustive: 4, samples: 2, seed: 1 });
    });
}

#[test]
fn every_barrier_is_needed() {
    let mut barriers = Barriers::default();
    operations(&mut |operation, finish| {
        operation.sabotage_with_finish(&mut barriers, Effort { exhaustive: 3, samples: 1, seed: 1 }, finish);
    });
    barriers.assert("merge");
}
