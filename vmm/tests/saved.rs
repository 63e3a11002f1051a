//! Goal: a guest that is saved in the middle of its work goes on elsewhere as if nothing had happened, and nothing else
//! is ever gone on from.
//!
//! Method: the test guest writes, flushes and verifies patterns; it is saved on the way, its machine is thrown away, and
//! another one goes on from the file. The file is cut and changed at each sort of byte; a disk is changed or exchanged.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that can't go on fails here")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vhd_core::ErrorKind;
use vhd_core::chain::{Chain, ChainOptions};
use vhd_core::image::OpenOptions;
use vhd_core::ops::saved_state;
use vhd_service::events::Events;
use vhd_testkit::fixture::Kind;
use vhd_vmm::machine::{Command, Definition, Machine, State, discard_state};
use vhd_vmm::saved;
use vhd_vmm::virtio::block::BlockOptions;

use support::{PATIENCE, Said, attached, definition, kvm, machine, make_disk, open};

fn definition_in(folder: &Path, command_line: &str, image: &Path) -> Definition {
    let disks = vec![attached(image, BlockOptions::default())];
    Definition { state_file: Some(folder.join("guest.vsv")), ..definition(command_line, disks) }
}

/// A folder with a disk of this sort; `None` where no machine can run.
fn place(kind: Kind) -> Option<(TempDir, PathBuf)> {
    let folder = kvm().then(|| tempfile::tempdir().unwrap())?;
    let image = make_disk(folder.path(), "disk", kind, 8 << 20);
    Some((folder, image))
}

/// A machine whose guest fills the disk, or goes on with that.
fn filling(folder: &Path, image: &Path) -> (Machine, Said, Events) {
    machine(definition_in(folder, "do=fill sectors=4096", image))
}

/// How an image is opened to be written to by someone who is no machine.
fn writable() -> ChainOptions {
    ChainOptions { image: OpenOptions { writable: true, ..OpenOptions::default() }, ..ChainOptions::default() }
}

/// Waits until it is off.
#[track_caller]
fn assert_ends(machine: &Machine) {
    assert_eq!(machine.wait(PATIENCE, |state| *state != State::Running), State::Off);
}

/// Saves a guest in the middle of filling its disk. Returns what it said.
fn save_in_the_middle(folder: &Path, image: &Path, after: usize) -> String {
    let (machine, said, events) = filling(folder, image);
    let events = events.subscribe();
    machine.command(Command::Start).unwrap();
    said.wait_for("flushed", after);
    machine.command(Command::Save).unwrap();
    assert_eq!(machine.state(), State::Saved);
    assert_eq!(events.try_iter().last().unwrap().kind, "saved");
    said.text()
}

#[test]
fn a_guest_goes_on_in_another_machine_from_where_it_was_saved() {
    let Some((folder, image)) = place(Kind::Differencing) else { return };
    let folder = folder.path();
    let mut told = save_in_the_middle(folder, &image, 3);
    let size = folder.join("guest.vsv").metadata().unwrap().len();
    assert!(size < 2 << 20, "pages of zeros are in the file: {size} bytes");
    // Several times, with each a new machine.
    for _ in 0..3 {
        let (machine, said, _) = filling(folder, &image);
        assert_eq!(machine.state(), State::Saved);
        assert_eq!(machine.command(Command::Start).unwrap_err().kind(), ErrorKind::Refused);
        machine.command(Command::Restore).unwrap();
        said.wait_for("flushed", 2);
        machine.command(Command::Save).unwrap();
        told += &said.text();
    }
    let (machine, said, _) = filling(folder, &image);
    machine.command(Command::Restore).unwrap();
    assert!(!folder.join("guest.vsv").exists(), "a guest goes on once");
    assert_ends(&machine);
    told += &said.text();
    assert!(told.starts_with("guest: do=fill") && told.ends_with("filled 4096, 0 failed\nguest: done\n"), "{told}");
    assert!(!told.contains("WRONG"), "{told}");
    // Nothing was said twice or never.
    let flushed: Vec<_> = told.lines().filter(|line| line.starts_with("flushed")).map(str::to_owned).collect();
    let wanted: Vec<_> = (0..4096).step_by(64).map(|sector| format!("flushed {}", sector + 8)).collect();
    assert_eq!(flushed, wanted);
}

#[test]
fn a_file_that_is_cut_or_changed_is_refused() {
    let Some((folder, image)) = place(Kind::Dynamic) else { return };
    let folder = folder.path();
    save_in_the_middle(folder, &image, 2);
    let file = folder.join("guest.vsv");
    let sound = fs::read(&file).unwrap();
    let (machine, _, _) = filling(folder, &image);
    let refuse = |bytes: &[u8], what: &str| {
        fs::write(&file, bytes).unwrap();
        let error = machine.command(Command::Restore).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{what}: {error}");
        assert!(error.to_string().contains("guest.vsv: "), "{what}: {error}");
        assert_eq!(machine.state(), State::Saved, "{what}");
    };
    let state_end = 12 + 16 + u64::from_le_bytes(sound[16..24].try_into().unwrap()) as usize;
    // The magic number, the version, a tag, a length, a CRC, the state, a piece of memory, the end.
    for at in [
        0,
        7,
        8,
        12,
        16,
        23,
        24,
        28,
        100,
        state_end - 1,
        state_end,
        state_end + 4,
        state_end + 30,
        sound.len() / 2,
        sound.len() - 1,
    ] {
        let mut changed = sound.clone();
        changed[at] ^= 0x41;
        refuse(&changed, &format!("byte {at} changed"));
    }
    for len in [0, 5, 12, 20, 28, 100, state_end, state_end + 16, sound.len() - 24, sound.len() - 1] {
        refuse(&sound[..len], &format!("cut to {len}"));
    }
    refuse(&[&sound[..], &[0]].concat(), "a byte more");
    fs::write(&file, &sound).unwrap();
    machine.command(Command::Restore).unwrap();
    assert_ends(&machine);
}

#[test]
fn a_disk_that_was_changed_or_exchanged_is_refused() {
    let Some((folder, image)) = place(Kind::Dynamic) else { return };
    let folder = folder.path();
    save_in_the_middle(folder, &image, 2);
    let restore = |image: &Path| {
        let (machine, _, _) = filling(folder, image);
        let error = machine.command(Command::Restore).unwrap_err();
        assert_eq!((error.kind(), machine.state()), (ErrorKind::Refused, State::Saved), "{error}");
        error.to_string()
    };
    let copy = folder.join("copy.vhd");
    fs::copy(&image, &copy).unwrap();
    let other = make_disk(folder, "other", Kind::Dynamic, 8 << 20);
    assert!(restore(&other).contains("other.vhd: is another disk"));
    let disk = open(&image).disk();
    disk.write_at(&[1; 512], 0).unwrap();
    disk.close().unwrap();
    drop(disk);
    assert!(restore(&image).contains("disk.vhd: was changed"));
    // What can't be gone on from can be forgotten.
    let (machine, _, _) = machine(definition_in(folder, "do=hello", &image));
    machine.command(Command::DiscardState).unwrap();
    assert_eq!(machine.state(), State::Off);
    machine.command(Command::Start).unwrap();
    assert_ends(&machine);
}

#[test]
fn a_disk_whose_parent_was_changed_is_refused() {
    let Some((folder, image)) = place(Kind::Differencing) else { return };
    let folder = folder.path();
    save_in_the_middle(folder, &image, 2);
    // As a program would that knows nothing of children.
    let parent = folder.join("disk-base.vhd");
    fs::File::options().write(true).open(&parent).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    let (machine, _, _) = filling(folder, &image);
    let error = machine.command(Command::Restore).unwrap_err();
    assert!(error.kind() == ErrorKind::Refused && error.to_string().contains("was changed"), "{error}");
}

/// Whether a disk has the note that a saved state relies on it.
fn is_noted(image: &Path) -> bool {
    saved_state::of(image, &ChainOptions::default()).unwrap()
}

#[test]
fn nobody_else_writes_to_the_disks_of_a_saved_guest() {
    let Some((folder, image)) = place(Kind::Dynamic) else { return };
    let folder = folder.path();
    save_in_the_middle(folder, &image, 2);
    assert!(is_noted(&image));
    let error = Chain::open(&image, &writable()).unwrap_err();
    assert!(error.kind() == ErrorKind::Refused && error.to_string().contains("saved state"), "{error}");
    let (machine, _, _) = filling(folder, &image);
    machine.command(Command::Restore).unwrap();
    // It is gone before the guest runs, and what the guest makes the disk grow by does not bring it back.
    assert!(!is_noted(&image));
    assert_ends(&machine);
    drop(machine);
    assert!(!is_noted(&image));
}

/// The moments at which a save, a restore or a discard may be cut: the file is durable before the first note is made, and gone
/// only after the last one is. So what is left is the file, with or without the notes, and never a note without the file.
#[test]
fn a_cut_between_file_and_notes_leaves_what_can_be_gone_on_from_or_forgotten() {
    if !kvm() {
        return;
    }
    for noted in [[true, false], [false, true], [false, false]] {
        for goes_on in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            let folder = folder.path();
            let images = ["one", "two"].map(|name| make_disk(folder, name, Kind::Dynamic, 8 << 20));
            let definition = || {
                let disks = images.iter().map(|image| attached(image, BlockOptions::default())).collect();
                Definition { state_file: Some(folder.join("guest.vsv")), ..definition("do=fill disks=2 sectors=512", disks) }
            };
            let (machine, said, _) = machine(definition());
            machine.command(Command::Start).unwrap();
            said.wait_for("flushed", 2);
            machine.command(Command::Save).unwrap();
            drop(machine);
            let open = writable();
            for (image, noted) in images.iter().zip(noted) {
                saved_state::set(image, noted, &open).unwrap();
            }
            if goes_on {
                let (machine, said, _) = support::machine(definition());
                machine.command(Command::Restore).unwrap();
                assert_eq!(machine.wait(PATIENCE, |state| *state != State::Running), State::Off, "{}", said.text());
                assert!(said.text().matches("filled 512, 0 failed").count() == 2 && !said.text().contains("WRONG"));
            } else {
                discard_state(&folder.join("guest.vsv"), &images, &open, false).unwrap();
                let error = discard_state(&folder.join("guest.vsv"), &images, &open, false).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
            }
            assert!(!images.iter().any(|image| is_noted(image)) && !folder.join("guest.vsv").exists());
        }
    }
}

#[test]
fn a_note_is_taken_off_its_own_disks_alone_and_off_others_by_force() {
    let Some((folder, image)) = place(Kind::Dynamic) else { return };
    let folder = folder.path();
    let other = make_disk(folder, "other", Kind::Dynamic, 8 << 20);
    save_in_the_middle(folder, &image, 2);
    let open = writable();
    saved_state::set(&other, true, &open).unwrap();
    let (file, missing) = (folder.join("guest.vsv"), folder.join("missing.vhd"));
    let notes = discard_state(&file, &[image.clone(), other.clone(), missing], &open, false).unwrap();
    let told: Vec<_> = notes.notes.iter().map(ToString::to_string).collect();
    assert!(told.len() == 2 && told[0].contains("other.vhd: is another disk") && told[1].contains("missing.vhd"), "{told:?}");
    assert!(!is_noted(&image) && is_noted(&other) && !file.exists());
    discard_state(&file, std::slice::from_ref(&other), &open, true).unwrap();
    assert!(!is_noted(&other));
}

#[test]
fn a_guest_that_can_not_be_saved_goes_on_and_its_disks_are_free() {
    let Some((folder, image)) = place(Kind::Dynamic) else { return };
    let state_file = Some(folder.path().join("no folder/guest.vsv"));
    let disks = vec![attached(&image, BlockOptions::default())];
    let (machine, said, _) = machine(Definition { state_file, ..definition("do=fill sectors=2048", disks) });
    machine.command(Command::Start).unwrap();
    said.wait_for("flushed", 2);
    assert_eq!(machine.command(Command::Save).unwrap_err().kind(), ErrorKind::NotFound);
    assert_ends(&machine);
    assert!(said.text().contains("filled 2048, 0 failed\n") && !said.text().contains("WRONG"), "{}", said.text());
    assert!(!is_noted(&image));
}

#[test]
fn a_paused_guest_may_be_saved_and_one_without_a_place_may_not() {
    if !kvm() {
        return;
    }
    let (machine, said, _) = machine(definition("do=spin", vec![]));
    machine.command(Command::Start).unwrap();
    said.wait_for("do=spin", 1);
    assert_eq!(machine.command(Command::Save).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(machine.state(), State::Running);
    machine.command(Command::Off).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let place = Some(folder.path().join("guest.vsv"));
    let (machine, said, _) = support::machine(Definition { state_file: place, ..definition("do=echo", vec![]) });
    machine.command(Command::Start).unwrap();
    said.wait_for("do=echo", 1);
    machine.command(Command::Pause).unwrap();
    machine.command(Command::Save).unwrap();
    machine.command(Command::Restore).unwrap();
    machine.input(b"HAL");
    said.wait_for("IBM", 1);
    machine.command(Command::Off).unwrap();
}

/// A section: its tag and its content.
type Section = ([u8; 4], Vec<u8>);

/// The sections of a sound state, of which the first is the machine and the last the end.
fn sections_of(state: &[u8]) -> Vec<Section> {
    let (mut sections, mut rest) = (Vec::new(), &state[12..]);
    while !rest.is_empty() {
        let len = u64::from_le_bytes(rest[4..12].try_into().unwrap()) as usize;
        sections.push((rest[..4].try_into().unwrap(), rest[16..16 + len].to_vec()));
        rest = &rest[16 + len..];
    }
    sections
}

/// A state of these sections, with right checksums and a right count.
fn forged(sections: &[Section]) -> Vec<u8> {
    let mut bytes = Vec::new();
    saved::write_start(&mut bytes).unwrap();
    for (tag, content) in sections {
        let count = (sections.len() as u64 - 1).to_le_bytes().to_vec();
        saved::write_section(&mut bytes, *tag, if tag == b"end " { &count } else { content }).unwrap();
    }
    bytes
}

#[test]
fn memory_that_a_save_does_not_make_is_refused_though_checksums_are_right() {
    let Some((folder, image)) = place(Kind::Dynamic) else { return };
    let folder = folder.path();
    save_in_the_middle(folder, &image, 2);
    let file = folder.join("guest.vsv");
    let sound = sections_of(&fs::read(&file).unwrap());
    let (machine, _, _) = filling(folder, &image);
    let pieces: Vec<_> = (0..sound.len()).filter(|at| sound[*at].0 == *b"memo").collect();
    let first = pieces[0];
    let refuse = |what: &str, change: &dyn Fn(&mut Vec<Section>)| {
        let mut changed = sound.clone();
        change(&mut changed);
        fs::write(&file, forged(&changed)).unwrap();
        let error = machine.command(Command::Restore).unwrap_err();
        assert_eq!((error.kind(), machine.state()), (ErrorKind::Corrupt, State::Saved), "{what}: {error}");
    };
    let set_start = |sections: &mut Vec<Section>, start: u64| {
        sections[first].1[..8].copy_from_slice(&start.to_le_bytes());
    };
    refuse("a piece twice", &|sections| sections.insert(first, sound[first].clone()));
    refuse("a piece between others", &|sections| set_start(sections, 4096));
    refuse("a piece outside", &|sections| set_start(sections, 1 << 40));
    refuse("a piece at the end of numbers", &|sections| set_start(sections, u64::MAX << 22));
    refuse("an empty piece", &|sections| sections.insert(first, (*b"memo", vec![0; 8 + 128])));
    refuse("a piece without a place", &|sections| sections[first].1.truncate(4));
    refuse("a second machine", &|sections| sections.insert(first, sound[0].clone()));
    refuse("no end", &|sections| drop(sections.pop()));
    // As it was it is gone on from.
    fs::write(&file, forged(&sound)).unwrap();
    machine.command(Command::Restore).unwrap();
    assert_ends(&machine);
}

#[test]
fn a_state_that_is_exchanged_while_it_is_looked_at_is_left() {
    let Some((folder, image)) = place(Kind::Dynamic) else { return };
    let folder = folder.path();
    save_in_the_middle(folder, &image, 2);
    let file = folder.join("guest.vsv");
    let head = saved::look(&file).unwrap().unwrap();
    assert!(head.is_of(&head.leaves().collect::<Vec<_>>()) && !head.is_of(&[[7; 16]]) && !head.is_of(&[]));
    fs::write(folder.join("new"), b"precious").unwrap();
    fs::rename(folder.join("new"), &file).unwrap();
    assert_eq!(saved::remove(&file, head.file).unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
}
