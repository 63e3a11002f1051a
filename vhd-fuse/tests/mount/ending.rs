//! How a mount ends: whatever ends it, the disk is flushed and closed once, and an error in that is told.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{Memory, Shared, mount_memory, mount_size};
use vhd_core::{Disk, ErrorKind};
use vhd_fuse::{MountOptions, mount, unmount};

const SIZE: usize = 1 << 20;

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().next().is_none()
}

#[test]
fn an_unmount_from_outside_ends_the_wait_and_closes_the_disk() {
    for command in [&["umount"][..], &["fusermount3", "-u"]] {
        let Some(fixture) = mount_size(SIZE) else { return };
        OpenOptions::new().write(true).open(&fixture.file).unwrap().write_all_at(b"data", 7).unwrap();
        let folder = fixture.folder.path().to_owned();
        let outside = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            assert!(Command::new(command[0]).args(&command[1..]).arg(folder).status().unwrap().success());
        });
        fixture.mounted.wait(None).unwrap();
        outside.join().unwrap();
        assert_eq!(fixture.memory.closes.load(Ordering::Relaxed), 1);
        assert_eq!(&fixture.memory.contents()[7..11], b"data");
        assert!(is_empty(fixture.folder.path()));
    }
}

#[test]
fn a_mount_in_use_is_taken_away_and_its_users_get_errors() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let file = OpenOptions::new().read(true).write(true).open(&fixture.file).unwrap();
    file.write_all_at(b"before", 0).unwrap();
    let started = Instant::now();
    fixture.mounted.end().unwrap();
    assert!(started.elapsed() < Duration::from_secs(60));
    assert_eq!(fixture.memory.closes.load(Ordering::Relaxed), 1);
    assert!(is_empty(fixture.folder.path()));
    // The cache may still answer reads; nothing may be accepted for writing.
    file.write_all_at(b"after", 0).unwrap_err();
    assert_eq!(&fixture.memory.contents()[..6], b"before");
}

#[test]
fn a_lazy_unmount_ends_when_the_last_user_does() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let file = OpenOptions::new().write(true).open(&fixture.file).unwrap();
    assert!(Command::new("umount").arg("-l").arg(fixture.folder.path()).status().unwrap().success());
    let user = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        file.write_all_at(b"late", 0).unwrap();
    });
    fixture.mounted.wait(None).unwrap();
    user.join().unwrap();
    assert_eq!(&fixture.memory.contents()[..4], b"late");
    assert_eq!(fixture.memory.closes.load(Ordering::Relaxed), 1);
}

#[test]
fn dropping_it_ends_it() {
    let Some(fixture) = mount_size(SIZE) else { return };
    drop(fixture.mounted);
    assert_eq!(fixture.memory.closes.load(Ordering::Relaxed), 1);
    assert!(is_empty(fixture.folder.path()));
}

#[test]
fn an_error_in_closing_is_told() {
    let Some(fixture) = mount_size(SIZE) else { return };
    fixture.memory.broken.store(true, Ordering::Relaxed);
    let error = fixture.mounted.end().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(is_empty(fixture.folder.path()));
}

#[test]
fn what_is_above_and_below_a_mount_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let other = Memory::new(2 * SIZE);
    let Some(other) = mount_memory(other, &MountOptions::default()) else { return };
    let command = |command: &str, arguments: &[&Path]| {
        assert!(Command::new(command).args(arguments).status().unwrap().success());
    };
    let (bind, elsewhere, place) = (Path::new("--bind"), other.folder.path(), folder.path());
    let size = || fs::metadata(place.join("disk.raw")).unwrap().len();
    let mount_between = || mount(Disk::new(Shared(Memory::new(SIZE))), place, &MountOptions::default()).unwrap();

    command("mount", &[bind, elsewhere, place]);
    let between = mount_between();
    assert_eq!(size(), SIZE as u64);
    command("umount", &[place]);
    between.wait(None).unwrap();
    assert_eq!(size(), 2 * SIZE as u64, "what was below is seen again");

    let between = mount_between();
    command("mount", &[bind, elsewhere, place]);
    between.end().unwrap();
    assert_eq!(size(), 2 * SIZE as u64, "what was above is seen still");
    command("umount", &[place]);
    command("umount", &[Path::new("-l"), place]);
    command("umount", &[place]);
    assert!(is_empty(place));
    other.mounted.end().unwrap();
}

#[test]
fn only_mounts_of_ours_are_unmounted() {
    let folder = tempfile::tempdir().unwrap();
    let error = unmount(folder.path(), false, &mut |_| {}).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("nothing is mounted here"), "{error}");
    let error = unmount(Path::new("/proc"), false, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("kind proc"), "{error}");
    let error = unmount(Path::new("/no/such/place"), false, &mut |_| {}).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn a_mount_in_use_is_not_unmounted_and_neither_is_one_that_cannot_flush() {
    let Some(fixture) = mount_size(SIZE) else { return };
    let file = fs::File::open(&fixture.file).unwrap();
    let error = unmount(fixture.folder.path(), false, &mut |_| {}).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("in use"), "{error}");
    drop(file);
    fixture.memory.full.store(true, Ordering::Relaxed);
    let error = unmount(fixture.folder.path(), false, &mut |_| {}).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(fixture.file.exists());
    fixture.memory.full.store(false, Ordering::Relaxed);
    fixture.mounted.end().unwrap();
}
