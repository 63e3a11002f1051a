//! Bad input as the command meets it, where the host has a say: memory, users, devices, names.
//!
//! Goal: no file makes `vhd` use memory beyond a small multiple of its size, and what the host forbids is one line and
//! status 2. Method: hostile files of a few KiB under a hard limit of memory; commands as a user without rights; raw
//! files with planted footers. The wrong fields themselves are tested in `vhd-core/tests/bad_input.rs`.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use support::{done, expect, json, names_in, noise, one_line, refused, vhd_fed};
use vhd_testkit::fixture::{
    Bits, BlockFill, Fill, FixtureSpec, Kind, Layout, Locator, Parent, put_u32, put_u64, refresh_checksums,
};

/// What a command may address at most: room for the program, its threads and its buffers, and little more.
const MEMORY_KIB: u64 = 256 << 10;

fn limited(folder: &Path, line: &str) -> Output {
    let mut command = Command::new("sh");
    let script = format!("ulimit -v {MEMORY_KIB} && exec \"$@\"");
    command.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_vhd")]).args(line.split_whitespace());
    // Output may be long; what counts is how the command ends.
    command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null()).output().unwrap()
}

fn dynamic(size: u64, block_size: u32) -> FixtureSpec {
    FixtureSpec { block_size, ..FixtureSpec::new(Kind::Dynamic, Layout::Classic, size) }
}

/// A block of which every second sector is present, named by very many entries: more extents than memory has room for.
fn one_block_many_times(entries: u32) -> Vec<u8> {
    let bits = Bits::Only((0..4096).step_by(2).collect());
    let spec = dynamic(u64::from(entries) << 21, 2 << 20).block(0, BlockFill { bits, ..BlockFill::full(Fill::Byte(7)) });
    let (mut bytes, placed) = spec.to_bytes();
    for entry in 0..entries as usize {
        put_u32(&mut bytes, placed.bat as usize + entry * 4, (placed.blocks[&0] / 512) as u32);
    }
    bytes
}

/// Blocks of 256 MiB, their bitmaps of 64 KiB all in one place.
fn large_bitmaps() -> Vec<u8> {
    let (mut bytes, placed) = dynamic(400 << 28, 256 << 20).to_bytes();
    for entry in 0..400 {
        // Each begins a sector further on, so that none is in a cache.
        put_u32(&mut bytes, placed.bat as usize + entry * 4, (placed.len / 512) as u32 + entry as u32);
    }
    // Nearly all sectors are present: a map of each second one would be true, and endless.
    let bits = [[0xFF; 4095].as_slice(), &[0]].concat();
    bytes.extend(bits.iter().cycle().take(1 << 20));
    let footer: [u8; 512] = bytes[..512].try_into().unwrap();
    bytes.extend(footer);
    bytes
}

fn claims() -> Vec<(&'static str, Vec<u8>)> {
    let mut parent = Parent::named([7; 16], "base.vhd");
    parent.locators = vec![Locator::w2ku("C:\\base.vhd"); 8];
    let child = FixtureSpec { parent: Some(parent), ..FixtureSpec::new(Kind::Differencing, Layout::Classic, 1 << 20) };
    let edited = |spec: &FixtureSpec, edit: &dyn Fn(&mut [u8], usize)| {
        let (mut bytes, placed) = spec.to_bytes();
        edit(&mut bytes, placed.header as usize);
        refresh_checksums(&mut bytes);
        bytes
    };
    let locators = |field: usize, value: u64| {
        edited(&child, &|bytes, header| {
            for slot in 0..8 {
                let at = header + 576 + slot * 24;
                put_u32(bytes, at + field, value as u32);
            }
        })
    };
    let small = dynamic(1 << 20, 4096);
    let tapdisk = FixtureSpec::new(Kind::Dynamic, Layout::Tapdisk, 1 << 20);
    let batmap = tapdisk.place().batmap.unwrap() as usize;
    vec![
        ("locators of 4 GiB", locators(8, u64::from(u32::MAX))),
        ("locators with room for 4 GiB", locators(4, u64::from(u32::MAX))),
        ("a BAT of 16 GiB", edited(&small, &|bytes, header| put_u32(bytes, header + 28, u32::MAX))),
        ("a batmap of 2 TiB", edited(&tapdisk, &|bytes, _| put_u32(bytes, batmap + 16, u32::MAX))),
        ("a disk of 2 TiB", {
            edited(&FixtureSpec { max_table_entries: Some(u32::MAX), ..small.clone() }, &|bytes, _| {
                let footer = bytes.len() - 512;
                put_u64(bytes, 48, u64::from(u32::MAX) * 512);
                put_u64(bytes, footer + 48, u64::from(u32::MAX) * 512);
            })
        }),
        ("one block many times", one_block_many_times(500)),
        ("large bitmaps", large_bitmaps()),
    ]
}

#[test]
fn no_claim_of_a_file_makes_memory_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    done(dir, "create good.vhd --size 1M");
    for line in ["info", "map", "check --deep", "write --offset 0"] {
        expect(limited(dir, &format!("{line} good.vhd")), 0, "the limit is not too tight");
    }
    for (name, bytes) in claims() {
        fs::write(dir.join("claim.vhd"), &bytes).unwrap();
        for line in
            ["info", "info --chain", "map", "map --json", "check --deep", "read --offset 0 --length 1M", "write --offset 0"]
        {
            let output = limited(dir, &format!("{line} claim.vhd"));
            // Out of memory would be an abort: no status at all.
            let status = output.status.code();
            assert!(matches!(status, Some(0..=2)), "{name}, {line}: {status:?} {}", String::from_utf8_lossy(&output.stderr));
            if status == Some(2) && !line.contains("--json") {
                one_line(&output, line);
            }
        }
        assert!(fs::read(dir.join("claim.vhd")).unwrap() == bytes, "{name}: changed");
    }
}

/// A hole is read as zeros, so a file that is nothing but a length can be a table of millions of entries.
#[test]
fn a_table_in_a_hole_is_not_kept_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let (mut bytes, placed) = dynamic(256 << 30, 4096).to_bytes();
    // The entries are a hole, each then names sector 0.
    let table = placed.bat as usize;
    let footer = bytes.split_off(placed.footer as usize);
    bytes.truncate(table);
    fs::write(dir.join("hole.vhd"), &bytes).unwrap();
    let file = fs::OpenOptions::new().write(true).open(dir.join("hole.vhd")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &footer, placed.footer).unwrap();
    for (line, status) in [("info", 0), ("check", 1), ("map", 2), ("write --offset 0", 2)] {
        expect(limited(dir, &format!("{line} hole.vhd")), status, line);
    }
}

/// A command as a user without rights, where the test may become one; else it is said loudly.
struct Nobody {
    folder: tempfile::TempDir,
    command: PathBuf,
}

impl Nobody {
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI runs as root");
            eprintln!("SKIPPED: not root, so commands as another user are not tested");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        // The build's folder may be closed to others.
        let command = folder.path().join("vhd");
        fs::copy(env!("CARGO_BIN_EXE_vhd"), &command).unwrap();
        Some(Self { folder, command })
    }

    fn run(&self, line: &str) -> Output {
        let mut command = Command::new(&self.command);
        command.args(line.split_whitespace()).current_dir(self.folder.path()).stdin(Stdio::null()).uid(65534).gid(65534);
        command.output().unwrap()
    }
}

#[test]
fn a_user_without_rights_is_told_so() {
    let Some(nobody) = Nobody::new() else { return };
    let dir = nobody.folder.path();
    done(dir, "create ours.vhd --size 1M");
    done(dir, "create secret.vhd --size 1M");
    done(dir, "create read-only.vhd --size 1M");
    fs::set_permissions(dir.join("secret.vhd"), fs::Permissions::from_mode(0o600)).unwrap();
    chown(dir.join("read-only.vhd"), Some(65534), None).unwrap();
    fs::set_permissions(dir.join("read-only.vhd"), fs::Permissions::from_mode(0o444)).unwrap();
    let cases = [
        ("write ours.vhd --offset 0", "ours.vhd: can't be opened for writing"),
        ("write read-only.vhd --offset 0", "read-only.vhd: can't be opened for writing"),
        ("info secret.vhd", "secret.vhd: can't be opened"),
        ("check secret.vhd", "secret.vhd: can't be opened"),
        ("create new.vhd --size 1M", "new.vhd: can't be created"),
        ("create child.vhd --parent ours.vhd", "child.vhd: can't be created"),
        ("convert ours.vhd new.raw", "new.raw: can't be created"),
    ];
    let before = names_in(dir);
    for (line, says) in cases {
        let said = one_line(&expect(nobody.run(line), 2, line), line);
        assert!(said.contains(says), "vhd {line}: {said}");
    }
    let document: serde_json::Value =
        serde_json::from_slice(&expect(nobody.run("write ours.vhd --offset 0 --json"), 2, "write").stdout).unwrap();
    assert_eq!(document["error"]["kind"], "read-only");
    for line in ["info ours.vhd", "read read-only.vhd --offset 0 --length 512", "check ours.vhd"] {
        expect(nobody.run(line), 0, line);
    }
    assert_eq!(names_in(dir), before);
}

#[test]
fn dry_runs_refuse_what_this_user_may_not_write() {
    let Some(nobody) = Nobody::new() else { return };
    let dir = nobody.folder.path();
    // Whose folder it is, is not the question.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
    for line in ["create base.vhd --size 4M", "create child.vhd --parent base.vhd", "create other.vhd --size 4M"] {
        done(dir, line);
    }
    expect(vhd_fed(dir, "write child.vhd --offset 0", b"data"), 0, "write");
    done(dir, "create grandchild.vhd --parent child.vhd");
    done(dir, "undo start other.vhd");
    let own = |name: &str| chown(dir.join(name), Some(65534), None).unwrap();
    own("base.vhd");
    let refuse_both = |cases: &[(&str, &str)]| {
        let before: Vec<_> = names_in(dir).into_iter().map(|name| fs::read(dir.join(name)).unwrap()).collect();
        for (line, file) in cases {
            let said = one_line(&expect(nobody.run(&format!("{line} --dry-run")), 2, line), line);
            assert!(said.contains(&format!("{file}: can't be opened for writing: ")), "{line}: {said}");
            assert_eq!(said, one_line(&expect(nobody.run(line), 2, line), line), "{line}: the dry run and the command differ");
        }
        let after: Vec<_> = names_in(dir).into_iter().map(|name| fs::read(dir.join(name)).unwrap()).collect();
        assert!(before == after, "something was changed");
    };
    refuse_both(&[
        ("compact grandchild.vhd", "grandchild.vhd"),
        ("resize grandchild.vhd 8M", "grandchild.vhd"),
        ("reparent grandchild.vhd child.vhd", "grandchild.vhd"),
        ("merge grandchild.vhd", "child.vhd"),
        ("undo commit other.vhd", "other.vhd"),
        ("undo discard other.vhd", "other.vud"),
        ("convert base.vhd other.vhd --overwrite", "other.vhd"),
        // Begun, it could not be finished: these become children of the base, one after the data were moved.
        ("merge child.vhd", "child.vhd"),
        ("merge child.vhd --delete", "grandchild.vhd"),
    ]);
    own("child.vhd");
    refuse_both(&[("merge child.vhd", "grandchild.vhd")]);
    own("grandchild.vhd");
    for line in ["compact grandchild.vhd --dry-run", "merge child.vhd --delete --dry-run", "merge child.vhd --delete"] {
        expect(nobody.run(line), 0, line);
    }
}

/// The images of a session are committed as one: that the second can't be written is known before the first is.
#[test]
fn a_forced_commit_writes_all_images_or_none() {
    let Some(nobody) = Nobody::new() else { return };
    let dir = nobody.folder.path();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
    for name in ["a", "b"] {
        expect(nobody.run(&format!("create {name}.vhd --size 4M")), 0, "create");
    }
    expect(nobody.run("undo start a.vhd b.vhd"), 0, "start");
    for name in ["a.vud", "b.vud"] {
        expect(vhd_fed(dir, &format!("write {name} --offset 0"), b"data"), 0, "write");
    }
    let before: Vec<_> = names_in(dir).into_iter().map(|name| fs::read(dir.join(name)).unwrap()).collect();
    let owned_by = |user| chown(dir.join("b.vhd"), Some(user), None).unwrap();
    let mode = |mode| fs::set_permissions(dir.join("b.vhd"), fs::Permissions::from_mode(mode)).unwrap();
    for (bits, says) in [(0o644, "b.vhd: can't be opened for writing"), (0o444, "b.vhd: can't be made writable")] {
        owned_by(0);
        mode(bits);
        let said = one_line(&expect(nobody.run("undo commit a.vhd b.vhd --force"), 2, "commit"), "commit");
        assert!(said.contains(says), "{said}");
        let after: Vec<_> = names_in(dir).into_iter().map(|name| fs::read(dir.join(name)).unwrap()).collect();
        assert!(before == after, "something was changed");
    }
    owned_by(65534);
    expect(nobody.run("undo commit a.vhd b.vhd"), 2, "commit");
    expect(nobody.run("undo commit a.vhd b.vhd --force"), 0, "commit");
    let mode = fs::metadata(dir.join("b.vhd")).unwrap().permissions().mode();
    assert_eq!((mode & 0o777, names_in(dir)), (0o444, vec!["a.vhd".to_owned(), "b.vhd".into(), "vhd".into()]));
}

/// By its name a raw file is raw, and a guest who writes a footer to its end changes nothing about it.
#[test]
fn a_raw_file_stays_raw_whatever_a_guest_wrote_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let mut raw = noise(3, 1 << 20);
    let planted = FixtureSpec::new(Kind::Fixed, Layout::Classic, 4096).footer();
    raw[..512].copy_from_slice(&dynamic(4096, 4096).footer());
    raw.splice((1 << 20) - 512.., planted);
    fs::write(dir.join("guest.raw"), &raw).unwrap();
    for target in ["a.vhd", "b.vhd --to fixed", "c.img"] {
        done(dir, &format!("convert guest.raw {target}"));
        let name = target.split(' ').next().unwrap();
        let output = expect(support::vhd(dir, &format!("compare guest.raw {name}")), 0, "compare");
        assert!(output.stderr.is_empty());
    }
    assert_eq!(json(dir, "info b.vhd", 0)["virtual_size"], 1 << 20);
    // Unless the user says so: then it is the image that the footer tells of.
    done(dir, "convert guest.raw d.raw --from vhd");
    assert_eq!(fs::metadata(dir.join("d.raw")).unwrap().len(), 4096);
    done(dir, "create child.vhd --parent guest.raw");
    assert_eq!(json(dir, "info child.vhd", 0)["virtual_size"], 1 << 20);
    assert!(refused(dir, "map child.vhd").contains("--raw-parent"));
    done(dir, "map child.vhd --raw-parent guest.raw");
}

/// What images and folders are called can't forge a second line, nor speak to a terminal.
#[test]
fn an_error_is_one_line_whatever_the_names() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let name = "evil\nvhd: all is well\u{1b}[2J.vhd";
    fs::write(dir.join(name), b"no image").unwrap();
    for arguments in [&["info", name][..], &["write", name, "--offset", "0"], &["create", name, "--size", "1M"]] {
        let output = support::vhd_in(dir).args(arguments).output().unwrap();
        let said = one_line(&expect(output, 2, "an odd name"), "an odd name");
        assert!(!said.trim_end_matches('\n').chars().any(char::is_control), "{said:?}");
    }
}

/// What is beyond the end of the file is lost, and no hole that may be left out of a copy.
#[test]
fn an_image_whose_last_block_is_cut_is_not_copied_without_a_word() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    done(folder, "create cut.vhd --size 8M");
    vhd_fed(folder, "write cut.vhd --offset 0", &noise(1, 8 << 20));
    let image = folder.join("cut.vhd");
    fs::File::options().write(true).open(&image).unwrap().set_len(7_000_000).unwrap();
    let before = fs::read(&image).unwrap();
    for line in ["map cut.vhd", "convert cut.vhd copy.vhd", "convert cut.vhd copy.raw", "convert --in-place --to fixed cut.vhd"] {
        let said = refused(folder, line);
        assert!(said.contains("cut.vhd: ") && said.contains("was cut short"), "{line}: {said}");
    }
    assert_eq!(names_in(folder), ["cut.vhd"]);
    assert!(fs::read(&image).unwrap() == before);
}
