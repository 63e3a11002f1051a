//! Goal: memory that others use too, such as a guest's, is filled from disks of every kind and written to them as buffers are.
//!
//! Method: random ranges, aligned and not, of disks of every kind on real files, on storages that copy, and past the page cache,
//! through memory that no reference leads to; each is compared with what buffers find.
//! It would fail if a range went to another place, or a part of it were left out.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;

use vhd_core::block::{BlockDevice, SharedBytes};
use vhd_core::chain::{Chain, ChainOptions, Layer, RawFile};
use vhd_core::image::{Image, NewKind, OpenOptions};
use vhd_core::storage::{MemoryStorage, Storage};
use vhd_core::{Disk, ErrorKind, LiveDisk};
use vhd_testkit::crash::Random;
use vhd_testkit::fixture::{FixtureSpec, Kind, Layout};

use self::support::{new_child, new_image};

const BLOCK: u64 = 64 << 10;
const SIZE: u64 = 40 * BLOCK;

/// Memory of which only copies are given.
struct Cells(RefCell<Vec<u8>>);

impl Cells {
    fn of(bytes: Vec<u8>) -> Self {
        Self(RefCell::new(bytes))
    }

    fn file(file: BorrowedFd<'_>) -> File {
        file.try_clone_to_owned().unwrap().into()
    }
}

fn indices(range: Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}

impl SharedBytes for Cells {
    fn len(&self) -> u64 {
        self.0.borrow().len() as u64
    }

    fn read_from(&self, file: BorrowedFd<'_>, offset: u64, range: Range<u64>) -> io::Result<()> {
        Self::file(file).read_exact_at(&mut self.0.borrow_mut()[indices(range)], offset)
    }

    fn write_to(&self, file: BorrowedFd<'_>, offset: u64, range: Range<u64>) -> io::Result<()> {
        Self::file(file).write_all_at(&self.0.borrow()[indices(range)], offset)
    }

    fn put(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.borrow_mut()[indices(at..at + bytes.len() as u64)].copy_from_slice(bytes);
        Ok(())
    }

    fn get(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.copy_from_slice(&self.0.borrow()[indices(at..at + bytes.len() as u64)]);
        Ok(())
    }

    fn is_aligned(&self, _range: Range<u64>, _lengths: usize, _addresses: usize) -> bool {
        false
    }
}

/// Writes and reads at random, by turns in one way and the other.
fn compare(what: &str, disk: &dyn BlockDevice) {
    let (mut random, mut model) = (Random::new(7), vec![0; SIZE as usize]);
    for round in 0..300 {
        let unit = if round % 3 == 0 { 1 } else { 512 };
        let start = random.below(SIZE / unit) * unit;
        let most = if round % 10 == 0 { SIZE } else { 3 * BLOCK };
        let len = (1 + random.below(most / unit)) * unit;
        let len = len.min(SIZE - start);
        let data: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
        if round % 2 == 0 {
            disk.write_shared_at(&Cells::of(data.clone()), start).unwrap();
        } else {
            disk.write_vectored_at(&[io::IoSlice::new(&data)], start).unwrap();
        }
        model[indices(start..start + len)].copy_from_slice(&data);
        let start = random.below(SIZE);
        let len = random.below(SIZE - start + 1).min(5 * BLOCK);
        let found = Cells::of(vec![0xAA; len as usize]);
        disk.read_shared_at(&found, start).unwrap();
        assert!(*found.0.borrow() == model[indices(start..start + len)], "{what}, round {round}: {start}, {len} bytes");
    }
    let beyond = Cells::of(vec![1; 512]);
    for start in [SIZE, SIZE - 1, u64::MAX] {
        assert_eq!(disk.read_shared_at(&beyond, start).unwrap_err().kind(), ErrorKind::OutOfRange, "{what}");
        assert_eq!(disk.write_shared_at(&beyond, start).unwrap_err().kind(), ErrorKind::OutOfRange, "{what}");
    }
    let mut whole = vec![0; SIZE as usize];
    disk.read_vectored_at(&mut [io::IoSliceMut::new(&mut whole)], 0).unwrap();
    assert!(whole == model && *beyond.0.borrow() == [1; 512], "{what}");
}

#[test]
fn shared_memory_is_read_and_written_as_buffers_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    new_image(&path("fixed.vhd"), NewKind::Fixed { preallocate: false }, SIZE, BLOCK as u32);
    new_image(&path("dynamic.vhd"), NewKind::Dynamic, SIZE, BLOCK as u32);
    new_image(&path("base.vhd"), NewKind::Dynamic, SIZE, BLOCK as u32);
    new_child(&path("child.vhd"), &path("base.vhd"));
    for name in ["fixed.vhd", "dynamic.vhd", "child.vhd"] {
        for direct in [false, true] {
            let copy = path(&format!("{direct}-{name}"));
            std::fs::copy(path(name), &copy).unwrap();
            let image = OpenOptions { writable: true, ..OpenOptions::default() };
            let options = ChainOptions { image, direct, ..ChainOptions::default() };
            let live = LiveDisk::open(&copy, &options).unwrap();
            compare(&format!("{name}, direct: {direct}"), &*live.disk());
        }
    }
}

#[test]
fn what_can_not_go_straight_is_copied() {
    let spec = FixtureSpec { block_size: BLOCK as u32, ..FixtureSpec::new(Kind::Dynamic, Layout::Windows8, SIZE) };
    let storage = std::sync::Arc::new(MemoryStorage::new(spec.to_bytes().0));
    let options = OpenOptions { writable: true, background_flush: None, ..OpenOptions::default() };
    let image = Image::open(storage as _, std::path::Path::new("disk.vhd"), &options).unwrap();
    compare("memory", &*Disk::new(Chain::of(Layer::Image(image))));
    let raw = std::sync::Arc::new(MemoryStorage::new(vec![0; SIZE as usize]));
    let raw = RawFile::new(raw as std::sync::Arc<dyn Storage>, std::path::Path::new("raw"), false).unwrap();
    compare("raw", &*Disk::new(Chain::of(Layer::Raw(std::sync::Arc::new(raw)))));
}
