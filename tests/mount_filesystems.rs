//! A file system lives on a mounted disk.
//!
//! Goal: what ext4 writes through a loop device over `disk.raw` is what it reads later, on a dynamic disk and on a
//! differencing child, and a child's parent keeps every byte. Method: mkfs, mount, copy a real tree, unmount, e2fsck;
//! then all of it once more from the image, and by a reader that is not ours. It needs root, FUSE and loop devices.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::mounts::possible;
use support::{done, noise, project, run, text, vhd};
use tempfile::TempDir;
use vhd_testkit::tools::QemuImg;

/// A disk that is mounted, with a loop device over it. What is left when a test fails is taken away.
struct Attached {
    target: PathBuf,
    /// None once it was given back.
    device: Option<String>,
}

impl Attached {
    fn new(folder: &Path, arguments: &str) -> Self {
        let target = folder.join("disk");
        fs::create_dir_all(&target).unwrap();
        done(folder, &format!("mount {arguments} disk"));
        let mut attached = Self { target, device: None };
        let read_only: &[&str] = if arguments.contains("--read-only") { &["--read-only"] } else { &[] };
        let file = attached.target.join("disk.raw");
        let device = run("losetup", &[read_only, &["--find", "--show", file.to_str().unwrap()]].concat());
        attached.device = Some(device.trim().to_owned());
        attached
    }

    fn device(&self) -> &str {
        self.device.as_deref().unwrap()
    }

    /// Mounts the file system, lets `work` use it, and unmounts it again.
    fn with_files(&self, options: &str, work: impl FnOnce(&Path)) {
        let files = Files { at: self.target.with_file_name("files") };
        fs::create_dir_all(&files.at).unwrap();
        run("mount", &["-t", "ext4", "-o", options, self.device(), files.at.to_str().unwrap()]);
        work(&files.at);
        run("umount", &[&files.at]);
    }

    /// The file system is sound.
    fn check(&self) {
        run("e2fsck", &["-f", "-n", self.device()]);
    }

    /// Gives everything back. When this returns the image is closed.
    fn end(mut self) {
        run("losetup", &["--detach", &self.device.take().unwrap()]);
        let output = vhd(self.target.parent().unwrap(), "unmount disk");
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Some(device) = self.device.take() {
            quietly("losetup", &["--detach", &device]);
        }
        if self.target.join("disk.raw").exists() {
            let output = vhd(self.target.parent().unwrap(), "unmount disk");
            if !output.status.success() {
                quietly("umount", &["--lazy", self.target.to_str().unwrap()]);
            }
        }
    }
}

/// A mounted file system; unmounted at the latest when a test fails.
struct Files {
    at: PathBuf,
}

impl Drop for Files {
    fn drop(&mut self) {
        quietly("umount", &["--lazy", self.at.to_str().unwrap()]);
    }
}

fn quietly(program: &str, arguments: &[&str]) {
    let mut command = Command::new(program);
    let _ = command.args(arguments).env("PATH", support::search_path()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

/// A tree to copy: this project's own files, and such as it lacks.
fn tree() -> TempDir {
    let tree = tempfile::tempdir().unwrap();
    for name in ["src", "vhd-core", "vhd-fuse", "testkit", "testdata", "docs", "Cargo.lock"] {
        let from = project().join(name);
        run("cp", &["-a", from.to_str().unwrap(), tree.path().to_str().unwrap()]);
    }
    let many = tree.path().join("many");
    fs::create_dir(&many).unwrap();
    for index in 0..400_u64 {
        fs::write(many.join(format!("file {index}")), noise(index, (index * 97 % 9000) as usize)).unwrap();
    }
    fs::write(tree.path().join("large"), noise(1, 20 << 20)).unwrap();
    let sparse = fs::File::create(tree.path().join("sparse")).unwrap();
    sparse.set_len(50 << 20).unwrap();
    symlink("large", tree.path().join("link")).unwrap();
    fs::hard_link(tree.path().join("large"), tree.path().join("second name of large")).unwrap();
    tree
}

/// Two trees hold the same.
fn assert_same(a: &Path, b: &Path) {
    run("diff", &["--recursive", "--no-dereference", "--exclude=lost+found", a.to_str().unwrap(), b.to_str().unwrap()]);
}

fn copy_into(tree: &Path, files: &Path) {
    run("cp", &["-a", "--sparse=always", &format!("{}/.", tree.display()), files.to_str().unwrap()]);
}

#[test]
fn ext4_on_a_dynamic_disk() {
    if !possible(&["mkfs.ext4", "losetup"]) {
        return;
    }
    let (folder, tree) = (tempfile::tempdir().unwrap(), tree());
    done(folder.path(), "create a.vhd --size 200M");
    let disk = Attached::new(folder.path(), "a.vhd");
    run("mkfs.ext4", &["-q", disk.device()]);
    disk.with_files("rw", |files| {
        copy_into(tree.path(), files);
        fs::remove_dir_all(files.join("vhd-fuse")).unwrap();
        copy_into(tree.path(), files);
    });
    disk.check();
    disk.end();
    done(folder.path(), "check --deep a.vhd");

    let disk = Attached::new(folder.path(), "--read-only a.vhd");
    disk.check();
    disk.with_files("ro", |files| assert_same(tree.path(), files));
    disk.end();

    // What others read is the same disk.
    if let Some(qemu) = QemuImg::find() {
        let raw = folder.path().join("by-qemu.raw");
        qemu.convert_to_raw(&folder.path().join("a.vhd"), &raw).unwrap();
        done(folder.path(), "compare a.vhd by-qemu.raw");
        run("e2fsck", &["-f", "-n", raw.to_str().unwrap()]);
    }
}

#[test]
fn ext4_on_a_child_whose_parent_keeps_every_byte() {
    if !possible(&["mkfs.ext4", "losetup"]) {
        return;
    }
    let (folder, tree) = (tempfile::tempdir().unwrap(), tree());
    done(folder.path(), "create parent.vhd --size 200M");
    let disk = Attached::new(folder.path(), "parent.vhd");
    run("mkfs.ext4", &["-q", disk.device()]);
    disk.with_files("rw", |files| copy_into(tree.path(), files));
    disk.end();
    let parent = fs::read(folder.path().join("parent.vhd")).unwrap();

    done(folder.path(), "create child.vhd --parent parent.vhd");
    let changed = tempfile::tempdir().unwrap();
    copy_into(tree.path(), changed.path());
    let change = |files: &Path| {
        fs::remove_dir_all(files.join("many")).unwrap();
        fs::write(files.join("Cargo.lock"), "# not any more\n").unwrap();
        copy_into(&project().join("tests"), &files.join("docs"));
        // In the middle of a large file, across sectors and pages.
        let large = fs::OpenOptions::new().write(true).open(files.join("large")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&large, &noise(2, 100_001), 7_654_321).unwrap();
    };
    change(changed.path());
    let disk = Attached::new(folder.path(), "child.vhd");
    disk.with_files("rw", |files| {
        change(files);
        run("fstrim", &[files]);
    });
    disk.check();
    disk.end();
    assert!(fs::read(folder.path().join("parent.vhd")).unwrap() == parent, "the parent was written to");
    done(folder.path(), "check --deep --chain child.vhd");

    let disk = Attached::new(folder.path(), "--read-only child.vhd");
    disk.check();
    disk.with_files("ro", |files| assert_same(changed.path(), files));
    disk.end();
    // And the parent still shows what it showed.
    let disk = Attached::new(folder.path(), "--read-only parent.vhd");
    disk.check();
    disk.with_files("ro", |files| assert_same(tree.path(), files));
    disk.end();
    assert!(fs::read(folder.path().join("parent.vhd")).unwrap() == parent, "the parent was written to");
}
