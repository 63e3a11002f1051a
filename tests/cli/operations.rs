//! What is done with whole images: compact, resize, repair; dry runs.

use std::fs;

use vhd_testkit::tools;

use crate::support::{done, expect, json, names_in, noise, one_line, refused, text, vhd, vhd_fed};

#[test]
fn compact_gives_back_what_is_zero_and_changes_nothing_that_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let write = |at: &str, bytes: &[u8]| expect(vhd_fed(dir, &format!("write disk.vhd --offset {at}"), bytes), 0, "write");
    let len = || fs::metadata(dir.join("disk.vhd")).unwrap().len();
    done(dir, "create disk.vhd --size 64M");
    write("0", &vec![7; 4 << 20]);
    write("32M", &vec![b'x'; 2 << 20]);
    write("0", &vec![0; 4 << 20]);
    let before = len();
    assert!(done(dir, "compact disk.vhd --dry-run").contains("would be"));
    assert_eq!(len(), before);
    let answer = json(dir, "compact disk.vhd", 0);
    assert_eq!(answer[0]["blocks_dropped"], 2);
    assert_eq!((answer[0]["file_size_before"].as_u64(), answer[0]["file_size"].as_u64()), (Some(before), Some(len())));
    assert_eq!(done(dir, "read disk.vhd --offset 32M --length 2M"), "x".repeat(2 << 20));
    done(dir, "check --deep disk.vhd");
}

#[test]
fn compact_says_what_a_fixed_image_needs() {
    let folder = tempfile::tempdir().unwrap();
    done(folder.path(), "create fixed.vhd --size 4M --type fixed");
    assert!(refused(folder.path(), "compact fixed.vhd").contains("convert"));
}

#[test]
fn compact_tells_what_it_did_before_an_image_that_fails() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    for name in ["a", "c"] {
        done(dir, &format!("create {name}.vhd --size 8M"));
        expect(vhd_fed(dir, &format!("write {name}.vhd --offset 0"), b"data"), 0, "write");
        expect(vhd_fed(dir, &format!("write {name}.vhd --offset 0"), &[0; 4]), 0, "write");
    }
    done(dir, "create b.vhd --size 4M --type fixed");
    let untouched = fs::read(dir.join("c.vhd")).unwrap();
    let output = expect(vhd(dir, "compact a.vhd b.vhd c.vhd"), 2, "compact");
    let told = text(&output.stdout);
    assert!(told.starts_with("a.vhd: ") && told.contains("1 of 1 blocks dropped"), "{told}");
    assert!(told.ends_with("b.vhd: not done\nc.vhd: not done\n"), "{told}");
    let error = text(&output.stderr);
    assert!(error.starts_with("vhd: b.vhd: ") && error.lines().count() == 1, "{error}");
    assert!(fs::read(dir.join("c.vhd")).unwrap() == untouched);
    let told = json(dir, "compact a.vhd b.vhd c.vhd", 2);
    assert_eq!((&told["error"]["file"], &told["done"][0]["path"]), (&"b.vhd".into(), &"a.vhd".into()));
    assert_eq!(told["done"].as_array().map(Vec::len), Some(1));
    assert_eq!(json(dir, "compact b.vhd", 2)["done"], serde_json::json!([]));
    assert_eq!(text(&expect(vhd(dir, "compact b.vhd"), 2, "compact").stdout), "");
}

#[test]
fn resize_grows_and_shrinks_and_says_what_is_in_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    for kind in ["dynamic", "fixed"] {
        done(dir, &format!("create {kind}.vhd --size 4M --type {kind}"));
        let answer = json(dir, &format!("resize {kind}.vhd 8M"), 0);
        assert_eq!((answer["size_before"].as_u64(), answer["virtual_size"].as_u64()), (Some(4 << 20), Some(8 << 20)));
        expect(vhd_fed(dir, &format!("write {kind}.vhd --offset 6M"), b"data"), 0, "write");
        assert!(refused(dir, &format!("resize {kind}.vhd 5M")).contains("--shrink"));
        assert!(refused(dir, &format!("resize {kind}.vhd 5M --shrink")).contains("--discard-data"));
        done(dir, &format!("resize {kind}.vhd 7M --shrink"));
        assert_eq!(done(dir, &format!("read {kind}.vhd --offset 6M --length 4")), "data");
        assert_eq!(json(dir, &format!("info {kind}.vhd"), 0)["virtual_size"], 7 << 20);
        done(dir, &format!("check --deep {kind}.vhd"));
    }
}

#[test]
fn repair_says_what_it_does_and_is_taken_back() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create disk.vhd --size 4M");
    expect(vhd_fed(dir, "write disk.vhd --offset 0", b"data"), 0, "write");
    let mut bytes = fs::read(dir.join("disk.vhd")).unwrap();
    let end = bytes.len() - 512;
    bytes[end..].fill(0);
    fs::write(dir.join("disk.vhd"), &bytes).unwrap();
    let planned = json(dir, "check disk.vhd --repair --dry-run", 0);
    assert_eq!((planned["done"].as_bool(), planned["changes"].as_array().map(Vec::len)), (Some(false), Some(1)));
    assert!(fs::read(dir.join("disk.vhd")).unwrap() == bytes);
    assert!(done(dir, "check disk.vhd --repair").contains("--undo-repair"));
    done(dir, "check disk.vhd");
    assert_eq!(done(dir, "read disk.vhd --offset 0 --length 4"), "data");
    // What was written since where the repair wrote is not overwritten unasked.
    expect(vhd_fed(dir, "write disk.vhd --offset 3M", b"more"), 0, "write");
    let written = fs::read(dir.join("disk.vhd")).unwrap();
    let told = refused(dir, "check disk.vhd --undo-repair");
    assert!(told.contains("disk.vhd: has ") && told.contains("--force"), "{told}");
    assert!(fs::read(dir.join("disk.vhd")).unwrap() == written);
    done(dir, "check disk.vhd --undo-repair --force");
    assert!(fs::read(dir.join("disk.vhd")).unwrap()[end..] == bytes[end..]);
    fs::write(dir.join("disk.vhd"), &bytes).unwrap();
    // A BAT entry that leads nowhere is given up by --repair=all alone.
    bytes[1536..1540].copy_from_slice(&[0, 255, 255, 255]);
    fs::write(dir.join("disk.vhd"), &bytes).unwrap();
    assert_eq!(json(dir, "check disk.vhd --repair", 1)["ok"], false);
    let all = json(dir, "check disk.vhd --repair=all", 0);
    assert!(all["lost"][0].as_str().unwrap().contains("block 0"), "{all}");
    assert!(refused(dir, "check missing.vhd --repair").contains("missing.vhd"));
}

#[test]
fn dry_runs_of_reparent_and_undo_tell_what_would_be_and_do_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create base.vhd --size 4M");
    done(dir, "create disk.vhd --parent base.vhd");
    fs::create_dir(dir.join("sub")).unwrap();
    fs::rename(dir.join("base.vhd"), dir.join("sub/base.vhd")).unwrap();
    let before = fs::read(dir.join("disk.vhd")).unwrap();
    assert!(refused(dir, "reparent sub/base.vhd").contains("is a dynamic disk: it has no parent"));
    assert!(refused(dir, "reparent disk.vhd").contains("--parent-dir"));
    let told = done(dir, "reparent disk.vhd --parent-dir sub --dry-run");
    assert!(told.contains("would become a child of") && told.contains("W2ru .\\sub\\base.vhd"), "{told}");
    let told = json(dir, "reparent disk.vhd --parent-dir sub --dry-run", 0);
    assert_eq!((&told["done"], &told["parent_uuid"]), (&false.into(), &told["parent_uuid_before"]));
    assert!(fs::read(dir.join("disk.vhd")).unwrap() == before);
    assert_eq!(json(dir, "reparent disk.vhd --parent-dir sub", 0)["done"], true);
    assert!(done(dir, "undo start disk.vhd --dry-run").contains("would make disk.vud"));
    assert!(!dir.join("disk.vud").exists());
    done(dir, "undo start disk.vhd");
    expect(vhd_fed(dir, "write disk.vud --offset 1M", &noise(1, 5000)), 0, "write");
    let before = fs::read(dir.join("disk.vud")).unwrap();
    assert!(done(dir, "undo commit disk.vhd --dry-run").contains("would merge disk.vud into disk.vhd\n  5120 bytes of data"));
    let told = json(dir, "undo commit disk.vhd --dry-run", 0);
    assert_eq!((&told[0]["data"], &told[0]["done"]), (&5120.into(), &false.into()));
    assert!(done(dir, "undo discard disk.vhd --dry-run").contains("would remove disk.vud\n  5120 changed bytes"));
    assert_eq!(json(dir, "undo discard disk.vhd --dry-run", 0)[0]["changed"], 5120);
    assert!(fs::read(dir.join("disk.vud")).unwrap() == before);
}

#[test]
fn dry_runs_refuse_what_the_command_would() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create base.vhd --size 16M");
    expect(vhd_fed(dir, "write base.vhd --offset 0", &noise(1, 8 << 20)), 0, "write");
    done(dir, "create child.vhd --parent base.vhd");
    expect(vhd_fed(dir, "write child.vhd --offset 0", &noise(2, 1 << 20)), 0, "write");
    let refuse_both = |lines: &[&str], why: &str| {
        let before: Vec<_> = ["base.vhd", "child.vhd"].map(|name| fs::read(dir.join(name)).unwrap()).into();
        for line in lines {
            let said = refused(dir, &format!("{line} --dry-run"));
            assert!(said.contains(why), "{line}: {said}");
            assert_eq!(said, refused(dir, line), "{line}: the dry run and the command refuse for one reason");
        }
        let after: Vec<_> = ["base.vhd", "child.vhd"].map(|name| fs::read(dir.join(name)).unwrap()).into();
        assert!(before == after);
    };
    refuse_both(&["compact base.vhd", "resize base.vhd 32M"], "is the parent of child.vhd");
    // Cut within a block: the footer copy, the header and the BAT are whole.
    let cut = |name: &str, len: u64| fs::OpenOptions::new().write(true).open(dir.join(name)).unwrap().set_len(len).unwrap();
    fs::copy(dir.join("base.vhd"), dir.join("same.vhd")).unwrap();
    fs::copy(dir.join("child.vhd"), dir.join("whole.vhd")).unwrap();
    cut("child.vhd", 2 << 20);
    refuse_both(&["reparent child.vhd same.vhd"], "child.vhd: block at sector");
    fs::rename(dir.join("whole.vhd"), dir.join("child.vhd")).unwrap();
    cut("base.vhd", 5 << 20);
    let lines =
        ["merge child.vhd", "compact base.vhd --force", "resize base.vhd 32M --force", "resize base.vhd 12M --shrink --force"];
    refuse_both(&lines, "base.vhd: block at sector");
    refuse_both(&["convert base.vhd --in-place --to fixed"], "cut short");
}

#[test]
fn a_merge_begins_only_where_all_that_it_changes_can_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create base.vhd --size 8M");
    done(dir, "create child.vhd --parent base.vhd");
    expect(vhd_fed(dir, "write child.vhd --offset 0", b"data"), 0, "write");
    done(dir, "create grandchild.vhd --parent child.vhd");
    expect(vhd_fed(dir, "write grandchild.vhd --offset 0", &noise(2, 1 << 20)), 0, "write");
    // The child's child, which gets another parent, is cut short.
    let file = fs::OpenOptions::new().write(true).open(dir.join("grandchild.vhd")).unwrap();
    file.set_len(file.metadata().unwrap().len() - (1 << 20)).unwrap();
    let before = fs::read(dir.join("base.vhd")).unwrap();
    for line in ["merge child.vhd --delete --dry-run", "merge child.vhd --delete"] {
        assert!(refused(dir, line).contains("grandchild.vhd: block at sector"));
    }
    assert!(fs::read(dir.join("base.vhd")).unwrap() == before, "a merge was begun that can't be finished");
}

#[test]
fn a_merge_begins_only_where_what_it_removes_can_be_removed() {
    if tools::require("chattr").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let chattr = |flag: &str, name: &str| {
        let mut command = std::process::Command::new("chattr");
        let output = command.arg(flag).arg(dir.join(name)).output();
        output.is_ok_and(|output| output.status.success())
    };
    done(dir, "create base.vhd --size 8M");
    done(dir, "create middle.vhd --parent base.vhd");
    done(dir, "create leaf.vhd --parent middle.vhd --protect-parent");
    expect(vhd_fed(dir, "write leaf.vhd --offset 0", b"data"), 0, "write");
    // Before anything is asserted: an immutable file outlives its folder.
    let is_immutable =
        fs::OpenOptions::new().append(true).open(dir.join("middle.vhd")).is_err_and(|error| error.raw_os_error() == Some(1));
    let lines = ["merge leaf.vhd --into base.vhd --delete --dry-run", "merge leaf.vhd --into base.vhd --delete"];
    let outputs = lines.map(|line| vhd(dir, line));
    let unprotected = chattr("-i", "middle.vhd");
    if !is_immutable || !unprotected {
        eprintln!("SKIPPED: no file can be made immutable here");
        return;
    }
    for (line, output) in lines.into_iter().zip(outputs) {
        let said = one_line(&expect(output, 2, line), line);
        assert!(said.contains("middle.vhd: is immutable") && said.contains("chattr -i"), "{line}: {said}");
    }
    assert_eq!(names_in(dir), ["base.vhd", "leaf.vhd", "middle.vhd"], "a merge was begun that can't be finished");
    done(dir, lines[1]);
    assert_eq!(done(dir, "read base.vhd --offset 0 --length 4"), "data");
}

/// Opening for writing mends what writing builds upon. It says so, once, and a sound image needs no word.
#[test]
fn what_opening_for_writing_mends_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let image = dir.join("disk.vhd");
    done(dir, "create disk.vhd --size 8M");
    let write = || text(&expect(vhd_fed(dir, "write disk.vhd --offset 0", b"data"), 0, "write").stderr);
    assert_eq!(write(), "");
    let sound = fs::read(&image).unwrap();
    type Damage = fn(&mut Vec<u8>);
    let damage: [(&str, Damage); 3] = [
        ("no valid footer copy at the start", |bytes| bytes[100] ^= 1),
        ("no valid trailing footer", |bytes| bytes.last_mut().map_or((), |byte| *byte ^= 1)),
        ("footer copy at the start differs", |bytes| {
            // Tapdisk's hidden byte, which old versions leave out of the checksum.
            bytes[85] ^= 1;
        }),
    ];
    for (says, damage) in damage {
        let mut bytes = sound.clone();
        damage(&mut bytes);
        fs::write(&image, bytes).unwrap();
        // Who only reads mends nothing, and says nothing of that.
        assert!(!text(&expect(vhd(dir, "read disk.vhd --offset 0 --length 4"), 0, "read").stderr).contains("written"));
        let said = write();
        assert!(said.lines().count() == 1 && said.contains("disk.vhd: found") && said.contains(says), "{says}: {said:?}");
        assert!(said.contains("written"), "{said:?}");
        assert_eq!(write(), "", "{says}: said twice");
        assert!(fs::read(&image).unwrap() == sound, "{says}");
    }
}
