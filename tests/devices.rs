//! Goal: devices are read, written and linked as files are, but none that someone else uses, and no other than the one
//! that was meant.
//!
//! Method: loop devices, whole and with partitions, mounted and not. It needs root; where there are no loop devices it says
//! that it was skipped.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::{done, json, names_in, noise, refused, run, search_path};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A loop device over a file of 8 MiB.
struct Device {
    name: String,
    file: PathBuf,
}

impl Device {
    fn new(folder: &Path, name: &str) -> Option<Self> {
        let file = folder.join(name);
        if !file.exists() {
            fs::File::create(&file).unwrap().set_len(8 * MIB).unwrap();
        }
        let arguments = ["--find", "--show", "--partscan", file.to_str().unwrap()];
        let said = Command::new("losetup").args(arguments).env("PATH", search_path()).output().unwrap();
        if said.status.success() {
            return Some(Self { name: support::text(&said.stdout).trim().to_owned(), file });
        }
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "no loop device: {}", support::text(&said.stderr));
        eprintln!("SKIPPED: no loop device");
        None
    }

    /// The bytes on the medium.
    fn content(&self) -> Vec<u8> {
        run("blockdev", &["--flushbufs", &self.name]);
        fs::read(&self.file).unwrap()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        run("losetup", &["--detach", &self.name]);
    }
}

/// 5 MiB of a disk with holes, as raw bytes and as a dynamic VHD.
fn sample(folder: &Path) -> Vec<u8> {
    let content = [noise(1, MIB as usize), vec![0; 3 * MIB as usize], noise(2, MIB as usize)].concat();
    fs::write(folder.join("sample.img"), &content).unwrap();
    done(folder, "convert sample.img sample.vhd");
    content
}

#[test]
fn a_device_is_source_and_destination() {
    let folder = TempDir::new().unwrap();
    let Some(device) = Device::new(folder.path(), "medium") else { return };
    let name = &device.name;
    let content = sample(folder.path());
    fs::write(&device.file, noise(9, 8 * MIB as usize)).unwrap();
    assert!(refused(folder.path(), &format!("convert sample.vhd {name}")).contains("--overwrite"));
    done(folder.path(), &format!("convert sample.vhd {name} --overwrite"));
    let held = device.content();
    assert!(held[..content.len()] == content && held[content.len()..] == noise(9, 8 * MIB as usize)[content.len()..]);
    done(folder.path(), &format!("convert {name} back.vhd"));
    assert_eq!(json(folder.path(), "info back.vhd", 0)["virtual_size"], 8 * MIB);
    done(folder.path(), &format!("compare back.vhd {name}"));
    for kind in ["dynamic", "fixed"] {
        // A VHD on the device itself.
        done(folder.path(), &format!("convert sample.vhd {name} --to {kind} --overwrite"));
        done(folder.path(), &format!("compare {name} sample.vhd --from-a vhd"));
        assert_eq!(json(folder.path(), &format!("check {name} --deep"), 0)["ok"], true, "{kind}");
    }
    let large = "create large.vhd --size 9M";
    done(folder.path(), large);
    let said = refused(folder.path(), &format!("convert large.vhd {name} --overwrite"));
    assert!(said.contains("has room for 8388608 bytes"), "{said}");
}

#[test]
fn a_device_that_is_used_is_not_written_and_not_linked() {
    let folder = TempDir::new().unwrap();
    let Some(device) = Device::new(folder.path(), "medium") else { return };
    let name = &device.name;
    sample(folder.path());
    run("mkfs.ext4", &["-q", "-F", name]);
    fs::create_dir(folder.path().join("files")).unwrap();
    run("mount", &[name, folder.path().join("files").to_str().unwrap()]);
    let lines = [format!("convert sample.vhd {name} --overwrite"), format!("create link.vhd --link {name}")];
    let said = lines.map(|line| refused(folder.path(), &line));
    run("umount", &[folder.path().join("files")]);
    assert!(said.iter().all(|said| said.contains("in use: mounted")), "{said:?}");
    assert!(!names_in(folder.path()).contains(&"link.vhd".to_owned()));
}

#[test]
fn a_linked_disk_is_its_device_and_no_other() {
    let folder = TempDir::new().unwrap();
    let Some(device) = Device::new(folder.path(), "medium") else { return };
    let name = device.name.clone();
    fs::write(&device.file, noise(5, 8 * MIB as usize)).unwrap();
    done(folder.path(), &format!("create link.vhd --link {name}"));
    let said = json(folder.path(), "info link.vhd", 0);
    assert_eq!(
        (&said["type"], &said["virtual_size"], &said["blocks_allocated"]),
        (&"linked".into(), &(8 * MIB).into(), &0.into())
    );
    assert_eq!((&said["linked"]["path"], &said["warnings"]), (&name.as_str().into(), &serde_json::json!([])));
    done(folder.path(), "convert link.vhd copy.vhd");
    done(folder.path(), &format!("compare copy.vhd {name}"));
    for line in [
        "write link.vhd --offset 0",
        "create child.vhd --parent link.vhd",
        "compact link.vhd",
        "merge link.vhd",
        "resize link.vhd 9M",
    ] {
        assert!(refused(folder.path(), line).contains("linked disk"), "{line}");
    }
    done(folder.path(), "check link.vhd");
    fs::OpenOptions::new().write(true).open(&device.file).unwrap().set_len(9 * MIB).unwrap();
    run("losetup", &["--set-capacity", &name]);
    let said = refused(folder.path(), "convert link.vhd another.vhd");
    assert!(said.contains("is another; link it anew"), "{said}");
    assert!(!json(folder.path(), "info link.vhd", 0)["warnings"].as_array().unwrap().is_empty());
}

#[test]
fn a_partition_can_not_be_linked() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("medium");
    fs::File::create(&file).unwrap().set_len(8 * MIB).unwrap();
    run("sgdisk", &["-n", "1:2048:0", file.to_str().unwrap()]);
    let Some(device) = Device::new(folder.path(), "medium") else { return };
    // Kernels that know no GPT take partitions all the same.
    let partition = format!("{}p1", device.name);
    if !Path::new(&format!("/sys/class/block/{}", &partition[5..])).exists() {
        run("partx", &["--add", &device.name]);
    }
    if !Path::new(&partition).exists() {
        // No udev to make nodes here.
        let number = fs::read_to_string(format!("/sys/class/block/{}/dev", &partition[5..])).unwrap();
        let (major, minor) = number.trim().split_once(':').unwrap();
        let node = folder.path().join("p1");
        run("mknod", &[node.to_str().unwrap(), "b", major, minor]);
        assert!(refused(folder.path(), "create link.vhd --link p1").contains("is a partition"));
        return;
    }
    assert!(refused(folder.path(), &format!("create link.vhd --link {partition}")).contains("is a partition"));
}

#[test]
fn a_raw_file_is_linked_in_its_folder_and_elsewhere_when_it_is_named() {
    let folder = TempDir::new().unwrap();
    let content = sample(folder.path());
    done(folder.path(), "create link.vhd --link sample.img");
    assert!(fs::metadata(folder.path().join("link.vhd")).unwrap().len() < 64 << 10);
    let said = done(folder.path(), "check link.vhd");
    assert!(said.contains("linked to") && !said.contains("--raw-parent"), "{said}");
    for line in ["convert link.vhd --in-place --to fixed", "reparent link.vhd", "compact link.vhd"] {
        assert!(refused(folder.path(), line).contains("is a linked disk of"), "{line}");
    }
    done(folder.path(), "convert link.vhd copy.vhd");
    assert!(refused(folder.path(), "create other.vhd --link copy.vhd").contains("is a VHD already"));
    done(folder.path(), "compare copy.vhd sample.img");
    done(folder.path(), "compare link.vhd sample.img");
    fs::create_dir(folder.path().join("sub")).unwrap();
    done(folder.path(), "create sub/link.vhd --link sample.img");
    let said = refused(folder.path(), "convert sub/link.vhd out.vhd");
    assert!(said.contains("--raw-parent"), "{said}");
    done(folder.path(), "convert sub/link.vhd out.vhd --raw-parent sample.img");
    done(folder.path(), "compare out.vhd sample.img");
    // Another file of that name.
    fs::remove_file(folder.path().join("sample.img")).unwrap();
    fs::write(folder.path().join("padding"), "").unwrap();
    fs::write(folder.path().join("sample.img"), &content).unwrap();
    let said = refused(folder.path(), "convert link.vhd again.vhd");
    assert!(said.contains("is another"), "{said}");
    let found = json(folder.path(), "check link.vhd", 1);
    assert_eq!(found["findings"].as_array().unwrap().last().unwrap()["code"], "parent-not-found");
}
