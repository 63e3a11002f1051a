//! Goal: a parent is found by everything that an image may say of it, and the images made here say it in every way that
//! others look.
//!
//! Method: children of the test kit with one way each, in the folders and under the names that users have; children of
//! this project, whose locators are read back as Windows, tapdisk and libvhdi read them.
//! It would fail if a chain that moved as a whole, or whose names have blanks or accents, did not open.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::fs;
use std::io::IoSliceMut;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vhd_core::chain::{Chain, create_child, read_locators};
use vhd_core::format::PlatformCode;
use vhd_core::image::NewKind;
use vhd_core::ops::resize::{ResizeOptions, resize};
use vhd_core::{Disk, ErrorKind, Progress};
use vhd_testkit::fixture::{BlockFill, FixtureSpec, Kind, Layout, Locator, Parent};
use vhd_testkit::reference::ReferenceChain;
use vhd_testkit::tools::VhdiMount;

use self::support::{assert_refused, child_options, new_child, new_image, open, options, read_all};

const UUID: [u8; 16] = *b"uuid-of-a-parent";
const SIZE: u64 = 64 << 10;
const MIB: u64 = 1 << 20;

fn base() -> FixtureSpec {
    FixtureSpec { uuid: UUID, block_size: 4096, ..FixtureSpec::new(Kind::Dynamic, Layout::Classic, SIZE) }
        .block(0, BlockFill::tags(1, 1))
}

fn child(name: &str, locators: &[Locator]) -> FixtureSpec {
    let mut parent = Parent::named(UUID, name);
    parent.locators.extend_from_slice(locators);
    FixtureSpec {
        uuid: *b"uuid-of-the-leaf",
        parent: Some(parent),
        block_size: 4096,
        ..FixtureSpec::new(Kind::Differencing, Layout::Classic, SIZE)
    }
    .block(3, BlockFill::tags(2, 1))
}

/// Writes a parent and a child at paths below a folder of their own; their folders are made.
fn place(parent: &str, child_at: &str, spec: &FixtureSpec) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    for (place, spec) in [(parent, &base()), (child_at, spec)] {
        let path = folder.path().join(place);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        spec.write_to(&path).unwrap();
    }
    let child = folder.path().join(child_at);
    (folder, child)
}

#[track_caller]
fn assert_opens(path: &Path, spec: &FixtureSpec) {
    assert!(read_all(&open(path, false)) == spec.guest(&base().guest(&[])));
    open(path, true);
}

#[test]
fn each_way_to_name_a_parent_finds_it() {
    let way = |locator: Locator| child("nowhere.vhd", &[locator]);
    let cases = [
        ("base.vhd", way(Locator::w2ru(".\\base.vhd"))),
        ("base.vhd", way(Locator::w2ru("base.vhd"))),
        ("base.vhd", way(Locator::w2ru(".\\base.vhd").in_sectors())),
        ("base.vhd", way(Locator::w2ru(".\\base.vhd\0\0"))),
        ("sub/deeper/base.vhd", way(Locator::w2ru(".\\sub\\deeper\\base.vhd"))),
        ("sub/base.vhd", way(Locator::w2ru(".\\sub\\..\\sub\\base.vhd"))),
        ("base.vhd", way(Locator::macx("file://./base.vhd"))),
        ("base.vhd", way(Locator::macx("file://base.vhd"))),
        ("my base %41.vhd", way(Locator::macx("file://./my base %41.vhd"))),
        ("my base ü.vhd", way(Locator::macx("file://./my%20base%20%C3%BC.vhd"))),
        ("base.vhd", way(Locator::wi2r(".\\base.vhd"))),
        ("base.vhd", child("base.vhd", &[])),
        ("base.vhd", child("C:\\Users\\vm\\base.vhd", &[])),
        ("base.vhd", child("/home/vm/base.vhd", &[])),
        ("base.vhd", child("base.vhd", &[Locator::w2ru(".\\moved.vhd"), Locator::w2ku("D:\\moved.vhd")])),
        ("base.vhd", child("base.vhd", &[Locator::mac(&[0; 40])])),
    ];
    for (parent, spec) in cases {
        println!("{parent}: {:?}", spec.parent.as_ref().unwrap());
        let (_folder, path) = place(parent, "child.vhd", &spec);
        assert_opens(&path, &spec);
    }
}

#[test]
fn an_absolute_path_counts_when_it_leads_into_the_childs_folder() {
    for (prefix, code) in [("", "w2ku"), ("C:", "w2ku"), ("file://localhost", "macx"), ("file://", "macx")] {
        let folder = tempfile::tempdir().unwrap();
        let base_path = folder.path().join("base.vhd");
        base().write_to(&base_path).unwrap();
        let text = format!("{prefix}{}", base_path.display());
        let locator = if code == "macx" { Locator::macx(&text) } else { Locator::w2ku(&text.replace('/', "\\")) };
        let spec = child("nowhere.vhd", &[locator]);
        let path = folder.path().join("child.vhd");
        spec.write_to(&path).unwrap();
        assert_opens(&path, &spec);
    }
}

#[test]
fn names_with_blanks_accents_and_backslashes_are_found() {
    for name in
        ["two words.vhd", "Prüfung – ß.vhd", "基底.vhd", "a\\b.vhd", "100%.vhd", "a%20b.vhd", "x;y&z,'\".vhd", "UPPER.VHD"]
    {
        let folder = tempfile::tempdir().unwrap();
        let (base, middle) = (folder.path().join(name), folder.path().join(format!("child of {name}")));
        let leaf = folder.path().join("leaf.vhd");
        new_image(&base, NewKind::Dynamic, SIZE, 4096);
        open(&base, true).write_at(&[7; 4096], 0).unwrap();
        new_child(&middle, &base);
        new_child(&leaf, &middle);
        let disk = open(&leaf, true);
        assert_eq!(disk.capabilities().layers, 3, "{name}");
        assert_eq!(read_all(&disk)[..4096], [7; 4096], "{name}");
    }
}

/// The three locators of a child, decoded.
fn locators_of(path: &Path) -> Vec<(PlatformCode, String)> {
    let image = Chain::open_image(path, &options(false)).unwrap();
    let locators = read_locators(&**image.storage(), image.header().unwrap()).unwrap();
    locators.into_iter().map(|locator| (locator.entry.code, locator.path.unwrap())).collect()
}

#[test]
fn children_name_their_parent_in_every_way_that_others_look() {
    let folder = tempfile::tempdir().unwrap();
    let (base, leaf) = (folder.path().join("my base.vhd"), folder.path().join("leaf.vhd"));
    new_image(&base, NewKind::Dynamic, SIZE, 512 << 10);
    new_child(&leaf, &base);
    let absolute = base.canonicalize().unwrap().to_str().unwrap().replace('/', "\\");
    // Windows reads W2ru and W2ku; tapdisk takes what follows file:// as it is, and wants it to be a path.
    let expected = [
        (PlatformCode::W2ku, absolute),
        (PlatformCode::W2ru, ".\\my base.vhd".to_owned()),
        (PlatformCode::MacX, "file://./my base.vhd".to_owned()),
    ];
    assert_eq!(locators_of(&leaf), expected);
    let image = Chain::open_image(&leaf, &options(false)).unwrap();
    let header = image.header().unwrap();
    // libvhdi looks for the base name, and tapdisk compares it with the locator's.
    assert_eq!(header.parent_name(), "my base.vhd");
    assert_eq!(header.parent_timestamp().0, 0);
    let parent = Chain::open_image(&base, &options(false)).unwrap();
    assert_eq!(header.parent_uuid(), parent.footer().uuid());
    assert_eq!(image.layout().unwrap().block_size(), parent.layout().unwrap().block_size());
    for entry in header.locators().filter(vhd_core::format::LocatorEntry::is_used) {
        assert!(entry.data_space.is_multiple_of(512) && entry.data_length <= entry.data_space, "{entry:?}");
    }
    if let Some(libvhdi) = VhdiMount::find() {
        assert!(libvhdi.to_raw(&leaf).unwrap().iter().all(|&byte| byte == 0));
    }
}

#[test]
fn a_chain_that_moves_as_a_whole_opens() {
    let folder = tempfile::tempdir().unwrap();
    let old = folder.path().join("old place");
    fs::create_dir_all(old.join("bases")).unwrap();
    let (base, middle, leaf) = (old.join("bases/base.vhd"), old.join("middle.vhd"), old.join("leaf.vhd"));
    new_image(&base, NewKind::Dynamic, SIZE, 4096);
    open(&base, true).write_at(&[1; 512], 0).unwrap();
    new_child(&middle, &base);
    new_child(&leaf, &middle);
    open(&leaf, true).write_at(&[2; 512], 8192).unwrap();
    let new = folder.path().join("new");
    fs::rename(&old, &new).unwrap();
    let disk = open(&new.join("leaf.vhd"), true);
    let bytes = read_all(&disk);
    assert!(bytes[..512] == [1; 512] && bytes[8192..8704] == [2; 512]);
    assert!(disk.layer_path(2).unwrap().starts_with(&new));
}

#[test]
fn a_parent_is_found_from_any_working_folder_and_through_a_relative_path() {
    let folder = tempfile::tempdir().unwrap();
    let (base, leaf) = (folder.path().join("base.vhd"), folder.path().join("leaf.vhd"));
    new_image(&base, NewKind::Dynamic, SIZE, 4096);
    new_child(&leaf, &base);
    let up: PathBuf = std::env::current_dir().unwrap().components().skip(1).map(|_| "..").collect();
    let relative = up.join(leaf.strip_prefix("/").unwrap());
    assert_eq!(open(&relative, true).capabilities().layers, 2);
}

#[test]
fn a_parent_dir_is_searched_by_identifier() {
    let spec = child("base.vhd", &[Locator::w2ru(".\\base.vhd")]);
    let (folder, path) = place("elsewhere/renamed.vhd", "vm/child.vhd", &spec);
    let elsewhere = folder.path().join("elsewhere");
    FixtureSpec { uuid: [1; 16], ..base() }.write_to(&elsewhere.join("another.vhd")).unwrap();
    fs::write(elsewhere.join("noise.vhd"), b"noise").unwrap();
    assert_refused(&path, &options(false), ErrorKind::Parent, "--parent-dir");
    let mut with = options(true);
    with.parents.parent_dirs = vec![folder.path().join("missing"), elsewhere.clone()];
    let disk = Disk::open(&path, &with).unwrap();
    assert_eq!(disk.layer_path(1), Some(elsewhere.join("renamed.vhd")));
    assert!(read_all(&disk) == spec.guest(&base().guest(&[])));
    // Not by name: another image of the parent's name is no parent.
    with.parents.parent_dirs = vec![folder.path().join("vm")];
    drop(disk);
    FixtureSpec { uuid: [2; 16], ..base() }.write_to(&folder.path().join("vm/base.vhd")).unwrap();
    assert_refused(&path, &with, ErrorKind::Parent, "has UUID");
}

#[test]
fn any_parent_follows_what_the_image_says() {
    let spec = child("nowhere.vhd", &[Locator::w2ru("..\\base.vhd")]);
    let (_folder, path) = place("base.vhd", "vm/child.vhd", &spec);
    let mut with = options(true);
    assert_refused(&path, &with, ErrorKind::Parent, "is outside");
    with.parents.any_parent = true;
    assert!(read_all(&Disk::open(&path, &with).unwrap()) == spec.guest(&base().guest(&[])));
}

#[test]
fn a_child_elsewhere_is_made_with_a_note() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("bases")).unwrap();
    fs::create_dir_all(folder.path().join("vm")).unwrap();
    let (base, leaf) = (folder.path().join("bases/base.vhd"), folder.path().join("vm/leaf.vhd"));
    new_image(&base, NewKind::Dynamic, SIZE, 4096);
    let created = create_child(&leaf, &base, &child_options(), &options(false)).unwrap();
    assert!(created.notes.iter().any(|note| note.contains("--any-parent")), "{:?}", created.notes);
    assert_eq!(locators_of(&leaf)[1].1, "..\\bases\\base.vhd");
    assert_refused(&leaf, &options(false), ErrorKind::Parent, "is outside");
    let mut with = options(true);
    with.parents.any_parent = true;
    assert_eq!(Disk::open(&leaf, &with).unwrap().capabilities().layers, 2);
}

#[test]
fn a_raw_parent_is_read_and_written_over_when_named() {
    let folder = tempfile::tempdir().unwrap();
    // No whole number of sectors, as a raw file may be.
    let raw: Vec<u8> = (0..100_000_u32).map(|n| (n >> 8) as u8).collect();
    let (base, leaf) = (folder.path().join("base.raw"), folder.path().join("leaf.vhd"));
    fs::write(&base, &raw).unwrap();
    new_child(&leaf, &base);
    let mut with = options(true);
    with.parents.raw_parent = Some(base.clone());
    let disk = Disk::open(&leaf, &with).unwrap();
    let mut expected = raw.clone();
    expected.resize(raw.len().next_multiple_of(512), 0);
    assert!(read_all(&disk) == expected);
    disk.write_at(&[0xEE; 1000], 99_500).unwrap_err();
    disk.write_at(&[0xEE; 600], 99_500).unwrap();
    expected[99_500..100_100].fill(0xEE);
    disk.close().unwrap();
    assert!(read_all(&disk) == expected && fs::read(&base).unwrap() == raw);
    drop(disk);
    let (leaf, base): (Box<fs::File>, Box<fs::File>) =
        (Box::new(fs::File::open(&leaf).unwrap()), Box::new(fs::File::open(&base).unwrap()));
    let read = ReferenceChain::open_over(vec![leaf], Some(base)).unwrap().read_all().unwrap();
    assert!(read[..100_000] == expected[..100_000]);
}

/// A copied file has another time stamp, and a clock may be changed: neither says that the parent was written to.
#[test]
fn a_time_stamp_that_differs_does_not_hinder() {
    for timestamp in [0, 1, 0x2695_B89E, u32::MAX] {
        let mut spec = child("base.vhd", &[]);
        spec.parent.as_mut().unwrap().timestamp = timestamp;
        let (_folder, path) = place("base.vhd", "child.vhd", &spec);
        assert_opens(&path, &spec);
    }
}

#[test]
fn a_parent_without_an_identifier_is_given_one_and_nothing_else() {
    for kind in [Kind::Dynamic, Kind::Fixed] {
        let folder = tempfile::tempdir().unwrap();
        let (path, leaf) = (folder.path().join("base.vhd"), folder.path().join("leaf.vhd"));
        let spec = FixtureSpec { uuid: [0; 16], ..FixtureSpec::new(kind, Layout::Classic, SIZE) };
        let placed = spec.write_to(&path).unwrap();
        let before = fs::read(&path).unwrap();
        let created = create_child(&leaf, &path, &child_options(), &options(false)).unwrap();
        assert!(created.notes.iter().any(|note| note.contains("UUID")), "{:?}", created.notes);
        let uuid = Chain::open_image(&path, &options(false)).unwrap().footer().uuid();
        assert_ne!(uuid, [0; 16]);
        assert_eq!(open(&leaf, true).capabilities().layers, 2);
        let expected = FixtureSpec { uuid, ..spec.clone() }.to_bytes().0;
        assert!(fs::read(&path).unwrap() == expected && before.len() == placed.len as usize, "{kind:?}: more changed");
    }
}

#[test]
fn a_child_may_be_larger_than_its_parent_and_not_smaller() {
    let folder = tempfile::tempdir().unwrap();
    let (base, leaf) = (folder.path().join("base.vhd"), folder.path().join("leaf.vhd"));
    new_image(&base, NewKind::Dynamic, MIB, 512 << 10);
    open(&base, true).write_at(&[3; 512], MIB - 512).unwrap();
    let mut larger = child_options();
    larger.size = Some(3 * MIB + 1);
    let created = create_child(&leaf, &base, &larger, &options(false)).unwrap();
    assert_eq!(created.size, 3 * MIB + 512);
    assert!(created.notes.iter().any(|note| note.contains("larger than its parent")), "{:?}", created.notes);
    let bytes = read_all(&open(&leaf, true));
    assert!(bytes[MIB as usize - 512..MIB as usize] == [3; 512] && bytes[MIB as usize..].iter().all(|&byte| byte == 0));
    larger.size = Some(MIB - 512);
    larger.overwrite = true;
    let error = create_child(&leaf, &base, &larger, &options(false)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert_eq!(open(&leaf, false).size(), 3 * MIB + 512, "what was there is still there");
}

/// The layers below the leaf are remembered by stretches of the disk; one may be larger than the leaf.
#[test]
fn a_layer_reads_the_same_as_its_own_leaf_however_often() {
    let folder = tempfile::tempdir().unwrap();
    let path = |n: u64| folder.path().join(format!("{n}.vhd"));
    const MIB: u64 = 1 << 20;
    new_image(&path(0), NewKind::Dynamic, 4 * MIB + 512, 512 << 10);
    for n in 0..4 {
        if n > 0 {
            new_child(&path(n), &path(n - 1));
        }
        let disk = open(&path(n), true);
        (0..40).for_each(|k| disk.write_at(&[n as u8 + 1; 1536], (k * 7919 * (n + 1)) % (4 * MIB - 1536)).unwrap());
        disk.write_at(&[n as u8 + 0x10; 512], 4 * MIB).unwrap();
    }
    let how = ResizeOptions { shrink: true, discard_data: true, ..ResizeOptions::default() };
    resize(&path(3), 300 << 10, &how, &options(true), &Progress::default()).unwrap();
    let expected: Vec<_> = (0..4).map(|n| read_all(&open(&path(n), false))).collect();
    let chain = Chain::open(&path(3), &options(false)).unwrap();
    for _ in 0..3 {
        for depth in 0..4 {
            let expected = &expected[3 - depth];
            let mut bytes = vec![0xEE; expected.len()];
            chain.read_layer(depth, &mut [IoSliceMut::new(&mut bytes)], 0).unwrap();
            assert!(bytes == *expected, "depth {depth}");
        }
    }
}
