//! Goal: what a fuzzer once found stays found, and the fuzz targets run wherever the tests do.
//!
//! Method: every file of `fuzz/corpus/TARGET`, and the same cut and with a byte changed, is given to its target on the
//! stable compiler. The targets are in `vhd_testkit::fuzz`, with what each of them asserts.
//! It would fail if an input broke its target again, or a target had no corpus.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

use std::ffi::OsString;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use vhd_testkit::fuzz;

/// A target: its name, and what it does.
type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 12] = [
    ("footer_roundtrip", fuzz::footer_roundtrip),
    ("open_image", fuzz::open_image),
    ("mutate_image", fuzz::mutate_image),
    ("bat_edits", fuzz::bat_edits),
    ("disk_ops", fuzz::disk_ops),
    ("chain_resolve", fuzz::chain_resolve),
    ("crash_ops", fuzz::crash_ops),
    ("guest_fs", fuzz::guest_fs),
    ("block_rings", fuzz::block_rings),
    ("partition_table", fuzz::partition_table),
    ("machine_files", fuzz::machine_files),
    ("repair_journal", fuzz::repair_journal),
];

fn replay((name, target): Target) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 5, "no corpus in {}", folder.display());
    for file in files {
        let bytes = fs::read(&file).unwrap();
        let mut changed = bytes.clone();
        if let Some(byte) = changed.get_mut(bytes.len() / 3) {
            *byte ^= 0x81;
        }
        for (how, input) in [("as it is", &bytes[..]), ("cut", &bytes[..bytes.len() * 2 / 3]), ("changed", &changed[..])] {
            let outcome = catch_unwind(AssertUnwindSafe(|| target(input)));
            assert!(outcome.is_ok(), "{name} fails on {}, {how}", file.display());
        }
    }
}

#[test]
fn footer_roundtrip_holds_on_its_corpus() {
    replay(TARGETS[0]);
}

#[test]
fn open_image_holds_on_its_corpus() {
    replay(TARGETS[1]);
}

#[test]
fn mutate_image_holds_on_its_corpus() {
    replay(TARGETS[2]);
}

#[test]
fn bat_edits_holds_on_its_corpus() {
    replay(TARGETS[3]);
}

#[test]
fn disk_ops_holds_on_its_corpus() {
    replay(TARGETS[4]);
}

#[test]
fn chain_resolve_holds_on_its_corpus() {
    replay(TARGETS[5]);
}

/// Each binary of the fuzz crate is one of these, and each of these has its binary.
#[test]
fn every_target_is_replayed() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/targets");
    let mut binaries: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path().file_stem().unwrap().to_owned()).collect();
    let mut replayed: Vec<OsString> = TARGETS.map(|(name, _)| name.into()).into();
    // In `vhd-nbd/tests/fuzz_replay.rs`.
    replayed.push("nbd_session".into());
    binaries.sort();
    replayed.sort();
    assert_eq!(binaries, replayed);
}

#[test]
fn crash_ops_holds_on_its_corpus() {
    replay(TARGETS[6]);
}

#[test]
fn guest_fs_holds_on_its_corpus() {
    replay(TARGETS[7]);
}

#[test]
fn block_rings_holds_on_its_corpus() {
    replay(TARGETS[8]);
}

#[test]
fn partition_table_holds_on_its_corpus() {
    replay(TARGETS[9]);
}

#[test]
fn repair_journal_holds_on_its_corpus() {
    replay(TARGETS[11]);
}

#[test]
fn machine_files_holds_on_its_corpus() {
    replay(TARGETS[10]);
}
