//! Goal: what goes into a pipe without being copied is what a read has, and only goes there where its place can't come to
//! hold another part of the disk before the pipe is read.
//!
//! Method: disks of every kind on real files, and a pipe. What is spliced is compared with what is read.
//! It would fail if a range over two pieces were taken for one, or if blocks that can be freed were spliced.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vhd_core::block::{Spliced, ZeroMode};
use vhd_core::chain::{Chain, ChainOptions};
use vhd_core::image::NewKind;
use vhd_core::{Disk, ErrorKind, LiveDisk, Result};
use vhd_testkit::crash::Random;

use self::support::{child_options, new_child, new_image, open, options};

const KIB: u64 = 1 << 10;
const BLOCK: u64 = 64 * KIB;
const SIZE: u64 = 64 * BLOCK;

fn pipe() -> (File, OwnedFd) {
    let (read, write) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
    fcntl(&write, FcntlArg::F_SETPIPE_SZ(1 << 20)).unwrap();
    (read.into(), write)
}

/// What was spliced, where it was.
fn splice(disk: &Disk, range: Range<u64>) -> Result<Option<Vec<u8>>> {
    let (mut read, write) = pipe();
    let spliced = disk.splice_at(write.as_fd(), range, true)?;
    drop(write);
    let mut bytes = Vec::new();
    read.read_to_end(&mut bytes).unwrap();
    assert!(spliced == Spliced::All || bytes.is_empty());
    Ok((spliced == Spliced::All).then_some(bytes))
}

fn is_spliced(disk: &Disk, range: Range<u64>) -> bool {
    let mut read = vec![0; (range.end - range.start) as usize];
    disk.read_at(&mut read, range.start).unwrap();
    let spliced = splice(disk, range.clone()).unwrap();
    assert!(spliced.as_ref().is_none_or(|bytes| *bytes == read), "{range:?}");
    spliced.is_some()
}

fn write(path: &Path, offset: u64, len: u64, seed: u64) {
    let mut random = Random::new(seed);
    let data: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
    let disk = open(path, true);
    disk.write_at(&data, offset).unwrap();
    disk.close().unwrap();
}

/// A dynamic image with data in its first ten blocks, which lie in the file in another order.
fn dynamic(path: &Path) {
    new_image(path, NewKind::Dynamic, SIZE, BLOCK as u32);
    for block in [3, 0, 1, 2, 9, 8, 7, 6, 5, 4] {
        write(path, block * BLOCK, BLOCK, block);
    }
}

#[test]
fn what_is_only_read_is_spliced_where_it_is_in_one_piece() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.vhd");
    dynamic(&path);
    let disk = open(&path, false);
    assert!(is_spliced(&disk, 0..BLOCK) && is_spliced(&disk, BLOCK + 1..2 * BLOCK - 77) && is_spliced(&disk, 5..6));
    assert!(!is_spliced(&disk, BLOCK - 1..BLOCK + 1), "there is a bitmap between two blocks");
    assert!(!is_spliced(&disk, 20 * BLOCK..21 * BLOCK) && !is_spliced(&disk, 9 * BLOCK..11 * BLOCK), "nobody holds it");
    assert!(!is_spliced(&disk, 7..7));
    for range in [SIZE - 1..SIZE + 1, u64::MAX - 1..u64::MAX, 9..u64::MAX] {
        assert_eq!(splice(&disk, range).unwrap_err().kind(), ErrorKind::OutOfRange);
    }
    let direct = Disk::new(Chain::open(&path, &ChainOptions { direct: true, ..options(false) }).unwrap());
    // Where the file system has direct I/O, as a disk's has and that of memory may not.
    let mut opening = File::options();
    let has_direct = opening.read(true).custom_flags(OFlag::O_DIRECT.bits()).open(&path).is_ok();
    assert!(!(has_direct && is_spliced(&direct, 0..BLOCK)), "what goes past the page cache has no pages there");
}

#[test]
fn of_an_image_that_is_written_only_fixed_ones_are_spliced() {
    let folder = tempfile::tempdir().unwrap();
    let (path, fixed) = (folder.path().join("a.vhd"), folder.path().join("b.vhd"));
    dynamic(&path);
    assert!(!is_spliced(&open(&path, true), 0..BLOCK), "the block may be freed, and its place become another's");
    new_image(&fixed, NewKind::Fixed { preallocate: false }, SIZE, BLOCK as u32);
    let disk = open(&fixed, true);
    disk.write_at(&[7; 4096], 2 * BLOCK).unwrap();
    assert!(is_spliced(&disk, BLOCK..4 * BLOCK));
    disk.zero(0..SIZE, ZeroMode::Free).unwrap();
    assert!(is_spliced(&disk, BLOCK..4 * BLOCK));
}

#[test]
fn parents_are_spliced_whoever_writes_the_leaf_and_random_ranges_are_right() {
    let folder = tempfile::tempdir().unwrap();
    let [base, middle, leaf] = ["base.vhd", "middle.vhd", "leaf.vhd"].map(|name| folder.path().join(name));
    dynamic(&base);
    new_child(&middle, &base);
    // Single sectors, and a whole block over what the base lacks.
    write(&middle, 3 * BLOCK + 5 * KIB, 512, 77);
    write(&middle, 12 * BLOCK, BLOCK, 78);
    new_child(&leaf, &middle);
    write(&leaf, 4 * BLOCK + 512, 16 * KIB, 79);
    let mut random = Random::new(5);
    for writable in [false, true] {
        let disk = open(&leaf, writable);
        assert!(is_spliced(&disk, 0..BLOCK) && is_spliced(&disk, 12 * BLOCK..12 * BLOCK + 999));
        assert_eq!(is_spliced(&disk, 4 * BLOCK + 512..4 * BLOCK + 8 * KIB), !writable, "the leaf's own");
        assert!(!is_spliced(&disk, 3 * BLOCK..4 * BLOCK), "a sector of it is in another file");
        let spliced = (0..2000).filter(|_| {
            let start = random.below(14 * BLOCK);
            is_spliced(&disk, start..start + 1 + random.below(BLOCK))
        });
        assert!((200..1900).contains(&spliced.count()));
    }
}

#[test]
fn what_a_snapshot_froze_is_spliced_and_what_is_written_then_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.vhd");
    dynamic(&path);
    let live = LiveDisk::open(&path, &options(true)).unwrap();
    assert!(!is_spliced(&live.disk(), 0..BLOCK));
    live.snapshot(&folder.path().join("b.vhd"), &child_options()).unwrap();
    assert!(is_spliced(&live.disk(), 0..BLOCK));
    let layers = live.layers().unwrap();
    assert!(is_spliced(&layers[0], 0..BLOCK) && is_spliced(&layers[1], 0..BLOCK));
    live.disk().write_at(&[1; 512], 512).unwrap();
    assert!(!is_spliced(&live.disk(), 0..BLOCK) && !is_spliced(&live.disk(), 512..1024));
    assert!(is_spliced(&layers[1], 0..BLOCK), "below it nothing changed");
}

#[test]
fn a_file_that_ends_early_fails_when_it_is_spliced_as_when_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.vhd");
    new_image(&path, NewKind::Fixed { preallocate: false }, SIZE, BLOCK as u32);
    let disk = open(&path, false);
    File::options().write(true).open(&path).unwrap().set_len(3 * BLOCK + 100).unwrap();
    assert!(is_spliced(&disk, BLOCK..3 * BLOCK));
    let (spliced, read) = (splice(&disk, BLOCK..4 * BLOCK), disk.read_at(&mut vec![0; 3 * BLOCK as usize], BLOCK));
    assert_eq!(spliced.unwrap_err().kind(), read.unwrap_err().kind());
}

#[test]
fn what_would_have_to_be_waited_for_is_put_off_or_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.vhd");
    dynamic(&path);
    let disk = open(&path, false);
    let (_read, write) = pipe();
    let spliced = disk.splice_at(write.as_fd(), 0..BLOCK, false).unwrap();
    assert!(spliced == Spliced::NotNow || spliced == Spliced::All, "as the file system is one of a disk, or of memory");
    assert_eq!(disk.splice_at(write.as_fd(), 40 * BLOCK..41 * BLOCK, false).unwrap(), Spliced::No);
}
