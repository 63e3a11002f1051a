//! Goal: a real Linux finds its disks through ACPI, mounts a root file system on a chain of VHDs read-write, and starts
//! its init; what it wrote is sound, is discarded or committed exactly, and changed no parent.
//!
//! Method: a small Linux is built from Debian's source (`vmm/tests/linux`, kept in `target/tmp`) and started, on an ext4
//! file system that mkfs.ext4 made, below an undo disk over a differencing disk. e2fsck judges what is left. On a software
//! KVM no program runs, so the machine is cut off where init starts; on the processor's KVM it goes on to a shell, and a
//! kernel of Debian's starts, too.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that can't go on fails here")]

mod support;

#[path = "support/linux.rs"]
mod small;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::time::{Duration, Instant};

use vhd_core::chain::{ChainOptions, ChildOptions, create_child};
use vhd_core::image::OpenOptions;
use vhd_core::ops::undo;
use vhd_core::{LiveDisk, Progress};
use vhd_testkit::fixture::Kind;
use vhd_testkit::tools::require;
use vhd_vmm::loader::Boot;
use vhd_vmm::machine::{Command, Definition, Machine, MachineDisk, State};
use vhd_vmm::virtio::block::BlockOptions;

use small::{hardware_kvm, linux, say};
use support::{Said, definition, kvm, machine, make_disk, open};

/// A software KVM takes a minute where nothing else runs, and tests do.
const PATIENCE: Duration = Duration::from_secs(1800);
const ROOT_SIZE: u64 = 32 << 20;

/// What a software KVM lacks is turned off, and so is what it does slowly.
const SOFTWARE: &str = "nokaslr mitigations=off noxsave nofsgsbase nopcid noinvpcid clearcpuid=151,308,295,514,141 \
    tsc=reliable no_timer_check lpj=9781624";

fn command_line(more: &str) -> String {
    let software = if hardware_kvm() { "" } else { SOFTWARE };
    format!("console=ttyS0 panic=-1 {software} {more}").split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What init does where programs run.
const INIT: &str = "#!/bin/busybox sh\n\
    echo \"init: $(/bin/busybox cat /greeting)\"\n\
    echo written by the guest > /written\n\
    /bin/busybox sync\n\
    echo init: done\n\
    /bin/busybox mount -o remount,ro /\n\
    /bin/busybox poweroff -f\n";

/// An ext4 file system with busybox and that init, or nothing where tools are missing.
fn root_file_system() -> Option<Vec<u8>> {
    let (mkfs, busybox) = (require("mkfs.ext4")?, require("busybox")?);
    drop(busybox);
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    for name in ["bin", "sbin", "dev", "proc", "sys"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    let which = Process::new("sh").args(["-c", "command -v busybox"]).output().unwrap();
    fs::copy(String::from_utf8(which.stdout).unwrap().trim(), root.join("bin/busybox")).unwrap();
    fs::write(root.join("greeting"), "hello from the image\n").unwrap();
    fs::write(root.join("sbin/init"), INIT).unwrap();
    let mode = Process::new("chmod").arg("755").arg(root.join("sbin/init")).arg(root.join("bin/busybox")).status();
    assert!(mode.unwrap().success());
    let image = folder.path().join("image");
    let (from, to, size) = (root.to_str().unwrap(), image.to_str().unwrap(), format!("{}K", ROOT_SIZE >> 10));
    mkfs.run(&["-q", "-F", "-d", from, to, &size]).unwrap();
    fs::read(image).ok()
}

/// Waits until the guest has said this; the machine must not end before.
fn wait_for(machine: &Machine, said: &Said, what: &str) {
    let begin = Instant::now();
    loop {
        let state = machine.state();
        let text = said.text();
        if text.contains(what) {
            return;
        }
        assert!(state == State::Running, "{state:?} before {what:?}: {text}");
        assert!(begin.elapsed() < PATIENCE, "{what:?} was not said: {text}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn bytes_of(image: &Path) -> Vec<u8> {
    let live = LiveDisk::open(image, &ChainOptions::default()).unwrap();
    let disk = live.disk();
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// What e2fsck says after it has replayed the journal, as a mount would: nothing is wrong.
fn is_sound(bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("raw");
    fs::write(&raw, bytes).unwrap();
    let check = |option: &str| {
        let output = Process::new("e2fsck").arg(option).arg(&raw).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    // 1 is a journal that was replayed.
    let (status, text) = check("-fp");
    assert!(matches!(status, Some(0 | 1)), "{text}");
    let (status, text) = check("-fn");
    assert_eq!(status, Some(0), "{text}");
}

fn mount_count(bytes: &[u8]) -> u16 {
    u16::from(bytes[1024 + 0x34]) | u16::from(bytes[1024 + 0x35]) << 8
}

/// Boots from the disk until init was started, and, where programs run, until it has done its work.
fn boot(image: &Path, kernel: PathBuf, initrd: Option<PathBuf>, line: &str) -> String {
    let boot = Boot { kernel: Some(kernel), initrd, command_line: command_line(line) };
    let disks = vec![MachineDisk { live: open(image), options: BlockOptions::default() }];
    let (machine, said, _) = machine(Definition { boot, memory: 128 << 20, ..definition("", disks) });
    let begin = Instant::now();
    machine.command(Command::Start).unwrap();
    wait_for(&machine, &said, if hardware_kvm() { "init: hello from the image" } else { "Run /sbin/init as init process" });
    say(&format!("Linux started its init after {:.1} s", begin.elapsed().as_secs_f64()));
    if hardware_kvm() {
        assert_eq!(machine.wait(PATIENCE, |state| *state != State::Running), State::Off, "{}", said.text());
        assert!(said.text().contains("init: done"), "{}", said.text());
    } else {
        say("SKIPPED: on a software KVM no program runs; what init would do was not tried");
        machine.command(Command::Off).unwrap();
    }
    let text = said.text();
    say(&text);
    text
}

/// A base disk with the root file system, and a child of it.
fn chain(folder: &Path, root: &[u8]) -> [PathBuf; 2] {
    let base = make_disk(folder, "base", Kind::Dynamic, ROOT_SIZE);
    let live = open(&base);
    live.disk().write_at(root, 0).unwrap();
    live.disk().close().unwrap();
    drop(live);
    let child = folder.join("child.vhd");
    create_child(&child, &base, &ChildOptions::new(uuid::Uuid::new_v4().into_bytes()), &ChainOptions::default()).unwrap();
    [base, child]
}

#[test]
fn linux_mounts_its_root_on_a_chain_and_what_it_wrote_is_sound_discarded_or_committed() {
    if !kvm() {
        return;
    }
    let (Some(kernels), Some(root)) = (linux(), root_file_system()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let [base, child] = chain(folder, &root);
    let before = [&base, &child].map(|image| fs::read(image).unwrap());
    let images = [child.clone()];
    undo::start(&images, None, &ChainOptions::default()).unwrap();
    let undo_disk = undo::undo_of(&child, None).unwrap();

    let text = boot(&undo_disk, kernels.join("vmlinux"), None, "root=/dev/vda rw");
    assert!(text.contains("[vda] 65536 512-byte logical blocks"), "{text}");
    assert!(text.contains("VFS: Mounted root (ext4 filesystem) on device"), "{text}");

    let written = bytes_of(&undo_disk);
    assert_eq!((mount_count(&root), mount_count(&written)), (0, 1), "the mount was not written");
    is_sound(&written);
    assert!(before == [&base, &child].map(|image| fs::read(image).unwrap()), "a parent was written");

    // The same session, to its two ends.
    let other = folder.join("other");
    fs::create_dir(&other).unwrap();
    for image in [&base, &child, &undo_disk] {
        fs::copy(image, other.join(image.file_name().unwrap())).unwrap();
    }
    let writable = ChainOptions { image: OpenOptions { writable: true, ..OpenOptions::default() }, ..ChainOptions::default() };
    undo::discard(&images, None, false, &writable).unwrap();
    assert!(!undo_disk.exists() && before == [&base, &child].map(|image| fs::read(image).unwrap()));
    assert!(bytes_of(&child) == root);

    let copies = [other.join("child.vhd")];
    undo::commit(&copies, None, false, &writable, &Progress::default()).unwrap();
    assert!(!other.join(undo_disk.file_name().unwrap()).exists());
    assert!(bytes_of(&copies[0]) == written, "what was committed is not what was written");
    assert!(before[0] == fs::read(other.join("base.vhd")).unwrap(), "the parent of what was committed to was written");
}

/// Starts a kernel and waits for its first words.
fn speaks(kernel: PathBuf) -> String {
    let boot = Boot { kernel: Some(kernel), initrd: None, command_line: command_line("earlyprintk=ttyS0") };
    let (machine, said, _) = machine(Definition { boot, memory: 128 << 20, ..definition("", vec![]) });
    machine.command(Command::Start).unwrap();
    wait_for(&machine, &said, "Command line: console=ttyS0");
    machine.command(Command::Off).unwrap();
    said.text()
}

#[test]
fn a_bzimage_of_linux_starts_however_it_is_packed() {
    if !kvm() {
        return;
    }
    let Some(kernels) = linux() else { return };
    for packing in ["gzip", "zstd", "lz4"] {
        let text = speaks(kernels.join(format!("bzImage-{packing}")));
        assert!(text.contains("Linux version 6.1."), "{packing}: {text}");
    }
}

/// The last has a partition, which is seen only when a request to it was answered.
#[test]
fn linux_finds_disks_that_share_interrupt_lines() {
    const DISKS: usize = 20;
    if !kvm() {
        return;
    }
    let Some(kernels) = linux() else { return };
    let folder = tempfile::tempdir().unwrap();
    let images: Vec<_> =
        (0..DISKS).map(|number| make_disk(folder.path(), &format!("d{number}"), Kind::Dynamic, 1 << 20)).collect();
    let disks: Vec<_> = images.iter().map(|image| MachineDisk { live: open(image), options: BlockOptions::default() }).collect();
    let mut table = [0; 512];
    table[446 + 4] = 0x83;
    (table[446 + 8], table[446 + 12], table[510], table[511]) = (8, 64, 0x55, 0xAA);
    for disk in [&disks[0], &disks[DISKS - 1]] {
        disk.live.disk().write_at(&table, 0).unwrap();
    }
    let boot = Boot { kernel: Some(kernels.join("vmlinux")), initrd: None, command_line: command_line("root=/dev/vdt1") };
    let (machine, said, _) = machine(Definition { boot, memory: 128 << 20, ..definition("", disks) });
    machine.command(Command::Start).unwrap();
    wait_for(&machine, &said, " vdt: vdt1");
    assert!(said.text().contains(" vda: vda1"), "{}", said.text());
    machine.command(Command::Off).unwrap();
}

#[test]
fn linux_unpacks_an_initrd_and_starts_what_is_in_it() {
    if !kvm() {
        return;
    }
    let (Some(kernels), Some(_)) = (linux(), require("cpio")) else { return };
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("i")).unwrap();
    fs::write(folder.path().join("i/init"), "#!/bin/nothing\n").unwrap();
    let pack = "chmod 755 i/init && cd i && find . | cpio -o -H newc --quiet > ../initrd";
    assert!(Process::new("sh").args(["-c", pack]).current_dir(&folder).status().unwrap().success());
    let boot = Boot {
        kernel: Some(kernels.join("vmlinux")),
        initrd: Some(folder.path().join("initrd")),
        command_line: command_line("rdinit=/init"),
    };
    let (machine, said, _) = machine(Definition { boot, memory: 128 << 20, ..definition("", vec![]) });
    machine.command(Command::Start).unwrap();
    wait_for(&machine, &said, "Run /init as init process");
    machine.command(Command::Off).unwrap();
}

#[test]
fn a_kernel_of_debians_boots() {
    if !kvm() {
        return;
    }
    if !hardware_kvm() {
        say("SKIPPED: a kernel of Debian's takes too long on a software KVM; needs the processor's");
        return;
    }
    let Some(root) = root_file_system() else { return };
    let release = fs::read_dir("/lib/modules").unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
    let Some(release) = release.filter(|name| Path::new("/boot").join(format!("vmlinuz-{name}")).exists()).max() else {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "CI must have a kernel of Debian's");
        say("SKIPPED: there is no kernel of Debian's in /boot");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    make_initrd(folder.path(), &release);
    let [_, child] = chain(folder.path(), &root);
    let kernel = Path::new("/boot").join(format!("vmlinuz-{release}"));
    boot(&child, kernel, Some(folder.path().join("initrd")), "quiet");
    is_sound(&bytes_of(&child));
}

/// An initial RAM disk with busybox and the modules that the root needs.
fn make_initrd(folder: &Path, release: &str) {
    let init = "#!/bin/busybox sh\n/bin/busybox mount -t devtmpfs dev /dev\n\
        for module in $(/bin/busybox cat /modules); do /bin/busybox insmod /lib/$module; done\n\
        until [ -b /dev/vda ]; do /bin/busybox sleep 1; done\n\
        /bin/busybox mount -t ext4 /dev/vda /root\nexec /bin/busybox switch_root /root /sbin/init\n";
    let script = format!(
        "set -e; mkdir -p i/bin i/lib i/dev i/root; cp $(command -v busybox) i/bin/busybox; cp init i/init; chmod 755 i/init
        for wanted in virtio_mmio virtio_blk ext4; do modprobe -S {release} --show-depends $wanted; done |
            awk '$1 == \"insmod\" && !seen[$2]++ {{ print $2 }}' | while read module; do
            name=$(basename $module); name=${{name%.xz}}
            case $module in *.xz) xz -dc $module > i/lib/$name;; *) cp $module i/lib/$name;; esac
            echo $name >> i/modules
        done
        cd i; find . | cpio -o -H newc --quiet > ../initrd"
    );
    fs::write(folder.join("init"), init).unwrap();
    let output = Process::new("sh").args(["-c", &script]).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
