//! Goal: whatever the host says no to ends in one clear error, nothing is lost, and work goes on when it can again.
//!
//! Method: folders, pipes, devices, sockets and files that may not be written, as leaf; images in use; and as root a
//! small tmpfs that is filled up under an image, and one that is mounted read-only.
//! It would fail if opening waited for ever, a failure were told as another, or an acknowledged write were lost.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vhd_core::block::ZeroMode;
use vhd_core::chain::create_child;
use vhd_core::image::NewKind;
use vhd_core::{Disk, ErrorKind};
use vhd_testkit::model::ModelDisk;
use vhd_testkit::tools::skip;
use vhd_testkit::volume::Volume;

use self::support::{assert_error, assert_refused, child_options, files_of, new_child, new_image, open, options, read_all};

const MIB: u64 = 1 << 20;
const BLOCK: u32 = 512 << 10;

#[test]
fn what_is_no_file_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    fs::create_dir(place("folder.vhd")).unwrap();
    nix::unistd::mkfifo(&place("pipe.vhd"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(place("socket.vhd")).unwrap();
    std::os::unix::fs::symlink("loop.vhd", place("loop.vhd")).unwrap();
    let cases = [
        (place("folder.vhd"), ErrorKind::InvalidInput, "is a folder"),
        (place("pipe.vhd"), ErrorKind::InvalidInput, "neither a regular file nor a block device"),
        (PathBuf::from("/dev/zero"), ErrorKind::InvalidInput, "neither a regular file nor a block device"),
        (PathBuf::from("/dev/null"), ErrorKind::InvalidInput, "neither a regular file nor a block device"),
        (place("socket.vhd"), ErrorKind::Io, "can't be opened"),
        (place("loop.vhd"), ErrorKind::Io, "can't be opened"),
        (place("missing.vhd"), ErrorKind::NotFound, "can't be opened"),
        (place("missing/image.vhd"), ErrorKind::NotFound, "can't be opened"),
    ];
    for (path, kind, says) in cases {
        for writable in [false, true] {
            let error = Disk::open(&path, &options(writable)).unwrap_err();
            assert_error(&error, kind, says);
            assert_eq!(error.path(), Some(&*path));
        }
    }
    fs::write(place("empty.vhd"), b"").unwrap();
    assert_refused(&place("empty.vhd"), &options(false), ErrorKind::NotVhd, "it has 0 bytes");
}

#[test]
fn an_image_in_use_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.vhd");
    new_image(&path, NewKind::Dynamic, MIB, BLOCK);
    let writer = open(&path, true);
    for writable in [false, true] {
        assert_refused(&path, &options(writable), ErrorKind::Locked, "elsewhere");
    }
    drop(writer);
    let reader = open(&path, false);
    assert_refused(&path, &options(true), ErrorKind::Locked, "is in use elsewhere");
    let second = open(&path, false);
    drop((reader, second));
    open(&path, true);
    // A parent is in use by its child.
    let child = folder.path().join("child.vhd");
    new_child(&child, &path);
    let mut forced = options(true);
    forced.image.force = true;
    let user = open(&child, true);
    assert_refused(&path, &forced, ErrorKind::Locked, "is in use elsewhere");
    assert!(Disk::open(&path, &options(false)).is_ok(), "a parent may be read");
    drop(user);
    let writer = Disk::open(&path, &forced).unwrap();
    assert_refused(&child, &options(false), ErrorKind::Locked, "image.vhd: is open for writing elsewhere");
    let error = create_child(&folder.path().join("c.vhd"), &path, &child_options(), &options(false)).unwrap_err();
    assert_error(&error, ErrorKind::Locked, "is open for writing");
    drop(writer);
}

/// Writes until there is no room, and tells how much was taken.
fn fill_up(disk: &Disk, model: &mut ModelDisk) -> u64 {
    let chunk = vec![0xA1; 64 << 10];
    let mut at = 0;
    while at < disk.size() {
        match disk.write_at(&chunk, at) {
            Ok(()) => model.write(at, &chunk),
            Err(error) => {
                assert_error(&error, ErrorKind::NoSpace, "image.vhd");
                // Of the write that failed each sector may have been written or not.
                let mut found = chunk.clone();
                disk.read_at(&mut found, at).unwrap();
                assert!(found.chunks(512).all(|sector| sector == [0; 512] || sector == [0xA1; 512]));
                model.write(at, &found);
                return at;
            }
        }
        at += chunk.len() as u64;
    }
    panic!("the disk was never full");
}

#[test]
fn a_full_host_disk_loses_nothing_and_writing_goes_on() {
    let size = 16 * MIB;
    let make: [fn(&Path); 3] = [
        |path| new_image(path, NewKind::Dynamic, 16 * MIB, BLOCK),
        |path| new_image(path, NewKind::Fixed { preallocate: false }, 16 * MIB, BLOCK),
        |path| {
            let base = path.with_file_name("base.vhd");
            new_image(&base, NewKind::Dynamic, 16 * MIB, BLOCK);
            new_child(path, &base);
        },
    ];
    for (n, make) in make.into_iter().enumerate() {
        let Some(host) = Volume::new("4M") else { return };
        let path = host.path().join("image.vhd");
        make(&path);
        fs::write(host.path().join("other"), vec![1; 1 << 20]).unwrap();
        let mut model = ModelDisk::new(size);
        let disk = open(&path, true);
        let full_at = fill_up(&disk, &mut model);
        assert!(full_at > MIB, "{full_at} bytes in image {n}");
        // What was taken is there, can be written over, and is made durable.
        assert!(read_all(&disk) == model.read(0..size));
        disk.write_at(&[0xB2; 4096], 8192).unwrap();
        model.write(8192, &[0xB2; 4096]);
        disk.flush().unwrap();
        // The one who has room again goes on where he was.
        fs::remove_file(host.path().join("other")).unwrap();
        disk.write_at(&[0xC3; 64 << 10], full_at).unwrap();
        model.write(full_at, &[0xC3; 64 << 10]);
        // Or makes room himself.
        disk.zero(0..BLOCK.into(), ZeroMode::Free).unwrap();
        model.write_zeroes(0..BLOCK.into());
        disk.flush().unwrap();
        disk.close().unwrap();
        drop(disk);
        assert!(read_all(&open(&path, true)) == model.read(0..size));
    }
}

#[test]
fn nothing_half_made_is_left_on_a_full_disk() {
    let Some(host) = Volume::new("256K") else { return };
    fs::write(host.path().join("other"), vec![1; 240 << 10]).unwrap();
    let before = files_of(host.path());
    let path = host.path().join("image.vhd");
    for (kind, size) in [(NewKind::Fixed { preallocate: true }, MIB), (NewKind::Dynamic, 2040 << 30)] {
        let create = vhd_core::image::CreateOptions {
            kind,
            size,
            block_size: BLOCK,
            uuid: [1; 16],
            creator: vhd_core::format::Creator::WINDOWS_10,
            timestamp: vhd_core::format::Timestamp(0),
        };
        let error = vhd_core::image::create_file(&path, &create, false).unwrap_err();
        assert_error(&error, ErrorKind::NoSpace, "image.vhd");
        assert!(files_of(host.path()) == before);
    }
}

#[test]
fn a_read_only_host_disk_is_told_as_such() {
    let Some(host) = Volume::new("4M") else { return };
    let (path, child) = (host.path().join("image.vhd"), host.path().join("child.vhd"));
    new_image(&path, NewKind::Dynamic, 16 * MIB, BLOCK);
    new_child(&child, &path);
    host.remount("ro");
    for image in [&path, &child] {
        assert_refused(image, &options(true), ErrorKind::ReadOnly, "can't be opened for writing");
        assert!(read_all(&open(image, false)).iter().all(|&byte| byte == 0));
    }
    let error = create_child(&host.path().join("c.vhd"), &path, &child_options(), &options(false)).unwrap_err();
    assert_error(&error, ErrorKind::ReadOnly, "c.vhd");
}

#[test]
fn a_protected_parent_is_told_as_read_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.vhd");
    new_image(&path, NewKind::Dynamic, MIB, BLOCK);
    if !chattr("+i", &path) {
        return skip("no file can be made immutable here: that is not tested");
    }
    let refused = Disk::open(&path, &options(true)).map(drop);
    assert!(chattr("-i", &path));
    assert_error(&refused.unwrap_err(), ErrorKind::ReadOnly, "can't be opened for writing");
}

fn chattr(flag: &str, path: &Path) -> bool {
    Command::new("chattr").arg(flag).arg(path).stderr(std::process::Stdio::null()).status().is_ok_and(|status| status.success())
}

#[test]
fn what_was_opened_to_be_read_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    for (name, kind) in [("fixed.vhd", NewKind::Fixed { preallocate: false }), ("dynamic.vhd", NewKind::Dynamic)] {
        let path = folder.path().join(name);
        new_image(&path, kind, MIB, BLOCK);
        let before = files_of(folder.path());
        let disk = open(&path, false);
        assert_error(&disk.write_at(&[1], 0).unwrap_err(), ErrorKind::ReadOnly, name);
        assert_error(&disk.zero(0..512, ZeroMode::Free).unwrap_err(), ErrorKind::ReadOnly, name);
        disk.flush().unwrap();
        disk.close().unwrap();
        drop(disk);
        assert!(files_of(folder.path()) == before);
    }
}
