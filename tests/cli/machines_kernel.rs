//! `vhd run` as a new user has it: the kernel that is installed on the disk, and hosts where KVM is not there or may not be used.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use vhd_testkit::machine::kvm;
use vhd_testkit::tools::require;

use super::machines::{put_guest, said, vhd};
use crate::support::{done, text};

/// Makes `root.vhd`: an ext4 file system whose boot menu starts the test guest.
fn bootable(folder: &Path) -> bool {
    let Some(mkfs) = require("mkfs.ext4") else { return false };
    put_guest(folder);
    fs::create_dir_all(folder.join("files/extlinux")).unwrap();
    fs::rename(folder.join("guest"), folder.join("files/vmlinuz")).unwrap();
    let menu = "default a\nlabel a\nmenu label The Guest\nkernel /vmlinuz\nappend do=hello\n";
    fs::write(folder.join("files/extlinux/extlinux.conf"), menu).unwrap();
    let at = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    mkfs.run(&["-q".to_owned(), "-F".into(), "-d".into(), at("files"), at("root.raw"), "16M".into()]).unwrap();
    done(folder, "convert root.raw root.vhd");
    true
}

#[test]
fn without_a_kernel_the_one_of_the_disks_boot_menu_is_started_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    if !kvm() || !bootable(folder) {
        return;
    }
    let run = |more: &[&str]| vhd(folder).args(["run", "--disk", "root.vhd", "--memory", "16M"]).args(more).output().unwrap();
    let output = run(&["--append", "places=3"]);
    assert_eq!(text(&output.stdout), "guest: do=hello places=3\nguest: done\n", "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("starts 'The Guest' (/vmlinuz) of root.vhd"), "{}", text(&output.stderr));
    // A console is added where nothing is said, so that a menu made for a screen can be seen.
    let output = run(&[]);
    assert!(text(&output.stdout).starts_with("guest: do=hello console=ttyS0 "), "{}", text(&output.stdout));
    // One of the host's goes first.
    fs::copy(folder.join("files/vmlinuz"), folder.join("other")).unwrap();
    let output = run(&["--kernel", "other", "--append", "do=clock"]);
    assert!(text(&output.stdout).contains("year ") && text(&output.stderr).is_empty(), "{}", text(&output.stderr));
    // A disk without one.
    done(folder, "create empty.vhd --size 16M");
    let output = vhd(folder).args(["run", "--disk", "empty.vhd"]).output().unwrap();
    let message = "vhd: empty.vhd: has no kernel that its boot menu starts (the disk as a whole has neither an ext nor a FAT file \
        system); give one with --kernel\n";
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(2), message));
}

#[test]
fn a_host_without_kvm_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    if !bootable(folder) {
        return;
    }
    // A name space in which /dev is empty.
    let root = nix::unistd::geteuid().is_root();
    let line = format!("mount -t tmpfs none /dev && exec {} run --disk root.vhd", env!("CARGO_BIN_EXE_vhd"));
    let mut command = Command::new("unshare");
    command.arg(if root { "-m" } else { "-rm" }).args(["sh", "-c", &line]);
    let output = command.current_dir(folder).env("XDG_RUNTIME_DIR", folder).stdin(Stdio::null()).output().unwrap();
    let message =
        "vhd: /dev/kvm: does not exist; load the module kvm_intel or kvm_amd, and turn on virtualisation in the firmware\n";
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(2), message));
}

#[test]
fn a_user_who_may_not_use_kvm_is_told_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    if !kvm() || !bootable(folder) {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can be a user who may not use KVM");
        return;
    }
    assert_eq!(fs::metadata("/dev/kvm").unwrap().permissions().mode() & 0o006, 0, "everyone may use KVM here");
    fs::copy(env!("CARGO_BIN_EXE_vhd"), folder.join("program")).unwrap();
    for path in [folder, &folder.join("root.vhd")] {
        std::os::unix::fs::chown(path, Some(65534), Some(65534)).unwrap();
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "./program", "run", "--disk", "root.vhd"]);
    let output = command.current_dir(folder).env("XDG_RUNTIME_DIR", folder).stdin(Stdio::null()).output().unwrap();
    let message = "vhd: /dev/kvm: may not be opened by this user; add the user to the group kvm: usermod -a -G kvm USER\n";
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(2), message));
    // What the message says is enough.
    let with = format!("--groups={}", fs::metadata("/dev/kvm").unwrap().gid());
    let line = ["--reuid", "65534", "--regid", "65534", &with, "./program", "run", "--disk", "root.vhd", "--memory", "16M"];
    let mut command = Command::new("setpriv");
    let told = said(command.args(line).current_dir(folder).env("XDG_RUNTIME_DIR", folder).stdin(Stdio::null()));
    assert!(told.ends_with("guest: done\n"), "{told}");
}
