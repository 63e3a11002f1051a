//! Goal: a disk of another size reads what it held, and zeros where it is new, at every point of the work.
//!
//! Method: images of this project and of the catalogue grow so far that their table needs room where blocks, locators
//! or a batmap are. The operation is recorded; each state that a power cut may leave is read, checked, and resized again.
//! (At any moment of a disk's life: `tests/model.rs`.)
//! It would fail if a footer led to a header that is not whole, or if what lies behind the end came to light.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;

use vhd_core::chain::{Chain, ChainOptions};
use vhd_core::image::NewKind;
use vhd_core::ops::check::{CheckOptions, Code, Finding, Severity, check};
use vhd_core::ops::resize::{ResizeOptions, Resized, resize};
use vhd_core::partition::{PartitionTable, TableKind};
use vhd_core::storage::FileStorage;
use vhd_core::{Disk, Error, ErrorKind, Progress};
use vhd_testkit::crash::Effort;
use vhd_testkit::fixture::{BlockFill, FixtureSpec, Kind, Layout, Locator, Parent, catalogue};
use vhd_testkit::tagged::Tag;
use vhd_testkit::tools::QemuImg;

use self::support::sabotage::{Barriers, Operation, Run};
use self::support::{assert_error, files_of, new_child, new_image, open, options, read_all};

const BLOCK: u64 = 4096;
const SHRINK: ResizeOptions = ResizeOptions { shrink: true, discard_data: false, force: false, dry_run: false };
const CUT: ResizeOptions = ResizeOptions { discard_data: true, ..SHRINK };

fn run_with(path: &Path, size: u64, how: &ResizeOptions, chain: &ChainOptions) -> Result<Resized, Error> {
    resize(path, size, how, chain, &Progress::default())
}

fn run(path: &Path, size: u64) -> Result<Resized, Error> {
    run_with(path, size, &SHRINK, &options(false))
}

/// What check finds that is worth a warning.
fn findings(path: &Path) -> Vec<Finding> {
    let storage = FileStorage::open(path, false).unwrap();
    let report = check(&storage, path, &CheckOptions { deep: true, ..CheckOptions::default() }).unwrap();
    // Where a block made room for the table, the rest of its space may be too small for another one.
    let is_bad = |finding: &&Finding| finding.severity > Severity::Note && finding.code != Code::LeakedSpace;
    report.findings.iter().filter(is_bad).cloned().collect()
}

fn fill(path: &Path, image: u32, blocks: impl Iterator<Item = u64>) {
    let disk = open(path, true);
    for block in blocks {
        let tags: Vec<u8> = (block * 8..block * 8 + 5).flat_map(|lba| Tag { image, lba, write: 1 }.sector()).collect();
        disk.write_at(&tags, block * BLOCK).unwrap();
    }
    disk.close().unwrap();
}

#[test]
fn images_of_all_creators_grow_and_shrink_back() {
    for fixture in catalogue().into_iter().filter(|fixture| fixture.damage.is_none()) {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let paths = fixture.write_into(folder.path()).unwrap();
        let path = &paths[0];
        let Ok(disk) = Disk::open(path, &options(true)) else { continue };
        let before = read_all(&disk);
        drop(disk);
        let codes: Vec<_> = findings(path).iter().map(|finding| finding.code).collect();
        let assert_no_new = |path: &Path| {
            let new: Vec<_> = findings(path).into_iter().filter(|finding| !codes.contains(&finding.code)).collect();
            assert!(new.is_empty(), "{}: {new:?}", fixture.name);
        };
        let block = fixture.leaf.block_size;
        let name = fixture.name;
        // The table gets several sectors more.
        let larger = before.len() as u64 + u64::from(block) * 1000 + 512;
        match run(path, larger) {
            Err(error) if error.to_string().contains("parent is larger") => continue,
            result => drop(result.unwrap_or_else(|error| panic!("{name}: {error}"))),
        }
        let disk = open(path, false);
        assert_eq!(disk.size(), larger, "{name}");
        let mut found = vec![0; before.len()];
        disk.read_at(&mut found, 0).unwrap();
        assert!(found == before, "{name}");
        let mut rest = vec![0xEE; 1 << 20];
        disk.read_at(&mut rest, before.len() as u64).unwrap();
        drop(disk);
        assert!(rest.iter().all(|byte| *byte == 0), "{name}: what is new is not zero");
        assert_no_new(path);
        let disk = open(path, true);
        disk.write_at(&[7; 512], larger - 512).unwrap();
        drop(disk);
        assert_error(&run(path, before.len() as u64).unwrap_err(), ErrorKind::Refused, "--discard-data");
        let cut = ResizeOptions { discard_data: true, ..SHRINK };
        run_with(path, before.len() as u64, &cut, &options(false)).unwrap();
        assert!(read_all(&open(path, false)) == before, "{name}");
        assert_no_new(path);
        // What was cut off is gone for good.
        run(path, larger).unwrap();
        let mut last = [1; 512];
        open(path, false).read_at(&mut last, larger - 512).unwrap();
        assert_eq!(last, [0; 512], "{name}");
    }
}

/// Its file may be shorter than the new table alone.
#[test]
fn an_image_with_few_blocks_or_none_grows_as_far_as_any() {
    let folder = tempfile::tempdir().unwrap();
    let (path, base) = (folder.path().join("disk.vhd"), folder.path().join("base.vhd"));
    new_image(&base, NewKind::Dynamic, 20 * BLOCK, BLOCK as u32);
    fill(&base, 1, 0..20);
    for (over, held) in [false, true].into_iter().flat_map(|over| [0, 1, 3].map(|held| (over, held))) {
        for blocks in [100, 600, 700, 1200, 1500, 5000, 60_000] {
            let _ = std::fs::remove_file(&path);
            match over {
                true => new_child(&path, &base),
                false => new_image(&path, NewKind::Dynamic, 20 * BLOCK, BLOCK as u32),
            }
            fill(&path, 2, (0..20).step_by(7).take(held));
            let mut expected = read_all(&open(&path, false));
            run(&path, blocks * BLOCK).unwrap();
            assert_eq!(findings(&path), [], "{held} of {blocks} blocks");
            expected.resize((blocks * BLOCK) as usize, 0);
            assert!(read_all(&open(&path, false)) == expected, "{held} of {blocks} blocks");
            run(&path, 20 * BLOCK).unwrap();
            assert_eq!(findings(&path), [], "{held} of {blocks} blocks, and back");
        }
    }
}

#[test]
fn what_a_block_holds_beyond_the_end_never_comes_to_light() {
    for over in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.vhd");
        new_image(&folder.path().join("base.vhd"), NewKind::Dynamic, 5 * BLOCK + 1024, BLOCK as u32);
        match over {
            true => new_child(&path, &folder.path().join("base.vhd")),
            false => drop(std::fs::rename(folder.path().join("base.vhd"), &path)),
        }
        let disk = open(&path, true);
        disk.write_at(&[1; 1024], 5 * BLOCK).unwrap();
        let extent = disk.extents_in(5 * BLOCK..disk.size()).unwrap().remove(0);
        disk.close().unwrap();
        drop(disk);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[0xAA; 3072], extent.offset.unwrap() + 1024).unwrap();
        file.write_all_at(&[0xFF], extent.offset.unwrap() - 512).unwrap();
        run(&path, 6 * BLOCK).unwrap();
        let all = read_all(&open(&path, false));
        assert!(all[5 * BLOCK as usize..][..1024] == [1; 1024] && all[5 * BLOCK as usize + 1024..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn qemu_reads_what_grew() {
    let Some(qemu) = QemuImg::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    for (name, kind) in [("dynamic.vhd", NewKind::Dynamic), ("fixed.vhd", NewKind::Fixed { preallocate: false })] {
        let path = folder.path().join(name);
        new_image(&path, kind, 10 << 20, 2 << 20);
        open(&path, true).write_at(&[7; 100_000], 3 << 20).unwrap();
        run(&path, 3 << 30).unwrap();
        let disk = open(&path, true);
        disk.write_at(&[9; 4096], (3 << 30) - 4096).unwrap();
        disk.close().unwrap();
        drop(disk);
        run(&path, 3 << 30).unwrap();
        let raw = folder.path().join("raw");
        qemu.convert_to_raw(&path, &raw).unwrap();
        let raw = std::fs::File::open(&raw).unwrap();
        assert_eq!(raw.metadata().unwrap().len(), 3 << 30);
        for (at, byte) in [(3 << 20, 7), ((3 << 30) - 4096, 9)] {
            let mut found = [0; 4096];
            raw.read_exact_at(&mut found, at).unwrap();
            assert_eq!(found, [byte; 4096]);
        }
    }
}

#[test]
fn what_can_not_be_had_is_refused_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.vhd");
    new_image(&base, NewKind::Dynamic, 10 * BLOCK, BLOCK as u32);
    fill(&base, 1, 0..10);
    let no = ResizeOptions::default();
    let before = files_of(folder.path());
    assert_error(&run_with(&base, 5 * BLOCK, &no, &options(false)).unwrap_err(), ErrorKind::Refused, "--shrink");
    assert_error(&run(&base, 5 * BLOCK).unwrap_err(), ErrorKind::Refused, "byte 20480 holds data");
    assert_error(&run(&base, 0).unwrap_err(), ErrorKind::InvalidInput, "expected 512 bytes");
    assert_error(&run(&base, 3 << 40).unwrap_err(), ErrorKind::InvalidInput, "2040 GiB");
    assert!(files_of(folder.path()) == before);
    let child = folder.path().join("child.vhd");
    new_child(&child, &base);
    assert_error(&run(&base, 20 * BLOCK).unwrap_err(), ErrorKind::Refused, "child.vhd");
    let cut = ResizeOptions { discard_data: true, ..SHRINK };
    run_with(&child, 5 * BLOCK, &cut, &options(false)).unwrap();
    assert_error(&run(&child, 8 * BLOCK).unwrap_err(), ErrorKind::Refused, "parent is larger");
}

#[test]
fn a_dry_run_tells_what_will_be_moved_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhd");
    new_image(&path, NewKind::Dynamic, 10 * BLOCK, BLOCK as u32);
    fill(&path, 1, 0..10);
    let before = files_of(folder.path());
    let planned = run_with(&path, 4000 * BLOCK, &ResizeOptions { dry_run: true, ..SHRINK }, &options(false)).unwrap();
    assert!(files_of(folder.path()) == before);
    assert!(planned.bytes_moved > 0);
    assert_eq!(run(&path, 4000 * BLOCK).unwrap(), planned);
}

/// A disk with a GPT that sgdisk made, of two partitions.
fn with_gpt(path: &Path, kind: NewKind) -> Option<()> {
    let sgdisk = vhd_testkit::tools::require("sgdisk")?;
    let raw = path.with_extension("img");
    std::fs::File::create(&raw).unwrap().set_len(20 << 20).unwrap();
    sgdisk.run(&["-n", "1:2048:+4M", "-n", "2:0:+2M", "-c", "2:data", raw.to_str().unwrap()]).unwrap();
    new_image(path, kind, 20 << 20, 2 << 20);
    open(path, true).write_at(&std::fs::read(&raw).unwrap(), 0).unwrap();
    Some(())
}

/// Fails unless sgdisk finds the table whole and right for the disk's size.
fn verify(path: &Path) {
    let Some(sgdisk) = vhd_testkit::tools::require("sgdisk") else { return };
    let raw = path.with_extension("img");
    std::fs::write(&raw, read_all(&open(path, false))).unwrap();
    let said = sgdisk.run(&["--verify", raw.to_str().unwrap()]).unwrap();
    assert!(said.contains("No problems found"), "{said}");
    // It says so of a disk without a table, too.
    let said = sgdisk.run(&["--print", raw.to_str().unwrap()]).unwrap();
    assert!(said.contains("data"), "{said}");
}

#[test]
fn a_gpt_follows_the_end_of_the_disk() {
    for kind in [NewKind::Dynamic, NewKind::Fixed { preallocate: false }] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.vhd");
        let Some(()) = with_gpt(&path, kind) else { return };
        for size in [33 << 20, (33 << 20) + 5120, 8 << 20, 30 << 20] {
            assert!(run(&path, size).unwrap().moves_gpt);
            verify(&path);
            let table = PartitionTable::read(&open(&path, false)).unwrap();
            assert!(table.problems.is_empty() && matches!(table.kind, TableKind::Gpt(_)), "{:?}", table.problems);
            assert_eq!(table.partitions.len(), 2);
        }
        // The last partition ends where its backup would have to be.
        assert_error(&run(&path, (7 << 20) + 4096).unwrap_err(), ErrorKind::Refused, "partition 2");
        // One that only has its backup gets its first table again.
        open(&path, true).write_at(&[0; 1024], 512).unwrap();
        assert!(run(&path, 40 << 20).unwrap().moves_gpt);
        verify(&path);
    }
}

/// What must hold after a power cut: the old size or the new, and the new one once resized again.
fn judge(folder: &Path, content: &[u8], expected: &[u8], done: bool) -> Result<(), String> {
    let disk = folder.join("disk.vhd");
    let same = |what: &str, wanted: &[&[u8]]| {
        let opened = match Disk::open(&disk, &options(false)) {
            // It says how to go on.
            Err(error) if error.to_string().contains("vhd resize") && wanted.len() > 1 => return Ok(()),
            opened => opened.map_err(|error| format!("{what}: {error}"))?,
        };
        let mut found = vec![0; opened.size() as usize];
        opened.read_at(&mut found, 0).map_err(|error| format!("{what}: {error}"))?;
        let wanted = wanted.iter().find(|wanted| wanted.len() == found.len()).ok_or(format!("{what}: {} bytes", found.len()))?;
        vhd_testkit::tagged::compare(&found, wanted, 0).map_err(|error| format!("{what}: {error}"))
    };
    let both = [expected, content];
    same("after the cut", &both[..if done { 1 } else { 2 }])?;
    if folder.join("disk.vhd.vhd-intent").exists() && !folder.join("base.vhd").exists() {
        judge_copied(&disk, content, expected)?;
    }
    run_with(&disk, expected.len() as u64, &CUT, &options(false)).map_err(|error| format!("again: {error}"))?;
    same("resized again", &[expected])?;
    let found = findings(&disk);
    if found.is_empty() { Ok(()) } else { Err(format!("resized again: {found:?}")) }
}

/// The image alone, copied without its record: it is the old disk or the new one, or says itself how to go on. (Until the mark
/// is durable the old footer stays where it was.)
fn judge_copied(disk: &Path, content: &[u8], expected: &[u8]) -> Result<(), String> {
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let copy = elsewhere.path().join("copy.vhd");
    std::fs::copy(disk, &copy).unwrap();
    let read = || -> Result<Vec<u8>, Error> {
        let opened = Disk::open(&copy, &options(false))?;
        let mut found = vec![0; opened.size() as usize];
        opened.read_at(&mut found, 0).map(|()| found)
    };
    let found = match read() {
        Err(error) if error.to_string().contains("vhd resize") => {
            run_with(&copy, expected.len() as u64, &CUT, &options(false)).map_err(|error| format!("the copy: {error}"))?;
            read().map_err(|error| format!("the copy, finished: {error}"))?
        }
        Err(_) if std::fs::read(&copy).unwrap().get(content.len()..).is_some_and(|rest| rest.starts_with(b"conectix")) => {
            return Ok(());
        }
        found => found.map_err(|error| format!("the copy: {error}"))?,
    };
    if found == content || found == expected { Ok(()) } else { Err("the copy is taken for something else".into()) }
}

/// Calls `visit` with each case, and what finishes it.
fn operations(visit: &mut dyn FnMut(&Operation<'_>, &Run<'_>)) {
    type Make = fn(&Path);
    let dynamic: Make = |folder| {
        new_image(&folder.join("disk.vhd"), NewKind::Dynamic, 20 * BLOCK + 1024, BLOCK as u32);
        fill(&folder.join("disk.vhd"), 1, (0..20).step_by(2));
    };
    let child: Make = |folder| {
        new_image(&folder.join("base.vhd"), NewKind::Dynamic, 20 * BLOCK, BLOCK as u32);
        fill(&folder.join("base.vhd"), 1, 0..20);
        new_child(&folder.join("disk.vhd"), &folder.join("base.vhd"));
        fill(&folder.join("disk.vhd"), 2, (0..20).step_by(3));
    };
    let without_blocks: Make = |folder| new_image(&folder.join("disk.vhd"), NewKind::Dynamic, 20 * BLOCK, BLOCK as u32);
    let one_block: Make = |folder| {
        new_image(&folder.join("disk.vhd"), NewKind::Dynamic, 20 * BLOCK, BLOCK as u32);
        fill(&folder.join("disk.vhd"), 1, 7..8);
    };
    // Its batmap and its locators are where the table grows.
    let tapdisk: Make = |folder| {
        new_image(&folder.join("base.vhd"), NewKind::Dynamic, 20 * BLOCK, BLOCK as u32);
        let uuid = Chain::open_image(&folder.join("base.vhd"), &options(false)).unwrap().footer().uuid();
        let parent = Parent::named(uuid, "base.vhd").locator(Locator::macx("file://./base.vhd"));
        let tap = FixtureSpec { block_size: BLOCK as u32, ..FixtureSpec::new(Kind::Differencing, Layout::Tapdisk, 20 * BLOCK) };
        FixtureSpec { parent: Some(parent), ..tap }.block(3, BlockFill::tags(2, 1)).write_to(&folder.join("disk.vhd")).unwrap();
    };
    let fixed: Make = |folder| {
        new_image(&folder.join("disk.vhd"), NewKind::Fixed { preallocate: false }, 20 * BLOCK, BLOCK as u32);
        fill(&folder.join("disk.vhd"), 1, 0..20);
    };
    for (name, make, size) in [
        ("dynamic, larger", dynamic, 1500 * BLOCK),
        ("dynamic, smaller", dynamic, 7 * BLOCK),
        ("dynamic without blocks, larger", without_blocks, 1500 * BLOCK),
        ("dynamic with one block, larger", one_block, 5000 * BLOCK),
        ("differencing, larger", child, 1500 * BLOCK),
        ("tapdisk, larger", tapdisk, 1500 * BLOCK),
        ("fixed, larger", fixed, 40 * BLOCK),
        ("fixed, smaller", fixed, 7 * BLOCK),
    ] {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        make(folder.path());
        let content = read_all(&open(&folder.path().join("disk.vhd"), false));
        let mut expected = content.clone();
        expected.resize(size as usize, 0);
        let run = |folder: &Path, chain: &ChainOptions| drop(run_with(&folder.join("disk.vhd"), size, &CUT, chain).unwrap());
        let judge = |folder: &Path, done: bool| judge(folder, &content, &expected, done);
        visit(&Operation::new(&format!("resize, {name}"), folder, &run, &judge), &run);
    }
}

#[test]
fn a_power_cut_at_any_point_leaves_the_old_size_or_the_new() {
    operations(&mut |operation, _| {
        operation.enumerate(Effort { exhaustive: 4, samples: 4, seed: 1 });
    });
}

#[test]
fn every_barrier_is_needed() {
    let mut barriers = Barriers::default();
    operations(&mut |operation, finish| {
        operation.sabotage_with_finish(&mut barriers, Effort { exhaustive: 4, samples: 4, seed: 1 }, finish);
    });
    barriers.assert("resize");
}
