//! Goal: an undo session is committed or discarded as a whole, in however many folders its disks are, whatever happens
//! meanwhile.
//!
//! Method: two images in two folders with changes in both. Commit and discard are recorded with all files and names; in
//! each state that a power cut may leave, one may see both committed, both pending, or a refusal that names the command
//! which goes on; that command is run.
//! It would fail if one image were written before the record that decides for both.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use vhd_core::chain::ChainOptions;
use vhd_core::image::NewKind;
use vhd_core::ops::merge::{MergeOptions, plan};
use vhd_core::ops::undo;
use vhd_core::{Disk, ErrorKind, Progress};
use vhd_testkit::crash::Effort;
use vhd_testkit::fault_host::FaultHost;

use self::support::sabotage::{Barriers, Operation, Run};
use self::support::{assert_error, files_of, new_child, new_image, open, options};

const NAMES: [&str; 2] = ["one/system.vhd", "two/data.vhd"];
/// The same in one folder.
const TOGETHER: [&str; 2] = ["system.vhd", "data.vhd"];

struct Session {
    folder: TempDir,
}

impl Session {
    /// Images that hold 1, and changes that make them hold 2.
    fn new() -> Self {
        Self::of(&NAMES)
    }

    /// The same, in one folder.
    fn together() -> Self {
        Self::of(&TOGETHER)
    }

    fn of(names: &[&str]) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        for name in names {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            new_image(&path, NewKind::Dynamic, 32 << 10, 4096);
            open(&path, true).write_at(&[1; 10_000], 0).unwrap();
        }
        let session = Self { folder };
        undo::start(&session.images(), None, &options(false)).unwrap();
        for image in session.images() {
            open(&image.with_extension("vud"), true).write_at(&[2; 10_000], 0).unwrap();
        }
        session
    }

    fn images(&self) -> Vec<PathBuf> {
        images(self.folder.path())
    }
}

fn images(folder: &Path) -> Vec<PathBuf> {
    let names = if folder.join(NAMES[0]).exists() { NAMES } else { TOGETHER };
    names.iter().map(|name| folder.join(name)).collect()
}

fn commit(images: &[PathBuf], chain: &ChainOptions) -> Result<(), vhd_core::Error> {
    undo::commit(images, None, false, chain, &Progress::default())
}

/// The byte that an image holds all over.
fn held(path: &Path) -> Result<u8, String> {
    let disk = Disk::open(path, &options(false)).map_err(|error| error.to_string())?;
    let mut bytes = vec![0; 10_000];
    disk.read_at(&mut bytes, 0).map_err(|error| error.to_string())?;
    if bytes.iter().all(|byte| *byte == bytes[0]) { Ok(bytes[0]) } else { Err("neither old nor new".into()) }
}

#[test]
fn a_commit_keeps_all_changes_and_a_discard_none() {
    for keep in [true, false] {
        let session = Session::new();
        let images = session.images();
        let states = undo::status(&images, None, &options(false)).unwrap();
        assert!(states.iter().all(|state| state.changed == 10_240 && state.missing.is_empty()), "{states:?}");
        if keep {
            commit(&images, &options(false)).unwrap()
        } else {
            drop(undo::discard(&images, None, false, &options(false)).unwrap())
        }
        for image in &images {
            assert_eq!(held(image), Ok(if keep { 2 } else { 1 }));
            open(image, true);
        }
        assert_eq!(files_of(session.folder.path()).into_keys().collect::<Vec<_>>(), images);
    }
}

#[test]
fn a_session_over_an_image_of_any_name_keeps_what_the_image_holds() {
    for keep in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        new_image(&image, NewKind::Dynamic, 10_240, 4096);
        open(&image, true).write_at(&[1; 10_240], 0).unwrap();
        let images = [image.clone()];
        undo::start(&images, None, &options(false)).unwrap();
        let undo = image.with_extension("vud");
        assert_eq!(held(&undo), Ok(1));
        open(&undo, true).write_at(&[2; 10_240], 0).unwrap();
        match keep {
            true => commit(&images, &options(false)).unwrap(),
            false => drop(undo::discard(&images, None, false, &options(false)).unwrap()),
        }
        assert_eq!(held(&image), Ok(if keep { 2 } else { 1 }));
    }
}

#[test]
fn all_images_of_a_session_are_named_and_what_is_in_use_is_not_discarded() {
    let session = Session::new();
    let images = session.images();
    let one = &images[..1];
    for error in [commit(one, &options(false)).unwrap_err(), undo::discard(one, None, false, &options(false)).unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("data.vhd"), "{error}");
    }
    assert_eq!(undo::start(one, None, &options(false)).unwrap_err().kind(), ErrorKind::Exists);
    let used = open(&images[1].with_extension("vud"), true);
    assert_eq!(commit(&images, &options(false)).unwrap_err().kind(), ErrorKind::Locked);
    assert_eq!(undo::discard(&images, None, false, &options(false)).unwrap_err().kind(), ErrorKind::Locked);
    drop(used);
    new_child(&images[1].with_file_name("snapshot.vhd"), &images[1].with_extension("vud"));
    let error = undo::discard(&images, None, false, &options(false)).unwrap_err();
    assert!(error.to_string().contains("snapshot.vhd"), "{error}");
    assert!(images.iter().all(|image| held(image) == Ok(1) && held(&image.with_extension("vud")) == Ok(2)));
}

/// Found by `trees`: the other disks of the session could only be discarded then.
#[test]
fn a_merge_takes_no_part_out_of_a_session() {
    let session = Session::new();
    let images = session.images();
    let undo = images[1].with_extension("vud");
    let above = undo.with_file_name("above.vhd");
    new_child(&above, &undo);
    for (leaf, delete) in [(&undo, true), (&undo, false), (&above, true)] {
        let how = MergeOptions { into: Some(images[1].clone()), delete, ..MergeOptions::default() };
        let error = plan(leaf, &how, &options(false)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("vhd undo commit"), "{error}");
        plan(leaf, &MergeOptions { force: true, ..how }, &options(false)).unwrap();
    }
    commit(&images, &options(false)).unwrap();
    assert!(images.iter().all(|image| held(image) == Ok(2)) && held(&above) == Ok(2));
}

/// Its undo disk would be one of no image: a session that nothing ends.
#[test]
fn an_image_with_an_undo_disk_is_not_merged() {
    let folder = tempfile::tempdir().unwrap();
    let (base, image) = (folder.path().join("base.vhd"), folder.path().join("disk.vhd"));
    new_image(&base, NewKind::Dynamic, 32 << 10, 4096);
    new_child(&image, &base);
    let images = [image.clone()];
    undo::start(&images, None, &options(false)).unwrap();
    for delete in [true, false] {
        let how = MergeOptions { delete, ..MergeOptions::default() };
        let error = plan(&image, &how, &options(false)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("disk.vud"), "{error}");
        plan(&image, &MergeOptions { force: true, ..how }, &options(false)).unwrap();
    }
    commit(&images, &options(false)).unwrap();
    plan(&image, &MergeOptions::default(), &options(false)).unwrap();
}

#[test]
fn an_image_whose_commit_would_be_refused_starts_no_session() {
    let session = Session::new();
    let images = session.images();
    undo::discard(&images, None, false, &options(false)).unwrap();
    new_child(&images[1].with_file_name("other.vhd"), &images[1]);
    let before = files_of(session.folder.path());
    let error = undo::start(&images, None, &options(false)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("other.vhd") && error.to_string().contains("--force"), "{error}");
    assert!(files_of(session.folder.path()) == before);
    let mut forced = options(false);
    forced.image.force = true;
    undo::start(&images, None, &forced).unwrap();
    assert_eq!(commit(&images, &options(false)).unwrap_err().kind(), ErrorKind::Refused);
    undo::discard(&images, None, false, &options(false)).unwrap();
}

#[test]
fn what_a_session_would_do_is_told_and_not_done() {
    let session = Session::new();
    let images = session.images();
    let before = files_of(session.folder.path());
    let chain = options(false);
    assert_eq!(undo::plan_start(&images, None, &chain).unwrap_err().kind(), ErrorKind::Exists);
    let plans = undo::plan_commit(&images, None, false, &chain).unwrap();
    assert_eq!(plans.iter().map(|plan| plan.data).collect::<Vec<_>>(), [10_240, 10_240]);
    let undos: Vec<_> = images.iter().map(|image| image.with_extension("vud")).collect();
    assert_eq!(undo::plan_discard(&images, None, false, &chain).unwrap(), undos);
    assert!(files_of(session.folder.path()) == before);
    undo::discard(&images, None, false, &chain).unwrap();
    let planned = undo::plan_start(&images, None, &chain).unwrap();
    assert_eq!(planned.members.into_iter().map(|member| member.undo).collect::<Vec<_>>(), undos);
    assert!(undos.iter().all(|undo| !undo.exists()));
}

#[test]
fn undo_disks_elsewhere_and_moved_together_are_one_session_still() {
    let session = Session::new();
    let images = session.images();
    undo::discard(&images, None, false, &options(false)).unwrap();
    let dir = session.folder.path().join("undo");
    std::fs::create_dir(&dir).unwrap();
    undo::start(&images, Some(&dir), &options(false)).unwrap();
    let moved = tempfile::tempdir_in("/dev/shm").unwrap();
    for name in ["one", "two", "undo"] {
        std::fs::rename(session.folder.path().join(name), moved.path().join(name)).unwrap();
    }
    let (images, dir) = (self::images(moved.path()), moved.path().join("undo"));
    let mut chain = options(true);
    chain.parents.parent_dirs = images.iter().map(|image| image.parent().unwrap().to_owned()).collect();
    Disk::open(&dir.join("system.vud"), &chain).unwrap().write_at(&[7; 10_000], 0).unwrap();
    undo::commit(&images, Some(&dir), false, &options(false), &Progress::default()).unwrap();
    assert_eq!((held(&images[0]), held(&images[1])), (Ok(7), Ok(1)));
}

/// Either both are committed, or both show the old content until the commit is finished.
fn judge_commit(images: &[PathBuf], done: bool) -> Result<(), String> {
    let seen: Vec<_> = images.iter().map(|image| held(image)).collect();
    for (image, seen) in images.iter().zip(&seen) {
        let undo = image.with_extension("vud");
        match seen {
            Ok(2) if !undo.exists() => {}
            Ok(1) if !done && held(&undo) == Ok(2) => {}
            Err(error) if !done && error.contains("vhd undo commit") => {}
            other => return Err(format!("{}: {other:?}, {:?}", image.display(), held(&undo))),
        }
    }
    if seen.contains(&Ok(1)) && seen.contains(&Ok(2)) {
        // Decided or not is one answer for both.
        let decided = undo::status(images, None, &options(false)).map_err(|error| error.to_string())?;
        if !decided.iter().any(|state| state.committing) {
            return Err("one is committed and the other does not know".into());
        }
    }
    if seen.iter().any(|seen| *seen != Ok(2)) {
        commit(images, &options(false)).map_err(|error| format!("again: {error}"))?;
    }
    match images.iter().find(|image| held(image) != Ok(2) || image.with_extension("vud").exists()) {
        None => Ok(()),
        Some(image) => Err(format!("{} is not committed at the end", image.display())),
    }
}

/// Either both are pending, or both can only be discarded; the images are never touched. (Of a session over several folders,
/// one does not know of the other: who opens an image has not named other folders.)
fn judge_discard(images: &[PathBuf], done: bool) -> Result<(), String> {
    if images.iter().any(|image| held(image) != Ok(1)) {
        return Err("an image changed".into());
    }
    let seen: Vec<_> = images.iter().map(|image| held(&image.with_extension("vud"))).collect();
    let pending = seen.iter().filter(|seen| **seen == Ok(2)).count();
    if (pending != 0 && pending != 2) || (done && images.iter().any(|image| image.with_extension("vud").exists())) {
        return Err(format!("{seen:?}"));
    }
    if images.iter().any(|image| image.with_extension("vud").exists()) {
        undo::discard(images, None, false, &options(false)).map_err(|error| format!("again: {error}"))?;
    }
    images.iter().try_for_each(|image| Disk::open(image, &options(true)).map(drop)).map_err(|error| error.to_string())
}

#[test]
fn a_session_over_several_folders_ends_where_all_are_named() {
    let session = Session::new();
    let [one, two] = [0, 1].map(|index| session.images()[index].clone());
    for only in [&one, &two] {
        let only = std::slice::from_ref(only);
        assert_error(&commit(only, &options(false)).unwrap_err(), ErrorKind::InvalidInput, "name all of its images");
        let discarded = undo::discard(only, None, false, &options(false));
        assert_error(&discarded.unwrap_err(), ErrorKind::InvalidInput, "name all of its images");
    }
    // Half discarded: what is left is not committed, and goes when all are named.
    std::fs::remove_file(one.with_extension("vud")).unwrap();
    let both = [one.clone(), two.clone()];
    assert!(commit(&both, &options(false)).is_err() && held(&two) == Ok(1));
    undo::discard(&both, None, false, &options(false)).unwrap();
    assert!(!two.with_extension("vud").exists());
    undo::start(&both, None, &options(false)).unwrap();
    both.iter().for_each(|image| drop(open(&image.with_extension("vud"), true).write_at(&[2; 10_000], 0)));
    commit(&both, &options(false)).unwrap();
    assert_eq!((held(&one), held(&two)), (Ok(2), Ok(2)));
}

/// Whatever fails, and whether or not the host still takes names away: no undo disk is left, or the error names it.
#[test]
fn a_start_that_fails_leaves_no_undo_disk_or_names_it() {
    let session = Session::new();
    let (mut gone, mut named) = (0, 0);
    for for_ever in [false, true] {
        for at in 1.. {
            undo::discard(&session.images(), None, false, &options(false)).ok();
            for image in session.images() {
                std::fs::remove_file(image.with_extension("vud")).ok();
            }
            let host = Arc::new(FaultHost::new(at, for_ever, false));
            let chain = ChainOptions { host: Arc::clone(&host) as _, ..options(false) };
            let Err(error) = undo::start(&session.images(), None, &chain) else { break };
            let undo_disks = session.images().into_iter().map(|image| image.with_extension("vud"));
            match undo_disks.into_iter().find(|undo| undo.exists()) {
                Some(left) => {
                    assert!(error.to_string().contains(&left.display().to_string()), "{error}");
                    named += 1;
                }
                None => gone += 1,
            }
        }
    }
    assert!(gone > 0 && named > 0, "{gone} gone, {named} named");
}

/// No session, or one that is whole; one that is not can be discarded, and started again.
fn judge_start(images: &[PathBuf], done: bool) -> Result<(), String> {
    if images.iter().any(|image| held(image) != Ok(1)) {
        return Err("an image changed".into());
    }
    let undo_disks: Vec<_> = images.iter().map(|image| image.with_extension("vud")).collect();
    let is_whole = undo_disks.iter().all(|undo| held(undo) == Ok(1));
    if done && !is_whole {
        return Err("answered, and not started".into());
    }
    if !is_whole {
        if undo_disks.iter().any(|undo| undo.exists()) {
            undo::discard(images, None, false, &options(false)).map_err(|error| format!("discard: {error}"))?;
        }
        undo::start(images, None, &options(false)).map_err(|error| format!("start again: {error}"))?;
    }
    match undo_disks.iter().find(|undo| held(undo) != Ok(1)) {
        None => Ok(()),
        Some(undo) => Err(format!("{}: {:?}", undo.display(), held(undo))),
    }
}

/// Calls `visit` with each operation, and what finishes it.
fn operations(visit: &mut dyn FnMut(&Operation<'_>, &Run<'_>)) {
    let commit = |folder: &Path, chain: &ChainOptions| commit(&images(folder), chain).unwrap();
    // Where all is done there is no session, and it says so.
    let finish = |folder: &Path, chain: &ChainOptions| drop(self::commit(&images(folder), chain));
    let judge = |folder: &Path, done: bool| judge_commit(&images(folder), done);
    visit(&Operation::new("undo commit", Session::new().folder, &commit, &judge), &finish);
    let discard = |folder: &Path, chain: &ChainOptions| drop(undo::discard(&images(folder), None, false, chain));
    let judge = |folder: &Path, done: bool| judge_discard(&images(folder), done);
    visit(&Operation::new("undo discard", Session::together().folder, &discard, &judge), &discard);
    let session = Session::together();
    undo::discard(&session.images(), None, false, &options(false)).unwrap();
    let start = |folder: &Path, chain: &ChainOptions| drop(undo::start(&images(folder), None, chain));
    let judge = |folder: &Path, done: bool| judge_start(&images(folder), done);
    visit(&Operation::new("undo start", session.folder, &start, &judge), &start);
}

#[test]
fn a_power_cut_leaves_a_session_that_is_started_committed_or_discarded_as_a_whole() {
    operations(&mut |operation, _| {
        operation.enumerate(Effort { exhaustive: 4, samples: 4, seed: 1 });
    });
}

#[test]
fn every_barrier_is_needed() {
    let mut barriers = Barriers::default();
    operations(&mut |operation, finish| {
        operation.sabotage_with_finish(&mut barriers, Effort { exhaustive: 4, samples: 2, seed: 1 }, finish);
    });
    barriers.assert("undo");
}
