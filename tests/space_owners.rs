//! Goal: `vhd compact --free-space` drops nothing of a place that anything else than one known file system may own, and says
//! why; `vhd mount --fs` does not write there. The same file system alone still loses what is free in it.
//!
//! Method: a sound ext4 whose free space is full of something is what was there before; over it comes what the other owner
//! writes: by its own tool where Debian has one, else byte by byte from its published layout (`vhd_testkit::foreign`), judged by
//! libblkid, mdadm and ldmtool. On the whole disk, and in a partition. Then types of partitions, and tables in doubt.
//! It would fail if an owner were not recognised where its makers recognise it, or a plain file system were refused.
//! It needs root and loop devices for the tools that want a device.

#![allow(missing_docs, clippy::unwrap_used)]
#![allow(clippy::little_endian_bytes, reason = "partition tables are little-endian")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use support::mounts::Place;
use support::{done, json, noise, refused, run, search_path, text, vhd};
use tempfile::TempDir;
use vhd_core::Disk;
use vhd_core::chain::Chain;
use vhd_core::guestfs::free_space;
use vhd_testkit::foreign::{self, Foreign};
use vhd_testkit::tools::require;

const MIB: u64 = 1 << 20;
/// Bytes of a place: a pool of ZFS wants as many.
const SIZE: u64 = 80 * MIB;
/// Where the partition of a test begins; behind it the disk goes on for as long.
const START: u64 = MIB;

/// A folder with `stale.img`, a sound ext4 of [`SIZE`] bytes whose free space is not zero.
struct Scene(TempDir);

impl Scene {
    /// `None` where a tool is missing, which is said.
    fn new() -> Option<Self> {
        let tools = ["mke2fs", "blkid"].map(require);
        if tools.iter().any(Option::is_none) {
            return None;
        }
        let scene = Self(tempfile::tempdir_in("/dev/shm").unwrap());
        let stale = scene.empty("stale.img", SIZE);
        run("mke2fs", &["-q", "-F", "-t", "ext4", stale.to_str().unwrap()]);
        fill_free_space(&stale);
        Some(scene)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn empty(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path().join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    /// A copy of the ext4 with these pieces over it, as a disk or in the one partition of an MBR.
    fn over_stale(&self, name: &str, pieces: &[(u64, Vec<u8>)], in_partition: bool) -> PathBuf {
        let start = if in_partition { START } else { 0 };
        let path = self.empty(name, SIZE + 2 * start);
        if in_partition {
            put(&path, 0, &master_boot_record(&[(0x83, START, SIZE)]));
        }
        put_file(&path, start, &self.path().join("stale.img"));
        pieces.iter().for_each(|(at, bytes)| put(&path, start + at, bytes));
        path
    }

    /// Makes an image of a raw disk, compacts it, and returns what was said. Where nothing may be dropped, all of it is there.
    fn compacted(&self, name: &str) -> Value {
        // Its end is what counts, not its content: which has a VHD's footer nowhere.
        done(self.path(), &format!("convert {name} x.vhd --overwrite --block-size 512K"));
        let said = json(self.path(), "compact x.vhd --free-space", 0);
        if said[0]["blocks_dropped"] == 0 {
            done(self.path(), &format!("compare x.vhd {name}"));
        }
        said[0].clone()
    }

    /// Fails unless nothing of a disk is dropped, and the reason of its first place, or what it is, has this word.
    #[track_caller]
    fn is_left_alone(&self, name: &str, word: &str) {
        let said = self.compacted(name);
        let place = &said["free_space"][0];
        let told = format!("{} {}", place["file_system"], place["reason"]);
        assert!(said["blocks_dropped"] == 0 && place["free"].is_null() && told.contains(word), "{name}: {word}: {said}");
        let reasons = said["free_space"].as_array().unwrap().iter();
        assert!(reasons.clone().all(|place| place["reason"].is_string()), "{name}: {said}");
    }

    /// Fails unless what is free on a disk is dropped.
    #[track_caller]
    fn is_compacted(&self, name: &str) {
        let said = self.compacted(name);
        let place = &said["free_space"][0];
        assert!(said["blocks_dropped"].as_u64() > Some(60) && place["free"].as_u64() > Some(30 * MIB), "{name}: {said}");
    }
}

/// Puts something into every block of an image of what is free.
fn fill_free_space(path: &Path) {
    let disk = Disk::new(Chain::open_raw(path, false).unwrap());
    let free = free_space(&disk).unwrap();
    assert!(!free.ranges.is_empty(), "{:?}", free.places);
    drop(disk);
    for range in free.ranges {
        (range.start..range.end).step_by(256 << 10).for_each(|at| put(path, at, &noise(at + 1, 512)));
    }
}

fn put(path: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

/// Copies what is not zero in a file.
fn put_file(path: &Path, at: u64, from: &Path) {
    let bytes = fs::read(from).unwrap();
    let to = File::options().write(true).open(path).unwrap();
    for (index, piece) in bytes.chunks(512).enumerate().filter(|(_, piece)| piece.iter().any(|byte| *byte != 0)) {
        to.write_all_at(piece, at + index as u64 * 512).unwrap();
    }
}

/// A table with these partitions: type, first byte, bytes.
fn master_boot_record(partitions: &[(u8, u64, u64)]) -> Vec<u8> {
    let mut sector = vec![0; 512];
    for (slot, (kind, start, len)) in partitions.iter().enumerate() {
        let entry = &mut sector[446 + slot * 16..][..16];
        entry[4] = *kind;
        entry[8..12].copy_from_slice(&((start / 512) as u32).to_le_bytes());
        entry[12..16].copy_from_slice(&((len / 512) as u32).to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xAA]);
    sector
}

/// What libblkid takes a file for.
fn blkid(path: &Path) -> String {
    let output = Command::new("blkid").args(["-p", "-o", "value", "-s", "TYPE"]).arg(path).env("PATH", search_path()).output();
    text(&output.unwrap().stdout).trim().to_owned()
}

#[test]
fn what_others_lay_out_is_left_alone_on_a_disk_and_in_a_partition() {
    let Some(scene) = Scene::new() else { return };
    scene.is_compacted("stale.img");
    scene.over_stale("part.img", &[], true);
    scene.is_compacted("part.img");
    let all = foreign::all(SIZE);
    assert!(all.len() > 50, "{}", all.len());
    let mut unknown = Vec::new();
    for Foreign { name, blkid: kind, told, pieces } in all {
        let alone = scene.empty("alone.img", SIZE);
        pieces.iter().for_each(|(at, bytes)| put(&alone, *at, bytes));
        let found = blkid(&alone);
        if kind.is_some_and(|kind| kind != found) {
            unknown.push(format!("{name}: {kind:?}, found {found:?}"));
        }
        // A whole disk is cut into partitions by an MBR.
        let [told_alone, told_over] = if name == "an MBR" { ["no file system", "ext4"] } else { [told, told] };
        scene.is_left_alone("alone.img", told_alone);
        scene.over_stale("over.img", &pieces, false);
        scene.is_left_alone("over.img", told_over);
        scene.over_stale("part.img", &pieces, true);
        scene.is_left_alone("part.img", told);
    }
    assert!(unknown.is_empty(), "libblkid does not agree: {unknown:#?}");
}

/// What it makes, libblkid's type, a word of what is said, the tool with its arguments, MiB.
const MADE: &[(&str, &str, &str, &str, u64)] = &[
    ("LUKS1", "crypto_LUKS", "LUKS", "cryptsetup -q luksFormat --type luks1 --pbkdf-force-iterations 1000 @ key", 80),
    (
        "LUKS2",
        "crypto_LUKS",
        "LUKS",
        "cryptsetup -q luksFormat --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 @ key",
        80,
    ),
    ("bcache, data", "bcache", "bcache", "make-bcache -B @", 80),
    ("bcache, cache", "bcache", "bcache", "make-bcache -C @", 80),
    ("LVM", "LVM2_member", "LVM", "pvcreate -q -ff -y @dev", 80),
    ("LVM, label in sector 3", "LVM2_member", "LVM", "pvcreate -q -ff -y --labelsector 3 @dev", 80),
    ("DRBD 8.4", "drbd", "DRBD", "drbdmeta --force 0 v08 @dev internal create-md", 80),
    ("DRBD 9", "drbd", "DRBD", "drbdmeta --force 0 v09 @dev internal create-md 1", 80),
    ("Btrfs", "btrfs", "Btrfs", "mkfs.btrfs -q -f @", 120),
    ("XFS", "xfs", "XFS", "mkfs.xfs -q -f @", 320),
    ("F2FS", "f2fs", "F2FS", "mkfs.f2fs -q -f @", 80),
    ("NILFS2", "nilfs2", "NILFS2", "mkfs.nilfs2 -q -f @", 140),
    ("JFS", "jfs", "JFS", "mkfs.jfs -q @", 80),
    ("ReiserFS", "reiserfs", "ReiserFS", "mkfs.reiserfs -q -ff @", 80),
    ("HFS", "hfs", "HFS", "hformat -f @", 80),
    ("exFAT", "exfat", "exFAT", "mkfs.exfat @", 80),
    ("UDF", "udf", "UDF", "mkfs.udf @", 80),
    ("OCFS2", "ocfs2", "OCFS2", "mkfs.ocfs2 -q -F --fs-features=local @", 300),
    ("EROFS", "erofs", "EROFS", "mkfs.erofs @ tree", 80),
    ("SquashFS", "squashfs", "SquashFS", "mksquashfs tree @ -quiet -no-progress -noappend", 80),
    ("ISO 9660", "iso9660", "ISO 9660", "genisoimage -quiet -o @ tree", 80),
    ("Minix", "minix", "Minix", "mkfs.minix @", 80),
    ("BFS", "bfs", "BFS", "mkfs.bfs @", 80),
    ("cramfs", "cramfs", "cramfs", "mkfs.cramfs tree @", 80),
];

/// Runs a tool over a file, on a loop device where it wants a device.
fn make(folder: &Path, line: &str, file: &Path) {
    let device = line.contains("@dev").then(|| run("losetup", &["-f", "--show", file.to_str().unwrap()]));
    let name = device.as_deref().map_or(file.to_str().unwrap(), str::trim);
    let words: Vec<_> = line.split_whitespace().map(|word| if word.starts_with('@') { name } else { word }).collect();
    let mut command = Command::new(words[0]);
    let output = command.args(&words[1..]).current_dir(folder).env("PATH", search_path()).stdin(Stdio::null()).output();
    if let Some(device) = &device {
        run("losetup", &["-d", device.trim()]);
    }
    let output = output.unwrap();
    assert!(output.status.success(), "{line}: {}{}", text(&output.stdout), text(&output.stderr));
}

#[test]
fn what_tools_make_is_left_alone_also_over_an_old_ext4() {
    let Some(scene) = Scene::new() else { return };
    let missing = MADE.iter().filter(|(.., line, _)| require(line.split_whitespace().next().unwrap()).is_none());
    if missing.count() > 0 || require("losetup").is_none() {
        return;
    }
    fs::write(scene.path().join("key"), "a key").unwrap();
    fs::create_dir(scene.path().join("tree")).unwrap();
    fs::write(scene.path().join("tree/file"), noise(1, 5000)).unwrap();
    for (what, kind, told, line, mib) in MADE {
        let made = scene.empty("made.img", mib * MIB);
        make(scene.path(), line, &made);
        assert_eq!(blkid(&made), *kind, "{what}");
        // Some make a file that is as short as they like.
        let len = fs::metadata(&made).unwrap().len().next_multiple_of(512).max(MIB);
        File::options().write(true).open(&made).unwrap().set_len(len).unwrap();
        scene.is_left_alone("made.img", told);
        let over = scene.empty("over.img", len.max(SIZE));
        put_file(&over, 0, &scene.path().join("stale.img"));
        put_file(&over, 0, &made);
        scene.is_left_alone("over.img", told);
    }
}

/// The daemon of ZFS in user space, where none runs.
struct ZfsFuse(Option<Child>);

impl ZfsFuse {
    fn start() -> Self {
        let answers = || {
            let mut asked = Command::new("zpool");
            asked.arg("list").env("PATH", search_path()).stdout(Stdio::null()).stderr(Stdio::null());
            asked.status().is_ok_and(|status| status.success())
        };
        if answers() {
            return Self(None);
        }
        let mut command = Command::new("zfs-fuse");
        let daemon = command.arg("--no-daemon").env("PATH", search_path()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let daemon = Self(Some(daemon.unwrap()));
        support::wait_until("zfs-fuse answers", answers);
        daemon
    }
}

impl Drop for ZfsFuse {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.0 {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// ZFS leaves the first 8 KiB alone: a superblock of ext4 stays, and says of a pool's data that it is free.
#[test]
fn a_pool_of_zfs_over_an_old_ext4_loses_nothing() {
    let Some(scene) = Scene::new() else { return };
    if ["zpool", "zfs-fuse"].map(require).iter().any(Option::is_none) {
        return;
    }
    let pool = format!("vhd-test-{}", std::process::id());
    let made = scene.empty("pool.img", SIZE);
    let _daemon = ZfsFuse::start();
    run("zpool", &["create", "-f", "-m", "none", &pool, made.to_str().unwrap()]);
    run("zpool", &["export", &pool]);
    assert_eq!(blkid(&made), "zfs_member");
    scene.is_left_alone("pool.img", "ZFS");
    let over = scene.empty("over.img", SIZE);
    put_file(&over, 0, &scene.path().join("stale.img"));
    put_file(&over, 0, &made);
    // The old superblock is still there.
    assert_eq!(fs::read(&over).unwrap()[1080..1082], [0x53, 0xEF]);
    scene.is_left_alone("over.img", "ext4 and ZFS at once");
    // Each of the four labels says it alone, by its list or by its blocks.
    let len = 256 << 10;
    for label in [0, len, SIZE - 2 * len, SIZE - len] {
        for part in [16 << 10..128 << 10, 128 << 10..len] {
            let bytes = fs::read(&made).unwrap()[(label + part.start) as usize..(label + part.end) as usize].to_vec();
            scene.over_stale("one.img", &[(label + part.start, bytes)], false);
            scene.is_left_alone("one.img", "ZFS");
        }
    }
}

#[test]
fn members_of_a_raid_are_what_mdadm_takes_for_them() {
    let Some(scene) = Scene::new() else { return };
    if require("mdadm").is_none() {
        return;
    }
    for Foreign { name, pieces, .. } in foreign::all(SIZE).into_iter().filter(|foreign| foreign.name.starts_with("md ")) {
        let alone = scene.empty("alone.img", SIZE);
        pieces.iter().for_each(|(at, bytes)| put(&alone, *at, bytes));
        let said = run("mdadm", &["--examine", alone.to_str().unwrap()]);
        let version = name.trim_start_matches("md ");
        let family = if version == "0.90" { "0.90" } else { "1." };
        assert!(said.contains(&format!("Version : {family}")) && said.contains("- correct"), "{name}: {said}");
    }
}

/// Makes a disk with a GPT of these types of sgdisk, and the ext4 in the first partition.
fn with_gpt(scene: &Scene, name: &str, types: &[&str]) -> PathBuf {
    let path = scene.empty(name, SIZE + 24 * MIB);
    let mut options = vec![format!("-n1:2048:+{}K", SIZE / 1024), format!("-t1:{}", types[0])];
    for (number, kind) in (2..).zip(&types[1..]) {
        options.extend([format!("-n{number}:0:+4M"), format!("-t{number}:{kind}")]);
    }
    options.push(path.to_str().unwrap().to_owned());
    run("sgdisk", &options);
    put_file(&path, START, &scene.path().join("stale.img"));
    path
}

#[test]
fn dynamic_disks_of_windows_are_left_alone_as_a_whole() {
    let Some(scene) = Scene::new() else { return };
    let tools = ["ldmtool", "sgdisk", "sfdisk"].map(require);
    if tools.iter().any(Option::is_none) {
        return;
    }
    let known = |path: &Path| run("ldmtool", &["scan", path.to_str().unwrap()]).contains("0a1b2c3d-7777");
    // One of an MBR: the database ends the disk, behind all partitions.
    let sectors = (SIZE + 2 * START) / 512;
    let database = foreign::ldm(6, sectors - 2048, START / 512..sectors - 2048);
    let disk = scene.over_stale("mbr.img", &[], true);
    let table = |kind: u8| master_boot_record(&[(kind, START, SIZE)]);
    database.iter().for_each(|(at, bytes)| put(&disk, *at, bytes));
    put(&disk, 0, &table(0x42));
    assert!(known(&disk));
    scene.is_left_alone("mbr.img", "LDM");
    // The type alone says so, and the database alone.
    let typed = scene.over_stale("typed.img", &[], true);
    put(&typed, 0, &table(0x42));
    scene.is_left_alone("typed.img", "LDM");
    put(&disk, 0, &table(0x07));
    scene.is_left_alone("mbr.img", "LDM");
    let plain = scene.over_stale("plain.img", &[], true);
    put(&plain, 0, &table(0x07));
    scene.is_compacted("plain.img");
    // One of a GPT: the database is in a partition. No partition beside it counts, whatever its type.
    let metadata = "5808C8AA-7E8F-42E0-85D2-E1E90434CFB3";
    let disk = with_gpt(&scene, "gpt.img", &["AF9B60A0-1431-4F62-BC68-3311714A69AD", metadata]);
    let first = (START + SIZE) / 512;
    foreign::ldm(first + 8191, first + 4096, 2048..first).iter().for_each(|(at, bytes)| put(&disk, *at, bytes));
    assert!(known(&disk));
    scene.is_left_alone("gpt.img", "LDM");
    for kind in ["AF9B60A0-1431-4F62-BC68-3311714A69AD", metadata] {
        with_gpt(&scene, "other.img", &["0700", kind]);
        scene.is_left_alone("other.img", "LDM");
    }
    with_gpt(&scene, "basic.img", &["0700", "0700"]);
    scene.is_compacted("basic.img");
}

#[test]
fn what_a_type_says_of_the_owner_counts() {
    let Some(scene) = Scene::new() else { return };
    if require("sgdisk").is_none() {
        return;
    }
    let disk = scene.over_stale("disk.img", &[], true);
    for kind in [0x07, 0x17, 0x27, 0x83] {
        put(&disk, 0, &master_boot_record(&[(kind, START, SIZE)]));
        scene.is_compacted("disk.img");
    }
    let others = [0x42, 0x82, 0x84, 0x87, 0x8E, 0xA5, 0xAF, 0xBF, 0xDA, 0xE7, 0xE8, 0xEE, 0xFB, 0xFD, 0x0C, 0xEF];
    for kind in others {
        put(&disk, 0, &master_boot_record(&[(kind, START, SIZE)]));
        scene.is_left_alone("disk.img", "");
    }
    for kind in ["8300", "0700", "8304", "8302", "2700"] {
        with_gpt(&scene, "gpt.img", &[kind]);
        scene.is_compacted("gpt.img");
    }
    let spaces = "E75CAF8F-F680-4CEE-AFA3-B001E56EFC2D";
    for kind in ["8E00", "FD00", "BF01", "AF00", "AF0A", "A504", "8309", "8308", "FB00", "0C01", "EF00", "EF02", "8200", spaces] {
        with_gpt(&scene, "gpt.img", &[kind]);
        scene.is_left_alone("gpt.img", "");
    }
    // A member of a pool has it all.
    with_gpt(&scene, "gpt.img", &["0700", spaces]);
    scene.is_left_alone("gpt.img", "Storage Spaces");
}

/// Changes the entries or a header of a GPT, and makes its checksums right again: the last word says where.
const GPT_CHANGE: &str = r#"
import struct, sys, zlib
name, kind = sys.argv[1], sys.argv[2]
with open(name, "r+b") as disk:
    disk.seek(0, 2); last = disk.tell() // 512 - 1
    for at in (1, last):
        if kind == "backup differs" and at == 1: continue
        disk.seek(at * 512); header = bytearray(disk.read(512))
        entries_at, count, size = struct.unpack_from("<QII", header, 72)
        disk.seek(entries_at * 512); entries = bytearray(disk.read(count * size))
        first, end = struct.unpack_from("<QQ", entries, 32)
        if kind == "backup differs": struct.pack_into("<QQ", entries, size + 32, end + 9, end + 99)
        elif kind == "overlap": struct.pack_into("<QQ", entries, size + 32, end - 8, end + 8)
        elif kind == "beyond": struct.pack_into("<QQ", entries, size + 32, end + 1, last + 4096)
        elif kind == "over the entries": struct.pack_into("<QQ", entries, size + 32, 3, 40)
        elif kind == "over the backup": struct.pack_into("<QQ", entries, size + 32, end + 1, last)
        disk.seek(entries_at * 512); disk.write(entries)
        struct.pack_into("<I", header, 88, zlib.crc32(entries))
        struct.pack_into("<I", header, 16, 0)
        struct.pack_into("<I", header, 16, zlib.crc32(header[:92]))
        disk.seek(at * 512); disk.write(header)
"#;

#[test]
fn nothing_is_free_where_a_partition_table_is_in_doubt() {
    let Some(scene) = Scene::new() else { return };
    if ["sgdisk", "python3"].map(require).iter().any(Option::is_none) {
        return;
    }
    let made = || with_gpt(&scene, "gpt.img", &["8300", "8300"]);
    let len = SIZE + 24 * MIB;
    made();
    scene.is_compacted("gpt.img");
    for kind in ["backup differs", "overlap", "beyond", "over the entries", "over the backup"] {
        let disk = made();
        run("python3", &["-c", GPT_CHANGE, disk.to_str().unwrap(), kind]);
        scene.is_left_alone("gpt.img", "in doubt");
    }
    // One copy is damaged, or both; or what should say that there is a GPT does not.
    for places in [&[520][..], &[len - 512 + 20], &[520, len - 512 + 20], &[510]] {
        let disk = made();
        places.iter().for_each(|at| put(&disk, *at, &[0x77]));
        let said = scene.compacted("gpt.img");
        assert!(said["blocks_dropped"] == 0 && said["free_space"][0]["reason"].is_string(), "{places:?}: {said}");
    }
    // A hybrid: the master boot record has a partition of its own.
    let disk = made();
    let mut hybrid = master_boot_record(&[(0xEE, 512, START - 512), (0x83, START, SIZE)]);
    put(&disk, 0, &hybrid);
    scene.is_left_alone("gpt.img", "hybrid");
    // Two that overlap, one beyond the end, one over what describes another.
    let disk = scene.over_stale("mbr.img", &[], true);
    let beyond = SIZE + 2 * START;
    let extended = START + SIZE;
    for (others, why) in [
        (&[(0x83, START + SIZE - 512, 4096)][..], "overlap"),
        (&[(0x83, extended, beyond)], "the disk has"),
        (&[(0x05, extended, START), (0x05, START / 2, 4096)], "second extended"),
        (&[(0x05, START + SIZE - 512, MIB / 2)], "overlaps the extended one"),
        (&[(0xEE, 512, 512)], "there is none"),
        (&[(0x05, extended, START / 2)], "has no signature"),
    ] {
        put(&disk, 0, &master_boot_record(&[&[(0x83, START, SIZE)], others].concat()));
        scene.is_left_alone("mbr.img", why);
    }
    hybrid = master_boot_record(&[(0x83, START, SIZE), (0x05, extended, START / 2)]);
    put(&disk, 0, &hybrid);
    // A logical partition that begins where it is described; the one of the honest table begins behind that.
    put(&disk, extended, &master_boot_record(&[(0x83, 0, 4096)]));
    scene.is_left_alone("mbr.img", "overlaps the description");
    put(&disk, extended, &master_boot_record(&[(0x83, 512, 4096)]));
    scene.is_compacted("mbr.img");
    // A table that is none, as its partition begins beyond the end: the disk as a whole is no file system for that.
    scene.over_stale("whole.img", &[(0, master_boot_record(&[(0x83, 2 * SIZE, MIB)]))], false);
    scene.is_left_alone("whole.img", "partition table");
    // One with no partition that is on the disk, and an empty one.
    scene.over_stale("none.img", &[(0, master_boot_record(&[(0x83, 512, 2 * SIZE)]))], false);
    scene.is_left_alone("none.img", "the disk has");
    run("sgdisk", &["-o", scene.empty("none.img", SIZE).to_str().unwrap()]);
    scene.is_left_alone("none.img", "no partitions");
    // An old GPT at the end of a disk with an MBR.
    put(&disk, beyond - 512, b"EFI PART");
    scene.is_left_alone("mbr.img", "GPT");
}

/// A system that sleeps has in its memory what other partitions hold.
#[test]
fn a_system_that_sleeps_in_one_partition_keeps_all_of_the_disk() {
    let Some(scene) = Scene::new() else { return };
    if ["sgdisk", "mkswap", "mkfs.ntfs", "ntfscp"].map(require).iter().any(Option::is_none) {
        return;
    }
    let swap = scene.empty("swap.img", 4 * MIB);
    run("mkswap", &["-q", swap.to_str().unwrap()]);
    let disk = with_gpt(&scene, "disk.img", &["8300", "8200"]);
    put_file(&disk, START + SIZE, &swap);
    scene.is_compacted("disk.img");
    assert_eq!(scene.compacted("disk.img")["free_space"][1]["file_system"], "swap");
    put(&disk, START + SIZE + 4086, b"S1SUSPEND\0");
    scene.is_left_alone("disk.img", "a hibernated system is in partition 2");
    // A Windows, also one that was shut down with fast startup.
    let windows = scene.empty("windows.img", 4 * MIB);
    run("mkfs.ntfs", &["-F", "-Q", "-q", windows.to_str().unwrap()]);
    let with_windows = || {
        let disk = with_gpt(&scene, "disk.img", &["8300", "0700"]);
        put_file(&disk, START + SIZE, &windows);
    };
    with_windows();
    scene.is_compacted("disk.img");
    let memory = scene.path().join("hiberfil.sys");
    fs::write(&memory, [b"HIBR", &[7; 9000][..]].concat()).unwrap();
    run("ntfscp", &["-f", windows.to_str().unwrap(), memory.to_str().unwrap(), "hiberfil.sys"]);
    with_windows();
    scene.is_left_alone("disk.img", "a hibernated system is in partition 2");
}

#[test]
fn what_others_own_is_mounted_to_be_read_at_most() {
    let Some(place) = Place::new(&["mke2fs", "blkid", "sgdisk", "mkswap"]) else { return };
    let Some(scene) = Scene::new() else { return };
    let folder = place.path();
    let tried = |name: &str, partition: &str, why: &str| {
        done(scene.path(), &format!("convert {name} x.vhd --overwrite --block-size 512K"));
        let before = fs::read(scene.path().join("x.vhd")).unwrap();
        let target = folder.join("disk");
        let said = refused(scene.path(), &format!("mount --fs x.vhd{partition} {}", target.display()));
        assert!(said.contains(why) && said.contains("--read-only"), "{name}: {said}");
        let output = vhd(scene.path(), &format!("mount --fs --read-only x.vhd{partition} {}", target.display()));
        if output.status.success() {
            // It may not be what it looks like.
            assert!(text(&output.stderr).contains(why), "{name}: {}", text(&output.stderr));
            done(folder, "unmount disk");
        }
        assert!(fs::read(scene.path().join("x.vhd")).unwrap() == before, "{name}: was written to");
        output.status.success()
    };
    let sound = |name: &str, partition: &str| {
        done(scene.path(), &format!("convert {name} x.vhd --overwrite --block-size 512K"));
        let target = folder.join("disk");
        done(scene.path(), &format!("mount --fs x.vhd{partition} {}", target.display()));
        fs::write(target.join("new"), "text").unwrap();
        done(folder, "unmount disk");
    };
    sound("stale.img", "");
    let disk = scene.over_stale("part.img", &[], true);
    sound("part.img", ":p1");
    for (kind, why) in [(0x42, "LDM"), (0x8E, "LVM"), (0x0C, "FAT"), (0xDA, "0xda")] {
        put(&disk, 0, &master_boot_record(&[(kind, START, SIZE)]));
        // What is there is an ext4 all the same.
        assert!(tried("part.img", ":p1", why));
    }
    for wanted in ["md 1.0", "DRBD 8.3", "a volume of VMFS", "Storage Spaces", "the end of a GPT", "bcachefs", "VIA"] {
        let owner = foreign::all(SIZE).into_iter().find(|foreign| foreign.name == wanted).unwrap();
        scene.over_stale("over.img", &owner.pieces, false);
        tried("over.img", "", owner.told);
        scene.over_stale("part.img", &owner.pieces, true);
        tried("part.img", "", owner.told);
    }
    let disk = with_gpt(&scene, "gpt.img", &["8300", "8200"]);
    let swap = scene.empty("swap.img", 4 * MIB);
    run("mkswap", &["-q", swap.to_str().unwrap()]);
    put_file(&disk, START + SIZE, &swap);
    sound("gpt.img", ":p1");
    put(&disk, START + SIZE + 4086, b"S1SUSPEND\0");
    tried("gpt.img", ":p1", "hibernated");
}
