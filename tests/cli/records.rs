//! What lies beside an image, seen from the command line: told, cleared, read past; never in the way of only some commands.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::support::{done, expect, json, refused, text, vhd, vhd_fed};

/// A base with a child, and a record that says that their merge was begun.
fn begun(dir: &Path) {
    done(dir, "create base.vhd --size 8M");
    expect(vhd_fed(dir, "write base.vhd --offset 0", b"base"), 0, "write");
    done(dir, "create leaf.vhd --parent base.vhd");
    let uuid = |name: &str| json(dir, &format!("info {name}"), 0)["uuid"].as_str().unwrap().to_owned();
    let member = serde_json::json!({
        "target": "base.vhd", "target_uuid": [uuid("base.vhd"), uuid::Uuid::new_v4()], "leaf": "leaf.vhd",
        "leaf_uuid": uuid("leaf.vhd"), "between": [], "children": [], "delete": false
    });
    let merge = serde_json::json!({ "merge": { "members": [member], "undo": false, "finishing": false, "force": false } });
    let record = serde_json::from_value(merge).unwrap();
    vhd_core::intent::put(&vhd_core::storage::LocalHost, &dir.join("base.vhd"), &record).unwrap();
}

#[test]
fn a_record_is_shown_cleared_and_read_past() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    begun(dir);
    let told = refused(dir, "read base.vhd --offset 0 --length 4");
    assert!(told.contains("vhd merge ") && told.contains("leaf.vhd --into "), "{told}");
    let past = expect(vhd(dir, "read base.vhd --offset 0 --length 4 --ignore-record"), 0, "read past");
    assert_eq!(text(&past.stdout), "base");
    assert!(text(&past.stderr).contains("interrupted"), "{}", text(&past.stderr));
    assert!(refused(dir, "resize base.vhd 16M --ignore-record").contains("reading only"));
    let shown = json(dir, "check base.vhd --clear-record --dry-run", 0);
    assert_eq!((shown["operation"].as_str(), shown["done"].as_bool()), (Some("merge"), Some(false)));
    assert!(dir.join("base.vhd.vhd-intent").exists());
    assert!(done(dir, "check base.vhd --clear-record").contains("removed"));
    assert_eq!(done(dir, "read base.vhd --offset 0 --length 4"), "base");
    assert!(refused(dir, "check base.vhd --clear-record").contains("has no record"));
}

#[test]
fn what_can_be_no_record_is_an_error_from_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create x.vhd --size 8M");
    let record = dir.join("x.vhd.vhd-intent");
    let kinds: [fn(&Path); 3] = [
        |path| mkfifo(path, Mode::S_IRWXU).unwrap(),
        |path| fs::create_dir(path).unwrap(),
        |path| std::os::unix::fs::symlink("/dev/zero", path).unwrap(),
    ];
    for kind in kinds {
        kind(&record);
        for line in ["read x.vhd --offset 0 --length 1", "check x.vhd", "check x.vhd --clear-record", "resize x.vhd 16M"] {
            assert!(refused(dir, line).contains("move it away"), "{line}");
        }
        if record.is_dir() { fs::remove_dir(&record).unwrap() } else { fs::remove_file(&record).unwrap() }
    }
    done(dir, "check x.vhd");
}

#[test]
fn what_holds_guest_data_is_as_closed_as_where_it_comes_from() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let mode = |name: &str| fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
    done(dir, "create closed.vhd --size 8M");
    fs::set_permissions(dir.join("closed.vhd"), fs::Permissions::from_mode(0o600)).unwrap();
    done(dir, "create open.vhd --size 8M");
    fs::set_permissions(dir.join("open.vhd"), fs::Permissions::from_mode(0o644)).unwrap();
    for (source, expected) in [("closed", 0o600), ("open", 0o644)] {
        done(dir, &format!("undo start {source}.vhd"));
        done(dir, &format!("convert {source}.vhd {source}.copy.vhd"));
        done(dir, &format!("convert {source}.vhd {source}.raw"));
        done(dir, &format!("create {source}.child.vhd --parent {source}.vud"));
        for name in ["vud", "copy.vhd", "raw", "child.vhd"] {
            assert_eq!(mode(&format!("{source}.{name}")), expected, "{source}.{name}");
        }
    }
    expect(vhd_fed(dir, "convert - fed.vhd --size 8M", &[1; 512]), 0, "convert");
    assert_eq!(mode("fed.vhd"), 0o600);
    // What is replaced keeps its mode.
    done(dir, "convert open.vhd closed.copy.vhd --overwrite");
    assert_eq!(mode("closed.copy.vhd"), 0o600);
}

#[test]
fn what_a_chain_needs_is_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create base.vhd --size 8M");
    expect(vhd_fed(dir, "write base.vhd --offset 0", b"important"), 0, "write");
    done(dir, "create mid.vhd --parent base.vhd");
    done(dir, "create leaf.vhd --parent mid.vhd");
    done(dir, "create alone.vhd --size 8M");
    for line in [
        "create base.vhd --parent leaf.vhd --overwrite",
        "create mid.vhd --parent leaf.vhd --overwrite",
        "create mid.vhd --size 8M --overwrite",
        "convert alone.vhd mid.vhd --overwrite",
        "convert alone.vhd base.vhd --to raw --overwrite",
        "convert leaf.vhd base.vhd --overwrite",
    ] {
        refused(dir, line);
        assert_eq!(done(dir, "read leaf.vhd --offset 0 --length 9"), "important", "{line}");
    }
    // A loop is none with force either.
    refused(dir, "create base.vhd --parent leaf.vhd --overwrite --force");
    assert_eq!(done(dir, "read leaf.vhd --offset 0 --length 9"), "important");
    let lost = expect(vhd(dir, "create mid.vhd --size 8M --overwrite --force"), 0, "create");
    assert!(text(&lost.stderr).contains("leaf.vhd: is lost"), "{}", text(&lost.stderr));
    // Nobody needs this one.
    done(dir, "create leaf.vhd --size 8M --overwrite");
    done(dir, "convert alone.vhd leaf.vhd --overwrite");
}

#[test]
fn a_merge_without_delete_says_which_images_can_not_be_opened_any_more() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create base.vhd --size 8M");
    done(dir, "create mid.vhd --parent base.vhd");
    done(dir, "create leaf.vhd --parent mid.vhd");
    for line in ["merge leaf.vhd --into base.vhd --dry-run", "merge leaf.vhd --into base.vhd"] {
        let told = done(dir, line);
        assert!(told.lines().any(|line| line.contains("mid.vhd") && line.contains("lost")), "{told}");
    }
    refused(dir, "read mid.vhd --offset 0 --length 1");
    done(dir, "read leaf.vhd --offset 0 --length 1");
}
