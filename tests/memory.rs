//! Goal: no command's memory grows with the size of the disk beyond what docs/performance.md says.
//!
//! Method: an image of 2040 GiB of which every block is allocated (a sparse file), and a chain of thirty of that size; the
//! commands that open it, look at its structure or change it are run by `time`, which is small itself and tells what the kernel saw
//! at most. It would fail if an open kept a whole BAT for each layer, a check a list of all blocks, or an answer all of
//! its lines.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use support::done;
use vhd_core::format::{Creator, Timestamp};
use vhd_core::image::{CreateOptions, NewKind, create_file};

/// KiB that a command has at most.
const MOST: u64 = 64 << 10;

/// KiB that a command had at most; `None` where there is no `time`.
fn memory(folder: &Path, arguments: &str) -> Option<u64> {
    vhd_testkit::tools::require("time")?;
    let told = folder.join("told");
    let status = Command::new("time")
        .current_dir(folder)
        .args(["--format", "%M", "--quiet", "--output"])
        .arg(&told)
        .arg(env!("CARGO_BIN_EXE_vhd"))
        .args(arguments.split(' '))
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.code().is_some_and(|code| code < 2), "vhd {arguments}: {status}");
    Some(std::fs::read_to_string(told).unwrap().trim().parse().unwrap())
}

/// Gives every block of an image a place in the file, one after the other, as if all of it had been written.
fn fill_table(path: &Path) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let (mut footer, mut header) = ([0; 512], [0; 1024]);
    file.read_exact_at(&mut footer, 0).unwrap();
    file.read_exact_at(&mut header, 512).unwrap();
    let table = u64::from_be_bytes(header[16..24].try_into().unwrap());
    let blocks = u64::from(u32::from_be_bytes(header[28..32].try_into().unwrap()));
    let block_size = u64::from(u32::from_be_bytes(header[32..36].try_into().unwrap()));
    let (first, stride) = ((table + blocks * 4).next_multiple_of(4096) + 4096, block_size + 4096);
    write_entries(&file, table, blocks, |n| ((first - 512 + n * stride) / 512) as u32);
    let end = (first + blocks * stride + 4096).next_multiple_of(4096);
    file.set_len(end).unwrap();
    file.write_all_at(&footer, end - 512).unwrap();
}

/// Writes entries of a table, not all of them in memory.
fn write_entries(file: &std::fs::File, table: u64, blocks: u64, entry: impl Fn(u64) -> u32) {
    for start in (0..blocks).step_by(1 << 18) {
        let end = (start + (1 << 18)).min(blocks);
        let bytes: Vec<u8> = (start..end).flat_map(|n| entry(n).to_be_bytes()).collect();
        file.write_all_at(&bytes, table + start * 4).unwrap();
    }
}

/// Where an image's table is, and how many entries it has.
fn table_of(path: &Path) -> (std::fs::File, u64, u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut header = [0; 1024];
    file.read_exact_at(&mut header, 512).unwrap();
    let table = u64::from_be_bytes(header[16..24].try_into().unwrap());
    (file, table, u64::from(u32::from_be_bytes(header[28..32].try_into().unwrap())))
}

#[test]
fn blocks_of_4_kib_and_a_full_table_of_64_mib_stay_in_64_mib() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let place = folder.path();
    let path = place.join("full.vhd");
    small_blocks(&path, 64 << 30);
    fill_table(&path);
    for command in [
        "check full.vhd",
        "compact full.vhd --dry-run",
        "compact full.vhd --realign --dry-run",
        "check full.vhd --repair=all --dry-run",
    ] {
        assert_small(place, command);
    }
    // Every second block is nowhere: half of the others move, to where they were.
    let (file, table, blocks) = table_of(&path);
    assert_eq!(blocks, 16 << 20);
    let mut entries = vec![0; 4 << 20];
    for part in 0..16 {
        file.read_exact_at(&mut entries, table + part * (4 << 20)).unwrap();
        entries.chunks_mut(8).for_each(|pair| pair[..4].fill(0xFF));
        file.write_all_at(&entries, table + part * (4 << 20)).unwrap();
    }
    for command in ["check full.vhd", "compact full.vhd --dry-run", "check full.vhd --repair --dry-run"] {
        // Of eight million moves it is known where each goes: a tenth of the table and the bitmaps is the bound then.
        assert_below(place, command, MOST.max(blocks * (4 + 512) / 10 / 1024));
    }
    // Blocks of which the host has nothing are dropped.
    fill_table(&path);
    assert_small(place, "compact full.vhd");
}

/// Each is told, and most of them are nowhere else.
#[test]
fn a_million_blocks_that_overlap_stay_in_64_mib() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let place = folder.path();
    let path = place.join("full.vhd");
    small_blocks(&path, 4 << 30);
    fill_table(&path);
    let (file, table, blocks) = table_of(&path);
    let first = (table + blocks * 4).next_multiple_of(4096) / 512 + 8;
    let near: fn(u64, u64) -> u64 = |first, n| first + n * 8;
    for entry in [near, |first, _| first + 7] {
        write_entries(&file, table, blocks, |n| entry(first, n) as u32);
        for command in ["check full.vhd", "check full.vhd --repair=all --dry-run"] {
            assert_small(place, command);
        }
    }
}

/// An image with blocks of 4 KiB, which the command makes none of.
fn small_blocks(path: &Path, size: u64) {
    let create = CreateOptions {
        kind: NewKind::Dynamic,
        size,
        block_size: 4096,
        uuid: [7; 16],
        creator: Creator::WINDOWS_10,
        timestamp: Timestamp(0),
    };
    create_file(path, &create, false).unwrap();
}

/// What is a hole of the file is not read entry by entry.
#[test]
fn a_table_of_2_gib_that_is_a_hole_is_checked_at_once() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let place = folder.path();
    let path = place.join("hole.vhd");
    small_blocks(&path, 4 << 20);
    let mut bytes = std::fs::read(&path).unwrap();
    let size: u64 = (2040 << 30) - 4096;
    bytes.truncate(2048);
    bytes[48..56].copy_from_slice(&size.to_be_bytes());
    bytes[512 + 28..][..4].copy_from_slice(&((size / 4096) as u32).to_be_bytes());
    sum(&mut bytes[..512], 64);
    sum(&mut bytes[512..1536], 36);
    let table = u64::from_be_bytes(bytes[512 + 16..][..8].try_into().unwrap());
    let end = (table + size / 4096 * 4).next_multiple_of(4096) + 4096;
    std::fs::write(&path, &bytes[..1536]).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(end).unwrap();
    file.write_all_at(&bytes[..512], end - 512).unwrap();
    let begin = std::time::Instant::now();
    for command in ["check hole.vhd", "check hole.vhd --repair=all --dry-run"] {
        assert_small(place, command);
    }
    assert!(begin.elapsed().as_secs() < 10, "{:?}", begin.elapsed());
}

/// The checksum of a footer or header, at `field`.
fn sum(bytes: &mut [u8], field: usize) {
    bytes[field..field + 4].fill(0);
    let sum = !bytes.iter().fold(0_u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    bytes[field..field + 4].copy_from_slice(&sum.to_be_bytes());
}

#[test]
fn commands_stay_in_64_mib_on_the_largest_disks() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let place = folder.path();
    done(place, "create full.vhd --size 2040G");
    fill_table(&place.join("full.vhd"));
    done(place, "create 0.vhd --size 2040G");
    for n in 1..30 {
        done(place, &format!("create {n}.vhd --parent {}.vhd", n - 1));
    }
    let commands = [
        "info full.vhd",
        "check full.vhd",
        "read full.vhd --offset 1T --length 1",
        "info --chain 29.vhd",
        "check --chain 29.vhd",
        "read 29.vhd --offset 1T --length 1",
        "create child.vhd --parent 29.vhd",
    ];
    commands.iter().for_each(|command| assert_small(place, command));
}

fn assert_small(place: &Path, command: &str) {
    assert_below(place, command, MOST);
}

fn assert_below(place: &Path, command: &str, most: u64) {
    let begin = std::time::Instant::now();
    let Some(had) = memory(place, command) else { return };
    println!("vhd {command}: {had} KiB, {:.1?}", begin.elapsed());
    assert!(had <= most, "vhd {command}: {had} KiB, expected {most} at most");
}

#[test]
fn operations_on_a_full_table_stay_in_64_mib() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let place = folder.path();
    done(place, "create full.vhd --size 2040G");
    fill_table(&place.join("full.vhd"));
    done(place, "create child.vhd --parent full.vhd");
    fill_table(&place.join("child.vhd"));
    for command in [
        "map full.vhd",
        "diff full.vhd child.vhd",
        "merge child.vhd --dry-run",
        "compact full.vhd --dry-run --force",
        "compact child.vhd --dry-run",
        "convert full.vhd copy.vhd",
    ] {
        assert_small(place, command);
    }
    std::fs::remove_file(place.join("child.vhd")).unwrap();
    assert_small(place, "resize full.vhd 2039G --shrink");
    // Blocks that nothing names any more: the last ones move into their places.
    clear_entries(&place.join("full.vhd"), [7, 100, 5000]);
    assert_small(place, "check full.vhd --repair");
    assert_small(place, "check full.vhd --undo-repair");
    let file = OpenOptions::new().write(true).open(place.join("full.vhd")).unwrap();
    file.write_all_at(b"none", 512).unwrap();
    assert_small(place, "check full.vhd --repair=all");
    assert_small(place, "compact full.vhd");
}

/// Forgets where these blocks of an image are, which hold something: freed space alone is no damage.
fn clear_entries(path: &Path, blocks: impl IntoIterator<Item = u64>) {
    let (file, table, _) = table_of(path);
    for block in blocks {
        let mut entry = [0; 4];
        file.read_exact_at(&mut entry, table + block * 4).unwrap();
        file.write_all_at(&[1; 4096], u64::from(u32::from_be_bytes(entry)) * 512 + 4096).unwrap();
        file.write_all_at(&[0xFF; 4], table + block * 4).unwrap();
    }
}
