//! Goal: this project and QEMU never use one image at once in a way that one of them does not expect.
//!
//! Method: real QEMU in both directions. Images that are open here are given to qemu-img, qemu-io and qemu-nbd; images
//! that a running qemu-nbd has open are opened here. Each program is ended with its test.
//! It would fail if either side opened what the other one holds, or refused what may be shared.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhd_core::image::NewKind;
use vhd_core::{Disk, ErrorKind};
use vhd_testkit::tools::{QemuImg, QemuIo, require, vpc_options};

use self::support::{assert_refused, new_child, new_image, open, options};

const MIB: u64 = 1 << 20;
/// How long qemu-nbd may take to be there.
const PATIENCE: Duration = Duration::from_secs(20);

struct Place {
    folder: TempDir,
    qemu: QemuImg,
    io: QemuIo,
}

impl Place {
    /// With `base.vhd` of each kind; `None` without QEMU.
    fn new(kind: NewKind) -> Option<Self> {
        let place = Self { folder: tempfile::tempdir().unwrap(), qemu: QemuImg::find()?, io: QemuIo::find()? };
        new_image(&place.base(), kind, 4 * MIB, 512 << 10);
        Some(place)
    }

    fn base(&self) -> PathBuf {
        self.folder.path().join("base.vhd")
    }

    fn info(&self, image: &Path) -> Result<String, String> {
        self.qemu.run(&["info", "-f", "vpc", image.to_str().unwrap()])
    }

    fn write(&self, image: &Path) -> Result<String, String> {
        self.io.run(image, &["write -P 0x55 0 512"])
    }
}

#[track_caller]
fn assert_locked(said: Result<String, String>) {
    let error = said.expect_err("QEMU opened what is in use here");
    assert!(error.contains("lock"), "refused for another reason: {error}");
}

fn kinds() -> [NewKind; 2] {
    [NewKind::Dynamic, NewKind::Fixed { preallocate: false }]
}

/// A qemu-nbd that has an image open, until it is dropped.
struct QemuNbd(Child);

impl QemuNbd {
    fn serve(place: &Place, image: &Path, read_only: bool) -> Option<Self> {
        require("qemu-nbd")?;
        let socket = place.folder.path().join("socket");
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--socket"]).arg(&socket).arg("--image-opts").arg(vpc_options(image));
        if read_only {
            command.arg("--read-only");
        }
        let mut nbd = Self(command.stdin(Stdio::null()).spawn().unwrap());
        let start = Instant::now();
        // The socket is there before the image is open, a greeting when it is.
        let greets = || UnixStream::connect(&socket).and_then(|mut stream| stream.read_exact(&mut [0; 18])).is_ok();
        while !greets() {
            assert!(start.elapsed() < PATIENCE && nbd.0.try_wait().unwrap().is_none(), "qemu-nbd did not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(nbd)
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_is_open_for_writing_here_is_closed_to_qemu() {
    for kind in kinds() {
        let Some(place) = Place::new(kind) else { return };
        let disk = open(&place.base(), true);
        assert_locked(place.info(&place.base()));
        assert_locked(place.qemu.to_raw(&place.base()).map(|_| String::new()));
        assert_locked(place.write(&place.base()));
        if require("qemu-nbd").is_some() {
            let refused =
                Command::new("qemu-nbd").args(["--image-opts", "--socket=/nowhere"]).arg(vpc_options(&place.base())).output();
            assert_locked(Err(String::from_utf8_lossy(&refused.unwrap().stderr).into_owned()));
        }
        // As long as it is open, whatever is done with it.
        disk.write_at(&[1; 4096], 0).unwrap();
        disk.flush().unwrap();
        assert_locked(place.info(&place.base()));
        disk.close().unwrap();
        drop(disk);
        place.info(&place.base()).unwrap();
        place.write(&place.base()).unwrap();
    }
}

#[test]
fn what_is_read_here_may_be_read_by_qemu_and_not_written() {
    for kind in kinds() {
        let Some(place) = Place::new(kind) else { return };
        let disk = open(&place.base(), false);
        place.info(&place.base()).unwrap();
        place.qemu.to_raw(&place.base()).unwrap();
        assert_locked(place.write(&place.base()));
        drop(disk);
        place.write(&place.base()).unwrap();
    }
}

#[test]
fn what_qemu_writes_is_refused_here() {
    for kind in kinds() {
        let Some(place) = Place::new(kind) else { return };
        let Some(nbd) = QemuNbd::serve(&place, &place.base(), false) else { return };
        for writable in [false, true] {
            let error = Disk::open(&place.base(), &options(writable)).unwrap_err();
            support::assert_error(&error, ErrorKind::Locked, "in QEMU");
        }
        drop(nbd);
        open(&place.base(), true);
    }
}

#[test]
fn what_qemu_reads_may_be_read_here_and_not_written() {
    for kind in kinds() {
        let Some(place) = Place::new(kind) else { return };
        let Some(nbd) = QemuNbd::serve(&place, &place.base(), true) else { return };
        open(&place.base(), false).read_at(&mut [0; 512], 0).unwrap();
        let error = Disk::open(&place.base(), &options(true)).unwrap_err();
        support::assert_error(&error, ErrorKind::Locked, "is in use elsewhere");
        // The failed attempt left no lock behind.
        place.info(&place.base()).unwrap();
        drop(nbd);
        open(&place.base(), true);
    }
}

#[test]
fn a_parent_in_use_may_be_looked_at_and_not_written() {
    let Some(place) = Place::new(NewKind::Dynamic) else { return };
    let (middle, leaf) = (place.folder.path().join("middle.vhd"), place.folder.path().join("leaf.vhd"));
    new_child(&middle, &place.base());
    new_child(&leaf, &middle);
    for writable in [true, false] {
        let disk = open(&leaf, writable);
        for parent in [&middle, &place.base()] {
            place.info(parent).unwrap();
            place.qemu.to_raw(parent).unwrap();
            assert_locked(place.write(parent));
        }
        drop(disk);
    }
    // The other way round: a parent that QEMU writes is no parent now, and one that it reads is.
    if let Some(nbd) = QemuNbd::serve(&place, &place.base(), false) {
        assert_refused(&leaf, &options(true), ErrorKind::Locked, "base.vhd: is open for writing elsewhere");
        drop(nbd);
        let nbd = QemuNbd::serve(&place, &place.base(), true);
        open(&leaf, true).write_at(&[1; 512], 0).unwrap();
        drop(nbd);
    }
}

#[test]
fn two_who_read_through_one_parent_get_along() {
    let Some(place) = Place::new(NewKind::Dynamic) else { return };
    let (a, b) = (place.folder.path().join("a.vhd"), place.folder.path().join("b.vhd"));
    new_child(&a, &place.base());
    new_child(&b, &place.base());
    let (first, second) = (open(&a, true), open(&b, true));
    first.write_at(&[1; 512], 0).unwrap();
    second.write_at(&[2; 512], 0).unwrap();
    let mut sector = [0; 512];
    first.read_at(&mut sector, 0).unwrap();
    assert_eq!(sector, [1; 512]);
    place.info(&place.base()).unwrap();
}
