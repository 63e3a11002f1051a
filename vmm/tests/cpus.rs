//! Goal: several CPUs that use disks of each sort at once, over one queue or several, find what they wrote, and the disk
//! holds exactly that.
//!
//! Method: the test guest starts its CPUs as a kernel does. Each writes, zeroes and discards places of its own, in
//! requests of three layouts, reads them back, and says what is wrong. Afterwards the whole disk is compared with what
//! was on it before, changed as the guest's rules say: it would fail if a request went to another place, or were lost.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that can't go on fails here")]

mod support;

use std::path::{Path, PathBuf};

use vhd_core::Disk;
use vhd_core::chain::{Chain, ChainOptions, ChildOptions, create_child};
use vhd_core::ops::undo;
use vhd_testkit::fixture::Kind;
use vhd_vmm::machine::Definition;
use vhd_vmm::virtio::block::BlockOptions;

use support::{attached, definition, kvm, make_disk, open, run};

const SIZE: u64 = 8 << 20;
/// What `vmm/guest/cpus.rs` does without being told otherwise.
const PLACES: u64 = 48;
const LAST_ROUND: u64 = 2;

/// What a disk is before the guest has it: nothing that the guest writes.
fn before(sector: u64) -> [u8; 512] {
    let mut content = [0x5A; 512];
    content[..8].copy_from_slice(&sector.to_ne_bytes());
    content
}

/// What the guest writes: see `pattern` in `vmm/guest/main.rs`.
fn pattern(sector: u64, round: u64) -> Vec<u8> {
    let mut state = sector.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ round.wrapping_mul(0xD1B5_4A32_D192_ED03) ^ 0xABCD;
    let words = (0..512).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_ne_bytes()
    });
    words.flatten().collect()
}

/// What the disk holds when the guest has done its work.
fn expected() -> Vec<u8> {
    let mut disk: Vec<u8> = (0..SIZE / 512).flat_map(before).collect();
    for place in 0..PLACES {
        let sector = place * (SIZE / 512 / PLACES) + place % 7;
        let start = sector as usize * 512;
        let content = if (place + LAST_ROUND) % 4 > 1 { pattern(sector, LAST_ROUND) } else { vec![0; 4096] };
        disk[start..start + 4096].copy_from_slice(&content);
    }
    disk
}

fn fill(image: &Path, which: impl Fn(u64) -> bool) {
    let live = open(image);
    for sector in (0..SIZE / 512).filter(|sector| which(*sector)) {
        live.disk().write_at(&before(sector), sector * 512).unwrap();
    }
    live.disk().close().unwrap();
}

/// A disk of this sort with something on it: its own, its parent's, or that of what it undoes.
fn disk_of(folder: &Path, sort: &str) -> PathBuf {
    let kind = if sort == "fixed" { Kind::Fixed } else { Kind::Dynamic };
    let path = make_disk(folder, "disk", kind, SIZE);
    fill(&path, |_| true);
    if sort == "differencing" {
        let (child, options) = (folder.join("child.vhd"), ChildOptions::new([7; 16]));
        create_child(&child, &path, &options, &ChainOptions::default()).unwrap();
        // A part of what the base has is the leaf's own, too.
        fill(&child, |sector| sector / 100 % 2 == 0);
        return child;
    }
    if sort == "undo" {
        undo::start(std::slice::from_ref(&path), None, &ChainOptions::default()).unwrap();
        return undo::undo_of(&path, None).unwrap();
    }
    path
}

fn content_of(image: &Path) -> Vec<u8> {
    let disk = Disk::new(Chain::open(image, &ChainOptions::default()).unwrap());
    let mut content = vec![0; SIZE as usize];
    disk.read_at(&mut content, 0).unwrap();
    content
}

fn cpus_and_queues_on(sort: &str) {
    if !kvm() {
        return;
    }
    let expected = expected();
    for queues in [1, 4] {
        for cpus in 1..=4 {
            let folder = tempfile::tempdir().unwrap();
            let image = disk_of(folder.path(), sort);
            let disks = vec![attached(&image, BlockOptions { queues, ..Default::default() })];
            let work = format!("do=cpus cpus={cpus} queues={queues}");
            let said = run(Definition { cpus, ..definition(&work, disks) });
            assert!(said.contains(&format!("{cpus} CPUs are done with 1 disks\n")), "{said}");
            let found = content_of(&image);
            let wrong = found.chunks(512).zip(expected.chunks(512)).position(|(found, expected)| found != expected);
            assert_eq!(wrong, None, "{sort}, {queues} queues, {cpus} CPUs: this sector is not what the guest wrote");
        }
    }
}

#[test]
fn on_fixed_disks() {
    cpus_and_queues_on("fixed");
}

#[test]
fn on_dynamic_disks() {
    cpus_and_queues_on("dynamic");
}

#[test]
fn on_differencing_disks() {
    cpus_and_queues_on("differencing");
}

#[test]
fn on_undo_disks() {
    cpus_and_queues_on("undo");
}
