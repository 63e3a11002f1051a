//! File systems in partitions, as people use them.
//!
//! Goal: whatever program made the table, each partition is a file of its own with a file system that can be mounted in
//! one step, used, trimmed, unmounted and checked. Method: tables by sfdisk, sgdisk and parted, file systems by their own mkfs,
//! a tree copied in, compared after another mount, and judged by their own fsck. (`tests/mount_user.rs` is for ordinary users.)

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::unistd::{Whence, lseek};
use support::mounts::{Place, wait_until_free};
use support::{done, json, noise, project, refused, run, search_path, wait_until};
use tempfile::TempDir;

/// A tree of this project's files, with some that are large or have odd names.
fn tree() -> TempDir {
    let tree = tempfile::tempdir().unwrap();
    for name in ["src", "docs", "vhd-fuse/src"] {
        run("cp", &["-r", project().join(name).to_str().unwrap(), tree.path().join(name.replace('/', "-")).to_str().unwrap()]);
    }
    fs::write(tree.path().join("three megabytes"), noise(3, 3 << 20)).unwrap();
    fs::write(tree.path().join("ünïcode"), "text").unwrap();
    tree
}

fn assert_same(a: &Path, b: &Path) {
    run("diff", &["-r", "--exclude=lost+found", a.to_str().unwrap(), b.to_str().unwrap()]);
}

/// Bytes of a large file that is removed again.
const RUBBISH: usize = 24 << 20;

/// Bytes of a file that are no hole.
fn data_in(path: &str) -> u64 {
    let file = File::open(path).unwrap();
    let (mut at, mut bytes) = (0, 0);
    while let Ok(start) = lseek(&file, at, Whence::SeekData) {
        at = lseek(&file, start, Whence::SeekHole).unwrap();
        bytes += at - start;
    }
    bytes as u64
}

/// Mounts the file system of a partition, copies the tree in, trims, unmounts, and finds all of it again.
fn use_it(folder: &Path, partition: &str, tree: &Path, by: &str, trims: bool) {
    let files = folder.join("files");
    let mounted = |options: &str| {
        let output = support::vhd(folder, &format!("mount {options} --fs a.vhd:{partition} files --json"));
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let said = document["filesystem"].as_str().unwrap_or_default();
        assert!(output.status.success() && said.starts_with(by), "{partition}: {document}");
        document["file"].as_str().unwrap().to_owned()
    };
    let blocks = || json(folder, "info a.vhd", 0)["blocks_allocated"].as_u64().unwrap();
    mounted("");
    run("cp", &["-r", &format!("{}/.", tree.display()), files.to_str().unwrap()]);
    fs::write(files.join("rubbish"), noise(9, RUBBISH)).unwrap();
    done(folder, "unmount files");
    let blocks_before = blocks();
    let disk = mounted("");
    let used = data_in(&disk);
    fs::remove_file(files.join("rubbish")).unwrap();
    run("sync", &["-f", files.to_str().unwrap()]);
    if trims {
        // Some free what was removed a little later. And in the blocks at the ends of it may be something else.
        wait_until("its blocks are free", || {
            run("fstrim", &[&files]);
            data_in(&disk) + RUBBISH as u64 <= used + (6 << 20)
        });
    }
    done(folder, "unmount files");
    if trims {
        let (before, after) = (blocks_before, blocks());
        assert!(after + 6 <= before, "{partition}: {before} blocks of 2 MiB before, {after} after");
    }
    mounted("--read-only");
    assert_same(tree, &files);
    fs::write(files.join("no"), "").unwrap_err();
    // To unmount the file system is all there is to be done, whatever does it.
    run("umount", &[&files]);
    wait_until_free(folder, "a.vhd");
}

/// Makes the file systems in the partitions `parts`, in this order: ext4, xfs, btrfs, squashfs, NTFS, FAT; uses each; and
/// has each checked.
fn all_kinds(make_table: impl FnOnce(&str), parts: [&str; 6]) {
    let Some(place) = Place::with_image(TOOLS, "800M") else { return };
    let tree = tree();
    let (folder, tree) = (place.path(), tree.path());
    fs::create_dir(folder.join("files")).unwrap();
    done(folder, "mount a.vhd disk");
    make_table(folder.join("disk/disk.raw").to_str().unwrap());
    done(folder, "unmount disk");

    done(folder, "mount a.vhd disk");
    let files = parts.map(|part| folder.join("disk").join(part).to_str().unwrap().to_owned());
    let [ext4, xfs, btrfs, squashfs, ntfs, fat] = &files;
    run("mkfs.ext4", &["-q", ext4]);
    run("mkfs.xfs", &["-q", xfs]);
    run("mkfs.btrfs", &["-q", btrfs]);
    let squashed = folder.join("squashed");
    run("mksquashfs", &[tree.to_str().unwrap(), squashed.to_str().unwrap(), "-quiet", "-no-progress"]);
    run("dd", &[&format!("if={}", squashed.display()), &format!("of={squashfs}"), "bs=1M", "conv=notrunc,fsync", "status=none"]);
    run("mkntfs", &["--quiet", "--force", "--fast", ntfs]);
    run("mkfs.vfat", &[fat]);
    run("mcopy", &["-s", "-i", fat, &format!("{}/docs", tree.display()), &format!("{}/three megabytes", tree.display()), "::"]);
    done(folder, "unmount disk");

    use_it(folder, parts[0], tree, "ext4 (kernel, /dev/loop", true);
    use_it(folder, parts[1], tree, "xfs (kernel, /dev/loop", true);
    use_it(folder, parts[2], tree, "btrfs (kernel, /dev/loop", true);
    use_it(folder, parts[4], tree, "ntfs (ntfs-3g)", false);
    let at = folder.join("files");
    done(folder, &format!("mount --read-only --fs a.vhd:{} files", parts[3]));
    assert_same(tree, &at);
    done(folder, "unmount files");

    done(folder, "mount --read-only a.vhd disk");
    run("e2fsck", &["-f", "-n", ext4]);
    run("xfs_repair", &["-n", "-f", xfs]);
    run("btrfs", &["check", "--readonly", btrfs]);
    run("ntfsfix", &["--no-action", ntfs]);
    run("fsck.vfat", &["-n", fat]);
    let back = folder.join("back");
    fs::create_dir(&back).unwrap();
    run("mcopy", &["-s", "-i", fat, "::docs", "::three megabytes", back.to_str().unwrap()]);
    assert_same(&tree.join("docs"), &back.join("docs"));
    assert!(fs::read(tree.join("three megabytes")).unwrap() == fs::read(back.join("three megabytes")).unwrap());
    done(folder, "unmount disk");
    done(folder, "check --deep a.vhd");
}

const TOOLS: &[&str] = &[
    "sfdisk",
    "sgdisk",
    "parted",
    "mkfs.ext4",
    "mkfs.xfs",
    "mkfs.btrfs",
    "mksquashfs",
    "mkntfs",
    "ntfs-3g",
    "mkfs.vfat",
    "mcopy",
    "fuse2fs",
    "blkid",
];

fn fed(program: &str, arguments: &[&str], input: &str) {
    use std::io::Write;
    let mut command = Command::new(program);
    let mut child =
        command.args(arguments).env("PATH", search_path()).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{program}");
}

#[test]
fn six_file_systems_in_an_mbr_by_sfdisk_three_of_them_in_logical_partitions() {
    let table = "label: dos\nsize=80M,type=83\nsize=320M,type=83\nsize=128M,type=83\ntype=5\nsize=40M,type=83\nsize=80M,type=7\nsize=64M,type=c\n";
    all_kinds(|disk| fed("sfdisk", &["--quiet", disk], table), ["p1", "p2", "p3", "p5", "p6", "p7"]);
}

#[test]
fn six_file_systems_in_a_gpt_by_sgdisk_and_parted_whose_primary_is_lost_in_the_end() {
    let make = |disk: &str| {
        run("sgdisk", &["-n1:0:+80M", "-n2:0:+320M", "-n3:0:+128M", "-n9:0:+40M", disk]);
        run("parted", &["-s", disk, "mkpart", "windows", "ntfs", "600MiB", "680MiB"]);
        run("parted", &["-s", disk, "mkpart", "efi", "fat32", "690MiB", "750MiB"]);
        // The backup is there for this.
        run("dd", &["if=/dev/zero", &format!("of={disk}"), "bs=512", "seek=1", "count=1", "conv=notrunc", "status=none"]);
    };
    all_kinds(make, ["p1", "p2", "p3", "p9", "p4", "p5"]);
}

#[test]
fn a_bad_table_is_told_in_a_file_and_what_is_good_of_it_is_shown() {
    let Some(place) = Place::with_image(&["sfdisk"], "64M") else { return };
    let folder = place.path();
    // Two partitions that overlap, one beyond the end, and logical ones that lead back to themselves.
    let mut sector = vec![0; 512];
    let entries: [(u8, u32, u32); 4] =
        [(0x83, 2048, 40960), (0x83, 20480, 20480), (0x83, 100_000, 100_000), (0x05, 81_920, 8192)];
    for (slot, (kind, start, len)) in entries.into_iter().enumerate() {
        let at = 446 + slot * 16;
        sector[at + 4] = kind;
        for (place, value) in [(8, start), (12, len)] {
            (0..4).for_each(|byte| sector[at + place + byte] = (value >> (8 * byte)) as u8);
        }
    }
    (sector[510], sector[511]) = (0x55, 0xAA);
    support::vhd_fed(folder, "write a.vhd --offset 0", &sector);
    let mut link = vec![0; 512];
    // Its second entry says that the next link is at the start of all: itself.
    (link[462 + 4], link[462 + 12]) = (0x05, 8);
    (link[510], link[511]) = (0x55, 0xAA);
    support::vhd_fed(folder, "write a.vhd --offset 41943040", &link);

    done(folder, "mount a.vhd disk");
    let told = fs::read_to_string(folder.join("disk/partition-errors.txt")).unwrap();
    for part in ["1 and 2 overlap", "partition 3 ends at sector 200000", "a loop"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let names = support::names_in(&folder.join("disk"));
    assert_eq!(names, ["disk.raw", "info.json", "layers", "map.json", "p1", "p2", "partition-errors.txt"]);
    done(folder, "unmount disk");
    let said = refused(folder, "mount --fs a.vhd disk");
    assert!(said.contains(":pN"), "{said}");
    let said = refused(folder, "mount --fs a.vhd:p7 disk");
    assert!(said.contains("p7") && said.contains("p1 p2"), "{said}");
    let said = refused(folder, "mount --fs a.vhd:p1 disk");
    assert!(said.contains("in doubt"), "{said}");
    let said = refused(folder, "mount --fs --read-only a.vhd:p1 disk");
    assert!(said.contains("no file system"), "{said}");
}

#[test]
fn where_there_is_no_file_system_the_image_is_named_with_what_was_looked_at_and_what_to_do() {
    let Some(place) = Place::new(&["sfdisk"]) else { return };
    let folder = place.path();
    File::create(folder.join("raw")).unwrap().set_len(16 << 20).unwrap();
    done(folder, "convert raw empty.vhd");
    run("bash", &["-c", "echo start=2048,type=83 | sfdisk -q -X dos \"$0\"", folder.join("raw").to_str().unwrap()]);
    done(folder, "convert raw parts.vhd");
    for (image, file, place) in [
        ("empty.vhd", "empty.vhd", "on the disk as a whole"),
        ("parts.vhd", "parts.vhd", "in its partition p1"),
        ("parts.vhd:p1", "parts.vhd", "in its partition p1"),
    ] {
        let said = refused(folder, &format!("mount --fs {image} disk"));
        let expected =
            format!("{file}: no file system is found {place} (blkid knows none); without --fs, vhd mount shows its bytes\n");
        assert!(said.ends_with(&expected), "{said}");
        assert!(!said.contains("/fs-"), "a folder is named that the user does not know: {said}");
        let error = json(folder, &format!("mount --fs {image} disk"), 2);
        assert!(error["error"]["file"].as_str().unwrap().ends_with(file), "{error}");
    }
}

/// Damages the GPT in a file that sgdisk made: `kind`, then checksums made right again, so that the lie is believed.
const LIE: &str = r#"
import struct, sys, zlib
name, kind = sys.argv[1], sys.argv[2]
with open(name, "r+b") as disk:
    disk.seek(0, 2); last = disk.tell() // 512 - 1
    for at in (1, last):
        disk.seek(at * 512); header = bytearray(disk.read(512))
        entries_at, count, size = struct.unpack_from("<QII", header, 72)
        disk.seek(entries_at * 512); entries = bytearray(disk.read(count * size))
        first, end = struct.unpack_from("<QQ", entries, 32)
        if kind == "overlap": struct.pack_into("<QQ", entries, size + 32, first + 8, end)
        elif kind == "beyond": struct.pack_into("<QQ", entries, size + 32, end + 1, 1 << 62)
        elif kind == "backwards": struct.pack_into("<QQ", entries, size + 32, end + 9, end + 1)
        elif kind == "many": struct.pack_into("<I", header, 80, 0xFFFFFFFF)
        elif kind == "large": struct.pack_into("<I", header, 84, 1 << 31)
        elif kind == "gone": header[0] = 0
        elif kind == "itself": struct.pack_into("<Q", header, 72, 1)
        disk.seek(entries_at * 512); disk.write(entries)
        if kind != "many" and kind != "large": struct.pack_into("<I", header, 88, zlib.crc32(entries))
        struct.pack_into("<I", header, 16, 0)
        struct.pack_into("<I", header, 16, zlib.crc32(header[:92]) ^ (kind == "checksum"))
        disk.seek(at * 512); disk.write(header)
"#;

#[test]
fn lies_in_a_gpt_are_told_in_a_file_and_what_is_good_of_it_is_shown() {
    let Some(place) = Place::new(&["sgdisk", "python3"]) else { return };
    let folder = place.path();
    let raw = folder.join("raw");
    let file = raw.to_str().unwrap();
    let both: &[&str] = &["p1", "p2"];
    let lies: &[(&str, &str, &[&str])] = &[
        ("overlap", "overlap", both),
        ("beyond", "2", &["p1"]),
        ("backwards", "2", &["p1"]),
        ("many", "4294967295 entries", &[]),
        ("large", "2147483648 bytes", &[]),
        ("itself", "entries at sector 1", &[]),
        ("checksum", "wrong CRC", &[]),
        ("gone", "there is none", &[]),
    ];
    for (kind, told, shown) in lies {
        File::create(&raw).unwrap().set_len(64 << 20).unwrap();
        run("sgdisk", &["-n1:2048:40959", "-n2:40960:81919", file]);
        run("python3", &["-c", LIE, file, kind]);
        done(folder, &format!("convert raw {kind}.vhd"));
        done(folder, &format!("mount --read-only {kind}.vhd disk"));
        let errors = fs::read_to_string(folder.join("disk/partition-errors.txt")).unwrap_or_default();
        assert!(errors.contains(told), "{kind}: {errors}");
        let names = support::names_in(&folder.join("disk"));
        let parts: Vec<_> = names.iter().filter(|name| name.starts_with('p') && !name.ends_with(".txt")).collect();
        assert_eq!(parts, *shown, "{kind}: {errors}");
        done(folder, "unmount disk");
    }
}

/// Three partitions with an ext4 each.
fn make_three_partitions(folder: &Path) {
    done(folder, "mount a.vhd disk");
    let disk = folder.join("disk/disk.raw").display().to_string();
    run(
        "parted",
        &[
            "-s", &disk, "mklabel", "gpt", "mkpart", "a", "1MiB", "50MiB", "mkpart", "b", "50MiB", "100MiB", "mkpart", "c",
            "100MiB", "150MiB",
        ],
    );
    done(folder, "unmount disk");
    done(folder, "mount a.vhd disk");
    (1..=3).for_each(|n| drop(run("mkfs.ext4", &["-q", &folder.join(format!("disk/p{n}")).display().to_string()])));
    done(folder, "unmount disk");
}

/// Two lines of fstab name two partitions of one image, and mount(8) runs the helper for both, one after the other or at once.
#[test]
fn partitions_of_one_image_are_mounted_one_by_one() {
    let Some(place) = Place::with_image(TOOLS, "200M") else { return };
    let folder = place.path();
    for name in ["files", "second", "third"] {
        fs::create_dir(folder.join(name)).unwrap();
    }
    let _cleanup = support::mounts::Cleanup(["second", "third"].map(|name| folder.join(name)).into());
    make_three_partitions(folder);
    let helper = folder.join("mount.vhd");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_vhd"), &helper).unwrap();
    let line = |part: &str, at: &str, access: &str| {
        let mut command = Command::new(&helper);
        command.arg(folder.join("a.vhd")).arg(folder.join(at)).args(["-o", &format!("{access},fs={part}")]).stdin(Stdio::null());
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let at_once = [line("p1", "files", "rw"), line("p2", "second", "rw")];
    for process in at_once {
        let output = process.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", support::text(&output.stderr));
    }
    let refusal = refused(folder, "mount --fs a.vhd:p2 third");
    assert!(refusal.contains("p2 of its image is mounted on ") && refusal.contains("mount --bind"), "{refusal}");
    assert!(refused(folder, "mount --fs a.vhd:p4 third").contains("p4"));
    let document = json(folder, "mount --fs a.vhd:p3 third", 0);
    assert_eq!(json(folder, &format!("ctl {} list", document["control"].as_str().unwrap()), 0)["exports"][0]["name"], "a");
    for (name, text) in [("files", "one"), ("second", "two"), ("third", "three")] {
        fs::write(folder.join(name).join("file"), text).unwrap();
    }

    // Each ends by itself, in any order and by any command; the image is closed with the last.
    let note = support::vhd(folder, "unmount files");
    assert!(note.status.success() && support::text(&note.stderr).contains("stays open"), "{}", support::text(&note.stderr));
    assert_eq!(fs::read(folder.join("third/file")).unwrap(), b"three");
    done(folder, "mount --fs a.vhd:p1 files");
    assert_eq!(fs::read(folder.join("files/file")).unwrap(), b"one");
    run("umount", &[&folder.join("files")]);
    done(folder, "unmount third");
    done(folder, "unmount second");
    wait_until_free(folder, "a.vhd");
    done(folder, "check a.vhd");

    // Those that only read need not share.
    done(folder, "mount --read-only --fs a.vhd:p1 files");
    let refusal = refused(folder, "mount --fs a.vhd:p2 second");
    assert!(refusal.contains("read-only"), "{refusal}");
    done(folder, "mount --read-only --fs a.vhd:p2 second");
    done(folder, "unmount files");
    assert_eq!(fs::read(folder.join("second/file")).unwrap(), b"two");
    done(folder, "unmount second");

    // Who serves it ends all of them.
    let first = json(folder, "mount --fs a.vhd:p1 files", 0);
    done(folder, "mount --read-only --fs a.vhd:p2 second");
    assert_eq!(fs::read(folder.join("second/file")).unwrap(), b"two");
    run("kill", &[&first["pid"].to_string()]);
    wait_until_free(folder, "a.vhd");
    assert!(fs::read_dir(folder.join("second")).unwrap().next().is_none(), "its file system is still there");
    assert!(fs::read_dir(folder.join("files")).unwrap().next().is_none());
}

#[test]
fn a_volume_that_is_only_read_is_not_told_to_be_full() {
    let Some(place) = Place::with_image(TOOLS, "8M") else { return };
    let folder = place.path();
    let squashed = folder.join("squashed").display().to_string();
    run("mksquashfs", &[&folder.join("a.vhd").display().to_string(), &squashed, "-quiet", "-no-progress"]);
    fs::create_dir(folder.join("files")).unwrap();
    run("mount", &["-o", "loop,ro", &squashed, &folder.join("files").display().to_string()]);
    let mut command = support::vhd_in(folder);
    command.args(["serve", "files/a.vhd", "--read-only", "--listen", "unix:s", "--control", "c", "--low-space", "1T"]);
    let server = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("it serves", || folder.join("s").exists());
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert!(!done(folder, "ctl ./c metrics").contains("vhd_volume_free_bytes{"));
    run("kill", &[&server.id().to_string()]);
    let said = support::text(&server.wait_with_output().unwrap().stderr);
    assert!(said.is_empty(), "{said}");
}
