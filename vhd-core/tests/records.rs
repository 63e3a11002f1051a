//! Goal: what lies beside an image is never believed. A record, an undo session, a half-made file of a stranger names files; none is
//! touched that the call did not name and whose identifier was not proved, and what is removed was compared before.
//!
//! Method: records of the current form and of the former one, forged with right checksums, beside honest images; each refusal has a
//! twin, where the same call on the honest record works. Operations that fail at each of their changes leave files that are copied
//! elsewhere, alone: nobody takes them for what they are not.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use uuid::Uuid;
use vhd_core::chain::{Chain, ChainOptions};
use vhd_core::format::DiskType;
use vhd_core::image::NewKind;
use vhd_core::intent::{self, Intent, Member, Merge, Named};
use vhd_core::ops::in_place::{InPlaceOptions, convert_in_place};
use vhd_core::ops::merge::{MergeOptions, execute, plan};
use vhd_core::ops::resize::{ResizeOptions, resize};
use vhd_core::ops::undo;
use vhd_core::storage::LocalHost;
use vhd_core::{Disk, Error, ErrorKind, Progress};
use vhd_testkit::fault_host::FaultHost;
use vhd_testkit::tools::QemuImg;

use self::support::{assert_error, new_child, new_image, open, options, read_all};

const BLOCK: u64 = 4096;
const SIZE: u64 = 16 * BLOCK;

/// A folder that was received, with a base and its child, and a home beside it with a file of the user's.
struct Received {
    folder: TempDir,
}

impl Received {
    fn new() -> Self {
        let it = Self { folder: tempfile::tempdir_in("/dev/shm").unwrap() };
        for name in ["got", "home"] {
            fs::create_dir(it.folder.path().join(name)).unwrap();
        }
        fs::write(it.precious(), b"precious").unwrap();
        new_image(&it.path("base.vhd"), NewKind::Dynamic, SIZE, BLOCK as u32);
        open(&it.path("base.vhd"), true).write_at(&[1; 20_000], 0).unwrap();
        new_child(&it.path("leaf.vhd"), &it.path("base.vhd"));
        open(&it.path("leaf.vhd"), true).write_at(&[2; 9_000], 5_000).unwrap();
        it
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("got").join(name)
    }

    fn precious(&self) -> PathBuf {
        self.folder.path().join("home/p.txt")
    }

    fn uuid(&self, name: &str) -> Uuid {
        uuid_of(&self.path(name))
    }

    /// What an honest merge of the leaf records, with `--delete`.
    fn member(&self) -> Member {
        Member {
            target: self.path("base.vhd"),
            target_uuid: Some((self.uuid("base.vhd"), Uuid::from_bytes([9; 16]))),
            leaf: self.path("leaf.vhd"),
            leaf_uuid: self.uuid("leaf.vhd"),
            between: Vec::new(),
            children: Vec::new(),
            delete: true,
            protection: None,
            grow: None,
        }
    }

    fn put(&self, members: Vec<Member>, finishing: bool, former: bool) {
        let merge = Merge { members, undo: false, finishing, force: (!former).then_some(false) };
        let record = Intent::Merge(merge.relative_to(&self.path("").canonicalize().unwrap()));
        intent::put(&LocalHost, &self.path("base.vhd"), &record).unwrap();
        if former {
            let path = self.path("base.vhd.vhd-intent");
            fs::write(&path, fs::read_to_string(&path).unwrap().replace("vhd-intent 2", "vhd-intent 1")).unwrap();
        }
    }

    fn merge(&self, how: &MergeOptions) -> Result<(), Error> {
        merge(&self.path("leaf.vhd"), &self.path("base.vhd"), how)
    }

    /// The stranger's record leads to a refusal, and the user's file is what it was.
    #[track_caller]
    fn assert_untouched(&self, result: Result<(), Error>) {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Refused);
        assert_eq!(fs::read(self.precious()).unwrap(), b"precious");
        assert!(self.path("leaf.vhd").exists());
    }
}

fn uuid_of(image: &Path) -> Uuid {
    Uuid::from_bytes(Chain::open_image(image, &options(false)).unwrap().footer().uuid())
}

fn deleting() -> MergeOptions {
    MergeOptions { delete: true, ..MergeOptions::default() }
}

fn merge(leaf: &Path, into: &Path, how: &MergeOptions) -> Result<(), Error> {
    let how = MergeOptions { into: Some(into.to_owned()), ..how.clone() };
    execute(&plan(leaf, &how, &options(false))?, &how, &options(false), &Progress::default())
}

fn interrupt(leaf: &Path, into: &Path, how: &MergeOptions) {
    let stopped = Progress::default();
    stopped.cancel();
    let how = MergeOptions { into: Some(into.to_owned()), ..how.clone() };
    let begun = execute(&plan(leaf, &how, &options(false)).unwrap(), &how, &options(false), &stopped);
    assert_eq!(begun.unwrap_err().kind(), ErrorKind::Cancelled);
}

#[test]
fn a_record_names_no_file_of_another_folder_that_goes() {
    for former in [false, true] {
        for finishing in [false, true] {
            let it = Received::new();
            let uuid = (!former).then(|| Uuid::from_bytes([5; 16]));
            let between = vec![Named { path: it.precious(), uuid }];
            it.put(vec![Member { between, ..it.member() }], finishing, former);
            it.assert_untouched(it.merge(&deleting()));
            // Nor where the call names it: it is no such image.
            it.assert_untouched(it.merge(&MergeOptions { with: vec![it.precious()], ..deleting() }));
        }
    }
}

#[test]
fn a_record_names_no_second_target_that_is_written() {
    for former in [false, true] {
        let it = Received::new();
        let second = Member { target: it.precious(), target_uuid: None, ..it.member() };
        it.put(vec![it.member(), second], false, former);
        drop(it.merge(&deleting()));
        assert_eq!(fs::read(it.precious()).unwrap(), b"precious");
    }
}

#[test]
fn an_honest_record_of_either_form_is_finished() {
    for former in [false, true] {
        let it = Received::new();
        let content = read_all(&open(&it.path("leaf.vhd"), false));
        it.put(vec![it.member()], false, former);
        it.merge(&deleting()).unwrap();
        assert!(read_all(&open(&it.path("base.vhd"), false)) == content);
        assert!(!it.path("leaf.vhd").exists() && !it.path("base.vhd.vhd-intent").exists());
    }
}

#[test]
fn what_a_record_calls_merged_is_compared_before_it_goes() {
    let it = Received::new();
    let base = it.uuid("base.vhd");
    it.put(vec![Member { target_uuid: Some((base, base)), ..it.member() }], true, false);
    let error = it.merge(&deleting()).unwrap_err();
    assert_error(&error, ErrorKind::Refused, "does not hold what");
    assert!(it.path("leaf.vhd").exists());
    // The same where the base has it all.
    intent::clear(&LocalHost, &it.path("base.vhd")).unwrap();
    it.merge(&MergeOptions::default()).unwrap();
    let new = it.uuid("base.vhd");
    it.put(vec![Member { target_uuid: Some((new, new)), ..it.member() }], true, false);
    it.merge(&deleting()).unwrap();
    assert!(!it.path("leaf.vhd").exists());
}

#[test]
fn an_image_of_the_folder_that_is_not_between_does_not_go() {
    let it = Received::new();
    let base = it.uuid("base.vhd");
    it.merge(&MergeOptions::default()).unwrap();
    // An empty child of another image: it holds nothing that could be compared.
    new_image(&it.path("other.vhd"), NewKind::Dynamic, SIZE, BLOCK as u32);
    new_child(&it.path("snapshot.vhd"), &it.path("other.vhd"));
    for former in [false, true] {
        let uuid = (!former).then(|| it.uuid("snapshot.vhd"));
        let between = vec![Named { path: it.path("snapshot.vhd"), uuid }];
        let target_uuid = Some((base, it.uuid("base.vhd")));
        it.put(vec![Member { target_uuid, between, ..it.member() }], true, former);
        let error = it.merge(&deleting()).unwrap_err();
        assert!(it.path("snapshot.vhd").exists() && it.path("leaf.vhd").exists(), "{error}");
        intent::clear(&LocalHost, &it.path("base.vhd")).unwrap();
    }
}

#[test]
fn another_image_of_the_childs_name_is_not_taken_for_it() {
    let it = Received::new();
    let content = read_all(&open(&it.path("leaf.vhd"), false));
    interrupt(&it.path("leaf.vhd"), &it.path("base.vhd"), &deleting());
    fs::rename(it.path("leaf.vhd"), it.path("leaf.bak")).unwrap();
    new_image(&it.path("leaf.vhd"), NewKind::Dynamic, SIZE, BLOCK as u32);
    open(&it.path("leaf.vhd"), true).write_at(b"another disk", 0).unwrap();
    assert_error(&it.merge(&deleting()).unwrap_err(), ErrorKind::Refused, "it is not the image whose merge");
    assert_eq!(read_all(&open(&it.path("leaf.vhd"), false))[..12], *b"another disk");
    fs::rename(it.path("leaf.bak"), it.path("leaf.vhd")).unwrap();
    it.merge(&deleting()).unwrap();
    assert!(read_all(&open(&it.path("base.vhd"), false)) == content);
}

#[test]
fn a_merge_goes_on_with_what_it_was_begun_with_alone() {
    let it = Received::new();
    interrupt(&it.path("leaf.vhd"), &it.path("base.vhd"), &deleting());
    let error = it.merge(&MergeOptions::default()).unwrap_err();
    assert_error(&error, ErrorKind::Refused, "--delete");
    assert!(error.to_string().contains("vhd merge") && it.path("leaf.vhd").exists());
    let forced = MergeOptions { force: true, ..deleting() };
    assert_error(&it.merge(&forced).unwrap_err(), ErrorKind::Refused, "begun without --force");
    it.merge(&deleting()).unwrap();
}

#[test]
fn a_merge_over_two_folders_goes_on_where_the_call_names_them() {
    let it = Received::new();
    let other = it.folder.path().join("home/grand.vhd");
    let mut chain = options(false);
    chain.parents.any_parent = true;
    vhd_core::chain::create_child(&other, &it.path("leaf.vhd"), &support::child_options(), &chain).unwrap();
    let with = MergeOptions { with: vec![other.clone()], ..deleting() };
    interrupt(&it.path("leaf.vhd"), &it.path("base.vhd"), &with);
    let told = Disk::open(&it.path("base.vhd"), &options(false)).map(drop).unwrap_err().to_string();
    assert!(told.contains("--with") && told.contains("grand.vhd") && told.contains("--delete"), "{told}");
    assert_error(&it.merge(&deleting()).unwrap_err(), ErrorKind::Refused, "--with names it");
    it.merge(&with).unwrap();
    let grand = Disk::open(&other, &chain).unwrap();
    assert!(read_all(&grand) == read_all(&open(&it.path("base.vhd"), false)));
}

#[test]
fn a_marked_target_without_its_record_takes_the_merge_anew() {
    let it = Received::new();
    let content = read_all(&open(&it.path("leaf.vhd"), false));
    interrupt(&it.path("leaf.vhd"), &it.path("base.vhd"), &deleting());
    fs::remove_file(it.path("base.vhd.vhd-intent")).unwrap();
    let told = Disk::open(&it.path("base.vhd"), &options(false)).map(drop).unwrap_err();
    assert_error(&told, ErrorKind::Refused, "vhd merge");
    it.merge(&MergeOptions::default()).unwrap();
    assert!(read_all(&open(&it.path("base.vhd"), false)) == content);
}

#[test]
fn a_session_names_no_file_that_is_discarded_or_committed() {
    for discards in [true, false] {
        let it = Received::new();
        let image = it.path("base.vhd");
        fs::remove_file(it.path("leaf.vhd")).unwrap();
        undo::start(std::slice::from_ref(&image), None, &options(false)).unwrap();
        let end = |images: &[PathBuf]| match discards {
            true => undo::discard(images, None, false, &options(false)).map(drop),
            false => undo::commit(images, None, false, &options(false), &Progress::default()),
        };
        // The session's text, with another file as its undo disk.
        let undo_disk = it.path("base.vud");
        let mut bytes = fs::read(&undo_disk).unwrap();
        let at = bytes.windows(8).position(|bytes| bytes == b"base.vud").unwrap();
        bytes[at..at + 8].copy_from_slice(b"p.txt   ");
        fs::write(&undo_disk, &bytes).unwrap();
        fs::write(it.path("p.txt   "), b"precious").unwrap();
        end(std::slice::from_ref(&image)).unwrap();
        assert_eq!(fs::read(it.path("p.txt   ")).unwrap(), b"precious");
        assert!(!undo_disk.exists());
    }
}

#[test]
fn a_file_that_is_no_undo_disk_of_the_image_is_not_discarded() {
    let it = Received::new();
    let images = [it.path("base.vhd")];
    // A child of another image has the undo disk's name.
    new_image(&it.path("other.vhd"), NewKind::Dynamic, SIZE, BLOCK as u32);
    new_child(&it.path("base.vud"), &it.path("other.vhd"));
    let error = undo::discard(&images, None, false, &options(false)).unwrap_err();
    assert_error(&error, ErrorKind::InvalidInput, "is no undo disk");
    // An undo disk of another image has it.
    fs::remove_file(it.path("base.vud")).unwrap();
    undo::start(&[it.path("other.vhd")], None, &options(false)).unwrap();
    fs::rename(it.path("other.vud"), it.path("base.vud")).unwrap();
    let error = undo::discard(&images, None, false, &options(false)).unwrap_err();
    assert_error(&error, ErrorKind::Refused, "its parent is another image");
    assert!(it.path("base.vud").exists());
}

/// An operation in stages on `disk.vhd` of a folder, which makes it and does it.
struct Stages {
    name: &'static str,
    make: fn(&Path),
    run: fn(&Path, &ChainOptions) -> Result<(), Error>,
}

fn filled(folder: &Path, kind: NewKind) {
    new_image(&folder.join("disk.vhd"), kind, SIZE, BLOCK as u32);
    let disk = open(&folder.join("disk.vhd"), true);
    (0..16).for_each(|block| disk.write_at(&[block as u8 + 1; 3000], block * BLOCK).unwrap());
    disk.close().unwrap();
}

fn stages() -> [Stages; 5] {
    let fixed = |folder: &Path| filled(folder, NewKind::Fixed { preallocate: false });
    [
        Stages { name: "to dynamic", make: fixed, run: |folder, chain| in_place(folder, DiskType::Dynamic, chain) },
        Stages {
            name: "to fixed",
            make: |folder| filled(folder, NewKind::Dynamic),
            run: |folder, chain| in_place(folder, DiskType::Fixed, chain),
        },
        Stages { name: "larger", make: fixed, run: |folder, chain| to_size(folder, SIZE + 5 * BLOCK, chain) },
        Stages { name: "smaller", make: fixed, run: |folder, chain| to_size(folder, SIZE - 5 * BLOCK, chain) },
        Stages {
            name: "merge",
            make: |folder| {
                filled(folder, NewKind::Dynamic);
                new_child(&folder.join("child.vhd"), &folder.join("disk.vhd"));
                open(&folder.join("child.vhd"), true).write_at(&[0xCC; 30_000], 7_000).unwrap();
            },
            run: |folder, chain| {
                let how = MergeOptions::default();
                execute(&plan(&folder.join("child.vhd"), &how, chain)?, &how, chain, &Progress::default())
            },
        },
    ]
}

fn in_place(folder: &Path, to: DiskType, chain: &ChainOptions) -> Result<(), Error> {
    let how = InPlaceOptions { block_size: BLOCK as u32, piece: 5 * BLOCK, ..InPlaceOptions::new(to) };
    convert_in_place(&folder.join("disk.vhd"), &how, chain, &Progress::default()).map(drop)
}

fn to_size(folder: &Path, size: u64, chain: &ChainOptions) -> Result<(), Error> {
    let how = ResizeOptions { shrink: true, discard_data: true, ..ResizeOptions::default() };
    resize(&folder.join("disk.vhd"), size, &how, chain, &Progress::default()).map(drop)
}

/// Each file of a folder, alone under another name: what reads as a whole disk is the old one or the new one.
fn judge_alone(what: &str, folder: &Path, whole: &[Vec<u8>], qemu: Option<&QemuImg>) -> usize {
    let mut refused = 0;
    for (path, bytes) in support::files_of(folder) {
        let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
        let copy = elsewhere.path().join("copy.vhd");
        fs::write(&copy, bytes).unwrap();
        let is_whole = |found: &[u8]| whole.iter().any(|whole| whole == found);
        match Disk::open(&copy, &options(false)) {
            Ok(disk) => assert!(is_whole(&read_all(&disk)), "{what}: {} is taken for another disk", path.display()),
            Err(_) => refused += 1,
        }
        // A child is empty to QEMU, whatever we do.
        if path.ends_with("child.vhd") {
            continue;
        }
        if let Some(Ok(found)) = qemu.map(|qemu| qemu.to_raw(&copy)) {
            assert!(is_whole(&found), "{what}: QEMU takes {} for another disk", path.display());
        }
    }
    refused
}

#[test]
fn no_stage_of_an_operation_is_taken_for_an_image() {
    let qemu = QemuImg::find();
    for stages in stages() {
        let whole = |run: bool| {
            let folder = tempfile::tempdir_in("/dev/shm").unwrap();
            (stages.make)(folder.path());
            if run {
                (stages.run)(folder.path(), &options(false)).unwrap();
            }
            read_all(&open(&folder.path().join("disk.vhd"), false))
        };
        let both = [whole(false), whole(true)];
        let mut refused = 0;
        for at in 1.. {
            let folder = tempfile::tempdir_in("/dev/shm").unwrap();
            (stages.make)(folder.path());
            let host = FaultHost::new(at, true, false);
            let chain = ChainOptions { host: Arc::new(host.clone()), ..options(false) };
            let done = (stages.run)(folder.path(), &chain);
            refused += judge_alone(&format!("{}, change {at}", stages.name), folder.path(), &both, qemu.as_ref());
            if !host.has_failed() {
                done.unwrap();
                break;
            }
        }
        assert!(refused > 0, "{}: no stage was seen", stages.name);
    }
}

#[test]
fn a_conversion_goes_on_where_both_files_were_renamed() {
    for (from, to) in [(NewKind::Fixed { preallocate: false }, DiskType::Dynamic), (NewKind::Dynamic, DiskType::Fixed)] {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = |name: &str| folder.path().join(name);
        filled(folder.path(), from);
        let content = read_all(&open(&path("disk.vhd"), false));
        let how = InPlaceOptions { block_size: BLOCK as u32, piece: 5 * BLOCK, ..InPlaceOptions::new(to) };
        let stopped = Progress::default();
        stopped.cancel_after(7 * BLOCK);
        convert_in_place(&path("disk.vhd"), &how, &options(false), &stopped).unwrap_err();
        fs::remove_file(path("disk.vhd.vhd-intent")).unwrap();
        fs::rename(path("disk.vhd"), path("moved.vhd")).unwrap();
        let told = Disk::open(&path("moved.vhd"), &options(false)).map(drop).unwrap_err();
        assert_error(&told, ErrorKind::Refused, "--in-place");
        // The other half has its own name still, and another.
        fs::rename(path(".disk.vhd.vhd-converting"), path("half.vhd-converting")).unwrap();
        convert_in_place(&path("moved.vhd"), &how, &options(false), &Progress::default()).unwrap();
        assert!(read_all(&open(&path("moved.vhd"), false)) == content);
    }
}

#[test]
fn a_raw_file_whose_content_moved_in_part_is_no_raw_disk() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("disk.img");
    let content: Vec<u8> = (0..SIZE).map(|at| (at / BLOCK) as u8 + 1).collect();
    fs::write(&path, &content).unwrap();
    let how = InPlaceOptions {
        from_raw: Some(true),
        block_size: BLOCK as u32,
        piece: 5 * BLOCK,
        ..InPlaceOptions::new(DiskType::Dynamic)
    };
    let stopped = Progress::default();
    stopped.cancel_after(7 * BLOCK);
    convert_in_place(&path, &how, &options(false), &stopped).unwrap_err();
    fs::remove_file(folder.path().join("disk.img.vhd-intent")).unwrap();
    assert_error(&Chain::open_raw(&path, false).unwrap_err(), ErrorKind::Refused, "--in-place");
    convert_in_place(&path, &how, &options(false), &Progress::default()).unwrap();
    assert!(read_all(&open(&path, false)) == content);
}
