//! Goal: a guest starts, speaks, uses its disks for real, and ends; whatever it does is a state of its machine.
//!
//! Method: the test guest (`vmm/guest`) is built and run on KVM. It drives the disks by itself, with patterns that
//! tell where and when they were written, and says what is wrong; the tests look at what it said, and at the states.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that can't go on fails here")]

mod support;

use vhd_testkit::fixture::Kind;
use vhd_vmm::machine::{Command, Reason, State};
use vhd_vmm::virtio::block::BlockOptions;

use support::{KINDS, PATIENCE, attached, definition, kvm, machine, make_disk, open, run};

#[test]
fn a_guest_starts_speaks_and_turns_off() {
    if kvm() {
        assert_eq!(run(definition("do=hello", vec![])), "guest: do=hello\nguest: done\n");
    }
}

#[test]
fn the_clock_tells_the_year() {
    if kvm() {
        let said = run(definition("do=clock", vec![]));
        let year: u32 = said.split("year ").nth(1).unwrap()[..4].parse().unwrap();
        assert!((2024..2200).contains(&year), "{said}");
    }
}

#[test]
fn what_is_typed_reaches_the_guest() {
    if !kvm() {
        return;
    }
    let (machine, said, _) = machine(definition("do=echo", vec![]));
    machine.command(Command::Start).unwrap();
    said.wait_for("do=echo\n", 1);
    machine.input(b"HAL");
    said.wait_for("IBM", 1);
    machine.input(b"q");
    assert_eq!(machine.wait(PATIENCE, |state| *state == State::Off), State::Off);
}

#[test]
fn patterns_survive_on_each_sort_of_disk_with_one_queue_and_four() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for kind in KINDS {
        for queues in [1, 4] {
            let name = format!("{kind:?}{queues}");
            let disk = make_disk(folder.path(), &name, kind, 8 << 20);
            let options = BlockOptions { queues, ..Default::default() };
            let said = run(definition(&format!("do=verify queues={queues}"), vec![attached(&disk, options)]));
            assert!(said.contains("2 rounds are right"), "{said}");
        }
    }
}

#[test]
fn a_guest_that_asks_for_nonsense_is_answered_or_its_device_fails() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = make_disk(folder.path(), "disk", Kind::Dynamic, 8 << 20);
    for what in ["errors", "break"] {
        run(definition(&format!("do={what}"), vec![attached(&disk, BlockOptions::default())]));
    }
}

#[test]
fn a_guest_that_resets_begins_again() {
    if !kvm() {
        return;
    }
    let (machine, said, events) = machine(definition("do=reset", vec![]));
    let events = events.subscribe();
    machine.command(Command::Start).unwrap();
    said.wait_for("do=reset\n", 3);
    machine.command(Command::Off).unwrap();
    let kinds: Vec<_> = events.try_iter().map(|event| event.kind).collect();
    assert!(kinds.starts_with(&["started", "reset", "reset"]) && kinds.ends_with(&["off"]), "{kinds:?}");
}

#[test]
fn a_guest_that_is_asked_to_shut_down_sees_its_power_button_and_turns_off() {
    if !kvm() {
        return;
    }
    let (machine, said, _) = machine(definition("do=button", vec![]));
    machine.command(Command::Start).unwrap();
    said.wait_for("waiting\n", 1);
    assert!(!said.text().contains("pressed"), "it was pressed by nobody");
    machine.command(Command::Shutdown).unwrap();
    assert_eq!(machine.wait(PATIENCE, |state| *state == State::Off), State::Off);
    assert!(said.text().ends_with("pressed\nguest: done\n"), "{}", said.text());
}

#[test]
fn a_triple_fault_is_a_state() {
    if !kvm() {
        return;
    }
    let (machine, said, _) = machine(definition("do=fault", vec![]));
    machine.command(Command::Start).unwrap();
    let state = machine.wait(PATIENCE, |state| *state != State::Running);
    assert!(matches!(&state, State::Faulted(why) if why.contains("vCPU 0 at 0x")), "{state:?}");
    // It stays so until it is told.
    machine.command(Command::Resume).unwrap_err();
    machine.command(Command::Reset).unwrap();
    said.wait_for("do=fault\n", 2);
    machine.wait(PATIENCE, |state| *state != State::Running);
    machine.command(Command::Off).unwrap();
}

#[test]
fn a_pause_holds_the_guest_in_the_middle_of_its_work() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = make_disk(folder.path(), "disk", Kind::Dynamic, 8 << 20);
    let disks = vec![attached(&disk, BlockOptions::default())];
    let (machine, said, _) = machine(definition("do=fill sectors=1024", disks));
    machine.command(Command::Start).unwrap();
    for _ in 0..3 {
        let times = said.text().matches("flushed").count() + 1;
        said.wait_for("flushed", times.min(16));
        if machine.command(Command::Pause).is_err() {
            break;
        }
        assert_eq!(machine.state(), State::Paused(Reason::Asked));
        let before = said.text();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(said.text(), before, "a guest that stands still spoke");
        machine.command(Command::Resume).unwrap();
    }
    assert_eq!(machine.wait(PATIENCE, |state| *state == State::Off), State::Off);
    assert!(said.text().contains("filled 1024, 0 failed\n") && !said.text().contains("WRONG"), "{}", said.text());
    drop(machine);
    open(&disk).disk().close().unwrap();
}

#[test]
fn several_machines_run_at_once() {
    if kvm() {
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| run(definition("do=hello", vec![])));
            }
        });
    }
}
