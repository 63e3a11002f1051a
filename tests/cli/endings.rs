//! How a run ends: exit statuses, closed pipes, signals, full disks; progress; completions.

use std::fs;
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{done, expect, names_in, noise, text, vhd, vhd_fed, vhd_in};

#[test]
fn help_and_version_succeed_and_nonsense_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    for line in ["--help", "--version", "help convert", "info --help", "-V"] {
        assert!(!expect(vhd(dir, line), 0, line).stdout.is_empty());
    }
    for line in ["", "frobnicate", "info", "info a b", "info --frobnicate a.vhd", "create -q -v a.vhd --size 1M"] {
        let output = expect(vhd(dir, line), 2, line);
        assert!(output.stdout.is_empty() && !output.stderr.is_empty());
    }
    // Every command of the contract that is built, with one line that says what it does.
    let help = done(dir, "--help");
    for command in
        ["create", "info", "map", "check", "convert", "compare", "diff", "read", "write", "mount", "unmount", "completions"]
    {
        assert!(help.lines().any(|line| line.trim_start().starts_with(command)), "{command} is not in the help");
        done(dir, &format!("{command} --help"));
    }
}

#[test]
fn a_closed_pipe_is_success() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create a.vhd --size 64M");
    // Many extents, so that the map is longer than a pipe holds.
    for block in 0..30 {
        for sector in 0..40 {
            let offset = (block << 21) + sector * 1024;
            if sector == 0 || block == 0 {
                expect(vhd_fed(dir, &format!("write a.vhd --offset {offset}"), &[1; 512]), 0, "write");
            }
        }
    }
    for line in ["read a.vhd --offset 0 --length 64M", "convert a.vhd -", "map a.vhd --json", "completions bash"] {
        let mut command = vhd_in(dir);
        command.args(line.split_whitespace()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // One byte is enough, as for `head -c 1`.
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut [0]).unwrap();
        drop(stdout);
        let output = child.wait_with_output().unwrap();
        expect(output, 0, line);
    }
    // Closed before anything is said.
    let mut command = vhd_in(dir);
    command.args(["info", "a.vhd"]).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn output_that_can_not_be_written_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create a.vhd --size 4M");
    for line in ["info a.vhd", "map a.vhd --json", "read a.vhd --offset 0 --length 1M", "convert a.vhd -", "completions zsh"] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = vhd_in(dir).args(line.split_whitespace()).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{line}");
    }
}

/// A `vhd convert` that reads what the caller writes to it, after it took the first bytes.
fn converting(dir: &std::path::Path, line: &str) -> Child {
    let mut command = vhd_in(dir);
    command.args(line.split_whitespace()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let before = names_in(dir);
    child.stdin.as_mut().unwrap().write_all(&noise(1, 4 << 20)).unwrap();
    // The new file has another name until it is whole.
    let started = Instant::now();
    while names_in(dir) == before && started.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn an_interrupted_convert_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    fs::write(dir.join("old.vhd"), b"precious").unwrap();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        for line in ["convert - new.vhd --size 1G", "convert - new.raw", "convert - old.vhd --size 1G --overwrite"] {
            let mut child = converting(dir, line);
            kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
            // No input comes any more, and none ends: someone typed it, and thought better of it.
            let idle = child.stdin.take();
            let output = expect(child.wait_with_output().unwrap(), 2, line);
            assert!(text(&output.stderr).contains("interrupted"), "{}", text(&output.stderr));
            drop(idle);
            assert_eq!(names_in(dir), ["old.vhd"], "{signal} left something of {line}");
        }
    }
    assert_eq!(fs::read(dir.join("old.vhd")).unwrap(), b"precious");
}

#[test]
fn a_killed_convert_leaves_no_file_of_that_name() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let mut child = converting(dir, "convert - new.vhd --size 1G");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!dir.join("new.vhd").exists());
}

#[test]
fn progress_is_told_on_stderr_when_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    fs::write(dir.join("disk.raw"), noise(1, 8 << 20)).unwrap();
    let silent = expect(vhd(dir, "convert disk.raw a.vhd"), 0, "convert");
    assert!(silent.stdout.is_empty() && silent.stderr.is_empty(), "nothing when it is no terminal");
    // It is told ten times a second: the input is slow enough for that.
    let mut child = converting(dir, "convert - b.vhd --size 32M --progress");
    for part in 0..5 {
        std::thread::sleep(Duration::from_millis(120));
        child.stdin.as_mut().unwrap().write_all(&noise(part, 1 << 20)).unwrap();
    }
    drop(child.stdin.take());
    let output = expect(child.wait_with_output().unwrap(), 0, "convert --progress");
    assert!(output.stdout.is_empty());
    assert!(text(&output.stderr).lines().all(|line| line.starts_with("vhd: convert: ")), "{}", text(&output.stderr));
    assert!(!text(&output.stderr).contains('\r'), "lines, not a bar");

    let read = expect(vhd(dir, "convert a.vhd - --progress"), 0, "convert");
    assert!(read.stdout == fs::read(dir.join("disk.raw")).unwrap(), "progress stays out of the data");
}

#[test]
fn completions_for_every_shell() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = done(folder.path(), &format!("completions {shell}"));
        for word in ["convert", "unmount", "parent-dir", "preallocate"] {
            assert!(script.contains(word), "{word} is not in the completions for {shell}");
        }
    }
    expect(vhd(folder.path(), "completions tcsh"), 2, "completions tcsh");
}
