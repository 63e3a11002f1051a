//! Goal: no command's memory grows with the size of the disk beyond what docs/performance.md says.
//!
//! Method: an image of 2040 GiB of which every block is allocated (a sparse file), and a chain of thirty of that size; the
//! commands that open it, look at its structure or change it are run by `time`, which is small itself and tells what the kernel saw
//! at most. It would fail if an open kept a whole BAT for each layer, a check more than its list of blocks, or an answer all of
//! its lines.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use support::done;

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
    let (first, stride) = ((table + blocks * 4).next_multiple_of(4096) + 4096, (2 << 20) + 4096);
    let entries: Vec<u8> = (0..blocks).flat_map(|n| (((first - 512 + n * stride) / 512) as u32).to_be_bytes()).collect();
    file.write_all_at(&entries, table).unwrap();
    let end = (first + blocks * stride + 4096).next_multiple_of(4096);
    file.set_len(end).unwrap();
    file.write_all_at(&footer, end - 512).unwrap();
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
    let begin = std::time::Instant::now();
    let Some(had) = memory(place, command) else { return };
    println!("vhd {command}: {had} KiB, {:.1?}", begin.elapsed());
    assert!(had <= MOST, "vhd {command}: {had} KiB, expected {MOST} at most");
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

/// Forgets where these blocks of an image are.
fn clear_entries(path: &Path, blocks: impl IntoIterator<Item = u64>) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut header = [0; 1024];
    file.read_exact_at(&mut header, 512).unwrap();
    let table = u64::from_be_bytes(header[16..24].try_into().unwrap());
    blocks.into_iter().for_each(|block| file.write_all_at(&[0xFF; 4], table + block * 4).unwrap());
}
