//! `vhd run` and `vhd vm`: machines as a user has them.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use vhd_testkit::machine;

use crate::support::{PATIENCE, done, text, wait_until};

/// Puts the test guest into a folder.
pub fn put_guest(folder: &Path) {
    std::fs::copy(machine::guest(Path::new(env!("CARGO_TARGET_TMPDIR"))), folder.join("guest")).unwrap();
}

/// A folder with the test guest; `None` where no machine can run.
pub fn folder_with_guest() -> Option<TempDir> {
    let folder = machine::kvm().then(|| tempfile::tempdir().unwrap())?;
    put_guest(folder.path());
    Some(folder)
}

/// A machine in the background, killed at the end.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn vhd(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhd"));
    command.current_dir(folder).stdin(Stdio::null());
    for variable in ["XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"] {
        command.env(variable, folder);
    }
    command.env("XDG_STATE_HOME", folder.join("state"));
    command
}

pub fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// What a machine is.
pub fn shown(folder: &Path, name: &str) -> serde_json::Value {
    serde_json::from_str(&said(vhd(folder).args(["vm", "show", name, "--json"]))).unwrap()
}

#[test]
fn undo_keeps_a_run_apart_until_it_is_committed() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
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
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    done(folder, "create disk.vhd --size 16M");
    let mut command = vhd(folder);
    command.args(["run", "--kernel", "guest", "--append", "do=spin", "--memory", "16M", "--disk", "disk.vhd", "--name", "one"]);
    let mut machine = Running(command.stdout(Stdio::null()).spawn().unwrap());
    wait_until("a machine in the list", || said(vhd(folder).args(["vm", "list"])) == "one                  running\n");
    said(vhd(folder).args(["vm", "pause", "one"]));
    let again = vhd(folder).args(["vm", "pause", "one"]).output().unwrap();
    let message = "vhd: one: is paused (as asked), so it can't pause; now it can: resume, reset, off, save\n";
    assert_eq!((again.status.code(), text(&again.stderr).as_str()), (Some(2), message));
    let shown = shown(folder, "one");
    assert_eq!((shown["state"].as_str(), shown["disks"][0]["image"].as_str()), (Some("paused"), Some("disk.vhd")));
    assert_eq!(said(vhd(folder).args(["vm", "snapshot", "one"])), "disk-1.vhd\n");
    said(vhd(folder).args(["vm", "off", "one"]));
    assert!(machine.0.wait().unwrap().success());
    let gone = vhd(folder).args(["vm", "show", "one"]).output().unwrap();
    assert!(text(&gone.stderr).contains("no machine of this name"), "{}", text(&gone.stderr));
    done(folder, "check --chain disk-1.vhd");
}

/// The first word of what the guest writes at a sector in round 0: see `vmm/guest/main.rs`.
pub fn pattern(sector: u64) -> [u8; 8] {
    let mut state = sector.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xABCD;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    let mut bytes = state.to_be_bytes();
    bytes.reverse();
    bytes
}

/// What a command that must not succeed says.
pub fn refused(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = text(&output.stderr);
    assert!(output.status.code() == Some(2) && error.lines().count() == 1, "{command:?}: {error} {}", text(&output.stdout));
    error
}

/// Runs a machine in the background, saves it when it has said something so many times, and adds what it said to `told`.
pub fn save_after(command: &mut Command, folder: &Path, name: &str, what: &str, times: usize, told: &mut String) {
    let log = folder.join("log");
    let mut machine = Running(command.stdout(std::fs::File::create(&log).unwrap()).spawn().unwrap());
    wait_until(what, || std::fs::read_to_string(&log).unwrap().matches(what).count() >= times);
    said(vhd(folder).args(["vm", "save", name]));
    assert!(machine.0.wait().unwrap().success());
    *told += &std::fs::read_to_string(&log).unwrap();
}

pub fn run_disk(folder: &Path, line: &str) -> Command {
    let mut command = vhd(folder);
    command.args(["run", "--kernel", "guest", "--append", line, "--memory", "16M", "--disk", "disk.vhd"]);
    command
}

#[test]
fn a_machine_that_is_saved_again_and_again_in_the_middle_of_io_goes_on_in_each_new_process() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    done(folder, "create disk.vhd --size 64M");
    let run = || run_disk(folder, "do=fill sectors=16384");
    let mut told = String::new();
    save_after(&mut run(), folder, "disk", "flushed", 2, &mut told);
    assert!(folder.join("disk.vsv").exists());
    // Nobody else writes to its disk meanwhile.
    for command in ["write disk.vhd --offset 0", "compact disk.vhd", "resize disk.vhd 128M", "undo start disk.vhd"] {
        let refused = refused(vhd(folder).args(command.split(' ')));
        assert!(refused.contains("disk.vhd: a ") && refused.contains("saved state"), "{command}: {refused}");
    }
    for _ in 0..3 {
        save_after(&mut run(), folder, "disk", "flushed", 2, &mut told);
    }
    told += &said(&mut run());
    assert!(told.ends_with("filled 16384, 0 failed\nguest: done\n") && !told.contains("WRONG"), "{told}");
    assert_eq!(told.matches("guest: do=").count(), 1, "it began anew: {told}");
    let flushed: Vec<_> = told.lines().filter(|line| line.starts_with("flushed")).map(str::to_owned).collect();
    let wanted: Vec<_> = (0..16384).step_by(64).map(|sector| format!("flushed {}", sector + 8)).collect();
    assert!(flushed == wanted, "something was said twice or never: {flushed:?}");
    assert!(!folder.join("disk.vsv").exists());
    done(folder, "check disk.vhd");
    done(folder, "compact disk.vhd");
}

#[test]
fn a_monitor_killed_while_it_saves_leaves_a_guest_that_goes_on_or_a_disk_that_is_free() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    let (mut saved, mut lost) = (0, 0);
    for round in 0..8_u64 {
        let _ = std::fs::remove_file(folder.join("disk.vhd"));
        done(folder, "create disk.vhd --size 64M");
        let log = folder.join("log");
        let mut command = run_disk(folder, "do=fill sectors=2048");
        let mut machine = Running(command.stdout(std::fs::File::create(&log).unwrap()).spawn().unwrap());
        wait_until("a flush", || std::fs::read_to_string(&log).unwrap().contains("flushed"));
        let mut save = vhd(folder).args(["vm", "save", "disk"]).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(round * 6));
        machine.0.kill().unwrap();
        machine.0.wait().unwrap();
        save.wait().unwrap();
        let there = folder.join("disk.vsv").exists();
        let told = std::fs::read_to_string(&log).unwrap();
        let output = run_disk(folder, "do=fill sectors=2048").output().unwrap();
        let error = text(&output.stderr);
        if there && error.contains("was changed since") {
            // It was hit between a footer and the file's time.
            said(vhd(folder).args(["vm", "discard-state", "disk", "--disk", "disk.vhd"]));
            continue;
        }
        assert!(output.status.success(), "round {round}: {error}");
        let told = if there { told + &text(&output.stdout) } else { text(&output.stdout) };
        assert_eq!(told.matches("guest: do=").count(), 1, "round {round}: {told}");
        assert!(told.ends_with("filled 2048, 0 failed\nguest: done\n") && !told.contains("WRONG"), "round {round}: {told}");
        let info: serde_json::Value = serde_json::from_str(&said(vhd(folder).args(["info", "disk.vhd", "--json"]))).unwrap();
        assert_eq!(info["saved_state"].as_bool(), Some(false), "round {round}");
        if there { saved += 1 } else { lost += 1 }
    }
    eprintln!("{saved} went on, {lost} began anew");
    let left =
        std::fs::read_dir(folder).unwrap().flatten().filter(|entry| entry.file_name().to_string_lossy().contains("passing"));
    assert!(left.count() <= 1, "states that were never finished pile up");
}

#[test]
fn on_a_terminal_each_key_goes_to_the_guest_and_control_bracket_ends_it() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    let line = format!("{} run --kernel guest --append do=echo --memory 16M", env!("CARGO_BIN_EXE_vhd"));
    let mut command = Command::new("script");
    command.args(["-qefc", &line, "typescript"]).current_dir(folder).env("XDG_RUNTIME_DIR", folder);
    let mut terminal = Running(command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap());
    let shown = || std::fs::read_to_string(folder.join("typescript")).unwrap_or_default();
    wait_until("the guest's line", || shown().contains("guest: do=echo"));
    assert!(shown().contains("Control-] ends the machine."), "{}", shown());
    // An interrupt is a key as well.
    let stdin = terminal.0.stdin.as_mut().unwrap();
    stdin.write_all(b"HAL\x03").unwrap();
    wait_until("the guest's answer", || shown().contains("IBM\x04"));
    assert!(!shown().contains("HAL"), "the terminal echoes what is typed: {}", shown());
    stdin.write_all(b"\x1D").unwrap();
    wait_until("the end", || terminal.0.try_wait().unwrap().is_some());
    assert!(terminal.0.wait().unwrap().success());
}

#[test]
fn a_state_that_was_cut_or_changed_and_a_disk_that_was_changed_are_refused_until_the_state_is_discarded() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    done(folder, "create disk.vhd --size 64M");
    save_after(&mut run_disk(folder, "do=fill sectors=16384"), folder, "disk", "flushed", 2, &mut String::new());
    let file = folder.join("disk.vsv");
    let sound = std::fs::read(&file).unwrap();
    let mut state_len: [u8; 8] = sound[16..24].try_into().unwrap();
    state_len.reverse();
    let state_len = u64::from_be_bytes(state_len) as usize;
    // The magic number, the version, a tag, a length, a checksum, the machine, memory, the end.
    for at in [0, 8, 12, 16, 24, 28 + state_len / 2, 28 + state_len + 20, sound.len() / 2, sound.len() - 1] {
        let mut changed = sound.clone();
        changed[at] ^= 0x41;
        std::fs::write(&file, &changed).unwrap();
        let error = refused(&mut run_disk(folder, "do=hello"));
        assert!(error.starts_with("vhd: ./disk.vsv: ") || error.starts_with("vhd: disk.vsv: "), "byte {at}: {error}");
    }
    for len in [0, 7, 20, 28 + state_len, sound.len() / 2, sound.len() - 1] {
        std::fs::write(&file, &sound[..len]).unwrap();
        assert!(refused(&mut run_disk(folder, "do=hello")).contains("disk.vsv: "), "cut to {len}");
    }
    std::fs::write(&file, &sound).unwrap();
    // By force, the disk is written to all the same, and the guest does not go on over it.
    let mut write = vhd(folder);
    write.args(["write", "disk.vhd", "--offset", "0", "--force"]).stdin(std::fs::File::open(folder.join("guest")).unwrap());
    said(&mut write);
    assert!(refused(&mut run_disk(folder, "do=hello")).contains("disk.vhd: was changed since the guest was saved"));
    // There is no configuration, so the disk is named.
    said(vhd(folder).args(["vm", "discard-state", "disk", "--disk", "disk.vhd"]));
    assert!(!file.exists());
    assert!(refused(vhd(folder).args(["vm", "discard-state", "disk", "--disk", "disk.vhd"])).contains("there is no saved state"));
    assert!(said(&mut run_disk(folder, "do=hello")).ends_with("guest: done\n"));
}

#[test]
fn a_configured_machine_is_made_shown_changed_run_saved_restored_and_discarded() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    done(folder, "create disk.vhd --size 64M");
    let vm = |arguments: &[&str]| said(vhd(folder).arg("vm").args(arguments));
    let made =
        vm(&["create", "one", "--kernel", "guest", "--append", "do=fill sectors=8192", "--memory", "16M", "--disk", "disk.vhd"]);
    assert_eq!(made, format!("{}/vhd/machines/one.vmc\n", folder.display()));
    let config = PathBuf::from(made.trim());
    assert!(refused(vhd(folder).args(["vm", "create", "one"])).contains("one.vmc: "));
    assert_eq!(vm(&["list"]), "one                  off\n");
    // A change keeps comments and what is not known.
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("<hardware>", "<!-- mine --><hardware><floppy a='b'/>")).unwrap();
    vm(&["set", "one", "--memory", "32M", "--disk", "guest,read-only,queues=2,on-error=pause"]);
    vm(&["set", "one", "--remove-disk", "1"]);
    let text = std::fs::read_to_string(&config).unwrap();
    assert!(
        text.contains("<!-- mine --><hardware><floppy a='b'/>") && text.contains(">32<") && !text.contains("read_only"),
        "{text}"
    );
    // What was changed by hand is taken over again.
    assert_eq!(shown(folder, "one")["registered"].as_bool(), Some(false));
    vm(&["register", "one"]);
    let shown = shown(folder, "one");
    assert_eq!((shown["state"].as_str(), shown["memory"].as_u64()), (Some("off"), Some(32 << 20)));
    assert!(refused(vhd(folder).args(["vm", "restore", "one"])).contains("there is no saved state"));
    let run = |what: &str, config: &str| {
        let mut command = vhd(folder);
        command.args(what.split(' ')).arg(config);
        command
    };
    let mut told = String::new();
    save_after(&mut run("run", "one"), folder, "one", "flushed", 2, &mut told);
    assert_eq!(vm(&["list"]), "one                  saved\n");
    // By its file it is the same machine.
    save_after(&mut run("vm restore", config.to_str().unwrap()), folder, "one", "flushed", 2, &mut told);
    told += &said(&mut run("vm restore", "one"));
    assert!(told.ends_with("filled 8192, 0 failed\nguest: done\n") && told.matches("guest: do=").count() == 1, "{told}");
    save_after(&mut run("run", "one"), folder, "one", "flushed", 2, &mut told);
    vm(&["discard-state", "one"]);
    assert_eq!(vm(&["list"]), "one                  off\n");
    done(folder, "compact disk.vhd");
    std::fs::write(&config, "<preferences>\n<hardware><cpus>many</cpus></hardware></preferences>").unwrap();
    let error = refused(vhd(folder).args(["run", "one"]));
    assert!(error.contains("one.vmc: line 2, column 11: <cpus> is \"many\", expected a number from 1 to 8"), "{error}");
}

#[test]
fn a_snapshot_moves_a_configuration_on_to_the_new_leaves() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    done(folder, "create disk.vhd --size 16M");
    said(
        vhd(folder).args([
            "vm", "create", "here.vmc", "--kernel", "guest", "--append", "do=spin", "--memory", "16M", "--disk", "disk.vhd",
        ]),
    );
    let mut machine = Running(vhd(folder).args(["run", "here.vmc"]).stdout(Stdio::null()).spawn().unwrap());
    wait_until("a machine", || said(vhd(folder).args(["vm", "list"])).contains("running"));
    // From another folder.
    let elsewhere = tempfile::tempdir().unwrap();
    said(vhd(folder).current_dir(elsewhere.path()).args(["vm", "snapshot", "here"]));
    said(vhd(folder).args(["vm", "off", "here.vmc"]));
    assert!(machine.0.wait().unwrap().success());
    let text = std::fs::read_to_string(folder.join("here.vmc")).unwrap();
    assert!(text.contains(">disk-1.vhd<") && !text.contains(">disk.vhd<"), "{text}");
    assert_eq!(shown(folder, "here.vmc")["registered"].as_bool(), Some(true));
    said(vhd(folder).args(["vm", "set", "here.vmc", "--append", "do=hello"]));
    assert!(said(vhd(folder).args(["run", "here.vmc"])).ends_with("guest: done\n"));
}

#[test]
fn the_serial_port_on_a_socket_speaks_both_ways_and_keeps_what_nobody_heard() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    let mut command = vhd(folder);
    command.args([
        "run",
        "--kernel",
        "guest",
        "--append",
        "do=echo",
        "--memory",
        "16M",
        "--serial",
        "unix:port",
        "--name",
        "echo",
    ]);
    let mut machine = Running(command.stdout(Stdio::null()).spawn().unwrap());
    let port = folder.join("port");
    wait_until("a machine", || said(vhd(folder).args(["vm", "list"])).contains("running"));
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(port.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let mut heard = String::new();
    for (say, hear) in [("HAL", "IBM"), ("VMR", "WNS")] {
        let mut client = std::os::unix::net::UnixStream::connect(&port).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(say.as_bytes()).unwrap();
        while !heard.contains(hear) {
            let mut bytes = [0; 64];
            let len = client.read(&mut bytes).unwrap();
            assert!(len > 0, "it hung up after {heard:?}");
            heard += &text(&bytes[..len]);
        }
    }
    // What was said before anyone listened is there, too.
    assert!(heard.starts_with("guest: do=echo\n"), "{heard}");
    let mut client = std::os::unix::net::UnixStream::connect(&port).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"q").unwrap();
    let mut last = String::new();
    client.read_to_string(&mut last).unwrap();
    assert_eq!(last, "guest: done\n");
    assert!(machine.0.wait().unwrap().success());
    assert!(!port.exists());
}

#[test]
fn a_linked_disk_starts_no_machine() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("kernel"), b"no kernel").unwrap();
    std::fs::write(folder.join("raw.img"), vec![1; 1 << 20]).unwrap();
    done(folder, "create linked.vhd --link raw.img");
    for arguments in [&[][..], &["--read-only"], &["--undo"], &["--raw-parent", "raw.img"]] {
        let error = refused(vhd(folder).args(["run", "--kernel", "kernel", "--disk", "linked.vhd"]).args(arguments));
        assert!(error.starts_with("vhd: linked.vhd: is linked to ") && error.contains("vhd convert"), "{arguments:?}: {error}");
    }
    assert!(!folder.join("linked.vud").exists());
}

#[test]
fn only_the_leaf_of_a_machine_is_open_for_writing() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    done(folder, "create base.vhd --size 16M");
    done(folder, "create middle.vhd --parent base.vhd");
    done(folder, "create leaf.vhd --parent middle.vhd");
    done(folder, "create tools.vhd --size 16M");
    for undo in [false, true] {
        let mut command = vhd(folder);
        command
            .args(["run", "--kernel", "guest", "--append", "do=spin", "--memory", "16M", "--name", "one", "--disk", "leaf.vhd"]);
        command.args(["--disk", "tools.vhd,read-only,serial=TOOLS,on-error=pause,queues=3"]).args(undo.then_some("--undo"));
        let mut machine = Running(command.stdout(Stdio::null()).spawn().unwrap());
        wait_until("a machine", || said(vhd(folder).args(["vm", "list"])).contains("running"));
        let mut writable = std::collections::BTreeMap::new();
        for entry in std::fs::read_dir(format!("/proc/{}/fd", machine.0.id())).unwrap() {
            let fd = entry.unwrap();
            let (Ok(target), Ok(info)) = (
                std::fs::read_link(fd.path()),
                std::fs::read_to_string(format!("/proc/{}/fdinfo/{}", machine.0.id(), fd.file_name().to_string_lossy())),
            ) else {
                continue;
            };
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
            let writes = u32::from_str_radix(flags, 8).unwrap() & 3 != 0;
            if let Ok(image) = target.strip_prefix(folder.canonicalize().unwrap()) {
                *writable.entry(image.to_string_lossy().into_owned()).or_insert(false) |= writes;
            }
        }
        writable.retain(|name, _| name.ends_with(".vhd") || name.ends_with(".vud"));
        let leaf = if undo { "leaf.vud" } else { "leaf.vhd" };
        let mut wanted: std::collections::BTreeMap<_, _> =
            ["base.vhd", "middle.vhd", "leaf.vhd", "tools.vhd"].map(|name| (name.to_owned(), false)).into();
        wanted.insert(leaf.to_owned(), true);
        assert_eq!(writable, wanted);
        let shown = shown(folder, "one");
        let tools = &shown["disks"][1];
        let found =
            (tools["serial"].as_str(), tools["queues"].as_u64(), tools["read_only"].as_bool(), tools["on_error"].as_str());
        assert_eq!(found, (Some("TOOLS"), Some(3), Some(true), Some("pause")), "{shown}");
        said(vhd(folder).args(["vm", "off", "one"]));
        assert!(machine.0.wait().unwrap().success());
    }
    assert!(!folder.join("tools.vud").exists(), "a disk that is not written to has an undo disk");
}

#[test]
fn a_configuration_is_made_of_disks_that_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::create_dir(folder.join("folder.vhd")).unwrap();
    for (disk, why) in [("folder.vhd", "is a folder, expected a file"), ("missing.vhd", "can't be opened: No such file")] {
        let error = refused(vhd(folder).args(["vm", "create", "here.vmc", "--disk", disk]));
        assert!(error.starts_with(&format!("vhd: {disk}: {why}")), "{error}");
        assert!(!folder.join("here.vmc").exists());
    }
}

#[test]
fn more_disks_than_a_machine_has_places_for_are_refused_with_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut command = vhd(folder);
    command.args(["run", "--kernel", "kernel"]);
    for number in 0..65 {
        command.args(["--disk", &format!("{number}.vhd")]);
    }
    let error = refused(&mut command);
    assert_eq!(error, "vhd: 64.vhd: is one disk too many: a machine has 64 at most\n");
}

#[test]
fn what_can_not_be_run_is_said_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("kernel"), b"no kernel").unwrap();
    nix::unistd::mkfifo(&folder.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    done(folder, "create disk.vhd --size 16M");
    for (arguments, expected) in [
        (vec!["--kernel", "kernel"], "kernel: is neither an ELF file nor a bzImage"),
        (vec!["--kernel", "missing"], "missing: can't be read as the kernel: No such file"),
        (vec!["--kernel", "missing"], "; give an ELF file or a bzImage, or no kernel to start the one"),
        (vec!["--kernel", "."], ".: can't be read as the kernel: is a folder; give"),
        // It would be waited for without end.
        (vec!["--kernel", "pipe"], "pipe: can't be read as the kernel: is no regular file; give"),
        (vec!["--kernel", "kernel", "--initrd", "missing"], "missing: can't be read as the initial RAM disk: No such file"),
        (vec!["disk.vhd"], "an image is run with --disk"),
        (vec!["--disk", "disk.vhd"], "disk.vhd: has no kernel that its boot menu starts"),
        (vec!["missing.vmc"], "missing.vmc: there is no such configuration"),
        (vec!["--kernel", "kernel", "--serial", "tty"], "expected stdio, none or unix:PATH"),
        (vec!["--kernel", "kernel", "--disk", "disk.vhd,on-error=stop"], "on-error=stop: report or pause"),
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
