//! Saved states: what is removed, replaced and gone on from is one of this machine's, and only its user can read it.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use super::machines::{Running, folder_with_guest, refused, run_disk, said, save_after, shown, vhd};
use crate::support::{done, json, text, wait_until};

/// Saves the guest of `disk.vhd` in the middle of its work, with these options more.
fn save_disk(folder: &Path, more: &[&str]) {
    let mut command = run_disk(folder, "do=fill sectors=16384");
    save_after(command.args(more), folder, "disk", "flushed", 2, &mut String::new());
}

/// Whether an image has the note that a saved state relies on it.
fn is_noted(folder: &Path, image: &str) -> bool {
    json(folder, &format!("info {image}"), 0)["saved_state"].as_bool().unwrap()
}

fn discard(folder: &Path, more: &[&str]) -> Command {
    let mut command = vhd(folder);
    command.args(["vm", "discard-state", "disk", "--disk", "disk.vhd"]).args(more);
    command
}

#[test]
fn only_a_saved_state_of_this_machine_is_removed() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    for disk in ["disk.vhd", "other.vhd"] {
        done(folder, &format!("create {disk} --size 64M"));
    }
    save_disk(folder, &[]);
    let state = fs::read(folder.join("disk.vsv")).unwrap();
    // Neither a user's file, nor one that looks like it, nor one that is cut, nor another machine's.
    let forged = [b"VHDSAVED\x02\0\0\0".as_slice(), b"stat", &[0; 12]].concat();
    let mut damaged = state.clone();
    damaged[100] ^= 1;
    for content in [b"precious".as_slice(), b"", b"VHDSAVED", &forged, &damaged, &state[..2000]] {
        fs::write(folder.join("file"), content).unwrap();
        let error = refused(&mut discard(folder, &["--state", "file"]));
        assert!(error.starts_with("vhd: file: "), "{error}");
        assert!(fs::read(folder.join("file")).unwrap() == content && is_noted(folder, "disk.vhd"));
    }
    let mut other = vhd(folder);
    other.args(["vm", "discard-state", "other", "--disk", "other.vhd", "--state", "disk.vsv"]);
    assert!(refused(&mut other).contains("disk.vsv: is the saved state of another machine"));
    assert!(fs::read(folder.join("disk.vsv")).unwrap() == state && is_noted(folder, "disk.vhd"));
    // Nor is one begun over it, or gone on from.
    for run in [&["--state", "file"][..], &["--state", "file", "--discard-state"]] {
        let error = refused(run_disk(folder, "do=hello").args(run));
        assert!(error.starts_with("vhd: file: "), "{error}");
    }
    let mut other = vhd(folder);
    other.args(["run", "--kernel", "guest", "--memory", "16M", "--disk", "other.vhd", "--state", "disk.vsv"]);
    assert!(refused(&mut other).contains("other.vhd: is another disk"));
    // By force the note goes, and the file stays.
    fs::write(folder.join("file"), b"precious").unwrap();
    let output = discard(folder, &["--state", "file", "--force", "--json"]).output().unwrap();
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((document["state"].as_str(), document["cleared"][0].as_str()), (Some("unknown"), Some("disk.vhd")));
    assert!(text(&output.stderr).contains("file: is no saved state") || text(&output.stderr).contains("file: ends too early"));
    assert!(fs::read(folder.join("file")).unwrap() == b"precious" && !is_noted(folder, "disk.vhd"));
    // Its own goes.
    let document: serde_json::Value = serde_json::from_str(&said(&mut discard(folder, &["--json"]))).unwrap();
    assert_eq!(document["state"].as_str(), Some("off"));
    assert!(!folder.join("disk.vsv").exists());
}

#[test]
fn a_state_beside_a_disk_is_no_link_fifo_or_folder() {
    let Some(folder) = folder_with_guest() else { return };
    let (folder, elsewhere) = (folder.path(), tempfile::tempdir().unwrap());
    done(folder, "create disk.vhd --size 64M");
    let moved = elsewhere.path().join("moved");
    save_disk(folder, &[]);
    fs::copy(folder.join("disk.vsv"), &moved).unwrap();
    let state = folder.join("disk.vsv");
    let put: [(&str, &dyn Fn()); 4] = [
        ("link", &|| symlink(&moved, &state).unwrap()),
        ("dangling link", &|| symlink("nowhere", &state).unwrap()),
        ("FIFO", &|| mkfifo(&state, Mode::S_IRWXU).unwrap()),
        ("folder", &|| fs::create_dir(&state).unwrap()),
    ];
    for (what, put) in put {
        let _ = fs::remove_file(&state);
        put();
        for command in [&mut discard(folder, &[]), &mut run_disk(folder, "do=hello")] {
            let error = refused(command);
            assert!(error.contains("disk.vsv: is ") && moved.exists(), "{what}: {error}");
        }
        if what == "folder" {
            fs::remove_dir(&state).unwrap();
        }
    }
    // What the user names is followed, and what it leads to goes.
    symlink(&moved, folder.join("named")).unwrap();
    said(&mut discard(folder, &["--state", "named"]));
    assert!(!moved.exists() && !is_noted(folder, "disk.vhd"));
}

#[test]
fn a_save_replaces_nothing_and_follows_no_link() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    done(folder, "create disk.vhd --size 64M");
    fs::write(folder.join("canary"), b"precious").unwrap();
    let log = folder.join("log");
    let mut command = run_disk(folder, "do=spin");
    let mut machine = Running(command.stdout(fs::File::create(&log).unwrap()).spawn().unwrap());
    wait_until("a machine", || fs::read_to_string(&log).unwrap().contains("do=spin"));
    let save = || vhd(folder).args(["vm", "save", "disk"]).output().unwrap();
    let (state, passing) = (folder.join("disk.vsv"), folder.join(".disk.vsv.passing"));
    for place in [&state, &passing] {
        for put in ["file", "link", "dangling"] {
            match put {
                "file" => fs::write(place, b"precious").unwrap(),
                "link" => symlink("canary", place).unwrap(),
                _ => symlink("nowhere", place).unwrap(),
            }
            let output = save();
            assert_eq!(output.status.code(), Some(2), "{put} at {}: {}", place.display(), text(&output.stderr));
            assert_eq!(shown(folder, "disk")["state"].as_str(), Some("running"));
            assert!(put != "file" || fs::read(place).unwrap() == b"precious");
            assert!(place.symlink_metadata().is_ok() && !folder.join("nowhere").exists());
            assert_eq!(fs::read(folder.join("canary")).unwrap(), b"precious");
            fs::remove_file(place).unwrap();
        }
    }
    // What a save left that was killed is no obstacle.
    fs::write(&passing, b"VHDSAVED and then the power went").unwrap();
    assert!(save().status.success());
    assert!(machine.0.wait().unwrap().success() && state.exists() && !passing.exists());
}

#[test]
fn a_saved_state_is_its_users_alone_whatever_the_umask() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    for umask in ["000", "777"] {
        let _ = fs::remove_file(folder.join("disk.vhd"));
        done(folder, "create disk.vhd --size 64M");
        let line = "umask $0; exec \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-c", line, umask, env!("CARGO_BIN_EXE_vhd"), "run", "--kernel", "guest", "--memory", "16M"]);
        command.args(["--append", "do=fill sectors=16384", "--disk", "disk.vhd"]).current_dir(folder).stdin(Stdio::null());
        for variable in ["XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME"] {
            command.env(variable, folder);
        }
        save_after(&mut command, folder, "disk", "flushed", 2, &mut String::new());
        assert_eq!(folder.join("disk.vsv").metadata().unwrap().mode() & 0o7777, 0o600, "umask {umask}");
        said(&mut discard(folder, &[]));
    }
    // Nor is it in a dump of the monitor.
    let log = folder.join("log");
    let mut command = run_disk(folder, "do=spin");
    let machine = Running(command.stdout(fs::File::create(&log).unwrap()).spawn().unwrap());
    wait_until("a machine", || fs::read_to_string(&log).unwrap().contains("do=spin"));
    let maps = fs::read_to_string(format!("/proc/{}/smaps", machine.0.id())).unwrap();
    let (mut size, mut guest) = ("", None);
    for line in maps.lines() {
        size = line.strip_prefix("Size:").map_or(size, str::trim);
        if line.starts_with("VmFlags:") && size == "16384 kB" {
            guest = Some(line.split(' ').any(|flag| flag == "dd"));
        }
    }
    assert_eq!(guest, Some(true), "{maps}");
}

#[test]
fn discarding_takes_the_note_off_undo_disks_and_says_of_which() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    done(folder, "create disk.vhd --size 64M");
    save_disk(folder, &["--undo", "--at-end", "keep"]);
    assert!(is_noted(folder, "disk.vud") && !is_noted(folder, "disk.vhd"));
    // Without a configuration nobody says that undo was on.
    let document: serde_json::Value = serde_json::from_str(&said(&mut discard(folder, &["--json"]))).unwrap();
    assert_eq!((document["state"].as_str(), document["cleared"][0].as_str()), (Some("off"), Some("disk.vud")));
    assert!(!is_noted(folder, "disk.vud") && !folder.join("disk.vsv").exists());
    let told = said(run_disk(folder, "do=hello").args(["--undo", "--at-end", "discard"]));
    assert!(told.ends_with("guest: done\n"), "{told}");
    // After a snapshot the leaf is another, and that is said.
    save_disk(folder, &["--undo", "--at-end", "keep"]);
    fs::rename(folder.join("disk.vud"), folder.join("away.vud")).unwrap();
    assert!(refused(&mut discard(folder, &[])).contains("is the saved state of another machine"));
    fs::rename(folder.join("away.vud"), folder.join("disk.vud")).unwrap();
    fs::remove_file(folder.join("disk.vsv")).unwrap();
    assert!(refused(&mut discard(folder, &[])).contains("there is no saved state"));
    said(&mut discard(folder, &["--force"]));
    assert!(!is_noted(folder, "disk.vud"));
}
