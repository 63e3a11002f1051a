//! Goal: the largest disks that there are cost no more than what is in them.
//!
//! Method: images of 2040 GiB, one and a chain of thirty, written and read at their first and last sectors; the memory
//! of this process is measured around it. Nothing is said about time: benches do that.
//! It would fail if a BAT were kept whole for each layer, an offset overflowed, or a file were not sparse.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use vhd_core::block::ExtentState;
use vhd_core::image::NewKind;
use vhd_core::{Disk, ErrorKind};

use self::support::{new_child, new_image, open, options};

const SIZE: u64 = 2040 << 30;
const MIB: u64 = 1 << 20;

fn sector_at(disk: &Disk, at: u64) -> [u8; 512] {
    let mut sector = [0xEE; 512];
    disk.read_at(&mut sector, at).unwrap();
    sector
}

#[test]
fn the_largest_disk_is_a_small_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.vhd");
    new_image(&path, NewKind::Dynamic, SIZE, 2 << 20);
    assert!(fs::metadata(&path).unwrap().len() < 16 * MIB);
    let disk = open(&path, true);
    assert_eq!(disk.size(), SIZE);
    let places = [0, 512, SIZE / 2 - 256, SIZE - 512];
    for (n, at) in places.into_iter().enumerate() {
        disk.write_at(&[n as u8 + 1; 512], at).unwrap();
    }
    assert_eq!(disk.write_at(&[1], SIZE).unwrap_err().kind(), ErrorKind::OutOfRange);
    disk.close().unwrap();
    drop(disk);
    let file = fs::metadata(&path).unwrap();
    assert!(file.len() < 16 * MIB + 5 * (2 * MIB + 4096) && file.blocks() * 512 < 6 * MIB, "{} bytes", file.blocks() * 512);
    let disk = open(&path, false);
    for (n, at) in places.into_iter().enumerate().rev() {
        // The one in the middle begins inside a sector.
        assert_eq!(sector_at(&disk, at), [n as u8 + 1; 512], "at {at}");
    }
    assert_eq!(sector_at(&disk, SIZE / 4), [0; 512]);
    let data: u64 = disk
        .extents_in(0..SIZE)
        .unwrap()
        .iter()
        .filter(|extent| extent.state == ExtentState::Data)
        .map(|extent| extent.range.end - extent.range.start)
        .sum();
    assert!((2048..6 * MIB).contains(&data), "{data} bytes of data");
}

/// What this process holds in memory, and the most it ever held.
fn memory() -> (u64, u64) {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    };
    (field("VmRSS:"), field("VmHWM:"))
}

#[test]
fn a_chain_of_thirty_of_the_largest_opens_in_64_mib() {
    let folder = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (0..30).map(|n| folder.path().join(format!("{n}.vhd"))).collect();
    new_image(&paths[0], NewKind::Dynamic, SIZE, 2 << 20);
    open(&paths[0], true).write_at(&[0xB0; 512], SIZE - 512).unwrap();
    for pair in paths.windows(2) {
        new_child(&pair[1], &pair[0]);
    }
    open(&paths[14], false);
    let (before, _) = memory();
    for writable in [false, true] {
        let disk = open(&paths[29], writable);
        assert_eq!((disk.capabilities().layers, disk.size()), (30, SIZE));
        assert_eq!((sector_at(&disk, 0), sector_at(&disk, SIZE - 512)), ([0; 512], [0xB0; 512]));
        if writable {
            disk.write_at(&[1; 512], 0).unwrap();
            disk.write_at(&[2; 512], SIZE - 512).unwrap();
            disk.close().unwrap();
        }
        let (now, peak) = memory();
        let used = now.saturating_sub(before).max(peak.saturating_sub(before));
        assert!(used < 64 * MIB, "{used} bytes, writable: {writable}");
    }
    let disk = Disk::open(&paths[29], &options(false)).unwrap();
    assert_eq!((sector_at(&disk, 0), sector_at(&disk, SIZE - 512)), ([1; 512], [2; 512]));
    // Reads that need every layer's table do not keep more than the tables.
    for gib in 0..2040 {
        sector_at(&disk, gib << 30);
    }
    assert_eq!(disk.extents_in(SIZE - (1 << 30)..SIZE).unwrap().last().unwrap().depth, 0);
}
