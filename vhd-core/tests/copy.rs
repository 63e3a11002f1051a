//! Goal: a copy of a disk reads as the disk, however short and odd the pieces of data are.
//!
//! Method: runs of sectors of random lengths and places, more than a buffer holds, copied over zeros and over other data.
//! It would fail if pieces that are read together were mixed up, overlapped in memory, or were not all written.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::ops::Range;

use vhd_core::Progress;
use vhd_core::image::NewKind;
use vhd_core::ops::copy::copy;
use vhd_testkit::tagged::Tag;

use self::support::{new_image, open, read_all};

const SIZE: u64 = 24 << 20;

/// Runs of 1 to 63 sectors, with as many between them: none begins where it would be convenient.
fn odd_runs() -> Vec<Range<u64>> {
    let (mut at, mut number) = (1, 1_u64);
    let mut runs = Vec::new();
    while at + 64 < SIZE / 512 {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (len, gap) = (1 + (number >> 40) % 63, 1 + (number >> 50) % 63);
        runs.push(at..at + len);
        at += len + gap;
    }
    runs
}

#[test]
fn pieces_that_are_read_together_each_go_to_their_place() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from.vhd"), folder.path().join("to.vhd"));
    for is_zero in [true, false] {
        for (path, image) in [(&from, 1), (&to, 2)] {
            let _ = std::fs::remove_file(path);
            new_image(path, NewKind::Dynamic, SIZE, 2 << 20);
            if image == 2 && is_zero {
                continue;
            }
            let disk = open(path, true);
            let whole = 0..SIZE / 512;
            let runs = if image == 1 { odd_runs() } else { vec![whole] };
            for lba in runs.into_iter().flatten() {
                disk.write_at(&Tag { image, lba, write: 1 }.sector(), lba * 512).unwrap();
            }
            disk.close().unwrap();
        }
        let (source, target) = (open(&from, false), open(&to, true));
        copy(&source, &target, is_zero, &Progress::default()).unwrap();
        assert!(read_all(&source) == read_all(&target), "over zeros: {is_zero}");
    }
}
