//! Goal: a compacted image reads the same, at every point of the work, and is as small as what it holds.
//!
//! Method: images of this project and of the catalogue, with holes, zeros, blocks in any order and every alignment. The
//! operation is recorded; each state that a power cut may leave is read, checked, and compacted again. (At any moment of
//! a disk's life: `tests/model.rs`.)
//! It would fail if a gap were filled before its old entry was gone from the file, or an entry named a copy too early.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::path::Path;

use vhd_core::chain::ChainOptions;
use vhd_core::image::NewKind;
use vhd_core::ops::check::{CheckOptions, Severity, check};
use vhd_core::ops::compact::{CompactOptions, Compacted, compact};
use vhd_core::storage::FileStorage;
use vhd_core::{Disk, ErrorKind, Progress};
use vhd_testkit::crash::{Effort, Random};
use vhd_testkit::fixture::{Kind, catalogue};
use vhd_testkit::tagged::Tag;
use vhd_testkit::tools::{QemuImg, VhdiMount};

use self::support::sabotage::{Barriers, Operation};
use self::support::{new_child, new_image, open, options, read_all};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 24;

fn run(path: &Path, how: CompactOptions, chain: &ChainOptions) -> Result<Compacted, vhd_core::Error> {
    compact(path, &how, &mut |_| Ok(Vec::new()), chain, &Progress::default())
}

fn plainly(path: &Path) -> Compacted {
    run(path, CompactOptions::default(), &options(false)).unwrap()
}

/// Blocks written in random order, some of them zeros, some discarded; over a parent, some the same as there.
fn fill(path: &Path, seed: u64) {
    let disk = open(path, true);
    let below = read_all(&disk);
    let mut random = Random::new(seed);
    for write in 0..BLOCKS * 3 {
        let block = random.below(BLOCKS);
        let tags: Vec<u8> = (block * 8..block * 8 + 8).flat_map(|lba| Tag { image: 2, lba, write }.sector()).collect();
        let at = block * BLOCK;
        match random.below(6) {
            0 => disk.write_at(&[0; BLOCK as usize], at).unwrap(),
            1 => disk.zero(at..at + BLOCK, vhd_core::block::ZeroMode::Free).unwrap(),
            2 => disk.write_at(&below[at as usize..][..BLOCK as usize], at).unwrap(),
            3 => disk.write_at(&tags[..1024], at + 512).unwrap(),
            _ => disk.write_at(&tags, at).unwrap(),
        }
    }
    disk.close().unwrap();
}

/// A folder with an image, over a parent where `over`.
fn folder(over: bool, seed: u64) -> tempfile::TempDir {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = |name: &str| folder.path().join(name);
    if over {
        new_image(&path("base.vhd"), NewKind::Dynamic, BLOCKS * BLOCK, BLOCK as u32);
        fill(&path("base.vhd"), seed + 100);
        new_child(&path("disk.vhd"), &path("base.vhd"));
    } else {
        new_image(&path("disk.vhd"), NewKind::Dynamic, BLOCKS * BLOCK, BLOCK as u32);
    }
    fill(&path("disk.vhd"), seed);
    folder
}

#[track_caller]
fn assert_clean(path: &Path) {
    let storage = FileStorage::open(path, false).unwrap();
    let report = check(&storage, path, &CheckOptions { deep: true, ..CheckOptions::default() }).unwrap();
    let bad: Vec<_> = report.findings.iter().filter(|finding| finding.severity > Severity::Note).collect();
    assert!(bad.is_empty(), "{bad:?}");
}

#[test]
fn zeros_and_what_is_the_parents_go_and_the_rest_is_packed() {
    for over in [false, true] {
        let folder = folder(over, 1);
        let path = folder.path().join("disk.vhd");
        let before = read_all(&open(&path, false));
        let done = plainly(&path);
        println!("{done:?}");
        assert!(done.dropped > 0 && done.moved > 0 && done.len_after < done.len_before);
        assert!(!over || done.cleared > 0);
        assert!(read_all(&open(&path, false)) == before);
        assert_clean(&path);
        let kept = done.blocks - done.dropped;
        let head = done.len_after - kept * 8192;
        assert!(head <= if over { 24 << 10 } else { 12 << 10 }, "{head} bytes are no blocks");
    }
}

#[test]
fn images_of_all_creators_keep_their_content_and_alignment() {
    for fixture in catalogue().into_iter().filter(|fixture| fixture.damage.is_none() && fixture.leaf.kind != Kind::Fixed) {
        for realign in [false, true] {
            let folder = tempfile::tempdir_in("/dev/shm").unwrap();
            let paths = fixture.write_into(folder.path()).unwrap();
            let Ok(disk) = Disk::open(&paths[0], &options(true)) else { continue };
            let before = read_all(&disk);
            drop(disk);
            let how = CompactOptions { realign, ..CompactOptions::default() };
            let done = run(&paths[0], how, &options(false)).unwrap_or_else(|error| panic!("{}: {error}", fixture.name));
            assert!(read_all(&open(&paths[0], false)) == before, "{}", fixture.name);
            assert!(realign || done.len_after <= done.len_before, "{}: {done:?}", fixture.name);
            if realign && !before.is_empty() {
                let again = run(&paths[0], how, &options(false)).unwrap();
                assert_eq!((again.moved, again.dropped), (0, 0), "{}", fixture.name);
            }
        }
    }
}

#[test]
fn others_read_what_was_compacted() {
    let (Some(qemu), Some(libvhdi)) = (QemuImg::find(), VhdiMount::find()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhd");
    new_image(&path, NewKind::Dynamic, 40 << 20, 2 << 20);
    let disk = open(&path, true);
    (0..20).rev().for_each(|block: u64| disk.write_at(&[block as u8; 5000], block * (2 << 20)).unwrap());
    (0..20).step_by(3).for_each(|block: u64| disk.write_at(&[0; 5000], block * (2 << 20)).unwrap());
    disk.close().unwrap();
    let before = read_all(&disk);
    drop(disk);
    assert_eq!(plainly(&path).dropped, 7);
    assert!(qemu.to_raw(&path).unwrap() == before);
    assert!(libvhdi.to_raw(&path).unwrap() == before);
}

/// Blocks that another creator packed, between aligned ones: once they are gone, what they held is filled.
#[test]
fn gaps_that_hold_no_aligned_block_are_filled_all_the_same() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("disk.vhd");
    let block = 64 << 10;
    new_image(&path, NewKind::Dynamic, 20 * block, block as u32);
    let disk = open(&path, true);
    (0..20).for_each(|number: u64| disk.write_at(&[number as u8 + 1; 64 << 10], number * block).unwrap());
    disk.close().unwrap();
    drop(disk);
    // Every second one moves to where its slot fits, and no aligned one does.
    let mut bytes = std::fs::read(&path).unwrap();
    let bat = u64::from_be_bytes(bytes[512 + 16..512 + 24].try_into().unwrap()) as usize;
    for number in (0..20).step_by(2) {
        let entry = u32::from_be_bytes(bytes[bat + number * 4..][..4].try_into().unwrap());
        let (from, to) = (entry as usize * 512, (entry as usize - 7) * 512);
        bytes.copy_within(from..from + 512 + block as usize, to);
        bytes[bat + number * 4..][..4].copy_from_slice(&(entry - 7).to_be_bytes());
    }
    std::fs::write(&path, bytes).unwrap();
    let disk = open(&path, true);
    (0..20).step_by(2).for_each(|number: u64| disk.write_at(&[0; 64 << 10], number * block).unwrap());
    disk.close().unwrap();
    drop(disk);
    let before = read_all(&open(&path, false));
    let dry = run(&path, CompactOptions { dry_run: true, ..CompactOptions::default() }, &options(false)).unwrap();
    let done = plainly(&path);
    println!("{done:?}");
    assert_eq!((dry.len_after, dry.moved), (done.len_after, done.moved), "a dry run says what is done");
    assert!(done.dropped == 10 && done.len_after < 10 * (block + 512) + (64 << 10), "{done:?}");
    assert!(read_all(&open(&path, false)) == before);
    assert_clean(&path);
}

#[test]
fn a_fixed_disk_is_told_how_to_become_one_that_can_be_compacted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fixed.vhd");
    new_image(&path, NewKind::Fixed { preallocate: false }, 1 << 20, BLOCK as u32);
    let error = run(&path, CompactOptions::default(), &options(false)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("vhd convert"), "{error}");
}

#[test]
fn what_may_be_lost_is_dropped_by_whole_sectors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhd");
    new_image(&path, NewKind::Dynamic, 10 * BLOCK, BLOCK as u32);
    open(&path, true).write_at(&[7; 10 * BLOCK as usize], 0).unwrap();
    // Two blocks wholly, one but for a part of a sector, one from two sides.
    let ranges = vec![0..2 * BLOCK, 3 * BLOCK..4 * BLOCK - 1, 5 * BLOCK - 512..5 * BLOCK + 1024, 5 * BLOCK + 1024..6 * BLOCK];
    let how = CompactOptions::default();
    let done = compact(&path, &how, &mut |_| Ok(ranges.clone()), &options(false), &Progress::default()).unwrap();
    assert_eq!(done.dropped, 3);
    let after = read_all(&open(&path, false));
    for block in 0..10 {
        let expected = if [0, 1, 5].contains(&block) { 0 } else { 7 };
        assert!(after[block * BLOCK as usize..][..BLOCK as usize].iter().all(|byte| *byte == expected), "block {block}");
    }
}

/// What must hold after a power cut: the image reads the same, at once and compacted again.
fn judge(folder: &Path, how: CompactOptions, content: &[u8]) -> Result<(), String> {
    let disk = folder.join("disk.vhd");
    let same = |what: &str| {
        let opened = Disk::open(&disk, &options(false)).map_err(|error| format!("{what}: {error}"))?;
        let mut found = vec![0; opened.size() as usize];
        opened.read_at(&mut found, 0).map_err(|error| format!("{what}: {error}"))?;
        vhd_testkit::tagged::compare(&found, content, 0).map_err(|error| format!("{what}: {error}"))
    };
    same("after the cut")?;
    run(&disk, how, &options(false)).map_err(|error| format!("again: {error}"))?;
    same("compacted again")
}

/// Calls `visit` with each case: packed, over a parent, to aligned places.
fn operations(visit: &mut dyn FnMut(&Operation<'_>)) {
    for (name, over, realign) in
        [("compact", false, false), ("compact, over a parent", true, false), ("compact --realign", false, true)]
    {
        let folder = folder(over, 3);
        if realign {
            make_classic(&folder.path().join("disk.vhd"));
        }
        let how = CompactOptions { realign, ..CompactOptions::default() };
        let content = read_all(&open(&folder.path().join("disk.vhd"), false));
        let run = |folder: &Path, chain: &ChainOptions| {
            run(&folder.join("disk.vhd"), how, chain).unwrap();
        };
        let judge = |folder: &Path, _done: bool| judge(folder, how, &content);
        visit(&Operation::new(name, folder, &run, &judge));
    }
}

#[test]
fn a_power_cut_at_any_point_changes_nothing_that_is_read() {
    operations(&mut |operation| {
        operation.enumerate(Effort { exhaustive: 4, samples: 4, seed: 1 });
    });
}

#[test]
fn every_barrier_is_needed() {
    let mut barriers = Barriers::default();
    operations(&mut |operation| {
        operation.sabotage(&mut barriers, Effort { exhaustive: 4, samples: 4, seed: 1 });
    });
    barriers.assert("compact");
}

/// An image of the same content as Virtual PC would lay it out: blocks without gaps.
fn make_classic(path: &Path) {
    use vhd_testkit::fixture::{BlockFill, FixtureSpec, Layout};
    let mut spec = FixtureSpec { block_size: BLOCK as u32, ..FixtureSpec::new(Kind::Dynamic, Layout::Classic, BLOCKS * BLOCK) };
    for block in [5, 3, 9, 1, 0, 7, 12, 20] {
        spec = spec.block(block, BlockFill::tags(1, 1));
    }
    spec.write_to(path).unwrap();
    open(path, true).zero(9 * BLOCK..10 * BLOCK, vhd_core::block::ZeroMode::Free).unwrap();
}
