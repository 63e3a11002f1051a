//! `vhd mount` and `vhd unmount` as a user meets them.
//!
//! Goal: when `mount` returns the file is there, when `unmount` returns the image is whole and free, and whatever else
//! ends the server (a signal, umount, a crash) loses nothing that was flushed. Method: the built command, with real
//! mounts; what is in the image afterwards is read with `vhd read`.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::wait_until;
use tempfile::TempDir;
use vhd_service::runtime;

const SIZE: u64 = 64 << 20;

/// An image and a folder to mount it on. What is left mounted is taken away at the end.
struct Place {
    folder: TempDir,
}

impl Place {
    /// With a dynamic image, or `None` where nothing can be mounted. In CI it must be possible.
    fn new() -> Option<Self> {
        if !Path::new("/dev/fuse").exists() {
            assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "no /dev/fuse, and CI must test mounts");
            eprintln!("SKIPPED: there is no /dev/fuse here, so NOTHING about vhd mount is tested");
            return None;
        }
        let place = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(place.target()).unwrap();
        success(vhd(&["create", place.image(), "--size", "64M"]));
        Some(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    // With a blank and a comma, which mount tables and option lists write in a way of their own.
    fn image(&self) -> &'static str {
        Box::leak(self.path("an, image.vhd").to_str().unwrap().to_owned().into_boxed_str())
    }

    fn target(&self) -> &'static str {
        Box::leak(self.path("a folder").to_str().unwrap().to_owned().into_boxed_str())
    }

    fn file(&self) -> PathBuf {
        self.path("a folder/disk.raw")
    }

    fn open(&self) -> File {
        OpenOptions::new().read(true).write(true).open(self.file()).unwrap()
    }

    fn foreground(&self) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhd"));
        let server = command.args(["mount", self.image(), self.target(), "--foreground"]).spawn().unwrap();
        wait_until("the mount is there", || self.file().exists());
        server
    }

    /// What the image holds, by another way than the mount.
    fn in_image(&self, offset: u64, length: usize) -> Vec<u8> {
        let (offset, length) = (offset.to_string(), length.to_string());
        success(vhd(&["read", self.image(), "--offset", &offset, "--length", &length])).stdout
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-q", "-l"]).arg(self.path("inside")).stderr(Stdio::null()).status();
        let _ = Command::new("umount").args(["-q", "-l"]).arg(self.target()).stderr(Stdio::null()).status();
    }
}

fn vhd(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhd")).args(arguments).output().unwrap()
}

#[track_caller]
fn success(output: Output) -> Output {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

/// The one line that a failure says; the status is 2.
#[track_caller]
fn failure(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

fn send(process: &Child, signal: Signal) {
    kill(Pid::from_raw(process.id().cast_signed()), signal).unwrap();
}

#[test]
fn the_file_is_there_when_mount_returns_and_the_image_is_whole_when_unmount_does() {
    let Some(place) = Place::new() else { return };
    for round in 0..3 {
        let output = success(vhd(&["mount", place.image(), place.target()]));
        assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
        assert_eq!(fs::metadata(place.file()).unwrap().len(), SIZE);
        place.open().write_all_at(format!("round {round}").as_bytes(), 5 << 20).unwrap();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(table.lines().any(|line| line.contains("fuse.vhd") && line.contains(r"an,\040image.vhd")), "{table}");

        success(vhd(&["unmount", place.target()]));
        assert!(!place.file().exists());
        assert_eq!(place.in_image(5 << 20, 7), format!("round {round}").as_bytes());
    }
}

#[test]
fn json_tells_where_the_file_is_and_who_serves_it() {
    let Some(place) = Place::new() else { return };
    let output = success(vhd(&["mount", "--json", place.image(), place.target()]));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["file"], place.file().to_str().unwrap());
    let pid = document["pid"].as_u64().unwrap();
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(command.contains("mount"));
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/"), "it holds no folder");
    success(vhd(&["unmount", place.target()]));
    // What nobody waits for may stay as a zombie, which has no command.
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    assert_eq!(command, "", "unmount waits for the server");
}

#[test]
fn an_error_of_the_background_process_is_the_error_of_the_command() {
    let Some(place) = Place::new() else { return };
    let missing = place.path("missing.vhd");
    let said = failure(&vhd(&["mount", missing.to_str().unwrap(), place.target()]));
    assert!(said.contains("missing.vhd"), "{said}");
    let said = failure(&vhd(&["mount", place.image(), place.image()]));
    assert!(said.contains("image itself"), "{said}");
    let output = vhd(&["mount", "--json", missing.to_str().unwrap(), place.target()]);
    assert_eq!(output.status.code(), Some(2));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["error"]["kind"], "not-found");

    success(vhd(&["mount", place.image(), place.target()]));
    let said = failure(&vhd(&["mount", place.image(), place.target()]));
    assert!(said.contains("image.vhd"), "an image in use names itself: {said}");
    success(vhd(&["unmount", place.target()]));
}

#[test]
fn options_are_those_of_mount() {
    let Some(place) = Place::new() else { return };
    let said = failure(&vhd(&["mount", place.image(), place.target(), "-o", "frobnicate"]));
    assert!(said.contains("frobnicate"), "{said}");
    for arguments in [&["-o", "ro,noauto,nofail,x-systemd.automount"][..], &["--read-only"], &["--read-only", "-o", "rw"]] {
        success(vhd(&[&["mount", place.image(), place.target()], arguments].concat()));
        assert_eq!(fs::metadata(place.file()).unwrap().mode() & 0o7777, 0o400);
        OpenOptions::new().write(true).open(place.file()).unwrap_err();
        success(vhd(&["unmount", place.target()]));
    }
    // Options may not stand after `--`, so they don't: the command is run again with one more.
    success(vhd(&["mount", "-o", "allow_other,umask=022", "--", place.image(), place.target()]));
    assert_eq!(fs::metadata(place.file()).unwrap().mode() & 0o7777, 0o644);
    success(vhd(&["unmount", place.target()]));
}

#[test]
fn signals_end_a_server_in_the_foreground_and_lose_nothing() {
    let Some(place) = Place::new() else { return };
    for (signal, text) in [(Signal::SIGTERM, b"term"), (Signal::SIGINT, b"int "), (Signal::SIGHUP, b"hup ")] {
        let mut server = place.foreground();
        place.open().write_all_at(text, 123).unwrap();
        send(&server, signal);
        assert!(server.wait().unwrap().success(), "{signal}");
        assert!(!place.file().exists());
        assert_eq!(place.in_image(123, 4), text);
    }
}

#[test]
fn a_signal_ends_a_server_whose_file_is_open_too() {
    let Some(place) = Place::new() else { return };
    let mut server = place.foreground();
    let file = place.open();
    file.write_all_at(b"open", 123).unwrap();
    send(&server, Signal::SIGTERM);
    assert!(server.wait().unwrap().success());
    assert!(!place.file().exists());
    file.write_all_at(b"late", 123).unwrap_err();
    drop(file);
    assert_eq!(place.in_image(123, 4), b"open");
}

#[test]
fn umount_ends_a_server_in_the_foreground() {
    let Some(place) = Place::new() else { return };
    let mut server = place.foreground();
    place.open().write_all_at(b"outside", 0).unwrap();
    assert!(Command::new("umount").arg(place.target()).status().unwrap().success());
    assert!(server.wait().unwrap().success());
    assert_eq!(place.in_image(0, 7), b"outside");
}

#[test]
fn a_server_says_nothing_of_what_programs_try_in_vain() {
    let Some(place) = Place::new() else { return };
    let log = place.path("log");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhd"));
    command.args(["mount", place.image(), place.target(), "--foreground"]).stderr(File::create(&log).unwrap());
    let mut server = command.env_remove("VHD_LOG").spawn().unwrap();
    wait_until("the mount is there", || place.file().exists());
    let script = r#"
import os, select, sys
fd = os.open(sys.argv[1], os.O_RDWR)
p = select.poll(); p.register(fd)
assert p.poll(0) == [(fd, select.POLLIN | select.POLLOUT)]
try: os.setxattr(fd, "user.x", b"1"); raise SystemExit("an attribute was set")
except OSError: pass
assert os.copy_file_range(fd, fd, 4096, 0, 1 << 20) == 4096
"#;
    assert!(Command::new("python3").arg("-c").arg(script).arg(place.file()).status().unwrap().success());
    success(vhd(&["unmount", place.target()]));
    assert!(server.wait().unwrap().success());
    assert_eq!(fs::read_to_string(log).unwrap(), "");
}

#[test]
fn a_mount_outlives_the_terminal_that_it_was_made_in() {
    let Some(place) = Place::new() else { return };
    // The terminal's first process is the command itself: when it ends, whoever belongs to the terminal is hung up on.
    let script = r#"
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0: os.execv(sys.argv[1], sys.argv[1:])
try:
    while os.read(terminal, 1000): pass
except OSError: pass
status = os.waitpid(pid, 0)[1]
os.close(terminal)
sys.exit(status != 0)
"#;
    let mut command = Command::new("python3");
    command.args(["-c", script, env!("CARGO_BIN_EXE_vhd"), "mount", place.image(), place.target()]);
    assert!(command.status().unwrap().success());
    place.open().write_all_at(b"outlived", 0).unwrap();
    success(vhd(&["unmount", place.target()]));
    assert_eq!(place.in_image(0, 8), b"outlived");
}

#[test]
fn a_mount_in_use_stays() {
    let Some(place) = Place::new() else { return };
    success(vhd(&["mount", place.image(), place.target()]));
    let file = place.open();
    let said = failure(&vhd(&["unmount", place.target()]));
    assert!(said.contains("in use"), "{said}");
    file.write_all_at(b"still", 0).unwrap();
    drop(file);
    success(vhd(&["unmount", place.target()]));
    assert_eq!(place.in_image(0, 5), b"still");
}

#[test]
fn what_is_no_mount_of_ours_is_an_error() {
    let Some(place) = Place::new() else { return };
    let said = failure(&vhd(&["unmount", place.target()]));
    assert!(said.contains("nothing is mounted here"), "{said}");
    let said = failure(&vhd(&["unmount", "/proc"]));
    assert!(said.contains("kind proc"), "{said}");
}

#[test]
fn a_crashed_server_leaves_a_mount_that_unmount_clears() {
    let Some(place) = Place::new() else { return };
    let mut server = place.foreground();
    let file = place.open();
    file.write_all_at(b"flushed", 0).unwrap();
    file.sync_all().unwrap();
    let socket = runtime::folder().unwrap().join(format!("mount-{}.ctl", server.id()));
    wait_until("its control socket is there", || socket.exists());
    send(&server, Signal::SIGKILL);
    server.wait().unwrap();
    assert_eq!(fs::metadata(place.file()).unwrap_err().raw_os_error(), Some(nix::libc::ENOTCONN));
    success(vhd(&["unmount", place.target()]));
    assert!(fs::read_dir(place.target()).unwrap().next().is_none());
    assert!(!socket.exists(), "a dead server's control socket is left");
    assert_eq!(place.in_image(0, 7), b"flushed");
}

#[test]
fn a_file_system_lives_on_it_and_gives_space_back() {
    let Some(place) = Place::new() else { return };
    if !Path::new("/dev/loop-control").exists() {
        eprintln!("SKIPPED: there are no loop devices here, so no file system is tried on a mount");
        return;
    }
    let run = |command: &str, arguments: &[&str]| {
        let output = Command::new(command).args(arguments).output().unwrap();
        String::from_utf8(success(output).stdout).unwrap().trim().to_owned()
    };
    success(vhd(&["mount", place.image(), place.target()]));
    let file = place.file();
    let file = file.to_str().unwrap();
    run("mkfs.ext4", &["-q", file]);
    let inside = place.path("inside");
    fs::create_dir(&inside).unwrap();
    let inside_path = inside.to_str().unwrap();
    run("mount", &["-o", "loop", file, inside_path]);
    fs::write(inside.join("large"), vec![0x5a; 24 << 20]).unwrap();
    fs::write(inside.join("kept"), b"kept").unwrap();
    run("sync", &["-f", inside_path]);
    let full = fs::metadata(file).unwrap().blocks();
    fs::remove_file(inside.join("large")).unwrap();
    // Space is free once the journal says so.
    run("sync", &["-f", inside_path]);
    run("fstrim", &[inside_path]);
    wait_until("the space is free", || fs::metadata(file).unwrap().blocks() < full - (16 << 11));
    assert_eq!(fs::read(inside.join("kept")).unwrap(), b"kept");
    run("umount", &[inside_path]);
    run("e2fsck", &["-fn", file]);
    success(vhd(&["unmount", place.target()]));
}

/// Each read that fails is worth a line, which nobody takes.
#[test]
fn a_log_that_nobody_reads_stops_no_mount() {
    let Some(place) = Place::new() else { return };
    let image = place.path("fixed.vhd");
    success(vhd(&["create", image.to_str().unwrap(), "--size", "8M", "--type", "fixed"]));
    let (reader, writer) = std::io::pipe().unwrap();
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    while std::io::Write::write(&mut &writer, &[b'x'; 4096]).is_ok() {}
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty())).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhd"));
    let mut server =
        command.args(["mount", image.to_str().unwrap(), place.target(), "--foreground"]).stderr(writer).spawn().unwrap();
    wait_until("the mount is there", || place.file().exists());
    File::options().write(true).open(&image).unwrap().set_len(4 << 20).unwrap();
    let file = File::open(place.file()).unwrap();
    let began = std::time::Instant::now();
    for at in 0..500 {
        assert!(file.read_at(&mut [0; 512], (5 << 20) + at * 4096).is_err());
    }
    assert_eq!(file.read_at(&mut [0; 512], 0).unwrap(), 512);
    drop(file);
    kill(Pid::from_raw(server.id() as i32), Signal::SIGTERM).unwrap();
    wait_until("the server has ended", || server.try_wait().unwrap().is_some());
    assert!(began.elapsed() < std::time::Duration::from_secs(60), "{:?}", began.elapsed());
    drop(reader);
}
