//! Goal: machines keep to their limits as a user's processes: the sandbox is around all threads and in nobody's way, a
//! kill at any moment loses nothing that a guest flushed, and a full volume stops a guest before it harms it.
//!
//! Method: `vhd run` with the test guest (`vmm/guest`). What threads may do is read from the kernel; disks are read and checked after
//! each kill. `VHD_KILLS` sets how often machines are killed (6 by default), `VHD_KILL_SEED` from which seed.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use vhd_testkit::machine;
use vhd_testkit::volume::Volume;

use super::machines::{Running, folder_with_guest, pattern, put_guest, said, shown, vhd};
use crate::support::{done, noise, number, text, wait_until};

/// A machine with the test guest in the background, and what it has said.
struct Machine(Running, tempfile::NamedTempFile);

impl Machine {
    fn start(folder: &Path, work: &str, options: &[&str]) -> Self {
        let mut command = vhd(folder);
        command.args(["run", "--kernel", "guest", "--memory", "16M", "--append", work]).args(options);
        // Not in the folder, whose volume may be full.
        let log = tempfile::NamedTempFile::new().unwrap();
        command.stdout(log.reopen().unwrap());
        Self(Running(command.spawn().unwrap()), log)
    }

    fn log(&self) -> String {
        text(&fs::read(self.1.path()).unwrap())
    }

    fn wait_for(&self, what: &str, times: usize) {
        wait_until(what, || self.log().matches(what).count() >= times);
    }

    /// Waits for its end, which is a good one. Returns what it said.
    fn end(mut self) -> String {
        assert!(self.0.0.wait().unwrap().success());
        self.log()
    }
}

/// Each thread's name, and what the kernel says of its fences: mode of seccomp, number of its filters.
fn fences(process: &Child) -> BTreeMap<String, (u32, u32)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.id())).unwrap();
    let threads = tasks.flatten().filter_map(|task| {
        // It may end meanwhile.
        let name = fs::read_to_string(task.path().join("comm")).ok()?.trim().to_owned();
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let number = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u32>().ok());
        Some((name, (number("Seccomp:")?, number("Seccomp_filters:")?)))
    });
    threads.collect()
}

#[test]
fn every_thread_of_a_machine_is_fenced_in() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    for (sandboxed, disk) in [(true, "one.vhd"), (false, "other.vhd")] {
        done(folder, &format!("create {disk} --size 16M"));
        let mut options = vec!["--disk", disk, "--name", "fenced", "--cpus", "2", "--queues", "2"];
        options.extend((!sandboxed).then_some("--no-sandbox"));
        let machine = Machine::start(folder, "do=fill sectors=16 stay=1", &options);
        // Then its disk has been written to, and has its thread that flushes.
        machine.wait_for("filled 16, 0 failed", 1);
        let fences = fences(&machine.0.0);
        let kinds = ["vcpu 0", "vcpu 1", "disk 0 queue 0", "disk 0 queue 1", "machine", "vhd-control", "vhd-space", "vhd-flush"];
        for thread in kinds {
            assert!(fences.contains_key(thread), "no thread {thread:?}: {fences:?}");
        }
        let control = fences["machine"].1;
        // One is the kernel's own, with the filters of whoever made it.
        for (thread, (mode, filters)) in fences.iter().filter(|(thread, _)| !thread.starts_with("kvm-")) {
            assert_eq!(*mode, if sandboxed { 2 } else { 0 }, "{thread}: {fences:?}");
            // The threads that the guest speaks to have filters of their own beside those of all.
            let own = thread.starts_with("vcpu") || thread.starts_with("disk") || thread == "vhd-flush";
            assert!(!sandboxed || own == (*filters > control), "{thread}: {fences:?}");
        }
    }
}

#[test]
fn the_sandbox_is_in_nobodys_way() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    let elsewhere = tempfile::tempdir().unwrap();
    // The script writes where the machine may not.
    let told = elsewhere.path().join("told");
    let script = elsewhere.path().join("script");
    fs::write(&script, format!("#!/bin/sh\necho \"$1 $2\" >> {}\n", told.display())).unwrap();
    assert!(Command::new("chmod").arg("755").arg(&script).status().unwrap().success());
    done(folder, "create base.vhd --size 16M");
    done(folder, "create disk.vhd --parent base.vhd");
    let base = fs::read(folder.join("base.vhd")).unwrap();
    let script = script.to_str().unwrap();
    let options = ["--disk", "disk.vhd", "--name", "free", "--on-event", script];
    let machine = Machine::start(folder, "do=fill sectors=64 stay=1", &options);
    machine.wait_for("filled 64, 0 failed", 1);
    let leaf = said(vhd(folder).args(["vm", "snapshot", "free"]));
    assert_eq!(leaf, "disk-1.vhd\n");
    for command in ["pause", "resume", "reset"] {
        said(vhd(folder).args(["vm", command, "free"]));
    }
    machine.wait_for("filled 64, 0 failed", 2);
    said(vhd(folder).args(["vm", "off", "free"]));
    machine.end();
    let told = fs::read_to_string(&told).unwrap();
    assert_eq!(told, "free started\nfree snapshot\nfree paused\nfree resumed\nfree reset\nfree off\n");
    assert!(fs::read(folder.join("base.vhd")).unwrap() == base, "the parent was written to");
}

#[test]
fn a_machine_that_is_killed_at_any_moment_loses_nothing_that_its_guest_flushed() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    let (kills, seed) = (number("VHD_KILLS", 6), number("VHD_KILL_SEED", 1));
    done(folder, "create base.vhd --size 64M");
    let base = fs::read(folder.join("base.vhd")).unwrap();
    let mut lost_work = 0;
    for kill in seed..seed + kills {
        let _ = fs::remove_file(folder.join("disk.vhd"));
        done(folder, ["create disk.vhd --size 64M", "create disk.vhd --parent base.vhd"][(kill % 2) as usize]);
        let mut machine = Machine::start(folder, "do=fill sectors=65536", &["--disk", "disk.vhd"]);
        machine.wait_for("flushed 8\n", 1);
        // Any moment will do, so this needs no agreement with the machine.
        let random = noise(kill, 4).iter().fold(0_u64, |all, byte| all << 8 | u64::from(*byte));
        std::thread::sleep(Duration::from_micros(random % 300_000));
        machine.0.0.kill().unwrap();
        machine.0.0.wait().unwrap();
        let told = machine.log();
        let whole = &told[..told.rfind('\n').unwrap()];
        let flushed: u64 = whole.lines().rev().find_map(|line| line.strip_prefix("flushed ")?.parse().ok()).unwrap();
        lost_work += u64::from(!told.contains("filled"));
        done(folder, "check --chain disk.vhd");
        let length = (flushed * 512).to_string();
        let read = vhd(folder).args(["read", "disk.vhd", "--offset", "0", "--length", &length]).output().unwrap();
        assert_eq!(read.stdout.len() as u64, flushed * 512, "{}", text(&read.stderr));
        for (piece, found) in read.stdout.chunks(512 * 8).enumerate() {
            assert!(found[..8] == pattern(piece as u64 * 8), "kill {kill}: sector {} was flushed and is lost", piece * 8);
        }
        assert!(fs::read(folder.join("base.vhd")).unwrap() == base, "the parent was written to");
    }
    assert!(lost_work > 0, "no machine was killed at its work");
}

/// A volume with the test guest and a disk that it does not have enough room for.
fn almost_full() -> Option<Volume> {
    let volume = machine::kvm().then(|| Volume::new("24M"))??;
    put_guest(volume.path());
    done(volume.path(), "create disk.vhd --size 64M");
    fs::write(volume.path().join("filling"), vec![1; 16 << 20]).unwrap();
    Some(volume)
}

#[test]
fn a_machine_on_a_full_volume_pauses_says_why_and_goes_on_when_there_is_room() {
    let Some(volume) = almost_full() else { return };
    let folder = volume.path();
    let options = ["--disk", "disk.vhd", "--name", "full", "--low-space", "0"];
    let machine = Machine::start(folder, "do=fill sectors=24576", &options);
    let shown = || shown(folder, "full");
    machine.wait_for("flushed 8\n", 1);
    wait_until("a pause", || shown()["state"] == "paused");
    let reason = shown()["reason"].as_str().unwrap().to_owned();
    assert!(reason.starts_with("no space: ") && reason.contains("disk.vhd"), "{reason}");
    fs::remove_file(folder.join("filling")).unwrap();
    let told = machine.end();
    assert!(told.ends_with("filled 24576, 0 failed\nguest: done\n") && !told.contains("WRONG"), "{told}");
    done(folder, "check disk.vhd");
}

#[test]
fn a_guest_that_is_to_be_told_of_a_full_volume_sees_errors() {
    let Some(volume) = almost_full() else { return };
    let folder = volume.path();
    let options = ["--disk", "disk.vhd", "--name", "told", "--low-space", "0", "--on-no-space", "report"];
    let told = Machine::start(folder, "do=fill sectors=24576", &options).end();
    assert!(told.contains("filled 24576, ") && !told.contains(", 0 failed"), "{told}");
    fs::remove_file(folder.join("filling")).unwrap();
    done(folder, "check disk.vhd");
}
