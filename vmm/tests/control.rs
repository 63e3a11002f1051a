//! Goal: a machine does what it is told over its socket, and no more: each command in each state, snapshots of all disks
//! at one instant, events, and scripts that are told of them.
//!
//! Method: the test guest on KVM, and clients of the control socket as `vhd vm` is one.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that can't go on fails here")]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use serde_json::Value;
use vhd_core::chain::{Chain, ChainOptions};
use vhd_core::storage::FileStorage;
use vhd_core::{Disk, Error, ErrorKind};
use vhd_service::control::{Control, Request, call};
use vhd_service::events::{Event, Events};
use vhd_testkit::fixture::Kind;
use vhd_vmm::machine::{Command, Definition, Machine, SharedConsole, State, run_at_events};
use vhd_vmm::virtio::block::BlockOptions;

use support::{PATIENCE, Said, attached, definition, kvm, machine, make_disk};

fn ask(socket: &Path, command: &str) -> Result<Value, Error> {
    call(socket, &Request::new(command))
}

/// A machine brought to the state of this word, its socket, and what happens to it from then on.
fn in_state(folder: &Path, state: &str) -> (Machine, Control, Receiver<Event>) {
    let what = if state == "faulted" { "do=fault" } else { "do=spin" };
    let file = folder.join("guest.vsv");
    let _ = std::fs::remove_file(&file);
    let (machine, said, events) = machine(Definition { state_file: Some(file), ..definition(what, vec![]) });
    let control = Control::bind(&folder.join("socket"), Arc::new(machine.clone())).unwrap();
    if state != "off" {
        ask(control.path(), "start").unwrap();
        said.wait_for(what, 1);
    }
    if let Some(command) = [("paused", "pause"), ("saved", "save")].iter().find(|(word, _)| *word == state) {
        ask(control.path(), command.1).unwrap();
    }
    let reached = machine.wait(PATIENCE, |now| now.name() == state);
    assert_eq!(reached.name(), state);
    (machine, control, events.subscribe())
}

/// What Virtual Server 2005 allows: in this state this command leads to that state, with that event. Everything else
/// is refused.
const TRANSITIONS: [(&str, &str, &str, &str); 14] = [
    ("off", "start", "running", "started"),
    ("running", "pause", "paused", "paused"),
    ("running", "reset", "running", "reset"),
    ("running", "off", "off", "off"),
    ("running", "save", "saved", "saved"),
    // A guest may take its time, or not listen: this one does not.
    ("running", "shutdown", "running", "shutdown"),
    ("paused", "resume", "running", "resumed"),
    ("paused", "reset", "running", "reset"),
    ("paused", "off", "off", "off"),
    ("paused", "save", "saved", "saved"),
    ("saved", "restore", "running", "restored"),
    ("saved", "discard-state", "off", "discarded"),
    ("faulted", "reset", "running", "reset"),
    ("faulted", "off", "off", "off"),
];

#[test]
fn every_command_in_every_state_does_what_the_table_says() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for state in ["off", "running", "paused", "saved", "faulted"] {
        let allowed: Vec<_> =
            TRANSITIONS.iter().filter(|transition| transition.0 == state).map(|transition| transition.1).collect();
        for command in Command::ALL.map(Command::name) {
            let (machine, control, events) = in_state(folder.path(), state);
            let answer = ask(control.path(), command);
            if let Some((_, _, becomes, event)) = TRANSITIONS.iter().find(|(from, with, ..)| (*from, *with) == (state, command)) {
                answer.unwrap();
                // A guest that faults does so again after a reset.
                let reached = machine.wait(PATIENCE, |now| now.name() == *becomes || state == "faulted");
                assert!(reached.name() == *becomes || state == "faulted", "{state} {command}: {reached}");
                assert_eq!(events.recv_timeout(PATIENCE).unwrap().kind, *event, "{state} {command}");
                continue;
            }
            let error = answer.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused, "{state} {command}: {error}");
            let told = error.message();
            let can: Vec<_> = told.split("now it can: ").nth(1).unwrap().split(", ").collect();
            assert!(can.len() == allowed.len(), "{told}");
            assert!(allowed.iter().all(|command| can.contains(command)), "{told}");
            assert_eq!(machine.state().name(), state, "{command} was refused and changed something");
            assert!(events.try_recv().is_err(), "{state} {command}: it was refused, and an event told of it");
        }
    }
}

#[test]
fn what_is_not_understood_is_answered() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (_machine, control, _) = in_state(folder.path(), "off");
    let error = ask(control.path(), "fly").unwrap_err();
    assert!(error.message().contains("fly") && error.message().contains("discard-state"), "{error}");
    let shown = ask(control.path(), "show").unwrap();
    assert_eq!((shown["name"].as_str(), shown["state"].as_str()), (Some("tested"), Some("off")));
}

/// The first number on a disk.
fn count_of(image: &Path) -> u64 {
    let mut bytes = [0; 8];
    Disk::new(Chain::open(image, &ChainOptions::default()).unwrap()).read_at(&mut bytes, 0).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn a_snapshot_of_two_disks_is_of_one_instant() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let images = ["first", "second"].map(|name| make_disk(folder.path(), name, Kind::Dynamic, 8 << 20));
    let disks = images.iter().map(|image| attached(image, BlockOptions::default())).collect();
    let (machine, said, _) = machine(definition("do=pair", disks));
    machine.command(Command::Start).unwrap();
    for round in 1..=6_usize {
        let said_before = said.text().matches("count").count();
        said.wait_for("count", said_before + 2);
        let leaves = machine.snapshot().unwrap();
        assert_eq!(leaves[1], folder.path().join(format!("second-{round}.vhd")));
    }
    machine.command(Command::Off).unwrap();
    drop(machine);
    assert!(!said.text().contains("WRONG"), "{}", said.text());
    let mut last = 0;
    for round in 0..6 {
        let name = |disk: &str| if round == 0 { format!("{disk}.vhd") } else { format!("{disk}-{round}.vhd") };
        let [first, second] = ["first", "second"].map(|disk| count_of(&folder.path().join(name(disk))));
        // The guest writes the first one first, and waits for each.
        assert!(first == second || first == second + 1, "snapshot {round}: {first} and {second}");
        assert!(first > last, "snapshot {round} holds nothing new");
        last = first;
    }
}

/// A script that notes each event in a file, one line each.
fn script(folder: &Path) -> (PathBuf, PathBuf) {
    let (script, log) = (folder.join("hook"), folder.join("log"));
    std::fs::write(&script, format!("#!/bin/sh\necho \"$1 $2 $#\" >> {}\n", log.display())).unwrap();
    std::process::Command::new("chmod").arg("755").arg(&script).status().unwrap();
    (script, log)
}

#[test]
fn a_script_is_told_of_each_event() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (script, log) = script(folder.path());
    let disk = make_disk(folder.path(), "disk", Kind::Dynamic, 8 << 20);
    let state_file = Some(folder.path().join("guest.vsv"));
    let disks = vec![attached(&disk, BlockOptions::default())];
    let (machine, said, events) = machine(Definition { state_file, ..definition("do=spin", disks) });
    let hook = run_at_events(&script, &events).unwrap();
    machine.command(Command::Start).unwrap();
    said.wait_for("do=spin", 1);
    for command in [Command::Pause, Command::Resume, Command::Shutdown] {
        machine.command(command).unwrap();
    }
    machine.snapshot().unwrap();
    for command in [Command::Reset, Command::Save, Command::Restore, Command::Save, Command::DiscardState] {
        machine.command(command).unwrap();
    }
    machine.command(Command::Start).unwrap();
    machine.command(Command::Off).unwrap();
    assert_eq!(machine.state(), State::Off);
    drop((machine, events));
    hook.join().unwrap();
    let told = std::fs::read_to_string(&log).unwrap();
    let wanted = [
        "started",
        "paused",
        "resumed",
        "shutdown",
        "snapshot",
        "reset",
        "saved",
        "restored",
        "saved",
        "discarded",
        "started",
        "off",
    ];
    assert_eq!(told, wanted.map(|event| format!("tested {event} 3\n")).concat());
}

#[test]
fn a_script_is_told_of_a_crash_and_of_little_space() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (script, log) = script(folder.path());
    let disk = make_disk(folder.path(), "disk", Kind::Dynamic, 8 << 20);
    // Low, and far from the quarter at which the machine is paused.
    let low_space = FileStorage::open(&disk, false).unwrap().room().unwrap().free / 2 * 3;
    let disks = vec![attached(&disk, BlockOptions::default())];
    let (said, events) = (Said::default(), Events::default());
    // The script listens before there is anything to tell.
    let hook = run_at_events(&script, &events).unwrap();
    let definition = Definition { low_space, ..definition("do=fault", disks) };
    let machine = Machine::new(definition, SharedConsole::new(said), events.clone()).unwrap();
    machine.command(Command::Start).unwrap();
    machine.wait(PATIENCE, |state| matches!(state, State::Faulted(_)));
    let begin = Instant::now();
    while !std::fs::read_to_string(&log).unwrap_or_default().contains("low-space") {
        assert!(begin.elapsed() < PATIENCE, "nothing was told of little space");
        std::thread::sleep(Duration::from_millis(20));
    }
    machine.command(Command::Off).unwrap();
    drop((machine, events));
    hook.join().unwrap();
    let told = std::fs::read_to_string(&log).unwrap();
    for event in ["started", "crash", "off", "low-space"] {
        assert!(told.contains(&format!("tested {event} 3\n")), "{event}: {told}");
    }
}
