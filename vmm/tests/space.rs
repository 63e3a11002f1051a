//! Goal: a guest does not notice that the host's volume is full, unless it is to be told.
//!
//! Method: disks on a small tmpfs that a file fills. The test guest writes and flushes; the machine must stand still
//! with the reason, go on when there is room, and the guest must see no error and lose nothing. Needs root, to mount.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that can't go on fails here")]

mod support;

use std::path::{Path, PathBuf};

use vhd_core::Disk;
use vhd_core::chain::{Chain, ChainOptions};
use vhd_core::ops::check::{CheckOptions, check};
use vhd_core::storage::FileStorage;
use vhd_testkit::fixture::Kind;
use vhd_testkit::volume::Volume;
use vhd_vmm::machine::{Command, Reason, State};
use vhd_vmm::virtio::block::{BlockOptions, Policies, Policy};

use support::{PATIENCE, attached, definition, kvm, machine, make_disk};

/// Fills a volume but for so many bytes.
fn fill(volume: &Volume, but: u64) -> PathBuf {
    let file = volume.path().join("filling");
    std::fs::write(&file, []).unwrap();
    let free = FileStorage::open(&file, false).unwrap().room().unwrap().free;
    std::fs::write(&file, vec![1; (free - but) as usize]).unwrap();
    file
}

fn assert_clean(image: &Path) {
    let disk = Disk::new(Chain::open(image, &ChainOptions::default()).unwrap());
    disk.extents_in(0..disk.size()).unwrap();
    let file = FileStorage::open(image, false).unwrap();
    let report = check(&file, image, &CheckOptions::default()).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

#[test]
fn a_full_volume_pauses_the_machine_until_there_is_room() {
    let (true, Some(volume)) = (kvm(), Volume::new("40M")) else { return };
    let image = make_disk(volume.path(), "disk", Kind::Dynamic, 64 << 20);
    let filling = fill(&volume, 6 << 20);
    let disks = vec![attached(&image, BlockOptions::default())];
    let (machine, said, events) = machine(definition("do=fill sectors=40960", disks));
    let events = events.subscribe();
    machine.command(Command::Start).unwrap();
    let state = machine.wait(PATIENCE, |state| *state != State::Running);
    let State::Paused(Reason::NoSpace(why)) = &state else { panic!("{state:?} {}", said.text()) };
    assert!(why.contains("disk.vhd"), "{why}");
    // Told to go on without room, it is soon here again.
    machine.command(Command::Resume).unwrap();
    let again = machine.wait(PATIENCE, |state| *state != State::Running);
    assert!(matches!(again, State::Paused(Reason::NoSpace(_))), "{again:?}");
    // With room it goes on by itself.
    std::fs::remove_file(filling).unwrap();
    assert_eq!(machine.wait(PATIENCE, |state| *state == State::Off), State::Off, "{}", said.text());
    assert!(said.text().contains("filled 40960, 0 failed") && !said.text().contains("WRONG"), "{}", said.text());
    let kinds: Vec<_> = events.try_iter().map(|event| event.kind).collect();
    assert_eq!(kinds, ["started", "paused", "resumed", "paused", "resumed", "off"]);
    drop(machine);
    assert_clean(&image);
}

#[test]
fn a_guest_that_is_to_be_told_is_told() {
    let (true, Some(volume)) = (kvm(), Volume::new("30M")) else { return };
    let image = make_disk(volume.path(), "disk", Kind::Dynamic, 64 << 20);
    fill(&volume, 6 << 20);
    let policies = Policies { on_error: Policy::Report, on_no_space: Policy::Report };
    let disks = vec![attached(&image, BlockOptions { policies, ..Default::default() })];
    let (machine, said, _) = machine(definition("do=fill sectors=40960", disks));
    machine.command(Command::Start).unwrap();
    assert_eq!(machine.wait(PATIENCE, |state| *state != State::Running), State::Off);
    let text = said.text();
    assert!(text.contains("filled 40960, ") && !text.contains(", 0 failed"), "{text}");
}

#[test]
fn a_volume_that_gets_low_is_warned_of_and_the_machine_pauses_before_it_is_full() {
    let (true, Some(volume)) = (kvm(), Volume::new("60M")) else { return };
    let image = make_disk(volume.path(), "disk", Kind::Dynamic, 64 << 20);
    let mut definition = definition("do=spin", vec![attached(&image, BlockOptions::default())]);
    definition.low_space = 16 << 20;
    let (machine, _, events) = machine(definition);
    let events = events.subscribe();
    machine.command(Command::Start).unwrap();
    fill(&volume, 10 << 20);
    let next = || events.recv_timeout(PATIENCE).unwrap().kind;
    assert_eq!([next(), next()], ["started", "low-space"]);
    assert_eq!(machine.state(), State::Running);
    std::fs::rename(volume.path().join("filling"), volume.path().join("more")).unwrap();
    fill(&volume, 2 << 20);
    assert_eq!(next(), "paused");
    assert!(matches!(machine.state(), State::Paused(Reason::NoSpace(_))));
    std::fs::remove_file(volume.path().join("more")).unwrap();
    std::fs::remove_file(volume.path().join("filling")).unwrap();
    assert_eq!(machine.wait(PATIENCE, |state| *state == State::Running), State::Running);
}
