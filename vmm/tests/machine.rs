//! Goal: a guest starts, speaks, uses its disks for real, and ends; whatever it does is a state of its machine.
//!
//! Method: the test guest (`vmm/guest`) is built and run on KVM. It drives the disks by itself, with patterns that
//! tell where and when they were written, and says what is wrong; the tests look at what it said, and at the states.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that can't go on fails here")]

mod support;

use std::io::{BufRead, BufReader, PipeWriter, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use vhd_service::events::Events;
use vhd_testkit::fixture::Kind;
use vhd_vmm::machine::{Command, Definition, Machine, Reason, SharedConsole, State};
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
    for (what, read_only) in [("errors", false), ("errors read_only=1", true), ("break", false)] {
        let options = BlockOptions { read_only, ..Default::default() };
        run(definition(&format!("do={what}"), vec![attached(&disk, options)]));
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

/// What a kernel can't go on from, its vCPU, and what is told of it.
#[test]
fn a_kernel_that_can_not_go_on_is_faulted_with_the_reason() {
    if !kvm() {
        return;
    }
    for (how, why) in [(1, "an instruction that KVM can't emulate: dd 00"), (2, "triple fault"), (3, "triple fault")] {
        let definition = definition(&format!("do=fault how={how}"), vec![]);
        let (machine, _, events) = machine(Definition { cpus: 2, ..definition });
        let events = events.subscribe();
        machine.command(Command::Start).unwrap();
        let state = machine.wait(PATIENCE, |state| *state != State::Running);
        let State::Faulted(told) = &state else { panic!("{how}: {state:?}") };
        assert!(told.starts_with("vCPU 1 at 0x") && told.contains(why), "{how}: {told}");
        let crash = events.try_iter().find(|event| event.kind == "crash");
        assert!(crash.is_some_and(|event| event.message.contains(told)));
        machine.command(Command::Off).unwrap();
    }
}

/// Bytes of the pipe that stands for a terminal.
const PIPE: usize = 4096;

/// A pipe, and how many bytes it has taken.
struct Counted(PipeWriter, Arc<AtomicUsize>);

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let len = self.0.write(bytes)?;
        self.1.fetch_add(len, Ordering::SeqCst);
        Ok(len)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_console_that_takes_nothing_stops_the_guest_and_not_the_machine() {
    if !kvm() {
        return;
    }
    let (reader, writer) = std::io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(PIPE as i32)).unwrap();
    let said = Arc::<AtomicUsize>::default();
    let console = SharedConsole::new(Counted(writer, Arc::clone(&said)));
    let machine = Machine::new(definition("do=flood", vec![]), console, Events::default()).unwrap();
    machine.command(Command::Start).unwrap();
    let begin = Instant::now();
    while said.load(Ordering::SeqCst) < PIPE {
        assert!(begin.elapsed() < PATIENCE, "the guest does not fill a pipe");
        std::thread::sleep(Duration::from_millis(5));
    }
    for _ in 0..3 {
        machine.input(b"typed");
        machine.command(Command::Pause).unwrap();
        machine.command(Command::Resume).unwrap();
    }
    machine.command(Command::Pause).unwrap();
    // What was said is there, in order and whole: a pause loses nothing.
    machine.command(Command::Resume).unwrap();
    let mut lines = BufReader::new(reader).lines().skip(1);
    for _ in 0..500 {
        let line = lines.next().unwrap().unwrap();
        assert_eq!(line, "a line that says nothing, again and again, for as long as somebody listens");
    }
    drop(lines);
    machine.command(Command::Off).unwrap();
}

#[test]
fn kicks_without_requests_and_broken_rings_harm_nothing() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let disk = make_disk(folder.path(), "disk", Kind::Dynamic, 8 << 20);
    let said = run(definition("do=storm", vec![attached(&disk, BlockOptions::default())]));
    assert!(said.contains("the storm is over"), "{said}");
    let said = run(definition("do=break times=40", vec![attached(&disk, BlockOptions::default())]));
    assert!(said.contains("the device failed and works again"), "{said}");
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
        std::thread::sleep(Duration::from_millis(50));
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
