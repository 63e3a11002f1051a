//! Configurations that are not the user's word: what they want beyond disks in their folder is listed and not done, until
//! `vhd vm register`.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

use super::machines::{Running, folder_with_guest, put_guest, refused, said, shown, vhd};
use crate::support::{PATIENCE, done, text, wait_until};

/// A configuration as a stranger writes it: disks by position, and what else is below `preferences`.
fn written(disks: &[&str], more: &str) -> String {
    let kind = |path: &str| if path.starts_with('/') { "absolute" } else { "relative" };
    let location = |(id, path): (usize, &&str)| {
        let kind = kind(path);
        format!("<location id=\"{id}\"><pathname><{kind}>{path}</{kind}></pathname></location>")
    };
    let disks: String = disks.iter().enumerate().map(location).collect();
    format!(
        "<preferences><hardware><memory><ram_size>16</ram_size></memory><virtio_bus>{disks}</virtio_bus></hardware>\
        <boot><kernel>guest</kernel><append>do=hello</append></boot>{more}</preferences>"
    )
}

/// A script that says so when it was run.
fn canary_script(folder: &Path, told: &Path) {
    let script = folder.join("script");
    fs::write(&script, format!("#!/bin/sh\necho \"$2\" >> {}\n", told.display())).unwrap();
    fs::set_permissions(script, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_strangers_configuration_runs_without_scripts_and_paths_outside() {
    let Some(folder) = folder_with_guest() else { return };
    let (folder, elsewhere) = (folder.path(), tempfile::tempdir().unwrap());
    let (told, port, state) = ["told", "port", "state"].map(|name| elsewhere.path().join(name)).into();
    fs::write(&state, b"precious").unwrap();
    canary_script(folder, &told);
    done(folder, "create disk.vhd --size 16M");
    let more = format!(
        "<hardware2/><settings><scripts><on_event>script</on_event></scripts><saved_state>{}</saved_state></settings>",
        state.display()
    );
    let config =
        written(&["disk.vhd"], &more).replace("<virtio_bus>", &format!("<serial>unix:{}</serial><virtio_bus>", port.display()));
    fs::write(folder.join("evil.vmc"), config).unwrap();
    let output = vhd(folder).args(["run", "evil.vmc"]).output().unwrap();
    let notes = text(&output.stderr);
    assert!(output.status.success() && text(&output.stdout).ends_with("guest: done\n"), "{notes}");
    for wanted in ["is not registered", "script at events", "serial port", "saved state", "vhd vm register evil.vmc"] {
        assert!(notes.contains(wanted), "{wanted}: {notes}");
    }
    assert!(!told.exists() && !port.exists() && fs::read(&state).unwrap() == b"precious");
    let found = shown(folder, "evil.vmc");
    assert_eq!((found["registered"].as_bool(), found["on_event"].as_str()), (Some(false), Some("script")));
    assert_eq!(found["left_out"].as_array().unwrap().len(), 3, "{found}");
    let found = said(vhd(folder).args(["vm", "show", "evil.vmc"]));
    assert!(found.contains("evil.vmc (is not registered)") && found.contains("at events     script"), "{found}");
    let output = vhd(folder).args(["vm", "discard-state", "evil.vmc"]).output().unwrap();
    assert!(output.status.code() == Some(2) && text(&output.stderr).contains("evil.vsv: there is no saved state"));
    assert!(fs::read(&state).unwrap() == b"precious");
    // Taken over, it has what it wants.
    fs::remove_file(&state).unwrap();
    let listed = said(vhd(folder).args(["vm", "register", "evil.vmc"]));
    let lines = ["disk 0 disk.vhd".into(), "kernel guest".into(), format!("serial port {}", port.display())];
    let lines = lines.into_iter().chain([format!("saved state {}", state.display()), "script at events script".into()]);
    assert_eq!(listed, lines.map(|line| line + "\n").collect::<String>());
    assert_eq!(shown(folder, "evil.vmc")["registered"].as_bool(), Some(true));
    let output = vhd(folder).args(["run", "evil.vmc"]).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
    assert_eq!(fs::read_to_string(&told).unwrap(), "started\noff\n");
}

#[test]
fn a_strangers_configuration_has_only_files_beneath_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let outer = folder.path();
    let folder = outer.join("theirs");
    fs::create_dir_all(folder.join("below")).unwrap();
    put_guest(&folder);
    done(outer, "create mine.vhd --size 16M");
    let before = fs::read(outer.join("mine.vhd")).unwrap();
    symlink("../mine.vhd", folder.join("link.vhd")).unwrap();
    symlink("..", folder.join("up")).unwrap();
    symlink(outer.join("mine.vhd"), folder.join("absolute.vhd")).unwrap();
    mkfifo(&folder.join("fifo.vhd"), Mode::S_IRWXU).unwrap();
    let mine = outer.join("mine.vhd");
    let run = || refused(vhd(&folder).args(["run", "evil.vmc"]));
    for disk in [
        "../mine.vhd",
        "below/../../mine.vhd",
        "link.vhd",
        "up/mine.vhd",
        "absolute.vhd",
        "fifo.vhd",
        "below",
        "/dev/null",
        mine.to_str().unwrap(),
    ] {
        fs::write(folder.join("evil.vmc"), written(&[disk], "")).unwrap();
        let error = run();
        assert!(
            error.starts_with("vhd: evil.vmc: is not registered, and wants ") && error.contains("vhd vm register"),
            "{disk}: {error}"
        );
        assert!(error.contains(&format!("disk 0 {disk}")), "{disk}: {error}");
    }
    for kernel in ["../guest", "/etc/passwd"] {
        fs::write(folder.join("evil.vmc"), written(&[], "").replace(">guest<", &format!(">{kernel}<"))).unwrap();
        assert!(run().contains(&format!("kernel {kernel}")), "{kernel}");
    }
    // What would be shown is no sequence that a terminal obeys.
    fs::write(folder.join("evil.vmc"), written(&["\u{1b}[2Jdisk.vhd"], "")).unwrap();
    assert!(run().contains("expected a path"));
    assert!(fs::read(&mine).unwrap() == before && !outer.join("mine.vud").exists());
}

#[test]
fn a_strangers_configuration_has_what_is_beneath_its_folder() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    fs::create_dir(folder.join("below")).unwrap();
    done(folder, "create below/disk.vhd --size 16M");
    symlink("below/disk.vhd", folder.join("link.vhd")).unwrap();
    let whole = folder.canonicalize().unwrap().join("below/disk.vhd");
    for disk in ["below/disk.vhd", "below/../below/disk.vhd", "link.vhd", whole.to_str().unwrap()] {
        fs::write(folder.join("theirs.vmc"), written(&[disk], "<settings><saved_state>below/s.vsv</saved_state></settings>"))
            .unwrap();
        let output = vhd(folder).args(["run", "theirs.vmc"]).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{disk}: {}", text(&output.stderr));
    }
}

#[test]
fn a_configuration_that_was_changed_is_a_strangers_again() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    let elsewhere = tempfile::tempdir().unwrap();
    let told = elsewhere.path().join("told");
    canary_script(folder, &told);
    let create =
        ["vm", "create", "mine.vmc", "--kernel", "guest", "--append", "do=hello", "--memory", "16M", "--on-event", "script"];
    said(vhd(folder).args(create));
    let list = folder.join("state/vhd");
    assert_eq!(list.metadata().unwrap().mode() & 0o777, 0o700);
    let registered = || shown(folder, "mine.vmc")["registered"].as_bool().unwrap();
    let run = || {
        let _ = fs::remove_file(&told);
        let output = vhd(folder).args(["run", "mine.vmc"]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        (told.exists(), text(&output.stderr))
    };
    assert!(registered() && run() == (true, String::new()));
    // By vhd vm set it stays the user's, by anybody else it does not.
    said(vhd(folder).args(["vm", "set", "mine.vmc", "--cpus", "1"]));
    assert!(registered() && run().0);
    let content = fs::read_to_string(folder.join("mine.vmc")).unwrap();
    fs::write(folder.join("mine.vmc"), content.replace("<cpus", " <cpus")).unwrap();
    let (ran, notes) = run();
    assert!(
        !ran && !registered() && notes.contains("was changed since it was registered, so it runs without: script"),
        "{notes}"
    );
    said(vhd(folder).args(["vm", "set", "mine.vmc", "--cpus", "2"]));
    assert!(!registered() && !run().0, "a change by vhd vm set takes over those of others");
    // As it was, it is the user's again; and so it is once it is registered.
    fs::write(folder.join("mine.vmc"), &content).unwrap();
    assert!(registered() && run().0);
    fs::write(folder.join("mine.vmc"), content.replace("<cpus", " <cpus")).unwrap();
    said(vhd(folder).args(["vm", "register", "mine.vmc"]));
    assert!(registered() && run().0);
    // A copy elsewhere is another file, and a list that others can write to is none.
    fs::create_dir(folder.join("copy")).unwrap();
    fs::copy(folder.join("mine.vmc"), folder.join("copy/mine.vmc")).unwrap();
    assert_eq!(shown(folder, "copy/mine.vmc")["registered"].as_bool(), Some(false));
    fs::set_permissions(&list, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(!registered());
}

#[test]
fn a_configuration_of_former_versions_is_taken_over_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::create_dir_all(folder.join("vhd/machines")).unwrap();
    done(folder, "create disk.vhd --size 16M");
    let disk = folder.join("disk.vhd");
    fs::write(folder.join("vhd/machines/old.vmc"), written(&[disk.to_str().unwrap()], "")).unwrap();
    assert!(refused(vhd(folder).args(["run", "old"])).contains("is not registered"));
    let document: serde_json::Value = serde_json::from_str(&said(vhd(folder).args(["vm", "register", "old", "--json"]))).unwrap();
    assert_eq!((document["registered"].as_bool(), document["reaches"][0]["what"].as_str()), (Some(true), Some("disk")));
    assert_eq!(shown(folder, "old")["registered"].as_bool(), Some(true));
}

#[test]
fn a_configuration_is_read_from_regular_files_alone() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    mkfifo(&folder.join("fifo.vmc"), Mode::S_IRWXU).unwrap();
    fs::create_dir(folder.join("folder.vmc")).unwrap();
    symlink("/dev/zero", folder.join("device.vmc")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(folder.join("socket.vmc")).unwrap();
    fs::File::create(folder.join("large.vmc")).unwrap().set_len(1 << 40).unwrap();
    for name in ["fifo", "folder", "device", "socket", "large"] {
        for command in
            [&["run"][..], &["vm", "show"], &["vm", "register"], &["vm", "set"], &["vm", "restore"], &["vm", "discard-state"]]
        {
            let error = ends(vhd(folder).args(command).arg(format!("{name}.vmc")));
            assert!(
                error.contains("is no regular file") || name == "large" && error.contains("has more than"),
                "{name}: {error}"
            );
        }
    }
    // The folder of a link is that of what it leads to.
    fs::create_dir(folder.join("real")).unwrap();
    fs::write(folder.join("real/theirs.vmc"), written(&["disk.vhd"], "")).unwrap();
    symlink("real/theirs.vmc", folder.join("link.vmc")).unwrap();
    let found = shown(folder, "link.vmc");
    let image = Path::new(found["disks"][0]["image"].as_str().unwrap());
    assert_eq!(image, folder.canonicalize().unwrap().join("real/disk.vhd"));
    said(vhd(folder).args(["vm", "set", "link.vmc", "--cpus", "2"]));
    assert!(folder.join("link.vmc").is_symlink());
}

/// What a command says that must fail, and not wait.
fn ends(command: &mut Command) -> String {
    let begin = Instant::now();
    let error = refused(command);
    assert!(begin.elapsed() < Duration::from_secs(30), "{command:?} took {:?}", begin.elapsed());
    error
}

#[test]
fn what_is_no_file_is_no_kernel_initrd_disk_state_or_script() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    mkfifo(&folder.join("fifo"), Mode::S_IRWXU).unwrap();
    for option in ["--kernel", "--initrd", "--disk", "--state", "--on-event"] {
        let mut command = vhd(folder);
        command.args(["run", option, "fifo"]).args((option != "--kernel").then_some(["--kernel", "guest"]).into_iter().flatten());
        let error = ends(&mut command);
        assert!(error.contains("fifo: "), "{option}: {error}");
    }
}

/// Sends a signal, and waits for the end, which must come within `patience`.
fn end_by(process: &mut Child, signal: Signal, patience: Duration) -> std::process::ExitStatus {
    let begin = Instant::now();
    kill(Pid::from_raw(process.id() as i32), signal).unwrap();
    loop {
        if let Some(status) = process.try_wait().unwrap() {
            return status;
        }
        assert!(begin.elapsed() < patience, "{signal} does not end it");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_signal_ends_a_command_that_waits_for_a_machine() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::create_dir_all(folder.join("vhd")).unwrap();
    // It takes clients, and never answers.
    let _mute = std::os::unix::net::UnixListener::bind(folder.join("vhd/vm-mute.ctl")).unwrap();
    for action in ["show", "pause", "save", "restore", "discard-state", "snapshot", "off"] {
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            let mut waiting = Running(vhd(folder).args(["vm", action, "mute"]).stderr(Stdio::null()).spawn().unwrap());
            std::thread::sleep(Duration::from_millis(50));
            assert!(waiting.0.try_wait().unwrap().is_none(), "{action} does not wait");
            assert!(!end_by(&mut waiting.0, signal, PATIENCE).success(), "{action}");
        }
    }
}

#[test]
fn a_signal_ends_a_run_whose_scripts_never_end() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    fs::write(folder.join("script"), "#!/bin/sh\necho $$ > running\nexec sleep 300\n").unwrap();
    fs::set_permissions(folder.join("script"), fs::Permissions::from_mode(0o755)).unwrap();
    for (signal, work) in
        [(Signal::SIGINT, "do=hello"), (Signal::SIGTERM, "do=hello"), (Signal::SIGINT, "do=spin"), (Signal::SIGTERM, "do=spin")]
    {
        let _ = fs::remove_file(folder.join("running"));
        let mut command = vhd(folder);
        command.args(["run", "--kernel", "guest", "--memory", "16M", "--append", work, "--on-event", "script", "--name", "one"]);
        let log = folder.join("log");
        command.stdout(fs::File::create(&log).unwrap()).stderr(Stdio::null());
        let mut machine = Running(command.spawn().unwrap());
        let script = || fs::read_to_string(folder.join("running")).ok()?.trim().parse().ok().map(Pid::from_raw);
        wait_until("a script", || script().is_some());
        let said = if work == "do=hello" { "guest: done" } else { "do=spin" };
        wait_until("the guest", || fs::read_to_string(&log).unwrap().contains(said));
        end_by(&mut machine.0, signal, Duration::from_secs(30));
        kill(script().unwrap(), Signal::SIGKILL).unwrap();
    }
}

#[test]
fn a_socket_is_not_put_over_or_removed_with_what_is_not_ours() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    let run = || {
        let mut command = vhd(folder);
        command.args(["run", "--kernel", "guest", "--memory", "16M", "--name", "one", "--serial", "unix:port"]);
        command
    };
    for precious in ["file", "link"] {
        match precious {
            "file" => fs::write(folder.join("port"), b"precious").unwrap(),
            _ => symlink("nowhere", folder.join("port")).unwrap(),
        }
        assert!(refused(run().args(["--append", "do=hello"])).contains("port: exists already and is no socket"));
        fs::remove_file(folder.join("port")).unwrap();
    }
    // Someone puts a file in its place while it is served.
    let mut machine = Running(run().args(["--append", "do=spin"]).stdout(Stdio::null()).spawn().unwrap());
    wait_until("a machine", || said(vhd(folder).args(["vm", "list"])).contains("running"));
    fs::write(folder.join("new"), b"precious").unwrap();
    fs::rename(folder.join("new"), folder.join("port")).unwrap();
    said(vhd(folder).args(["vm", "off", "one"]));
    assert!(machine.0.wait().unwrap().success());
    assert_eq!(fs::read(folder.join("port")).unwrap(), b"precious");
}

#[test]
fn a_snapshot_registers_nothing_but_new_leaves() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    done(folder, "create disk.vhd --size 16M");
    let create =
        ["vm", "create", "mine.vmc", "--kernel", "guest", "--append", "do=spin", "--memory", "16M", "--disk", "disk.vhd"];
    said(vhd(folder).args(create));
    let registered = || shown(folder, "./mine.vmc")["registered"].as_bool().unwrap();
    let mut machine = Running(vhd(folder).args(["run", "mine.vmc"]).stdout(Stdio::null()).spawn().unwrap());
    wait_until("a machine", || said(vhd(folder).args(["vm", "list"])).contains("running"));
    said(vhd(folder).args(["vm", "snapshot", "mine"]));
    // As a monitor would that its guest got the better of: what it has changed is no part of what is taken over.
    let content = fs::read_to_string(folder.join("mine.vmc")).unwrap();
    assert!(content.contains("disk-1.vhd"));
    fs::write(folder.join("mine.vmc"), content.replace("disk-1.vhd", "/etc/shadow")).unwrap();
    said(vhd(folder).args(["vm", "snapshot", "mine"]));
    said(vhd(folder).args(["vm", "off", "mine"]));
    assert!(machine.0.wait().unwrap().success() && !registered());
    fs::write(folder.join("mine.vmc"), &content).unwrap();
    assert!(registered(), "the first snapshot was not registered");
}

#[test]
fn a_signal_ends_the_question_what_becomes_of_undo_disks() {
    let Some(folder) = folder_with_guest() else { return };
    let folder = folder.path();
    done(folder, "create disk.vhd --size 16M");
    let run = "run --kernel guest --append do=hello --memory 16M --disk disk.vhd --undo";
    let line = format!("{} {run}", env!("CARGO_BIN_EXE_vhd"));
    let mut command = Command::new("script");
    command.args(["-qefc", &line, "typescript"]).current_dir(folder).env("XDG_RUNTIME_DIR", folder);
    let mut terminal = Running(command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap());
    let shown = || fs::read_to_string(folder.join("typescript")).unwrap_or_default();
    wait_until("the question", || shown().contains("[k]eep?"));
    std::io::Write::write_all(terminal.0.stdin.as_mut().unwrap(), b"\x03").unwrap();
    let begin = Instant::now();
    while terminal.0.try_wait().unwrap().is_none() {
        assert!(begin.elapsed() < PATIENCE, "it goes on to ask: {}", shown());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(terminal.0.wait().unwrap().code(), Some(130));
    assert!(folder.join("disk.vud").exists(), "what was written is gone");
}
