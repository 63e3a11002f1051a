//! Options of every command that opens a chain, and what protects parents.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use tempfile::TempDir;

use crate::support::{done, expect, json, refused, vhd, vhd_fed};

/// `base.vhd` and `leaf.vhd`, each with a word of its own.
fn chain() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create base.vhd --size 4M");
    expect(vhd_fed(dir, "write base.vhd --offset 0", b"base"), 0, "write");
    done(dir, "create leaf.vhd --parent base.vhd");
    expect(vhd_fed(dir, "write leaf.vhd --offset 1M", b"leaf"), 0, "write");
    folder
}

#[test]
fn a_parent_elsewhere_is_opened_when_allowed() {
    let folder = chain();
    let dir = folder.path();
    fs::create_dir(dir.join("parents")).unwrap();
    fs::rename(dir.join("base.vhd"), dir.join("parents/renamed.vhd")).unwrap();
    let read = "read leaf.vhd --offset 0 --length 4";
    assert!(refused(dir, read).contains("--parent-dir"));
    assert_eq!(done(dir, &format!("{read} --parent-dir parents")), "base");
    done(dir, "check leaf.vhd --chain --parent-dir parents");

    // A parent that is not in the child's folder or below is opened only when the user says so.
    fs::create_dir(dir.join("children")).unwrap();
    let created = expect(vhd(dir, "create children/c.vhd --parent leaf.vhd --parent-dir parents"), 0, "create");
    assert!(String::from_utf8_lossy(&created.stderr).contains("--parent-dir"));
    let read = "read children/c.vhd --offset 1M --length 4";
    assert!(refused(dir, read).contains("--any-parent"));
    assert_eq!(done(dir, &format!("{read} --any-parent --parent-dir parents")), "leaf");
    assert_eq!(done(dir, &format!("{read} --parent-dir . --parent-dir parents")), "leaf");
}

#[test]
fn another_image_in_the_place_of_the_parent_is_refused() {
    let folder = chain();
    let dir = folder.path();
    done(dir, "create --overwrite --force base.vhd --size 4M");
    let error = json(dir, "read leaf.vhd --offset 0 --length 4", 2);
    assert_eq!(error["error"]["kind"], "parent");
    let message = error["error"]["message"].as_str().unwrap();
    assert!(message.contains("UUID") && message.contains("expected"), "{message}");
}

#[test]
fn a_raw_parent_is_opened_when_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    fs::write(dir.join("base.img"), b"raw bytes".repeat(1000)).unwrap();
    done(dir, "create -q child.vhd --parent base.img");
    let read = "read child.vhd --offset 0 --length 9";
    assert!(refused(dir, read).contains("--raw-parent"));
    assert_eq!(done(dir, &format!("{read} --raw-parent base.img")), "raw bytes");
    expect(vhd_fed(dir, "write child.vhd --raw-parent base.img --offset 4", b"BYTES"), 0, "write");
    assert_eq!(done(dir, &format!("{read} --raw-parent base.img")), "raw BYTES");
    assert!(fs::read(dir.join("base.img")).unwrap().starts_with(b"raw bytes"));
}

#[test]
fn a_parent_beside_its_child_is_not_written() {
    let folder = chain();
    let dir = folder.path();
    let before = fs::read(dir.join("base.vhd")).unwrap();
    let output = vhd_fed(dir, "write base.vhd --offset 0", b"lost");
    let said = crate::support::one_line(&expect(output, 2, "write"), "write");
    assert!(said.contains("leaf.vhd") && said.contains("--force"), "{said}");
    assert!(fs::read(dir.join("base.vhd")).unwrap() == before);
    assert_eq!(done(dir, "read base.vhd --offset 0 --length 4"), "base");
    expect(vhd_fed(dir, "write base.vhd --offset 0 --force", b"lost"), 0, "write --force");
    assert_eq!(done(dir, "read base.vhd --offset 0 --length 4"), "lost");
}

#[test]
fn compacting_a_parent_is_refused_for_what_it_does_to_its_children() {
    let folder = chain();
    let dir = folder.path();
    let before = fs::read(dir.join("base.vhd")).unwrap();
    let said = refused(dir, "compact base.vhd");
    assert!(said.contains("leaf.vhd: children read the same") && said.contains("last changed"), "{said}");
    assert!(!said.contains("destroy") && said.contains("--force"), "{said}");
    let said = refused(dir, "compact base.vhd --free-space");
    assert!(said.contains("leaf.vhd, which may need what --free-space drops"), "{said}");
    assert!(fs::read(dir.join("base.vhd")).unwrap() == before);
    done(dir, "convert leaf.vhd before.raw");
    done(dir, "compact base.vhd --force");
    done(dir, "compare leaf.vhd before.raw");
}

#[test]
fn an_image_is_not_merged_into_itself() {
    let folder = chain();
    let dir = folder.path();
    assert!(refused(dir, "merge base.vhd").contains("base.vhd: has no parent to merge into"));
    for line in ["merge leaf.vhd --into leaf.vhd", "merge base.vhd --into base.vhd"] {
        assert!(refused(dir, line).contains("can't be merged into itself"));
    }
}

#[test]
fn protect_parent_makes_it_read_only() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create base.vhd --size 4M");
    // Before anything is asserted: an immutable file outlives its folder.
    let created = vhd(dir, "create leaf.vhd --parent base.vhd --protect-parent");
    let mode = fs::metadata(dir.join("base.vhd")).unwrap().permissions().mode();
    let write = vhd_fed(dir, "write base.vhd --offset 0 --force", b"x");
    let _ = Command::new("chattr").arg("-i").arg(dir.join("base.vhd")).status();
    expect(created, 0, "create --protect-parent");
    assert_eq!(mode & 0o222, 0);
    // Root may write what is read-only unless it is immutable too, which not every file system knows.
    assert!(write.status.code() == Some(2) || nix::unistd::geteuid().is_root());
    done(dir, "read leaf.vhd --offset 0 --length 4");
}

#[test]
fn the_geometry_counts_when_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create a.vhd --size 40M");
    assert_eq!(json(dir, "info a.vhd --force-size chs", 0)["virtual_size"], 41_909_760);
    assert_eq!(json(dir, "info a.vhd --force-size current", 0)["virtual_size"], 40 << 20);
    refused(dir, "read a.vhd --force-size chs --offset 41909760 --length 1");
    done(dir, "convert a.vhd --force-size chs a.raw");
    assert_eq!(fs::metadata(dir.join("a.raw")).unwrap().len(), 41_909_760);
}

#[test]
fn wrong_checksums_are_tolerated_when_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create a.vhd --size 4M --type fixed");
    let path = dir.join("a.vhd");
    let mut bytes = fs::read(&path).unwrap();
    bytes[..5].copy_from_slice(b"hello");
    // The time stamp.
    bytes[(4 << 20) + 24] ^= 0xFF;
    fs::write(&path, &bytes).unwrap();
    let said = refused(dir, "read a.vhd --offset 0 --length 5");
    assert!(said.contains("checksum") && said.contains("--tolerant"), "{said}");
    assert_eq!(done(dir, "read a.vhd --tolerant --offset 0 --length 5"), "hello");
    let info = json(dir, "info a.vhd --tolerant", 0);
    assert!(info["warnings"][0].as_str().unwrap().contains("checksum"), "{info}");
    let output = vhd_fed(dir, "write a.vhd --tolerant --offset 0", b"x");
    expect(output, 2, "what is tolerated is not written to");
    assert!(fs::read(&path).unwrap() == bytes);
}
