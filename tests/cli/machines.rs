//! `vhd run` and `vhd vm`: machines as a user has them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{done, project, text};

/// Nothing takes longer, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

pub fn kvm() -> bool {
    let found = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    assert!(found || std::env::var("CI").as_deref() != Ok("true"), "CI must have /dev/kvm");
    found
}

/// The test guest, built into a folder.
pub fn guest(folder: &Path) -> PathBuf {
    let built = folder.join("guest");
    let link = "link-args=-nostartfiles -nostdlib -static -no-pie -Wl,--image-base=0x200000,-e,_start,--build-id=none";
    let status = Command::new("rustc")
        .args(["--edition", "2024", "--crate-type", "bin", "-C", "panic=abort", "-C", "opt-level=2"])
        .args(["-C", "relocation-model=static", "-C", link, "-o"])
        .arg(&built)
        .arg(project().join("vmm/guest/main.rs"))
        .status();
    assert!(status.unwrap().success());
    built
}

/// A machine in the background, killed at the end.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn vhd(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhd"));
    command.current_dir(folder).env("XDG_RUNTIME_DIR", folder).stdin(Stdio::null());
    command
}

pub fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn wait(what: &str, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn undo_keeps_a_run_apart_until_it_is_committed() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    guest(folder);
    for disk in ["a.vhd", "b.vhd"] {
        done(folder, &format!("create {disk} --size 16M"));
    }
    let before = ["a.vhd", "b.vhd"].map(|disk| std::fs::read(folder.join(disk)).unwrap());
    let machine = |at_end: &str| {
        let mut command = vhd(folder);
        command.args(["run", "--kernel", "guest", "--append", "do=fill disks=2 sectors=256", "--memory", "16M"]);
        command.args(["--disk", "a.vhd", "--disk", "b.vhd", "--undo", "--at-end", at_end]);
        let said = said(&mut command);
        assert!(said.matches("filled 256, 0 failed").count() == 2 && !said.contains("WRONG"), "{said}");
    };
    machine("keep");
    let undo_disks = ["a.vud", "b.vud"].map(|disk| folder.join(disk));
    assert!(undo_disks.iter().all(|disk| disk.exists()));
    machine("discard");
    assert!(!undo_disks.iter().any(|disk| disk.exists()));
    for (disk, before) in ["a.vhd", "b.vhd"].iter().zip(&before) {
        assert!(std::fs::read(folder.join(disk)).unwrap() == *before, "{disk} was written to");
    }
    machine("commit");
    assert!(!undo_disks.iter().any(|disk| disk.exists()));
    done(folder, "compare a.vhd b.vhd");
    done(folder, "check a.vhd");
    let bytes = said(vhd(folder).args(["read", "a.vhd", "--offset", "0", "--length", "16"]));
    assert!(!bytes.is_empty() && bytes.bytes().any(|byte| byte != 0), "nothing was committed");
}

#[test]
fn a_running_machine_is_listed_shown_paused_and_ended() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    guest(folder);
    done(folder, "create disk.vhd --size 16M");
    let mut command = vhd(folder);
    command.args(["run", "--kernel", "guest", "--append", "do=spin", "--memory", "16M", "--disk", "disk.vhd", "--name", "one"]);
    let mut machine = Running(command.stdout(Stdio::null()).spawn().unwrap());
    wait("a machine in the list", || said(vhd(folder).args(["vm", "list"])) == "one                  running\n");
    said(vhd(folder).args(["vm", "pause", "one"]));
    let again = vhd(folder).args(["vm", "pause", "one"]).output().unwrap();
    let message = "vhd: one: is paused (as asked), so it can't pause; now it can: resume, reset, off, save\n";
    assert_eq!((again.status.code(), text(&again.stderr).as_str()), (Some(2), message));
    let shown: serde_json::Value = serde_json::from_str(&said(vhd(folder).args(["vm", "show", "one", "--json"]))).unwrap();
    assert_eq!((shown["state"].as_str(), shown["disks"][0]["image"].as_str()), (Some("paused"), Some("disk.vhd")));
    assert_eq!(said(vhd(folder).args(["vm", "snapshot", "one"])), "disk-1.vhd\n");
    said(vhd(folder).args(["vm", "off", "one"]));
    assert!(machine.0.wait().unwrap().success());
    let gone = vhd(folder).args(["vm", "show", "one"]).output().unwrap();
    assert!(text(&gone.stderr).contains("no machine of this name"), "{}", text(&gone.stderr));
    done(folder, "check --chain disk-1.vhd");
}

#[test]
fn a_killed_monitor_loses_nothing_that_the_guest_flushed() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    guest(folder);
    for wait_for in ["flushed 8\n", "flushed 520\n", "flushed 2056\n"] {
        let _ = std::fs::remove_file(folder.join("disk.vhd"));
        done(folder, "create disk.vhd --size 64M");
        let log = folder.join("log");
        let mut command = vhd(folder);
        command.args(["run", "--kernel", "guest", "--append", "do=fill sectors=65536", "--memory", "16M", "--disk", "disk.vhd"]);
        let mut machine = Running(command.stdout(std::fs::File::create(&log).unwrap()).spawn().unwrap());
        wait("a flush", || std::fs::read_to_string(&log).unwrap().contains(wait_for));
        machine.0.kill().unwrap();
        machine.0.wait().unwrap();
        let told = std::fs::read_to_string(&log).unwrap();
        let flushed: u64 = told.lines().rev().find_map(|line| line.strip_prefix("flushed ")?.parse().ok()).unwrap_or(8);
        done(folder, "check disk.vhd");
        let bytes = vhd(folder).args(["read", "disk.vhd", "--offset", "0", "--length", &(flushed * 512).to_string()]).output();
        for (sector, found) in bytes.unwrap().stdout.chunks(512 * 8).enumerate() {
            assert!(found[..8] == pattern(sector as u64 * 8), "sector {} was flushed and is lost", sector * 8);
        }
    }
}

/// The first word of what the guest writes at a sector in round 0: see `vmm/guest/main.rs`.
fn pattern(sector: u64) -> [u8; 8] {
    let mut state = sector.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xABCD;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    let mut bytes = state.to_be_bytes();
    bytes.reverse();
    bytes
}

#[test]
fn a_saved_machine_goes_on_with_the_next_run() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    guest(folder);
    done(folder, "create disk.vhd --size 64M");
    let machine = || {
        let mut command = vhd(folder);
        command.args(["run", "--kernel", "guest", "--append", "do=fill sectors=16384", "--memory", "16M", "--disk", "disk.vhd"]);
        command
    };
    let log = folder.join("log");
    let mut first = Running(machine().stdout(std::fs::File::create(&log).unwrap()).spawn().unwrap());
    wait("a flush", || std::fs::read_to_string(&log).unwrap().contains("flushed 72"));
    said(vhd(folder).args(["vm", "save", "disk"]));
    assert!(first.0.wait().unwrap().success());
    assert!(folder.join("disk.vsv").exists());
    let told = std::fs::read_to_string(&log).unwrap() + &said(&mut machine());
    assert!(told.ends_with("filled 16384, 0 failed\nguest: done\n") && !told.contains("WRONG"), "{told}");
    assert_eq!(told.matches("guest: do=").count(), 1, "it began anew: {told}");
    assert!(!folder.join("disk.vsv").exists());
}

#[test]
fn what_can_not_be_run_is_said_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("kernel"), b"no kernel").unwrap();
    done(folder, "create disk.vhd --size 16M");
    for (arguments, expected) in [
        (vec!["--kernel", "kernel"], "kernel: is neither an ELF file nor a bzImage"),
        (vec!["--kernel", "missing"], "missing: No such file"),
        (vec!["--kernel", "kernel", "--cpus", "9"], "9 CPUs, and a machine has 1 to 8"),
        (vec!["--kernel", "kernel", "--memory", "1M"], "it must be 2 MiB or more"),
        (vec!["--kernel", "kernel", "--disk", "nothing.vhd"], "nothing.vhd: can't be opened"),
        (vec!["--kernel", "kernel", "--name", "a/b"], "a machine's name has"),
    ] {
        let output = vhd(folder).arg("run").args(&arguments).output().unwrap();
        let error = text(&output.stderr);
        assert!(
            output.status.code() == Some(2) && error.contains(expected) && error.lines().count() == 1,
            "{arguments:?}: {error}"
        );
    }
}
