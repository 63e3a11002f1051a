//! Goal: an image is data from somewhere, and what it says of its parent opens nothing that its user did not mean; a
//! parent that is not the right one is never read in its place, and no parent with children is written to.
//!
//! Method: children whose locators and names lead everywhere they should not, over real files, links, pipes and
//! devices; each must be refused with its kind and words, and no file may change.
//! It would fail if a wrong or foreign file were taken, a device were as much as opened, or a chain never ended.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vhd_core::chain::{ChainOptions, MAX_DEPTH};
use vhd_core::{Disk, ErrorKind};
use vhd_testkit::fixture::{BlockFill, FixtureSpec, Kind, Layout, Locator, Parent};

use self::support::{assert_refused, open, options, read_all};

const UUID: [u8; 16] = *b"uuid-of-a-parent";
const SIZE: u64 = 64 << 10;

fn dynamic(uuid: [u8; 16], size: u64) -> FixtureSpec {
    FixtureSpec { uuid, block_size: 4096, ..FixtureSpec::new(Kind::Dynamic, Layout::Classic, size) }
        .block(0, BlockFill::tags(1, 1))
}

fn child(parent: Parent) -> FixtureSpec {
    let mut uuid = *b"a-child-of-.....";
    uuid[8..].copy_from_slice(&parent.uuid[8..]);
    FixtureSpec { uuid, parent: Some(parent), block_size: 4096, ..FixtureSpec::new(Kind::Differencing, Layout::Classic, SIZE) }
        .block(3, BlockFill::tags(2, 1))
}

fn write(folder: &Path, name: &str, spec: &FixtureSpec) -> PathBuf {
    let path = folder.join(name);
    spec.write_to(&path).unwrap();
    path
}

/// A child in a folder of its own, `vm`, with this locator and a name that leads nowhere.
fn child_with(folder: &TempDir, locator: Locator) -> PathBuf {
    let vm = folder.path().join("vm");
    fs::create_dir_all(&vm).unwrap();
    write(&vm, "child.vhd", &child(Parent::named(UUID, "nowhere.vhd").locator(locator)))
}

fn any_parent() -> ChainOptions {
    let mut options = options(false);
    options.parents.any_parent = true;
    options
}

#[test]
fn a_missing_or_renamed_parent_is_told_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), "child.vhd", &child(Parent::named(UUID, "base.vhd").locator(Locator::w2ru(".\\base.vhd"))));
    for writable in [false, true] {
        assert_refused(&path, &options(writable), ErrorKind::Parent, "\"base.vhd\" (UUID 75756964-2d6f-662d-612d-706172656e74)");
    }
    write(folder.path(), "renamed.vhd", &dynamic(UUID, SIZE));
    assert_refused(&path, &options(false), ErrorKind::Parent, "--parent-dir");
    fs::create_dir(folder.path().join("base.vhd")).unwrap();
    assert_refused(&path, &options(false), ErrorKind::Parent, "was not found");
}

#[test]
fn a_parent_of_another_identifier_is_told_with_both() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "base.vhd", &dynamic(*b"uuid-of-no-other", SIZE));
    let path = write(folder.path(), "child.vhd", &child(Parent::named(UUID, "base.vhd")));
    assert_refused(&path, &options(false), ErrorKind::Parent, "base.vhd has UUID 75756964-2d6f-662d-6e6f-2d6f74686572, expected");
    // A raw file under the parent's name is no parent, whatever it holds.
    fs::write(folder.path().join("base.vhd"), vec![0; 4096]).unwrap();
    assert_refused(&path, &options(false), ErrorKind::Parent, "was not found");
}

#[test]
fn a_smaller_or_larger_parent_is_read_as_far_as_it_goes() {
    for size in [512, 4096 + 512, SIZE, 4 * SIZE] {
        let folder = tempfile::tempdir().unwrap();
        let base = dynamic(UUID, size).block((size / 4096).min(15) as u32, BlockFill::tags(1, 2));
        write(folder.path(), "base.vhd", &base);
        let spec = child(Parent::named(UUID, "base.vhd"));
        let path = write(folder.path(), "child.vhd", &spec);
        assert!(read_all(&open(&path, false)) == spec.guest(&base.guest(&[])), "parent of {size} bytes");
    }
}

#[test]
fn a_child_of_itself_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let spec = child(Parent::named(UUID, "self.vhd").locator(Locator::w2ru(".\\self.vhd")));
    let path = write(folder.path(), "self.vhd", &FixtureSpec { uuid: UUID, ..spec.clone() });
    for writable in [false, true] {
        assert_refused(&path, &options(writable), ErrorKind::Parent, "names itself");
    }
    // By path only, with another identifier.
    write(folder.path(), "self.vhd", &spec);
    assert_refused(&path, &options(false), ErrorKind::Parent, "has UUID");
}

#[test]
fn loops_are_refused() {
    for len in [2_u8, 3] {
        let folder = tempfile::tempdir().unwrap();
        for n in 0..len {
            let next = (n + 1) % len;
            let spec = FixtureSpec { uuid: [n + 1; 16], ..child(Parent::named([next + 1; 16], &format!("{next}.vhd"))) };
            write(folder.path(), &format!("{n}.vhd"), &spec);
        }
        let path = folder.path().join("0.vhd");
        assert_refused(&path, &options(false), ErrorKind::Parent, "the chain is a loop");
        // It is a parent too, and that is found out first.
        assert_refused(&path, &options(true), ErrorKind::Refused, "is the parent of");
        let mut forced = options(true);
        forced.image.force = true;
        assert_refused(&path, &forced, ErrorKind::Parent, "the chain is a loop");
    }
}

#[test]
fn a_chain_of_256_opens_and_one_of_257_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let uuid = |n: usize| (n as u128 + 1).to_be_bytes();
    write(folder.path(), "0.vhd", &dynamic(uuid(0), SIZE));
    let layer = |n: usize| {
        let spec = FixtureSpec { uuid: uuid(n), ..child(Parent::named(uuid(n - 1), &format!("{}.vhd", n - 1))) };
        let spec =
            if n > 1 { FixtureSpec { blocks: [(n as u32 % 16, BlockFill::tags(n as u32, 1))].into(), ..spec } } else { spec };
        write(folder.path(), &format!("{n}.vhd"), &spec)
    };
    (1..MAX_DEPTH - 1).for_each(|n| drop(layer(n)));
    let top = layer(MAX_DEPTH - 1);
    let disk = open(&top, true);
    assert_eq!(disk.capabilities().layers, MAX_DEPTH);
    // Block 0 was last written in image 240.
    let mut sector = [0; 512];
    disk.read_at(&mut sector, 0).unwrap();
    assert_eq!(vhd_testkit::tagged::Tag::of(&sector).unwrap().image, 240);
    disk.write_at(&[1; 100], 700).unwrap();
    disk.close().unwrap();
    drop(disk);
    let over = layer(MAX_DEPTH);
    assert_refused(&over, &options(false), ErrorKind::Unsupported, "more than 256 images");
}

#[test]
fn a_parent_elsewhere_is_not_opened_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let base = write(folder.path(), "base.vhd", &dynamic(UUID, SIZE));
    let absolute = base.to_str().unwrap().replace('/', "\\");
    let url = format!("file://localhost{}", base.display());
    for locator in [
        Locator::w2ru("..\\base.vhd"),
        Locator::w2ru(".\\..\\vm\\..\\base.vhd"),
        Locator::w2ku(&absolute),
        Locator::w2ku(&format!("C:{absolute}")),
        Locator::macx(&url),
        Locator::macx("file://../base.vhd"),
        Locator::macx("file://%2e%2e/base.vhd"),
        Locator::wi2r("..\\base.vhd"),
    ] {
        let path = child_with(&folder, locator.clone());
        for writable in [false, true] {
            assert_refused(&path, &options(writable), ErrorKind::Parent, "is outside");
        }
        assert_eq!(Disk::open(&path, &any_parent()).unwrap().capabilities().layers, 2, "{locator:?}");
    }
}

#[test]
fn a_link_does_not_lead_out_of_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let base = write(folder.path(), "base.vhd", &dynamic(UUID, SIZE));
    let vm = folder.path().join("vm");
    fs::create_dir(&vm).unwrap();
    symlink(&base, vm.join("absolute.vhd")).unwrap();
    symlink("../base.vhd", vm.join("relative.vhd")).unwrap();
    symlink("..", vm.join("up")).unwrap();
    symlink("loop.vhd", vm.join("loop.vhd")).unwrap();
    for name in ["absolute.vhd", "relative.vhd", "up\\base.vhd"] {
        let path = child_with(&folder, Locator::w2ru(&format!(".\\{name}")));
        assert_refused(&path, &options(false), ErrorKind::Parent, "is outside");
        assert!(Disk::open(&path, &any_parent()).is_ok());
    }
    let path = child_with(&folder, Locator::w2ru(".\\loop.vhd"));
    assert_refused(&path, &options(false), ErrorKind::Parent, "was not found");
    // A link that stays inside is no matter.
    write(&vm, "real.vhd", &dynamic(UUID, SIZE));
    symlink("real.vhd", vm.join("inside.vhd")).unwrap();
    assert!(Disk::open(&child_with(&folder, Locator::w2ru(".\\inside.vhd")), &options(false)).is_ok());
}

#[test]
fn devices_and_pipes_are_no_parents() {
    let folder = tempfile::tempdir().unwrap();
    let vm = folder.path().join("vm");
    fs::create_dir(&vm).unwrap();
    nix::unistd::mkfifo(&vm.join("pipe.vhd"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(vm.join("socket.vhd")).unwrap();
    for place in ["/dev/sda", "/dev/vda", "/dev/zero", "/dev/null", "/dev/mem", "/dev/tty"] {
        for locator in [Locator::w2ku(place), Locator::macx(&format!("file://{place}")), Locator::w2ru(place)] {
            let path = child_with(&folder, locator);
            assert_refused(&path, &options(false), ErrorKind::Parent, "nowhere.vhd");
            assert_refused(&path, &any_parent(), ErrorKind::Parent, "nowhere.vhd");
        }
    }
    for name in [".\\pipe.vhd", ".\\socket.vhd", ".", "", "\\", ".\\child.vhd\\x"] {
        let path = child_with(&folder, Locator::w2ru(name));
        assert_refused(&path, &options(true), ErrorKind::Parent, "nowhere.vhd");
        assert_refused(&path, &any_parent(), ErrorKind::Parent, "nowhere.vhd");
    }
}

/// Opening a device does things: it starts a watchdog, it rewinds a tape.
#[test]
fn what_is_no_regular_file_is_not_even_opened() {
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
    let folder = tempfile::tempdir().unwrap();
    let path = child_with(&folder, Locator::w2ru(".\\pipe.vhd"));
    let pipe = path.with_file_name("pipe.vhd");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let watch = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
    watch.add_watch(&pipe, AddWatchFlags::IN_OPEN).unwrap();
    let mut elsewhere = any_parent();
    elsewhere.parents.parent_dirs = vec![path.parent().unwrap().to_owned()];
    for options in [options(false), options(true), elsewhere] {
        assert_refused(&path, &options, ErrorKind::Parent, "nowhere.vhd");
    }
    assert!(watch.read_events().is_err(), "the pipe was opened");
    drop(fs::OpenOptions::new().read(true).write(true).open(&pipe).unwrap());
    assert_eq!(watch.read_events().unwrap().len(), 1, "the test notices when it is opened");
}

#[test]
fn a_raw_parent_is_opened_only_when_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("base.raw"), vec![7; 4096]).unwrap();
    let parent = Parent::named([0; 16], "base.raw").locator(Locator::w2ru(".\\base.raw"));
    let path = write(folder.path(), "child.vhd", &child(parent));
    assert_refused(&path, &options(false), ErrorKind::Parent, "--raw-parent");
    assert_refused(&path, &any_parent(), ErrorKind::Parent, "--raw-parent");
    let mut named = options(false);
    named.parents.raw_parent = Some(folder.path().join("missing.raw"));
    assert_refused(&path, &named, ErrorKind::NotFound, "missing.raw");
}

#[test]
fn a_parent_is_not_written_beside_its_children() {
    let folder = tempfile::tempdir().unwrap();
    let base = write(folder.path(), "base.vhd", &dynamic(UUID, SIZE));
    write(folder.path(), "child.vhd", &child(Parent::named(UUID, "base.vhd")));
    assert_refused(&base, &options(true), ErrorKind::Refused, "is the parent of");
    assert!(Disk::open(&base, &options(false)).is_ok());
    // Not by another way to it either.
    let elsewhere = tempfile::tempdir().unwrap();
    let link = elsewhere.path().join("link.vhd");
    symlink(&base, &link).unwrap();
    assert_refused(&link, &options(true), ErrorKind::Refused, "is the parent of");
    let mut forced = options(true);
    forced.image.force = true;
    assert!(Disk::open(&base, &forced).is_ok());
    fs::remove_file(folder.path().join("child.vhd")).unwrap();
    assert!(Disk::open(&base, &options(true)).is_ok());
}

#[test]
fn what_is_wrong_with_a_parent_is_told_of_the_parent() {
    let folder = tempfile::tempdir().unwrap();
    let (mut bytes, placed) = dynamic(UUID, SIZE).to_bytes();
    bytes[placed.header as usize + 700] ^= 1;
    let base = folder.path().join("base.vhd");
    fs::write(&base, &bytes).unwrap();
    let middle = FixtureSpec { uuid: [9; 16], ..child(Parent::named(UUID, "base.vhd")) };
    let middle = write(folder.path(), "middle.vhd", &middle);
    let path = write(folder.path(), "leaf.vhd", &child(Parent::named([9; 16], "middle.vhd")));
    assert_refused(&path, &options(true), ErrorKind::Corrupt, &format!("{}: dynamic header checksum", base.display()));
    fs::remove_file(&base).unwrap();
    assert_refused(&path, &options(true), ErrorKind::Parent, &format!("{}: parent \"base.vhd\"", middle.display()));
}

/// Names come from images and from whoever made the folder; an error stays one line that does nothing to a terminal.
#[test]
fn names_do_not_break_messages() {
    let folder = tempfile::tempdir().unwrap();
    let odd = "evil\n\u{1b}[31m.vhd";
    write(folder.path(), odd, &dynamic(*b"uuid-of-no-other", SIZE));
    let path =
        write(folder.path(), "child.vhd", &child(Parent::named(UUID, odd).locator(Locator::macx(&format!("file://./{odd}")))));
    assert_refused(&path, &options(false), ErrorKind::Parent, "has UUID");
    fs::remove_file(folder.path().join(odd)).unwrap();
    assert_refused(&path, &options(false), ErrorKind::Parent, "was not found");
    let error = Disk::open(&folder.path().join(odd), &options(false)).unwrap_err();
    assert!(error.kind() == ErrorKind::NotFound && !error.to_string().chars().any(char::is_control), "{error}");
}
