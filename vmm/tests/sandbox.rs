//! Goal: a monitor that a guest got the better of reaches nothing of the host that the machine does not need.
//!
//! Method: this test program starts itself again; a thread there is fenced in as one of its kind is, and tries what it
//! should not be able to. Each try is also made without a fence, where it must succeed: else it would show nothing.
//! That the threads of a real machine are fenced in is shown in `tests/cli/machines.rs`.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that can't go on fails here")]

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use vhd_vmm::sandbox::{Access, Files, Kind, confine, enter};
use vm_memory::MmapRegion;

const TRY: &str = "VHD_SANDBOX_TRY";
const KINDS: [&str; 3] = ["vcpu", "disk", "control"];

/// What is tried, in a thread of its own. True when it was done.
fn act(what: &str, folder: &Path) -> bool {
    match what {
        "nothing" => true,
        "open outside" => File::open(folder.join("outside")).is_ok(),
        "write outside" => File::options().append(true).open(folder.join("outside")).is_ok(),
        "open inside" => File::open(folder.join("in/inside")).is_ok(),
        "make inside" => File::create(folder.join("in/new")).is_ok(),
        "change what is for reading" => File::options().append(true).open(folder.join("kernel")).is_ok(),
        "open for reading" => File::open(folder.join("kernel")).is_ok(),
        "start a program" => Command::new("/bin/true").status().is_ok_and(|status| status.success()),
        "open a connection" => std::net::UdpSocket::bind("127.0.0.1:0").is_ok(),
        "send a signal" => nix::sys::signal::kill(nix::unistd::Pid::this(), None).is_ok(),
        "have memory with code" => {
            let (all, anonymous) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_ANONYMOUS | libc::MAP_PRIVATE);
            MmapRegion::<()>::build(None, 4096, all, anonymous).is_ok()
        }
        "start a thread" => std::thread::Builder::new().spawn(|| ()).is_ok(),
        other => panic!("{other}"),
    }
}

#[test]
#[ignore = "started by the other tests, in a process of its own"]
fn one_try() {
    let Ok(text) = std::env::var(TRY) else { return };
    let [kind, what, folder] = text.split(':').collect::<Vec<_>>()[..] else { panic!("{text}") };
    let folder = Path::new(folder);
    if kind == "control" {
        let mut files = Files::default();
        files.add(&folder.join("in"), Access::Write);
        files.add(&folder.join("kernel"), Access::Read);
        println!("note: {:?}", confine(&files).unwrap());
    }
    let done = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(format!("a {kind}"));
        let tried = thread.spawn_scoped(scope, || {
            match kind {
                "vcpu" => enter(Kind::Vcpu).unwrap(),
                "disk" => enter(Kind::Disk).unwrap(),
                _ => {}
            }
            act(what, folder)
        });
        tried.unwrap().join().unwrap()
    });
    println!("{}", if done { "it was done" } else { "it was refused" });
}

/// What came of a try.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    Failed,
    /// The process was ended; the number of the system call.
    Ended(i64),
}

fn try_it(kind: &str, what: &str) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("in")).unwrap();
    for name in ["outside", "kernel", "in/inside"] {
        std::fs::write(folder.path().join(name), name).unwrap();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "one_try", "--ignored", "--nocapture"]);
    command.env(TRY, format!("{kind}:{what}:{}", folder.path().display()));
    let output = command.output().unwrap();
    let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if said.contains("no Landlock") {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "CI must have Landlock");
        eprintln!("SKIPPED in part: this kernel has no Landlock");
    }
    if output.status.signal() == Some(libc::SIGABRT) {
        let thread = format!("to thread \"a {kind}\", and ends the machine");
        assert!(error.contains(&thread), "{error}");
        let number = error.split("refuses system call ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        return Outcome::Ended(number.parse().unwrap());
    }
    assert!(output.status.success(), "{kind} {what}: {said}{error}");
    if said.contains("it was done") { Outcome::Done } else { Outcome::Failed }
}

#[test]
fn without_a_fence_everything_can_be_done() {
    for what in [
        "open outside",
        "write outside",
        "open inside",
        "make inside",
        "change what is for reading",
        "start a program",
        "open a connection",
        "send a signal",
        "have memory with code",
        "start a thread",
    ] {
        assert_eq!(try_it("nobody", what), Outcome::Done, "{what}");
    }
}

#[test]
fn no_thread_opens_what_the_machine_does_not_need() {
    for kind in KINDS {
        assert_eq!(try_it(kind, "open outside"), Outcome::Failed, "{kind}");
        assert_eq!(try_it(kind, "write outside"), Outcome::Failed, "{kind}");
        assert_eq!(try_it(kind, "change what is for reading"), Outcome::Failed, "{kind}");
        assert_eq!(try_it(kind, "nothing"), Outcome::Done, "{kind}");
    }
}

#[test]
fn only_control_opens_files_at_all() {
    for what in ["open inside", "make inside", "open for reading"] {
        assert_eq!(try_it("vcpu", what), Outcome::Failed);
        assert_eq!(try_it("disk", what), Outcome::Failed);
        assert_eq!(try_it("control", what), Outcome::Done);
    }
}

#[test]
fn a_call_that_no_thread_makes_ends_the_process_and_is_named() {
    for kind in KINDS {
        assert_eq!(try_it(kind, "send a signal"), Outcome::Ended(libc::SYS_kill), "{kind}");
        assert_eq!(try_it(kind, "open a connection"), Outcome::Ended(libc::SYS_socket), "{kind}");
        assert_eq!(try_it(kind, "have memory with code"), Outcome::Ended(libc::SYS_mmap), "{kind}");
    }
}

#[test]
fn a_disk_may_start_a_thread_that_flushes_and_nobody_a_program() {
    assert_eq!(try_it("disk", "start a thread"), Outcome::Done);
    assert_eq!(try_it("control", "start a thread"), Outcome::Done);
    assert_eq!(try_it("vcpu", "start a thread"), Outcome::Failed);
    for kind in KINDS {
        assert_eq!(try_it(kind, "start a program"), Outcome::Failed, "{kind}");
    }
}
