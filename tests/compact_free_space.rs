//! Goal: a file system that was full and from which files were deleted is compacted to what is left, and nothing that is
//! left is harmed.
//!
//! Method: 1 GiB of ext4 and of NTFS are filled through the kernel and through ntfs-3g; most files are deleted; what was
//! in them stays in the image, as nothing zeroes it. After `vhd compact --free-space` the file's size is compared with what
//! the files need, the rest is read through a mount, fsck looks at it, and QEMU and libvhdi read the same disk.
//! One that was not unmounted is left as it is, where it says so.
//! It would fail if a block that is in use were dropped, or one that is free kept. It needs root, loop devices and FUSE.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use support::mounts::Cleanup;
use support::{done, json, noise, run};
use tempfile::TempDir;
use vhd_testkit::tools::{QemuImg, VhdiMount, require};

const MIB: u64 = 1 << 20;
/// Bytes of a file; so many fill the disk, and each fourth stays.
const FILE: u64 = 24 * MIB;
const FILES: u64 = 38;

/// How a file system is made, mounted and judged.
struct System {
    name: &'static str,
    make: &'static [&'static str],
    mount: &'static [&'static str],
    judge: &'static [&'static str],
}

const EXT4: System = System {
    name: "ext4",
    make: &["mkfs.ext4", "-q", "-F"],
    mount: &["mount", "-t", "ext4", "-o", "loop"],
    judge: &["e2fsck", "-f", "-n"],
};
const NTFS: System =
    System { name: "NTFS", make: &["mkfs.ntfs", "-F", "-Q", "-q"], mount: &["ntfs-3g"], judge: &["ntfsfix", "-n"] };

/// A mount, which does not outlive its test.
struct Mounted {
    at: PathBuf,
    _cleanup: Cleanup,
}

impl Mounted {
    fn new(system: &System, raw: &Path, at: PathBuf) -> Self {
        fs::create_dir_all(&at).unwrap();
        run(system.mount[0], &[&system.mount[1..], &[raw.to_str().unwrap(), at.to_str().unwrap()]].concat());
        Self { _cleanup: Cleanup(vec![at.clone()]), at }
    }

    fn path(&self, number: u64) -> PathBuf {
        self.at.join(format!("file {number}"))
    }

    /// When it returns, all is in the file below.
    fn end(self) {
        run("umount", &[&self.at]);
    }
}

fn content(number: u64) -> Vec<u8> {
    let piece = noise(number + 1, MIB as usize);
    piece.iter().copied().cycle().take(FILE as usize).collect()
}

/// A disk whose file system was full: a quarter of its files is left.
fn filled(system: &System, folder: &Path) -> PathBuf {
    let raw = folder.join("disk.img");
    fs::File::create(&raw).unwrap().set_len(1 << 30).unwrap();
    run(system.make[0], &[&system.make[1..], &[raw.to_str().unwrap()]].concat());
    let mounted = Mounted::new(system, &raw, folder.join("files"));
    (0..FILES).for_each(|number| fs::write(mounted.path(number), content(number)).unwrap());
    run("sync", &["-f", mounted.at.to_str().unwrap()]);
    (0..FILES).filter(|number| number % 4 != 0).for_each(|number| fs::remove_file(mounted.path(number)).unwrap());
    mounted.end();
    raw
}

fn shrinks(system: &System) {
    let tools = [system.make[0], system.judge[0]].map(require);
    if tools.iter().any(Option::is_none) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let raw = filled(system, folder.path());
    done(folder.path(), "convert disk.img disk.vhd --block-size 512K");
    fs::remove_file(&raw).unwrap();
    let plain = json(folder.path(), "compact disk.vhd", 0)[0]["file_size"].as_u64().unwrap();
    assert!(plain > FILES * FILE, "what was deleted is still there: {plain}");
    let planned = json(folder.path(), "compact disk.vhd --free-space --dry-run", 0);
    let said = json(folder.path(), "compact disk.vhd --free-space", 0);
    let size = fs::metadata(folder.path().join("disk.vhd")).unwrap().len();
    assert_eq!((planned[0]["file_size"].as_u64(), said[0]["file_size"].as_u64()), (Some(size), Some(size)));
    assert_eq!(said[0]["free_space"][0]["file_system"], system.name, "{said}");
    done(folder.path(), "check disk.vhd --deep");
    done(folder.path(), "convert disk.vhd disk.img");
    run(system.judge[0], &[&system.judge[1..], &[raw.to_str().unwrap()]].concat());
    let left = FILES.div_ceil(4) * FILE;
    println!("{}: {} MiB of files, {} MiB before, {} MiB after", system.name, left / MIB, plain / MIB, size / MIB);
    assert!(size <= left + left / 10, "{}: {size} bytes for {left} bytes of files", system.name);
    others_read_the_same(folder.path(), &raw);
    let mounted = Mounted::new(system, &raw, folder.path().join("files"));
    for number in (0..FILES).step_by(4) {
        assert!(fs::read(mounted.path(number)).unwrap() == content(number), "{}: file {number}", system.name);
    }
    mounted.end();
}

fn others_read_the_same(folder: &Path, raw: &Path) {
    let (Some(qemu), Some(libvhdi)) = (QemuImg::find(), VhdiMount::find()) else { return };
    let vhd = folder.join("disk.vhd");
    qemu.run(&["compare", "-f", "vpc", "-F", "raw", vhd.to_str().unwrap(), raw.to_str().unwrap()]).unwrap();
    let expected = fs::read(raw).unwrap();
    assert!(libvhdi.to_raw(&vhd).unwrap() == expected, "libvhdi reads something else");
}

#[test]
fn ext4_shrinks_to_what_its_files_need() {
    shrinks(&EXT4);
}

#[test]
fn ntfs_shrinks_to_what_its_files_need() {
    shrinks(&NTFS);
}

/// ntfs-3g marks neither the volume nor its log, but allocates before it uses: what it calls free is free at any moment.
#[test]
fn ntfs_whose_driver_was_killed_keeps_all_that_was_synced() {
    let Some(_) = require("mkfs.ntfs") else { return };
    let folder = TempDir::new().unwrap();
    let dir = folder.path();
    let (raw, at) = (dir.join("disk.img"), dir.join("files"));
    fs::File::create(&raw).unwrap().set_len(64 * MIB).unwrap();
    run("mkfs.ntfs", &["-F", "-Q", "-q", raw.to_str().unwrap()]);
    fs::create_dir(&at).unwrap();
    let driver = ["-o", "no_detach", raw.to_str().unwrap(), at.to_str().unwrap()];
    // Should the test fail, the driver ends with its mount.
    let _cleanup = Cleanup(vec![at.clone()]);
    let mut driver = Command::new("ntfs-3g").args(driver).spawn().unwrap();
    let is_mounted = || fs::read_to_string("/proc/mounts").unwrap().contains(at.to_str().unwrap());
    while !is_mounted() {
        assert!(driver.try_wait().unwrap().is_none(), "ntfs-3g ended");
        std::thread::sleep(Duration::from_millis(10));
    }
    let piece = |number: u64| noise(number + 1, 3 << 20);
    (0..10).for_each(|number| fs::write(at.join(number.to_string()), piece(number)).unwrap());
    (0..10).step_by(2).for_each(|number| fs::remove_file(at.join(number.to_string())).unwrap());
    run("sync", &["-f", at.to_str().unwrap()]);
    // In the middle of others, which nobody was told of.
    let mut half = fs::File::create(at.join("half")).unwrap();
    half.write_all(&piece(20)).unwrap();
    driver.kill().unwrap();
    driver.wait().unwrap();
    drop(half);
    run("umount", &["-l", at.to_str().unwrap()]);
    done(dir, "convert disk.img disk.vhd --block-size 512K");
    let said = json(dir, "compact disk.vhd --free-space", 0);
    assert!(said[0]["free_space"][0]["free"].as_u64() > Some(5 * MIB), "{said}");
    done(dir, "convert disk.vhd disk.img --overwrite");
    let mounted = Mounted::new(&NTFS, &raw, at);
    for number in (1..10).step_by(2) {
        assert!(fs::read(mounted.at.join(number.to_string())).unwrap() == piece(number), "file {number}");
    }
    mounted.end();
}

/// The disk of a machine whose power went: what is in its journal is nowhere else.
#[test]
fn ext4_that_was_not_unmounted_is_left_as_it_is() {
    let Some(_) = require("mkfs.ext4") else { return };
    let folder = TempDir::new().unwrap();
    let dir = folder.path();
    let raw = dir.join("disk.img");
    fs::File::create(&raw).unwrap().set_len(64 * MIB).unwrap();
    run("mkfs.ext4", &["-q", "-F", raw.to_str().unwrap()]);
    let mounted = Mounted::new(&EXT4, &raw, dir.join("files"));
    fs::write(mounted.path(1), noise(1, 3 << 20)).unwrap();
    run("sync", &["-f", mounted.at.to_str().unwrap()]);
    fs::copy(&raw, dir.join("then.img")).unwrap();
    mounted.end();
    done(dir, "convert then.img then.vhd");
    done(dir, "convert disk.img now.vhd");
    let [then, now] = ["then", "now"].map(|name| json(dir, &format!("compact {name}.vhd --free-space"), 0));
    let reason = then[0]["free_space"][0]["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("dirty"), "{then}");
    assert_eq!((&then[0]["blocks_dropped"], then[0]["free_space"][0]["free"].as_u64()), (&0.into(), None));
    assert!(now[0]["free_space"][0]["free"].as_u64().is_some(), "{now}");
    done(dir, "compare then.vhd then.img");
}
