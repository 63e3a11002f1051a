//! Goal: a machine does what it is told over its socket, and no more: each command in each state, snapshots of all disks
//! at one instant, events, and scripts that are told of them.
//!
//! Method: the test guest on KVM, and clients of the control socket as `vhd vm` is one.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that can't go on fails here")]

mod support;

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use vhd_core::chain::{Chain, ChainOptions};
use vhd_core::{Disk, Error, ErrorKind};
use vhd_service::control::{Control, Request, call};
use vhd_testkit::fixture::Kind;
use vhd_vmm::machine::{Command, Machine, State, run_at_events};
use vhd_vmm::virtio::block::BlockOptions;

use support::{PATIENCE, attached, definition, kvm, machine, make_disk};

fn ask(socket: &Path, command: &str) -> Result<Value, Error> {
    call(socket, &Request::new(command))
}

/// A machine brought to the state of this word, with its socket.
fn in_state(folder: &Path, state: &str) -> (Machine, Control) {
    let what = if state == "faulted" { "do=fault" } else { "do=spin" };
    let (machine, _, _) = machine(definition(what, vec![]));
    let control = Control::bind(&folder.join("socket"), Arc::new(machine.clone())).unwrap();
    if state != "off" {
        ask(control.path(), "start").unwrap();
    }
    if state == "paused" {
        ask(control.path(), "pause").unwrap();
    }
    let reached = machine.wait(PATIENCE, |now| now.name() == state);
    assert_eq!(reached.name(), state);
    (machine, control)
}

#[test]
fn every_command_in_every_state_does_what_the_table_says() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // What Virtual Server 2005 allows; an empty word is a refusal.
    let table = [
        ("off", [("start", "running"), ("pause", ""), ("resume", ""), ("reset", ""), ("off", "")]),
        ("running", [("start", ""), ("pause", "paused"), ("resume", ""), ("reset", "running"), ("off", "off")]),
        ("paused", [("start", ""), ("pause", ""), ("resume", "running"), ("reset", "running"), ("off", "off")]),
        ("faulted", [("start", ""), ("pause", ""), ("resume", ""), ("reset", "running"), ("off", "off")]),
    ];
    for (state, row) in table {
        for (command, becomes) in row {
            let (machine, control) = in_state(folder.path(), state);
            let answer = ask(control.path(), command);
            if becomes.is_empty() {
                let error = answer.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Refused, "{state} {command}");
                assert!(error.message().contains("now it can:"), "{error}");
                assert_eq!(machine.state().name(), state);
            } else {
                answer.unwrap();
                let reached = machine.wait(PATIENCE, |now| now.name() == becomes);
                // A guest that faults does so again after a reset.
                assert!(reached.name() == becomes || state == "faulted", "{state} {command}: {reached}");
            }
        }
        for command in ["restore", "discard-state"] {
            let (_machine, control) = in_state(folder.path(), state);
            assert_eq!(ask(control.path(), command).unwrap_err().kind(), ErrorKind::Refused);
        }
    }
}

#[test]
fn what_is_not_understood_is_answered() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (_machine, control) = in_state(folder.path(), "off");
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

#[test]
fn a_script_is_told_of_each_event() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (script, log) = (folder.path().join("hook"), folder.path().join("log"));
    std::fs::write(&script, format!("#!/bin/sh\necho \"$1 $2 $#\" >> {}\n", log.display())).unwrap();
    std::process::Command::new("chmod").arg("755").arg(&script).status().unwrap();
    let (machine, said, events) = machine(definition("do=spin", vec![]));
    let hook = run_at_events(&script, &events).unwrap();
    machine.command(Command::Start).unwrap();
    said.wait_for("do=spin", 1);
    machine.command(Command::Pause).unwrap();
    machine.command(Command::Resume).unwrap();
    machine.command(Command::Reset).unwrap();
    machine.command(Command::Off).unwrap();
    assert_eq!(machine.state(), State::Off);
    drop((machine, events));
    hook.join().unwrap();
    let told = std::fs::read_to_string(&log).unwrap();
    let wanted = ["started", "paused", "resumed", "reset", "off"].map(|event| format!("tested {event} 3\n"));
    assert_eq!(told, wanted.concat());
}
