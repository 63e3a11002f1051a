//! Goal: what is called free is what the file system's own tools call free, and nothing of a file system that is in doubt.
//!
//! Method: file systems that their own mkfs makes, with every feature that moves a bitmap, and files in them; compared with
//! what dumpe2fs, ntfsinfo and fsck.fat say. Then each is made dirty, damaged, or another thing.
//! It would fail if one block of a file were called free: files are found again after all that is free was overwritten.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]
#![allow(clippy::little_endian_bytes, reason = "these file systems are little-endian")]
#![allow(clippy::single_range_in_vec_init, reason = "one range is meant")]

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vhd_core::chain::Chain;
use vhd_core::guestfs::{FreeSpace, Place, free_space};
use vhd_core::{Disk, Error};
use vhd_testkit::foreign;
use vhd_testkit::fuzz::{tell_disk, told_disk};
use vhd_testkit::tools::{Tool, require};

const MIB: u64 = 1 << 20;

struct Made {
    _folder: TempDir,
    path: PathBuf,
}

impl Made {
    fn new(size: u64) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("disk.img");
        fs::File::create(&path).unwrap().set_len(size).unwrap();
        Self { _folder: folder, path }
    }

    fn by(tool: &Tool, options: &[&str], size: u64) -> Self {
        let made = Self::new(size);
        tool.run(&[options, &[made.name()]].concat()).unwrap();
        made
    }

    fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }

    fn free(&self) -> FreeSpace {
        free_of(&self.path).unwrap()
    }

    fn place(&self) -> Place {
        self.free().places.remove(0)
    }

    /// Why nothing of it is freed.
    fn reason(&self) -> String {
        let free = self.free();
        assert_eq!(free.ranges, []);
        free.places[0].free.clone().unwrap_err()
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        fs::OpenOptions::new().write(true).open(&self.path).unwrap().write_all_at(bytes, at).unwrap();
    }

    fn get<const LEN: usize>(&self, at: u64) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        fs::File::open(&self.path).unwrap().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn flip(&self, at: u64, bits: u8) {
        self.put(at, &[self.get::<1>(at)[0] ^ bits]);
    }

    /// Overwrites all that is free.
    fn spoil_what_is_free(&self) {
        for range in self.free().ranges {
            let rubbish = vec![0xA5; (range.end - range.start) as usize];
            self.put(range.start, &rubbish);
        }
    }
}

fn free_of(path: &Path) -> Result<FreeSpace, Error> {
    let free = free_space(&Disk::new(Chain::open_raw(path, false)?))?;
    assert!(free.ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "ascending and apart");
    assert!(free.ranges.iter().all(|range| range.start < range.end && range.start % 512 == 0 && range.end % 512 == 0));
    let told: u64 = free.places.iter().filter_map(|place| place.free.as_ref().ok()).sum();
    assert_eq!(told, free.ranges.iter().map(|range| range.end - range.start).sum::<u64>());
    Ok(free)
}

/// A file for the file systems, and its content.
fn letter(folder: &Path, len: usize) -> (PathBuf, Vec<u8>) {
    let path = folder.join("letter");
    let content: Vec<u8> = (0..len).map(|at| (at / 512 * 7 + at) as u8 | 1).collect();
    fs::write(&path, &content).unwrap();
    (path, content)
}

/// The free blocks that dumpe2fs lists, as ranges of bytes.
fn listed_by_dumpe2fs(said: &str, block: u64, unit: u64) -> Vec<std::ops::Range<u64>> {
    let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
    for list in said.lines().filter_map(|line| line.strip_prefix("  Free blocks: ")) {
        for run in list.split(", ").filter(|run| !run.is_empty()) {
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            let [first, last] = [first, last].map(|number| number.parse::<u64>().unwrap() * block);
            let end = last + block * unit;
            match ranges.last_mut() {
                Some(before) if before.end == first => before.end = end,
                _ => ranges.push(first..end),
            }
        }
    }
    ranges
}

#[test]
fn ext_is_free_where_dumpe2fs_says_so() {
    let (Some(mke2fs), Some(debugfs), Some(dumpe2fs), Some(e2fsck)) =
        (require("mke2fs"), require("debugfs"), require("dumpe2fs"), require("e2fsck"))
    else {
        return;
    };
    let cases: [(&str, &[&str], u64); 11] = [
        ("ext4", &["-t", "ext4"], 300),
        ("ext3", &["-t", "ext3"], 64),
        ("ext2", &["-t", "ext2", "-b", "1024"], 40),
        ("ext4", &["-t", "ext4", "-b", "1024", "-O", "^metadata_csum,uninit_bg"], 100),
        ("ext4", &["-t", "ext4", "-O", "^flex_bg,^64bit"], 300),
        ("ext4", &["-t", "ext4", "-O", "meta_bg,^resize_inode", "-b", "1024"], 200),
        ("ext4", &["-t", "ext4", "-O", "bigalloc", "-C", "65536"], 300),
        ("ext4", &["-t", "ext4", "-O", "sparse_super2"], 300),
        ("ext4", &["-t", "ext4", "-O", "metadata_csum_seed,^has_journal"], 300),
        ("ext4", &["-t", "ext4", "-b", "2048", "-g", "4096", "-O", "^sparse_super,^resize_inode"], 60),
        ("ext4", &["-t", "ext4", "-I", "512", "-b", "1024", "-O", "inline_data,ea_inode"], 120),
    ];
    for (name, options, mib) in cases {
        let made = Made::by(&mke2fs, &[options, &["-q", "-F"]].concat(), mib * MIB);
        let (letter, content) = letter(made.path.parent().unwrap(), 3_000_000);
        debugfs.run(&["-w", "-R", &format!("write {} letter", letter.display()), made.name()]).unwrap();
        e2fsck.run(&["-f", "-y", made.name()]).unwrap();
        let said = dumpe2fs.run(&[made.name()]).unwrap();
        let field = |name: &str| said.lines().find_map(|line| line.strip_prefix(name)).map_or("0", str::trim).to_owned();
        let block: u64 = field("Block size:").parse().unwrap();
        let unit: u64 = field(concat!("Clus", "ter size:")).parse::<u64>().unwrap_or(0).max(block) / block;
        let free = made.free();
        assert_eq!(free.places[0].file_system, Some(name), "{options:?}: {:?}", free.places);
        let listed = listed_by_dumpe2fs(&said, block, unit);
        assert_eq!(free.ranges, listed, "{options:?}");
        made.spoil_what_is_free();
        e2fsck.run(&["-f", "-n", made.name()]).unwrap();
        let back = made.path.with_extension("back");
        debugfs.run(&["-R", &format!("dump letter {}", back.display()), made.name()]).unwrap();
        assert!(fs::read(back).unwrap() == content, "{options:?}");
    }
}

#[test]
fn ext_that_is_in_doubt_is_left_alone() {
    let Some(mke2fs) = require("mke2fs") else { return };
    let whole = || Made::by(&mke2fs, &["-t", "ext4", "-b", "4096", "-q", "-F", "-O", "^metadata_csum"], 64 * MIB);
    let summed = Made::by(&mke2fs, &["-t", "ext4", "-b", "4096", "-q", "-F"], 64 * MIB);
    assert!(summed.place().free.unwrap() > 32 * MIB && whole().place().free.unwrap() > 32 * MIB);
    let bitmap_of = |made: &Made| u64::from(u32::from_le_bytes(made.get(4096)));
    let cases: [(&str, u64, u8, &str); 9] = [
        ("not unmounted", 1024 + 58, 1, "dirty"),
        ("errors", 1024 + 58, 2, "errors"),
        ("a journal to replay", 1024 + 96, 4, "dirty"),
        ("an unknown feature", 1024 + 98, 0x80, "not known"),
        ("an unknown feature for writers", 1024 + 103, 0x40, "not known"),
        ("orphans", 1024 + 232, 9, "dirty"),
        ("more blocks than there are", 1024 + 6, 0xFF, "the place it is in"),
        ("a bitmap elsewhere", 4096 + 1, 0x40, "outside"),
        ("a free count", 4096 + 12, 1, "its descriptor says"),
    ];
    for (what, at, bits, why) in cases {
        let made = whole();
        made.flip(at, bits);
        assert!(made.reason().contains(why), "{what}: {}", made.reason());
    }
    for (what, at) in [("superblock", 1024 + 200), ("descriptor", 4096 + 16), ("bitmap", bitmap_of(&summed) * 4096 + 2000)] {
        summed.flip(at, 1);
        assert!(summed.reason().contains("wrong checksum"), "{what}: {}", summed.reason());
        summed.flip(at, 1);
    }
    assert!(summed.place().free.is_ok());
}

#[test]
fn ntfs_is_free_where_ntfsinfo_says_so() {
    let (Some(mkfs), Some(ntfsinfo), Some(ntfscp)) = (require("mkfs.ntfs"), require("ntfsinfo"), require("ntfscp")) else {
        return;
    };
    for (options, mib) in [(&["-c", "4096"][..], 64), (&["-c", "512"], 20), (&["-c", "65536"], 300)] {
        let made = Made::by(&mkfs, &[&["-F", "-Q", "-q"], options].concat(), mib * MIB);
        let (letter, content) = letter(made.path.parent().unwrap(), 3_000_000);
        ntfscp.run(&["-f", made.name(), letter.to_str().unwrap(), "letter"]).unwrap();
        let said = ntfsinfo.run(&["-f", "-m", made.name()]).unwrap();
        let field = |name: &str| {
            let line = said.lines().find(|line| line.trim().starts_with(name)).unwrap_or_else(|| panic!("{name}: {said}"));
            line.split(':').nth(1).unwrap().split_whitespace().next().unwrap().parse::<u64>().unwrap()
        };
        let [unit, free] = [concat!("Clus", "ter Size"), concat!("Free Clus", "ters")].map(field);
        let place = made.place();
        assert_eq!((place.file_system, place.free), (Some("NTFS"), Ok(unit * free)), "{options:?}");
        made.spoil_what_is_free();
        let back = require("ntfscat").unwrap().run(&["-f", made.name(), "letter"]);
        let expected = String::from_utf8_lossy(&content).into_owned();
        assert!(back.unwrap() == expected, "{options:?}");
    }
}

/// Where a record of a system file of a new NTFS is.
fn ntfs_record(made: &Made, number: u64) -> u64 {
    u64::from_le_bytes(made.get(48)) * 4096 + number * 1024
}

/// ntfsfix marks a volume for Windows to check, as Windows does with one that it mounts. (ntfs-3g marks nothing: what it
/// leaves when it is killed is in `tests/compact_free_space.rs`.)
#[test]
fn ntfs_that_another_program_calls_dirty_is_left_alone() {
    let (Some(mkfs), Some(ntfsfix)) = (require("mkfs.ntfs"), require("ntfsfix")) else { return };
    let made = Made::by(&mkfs, &["-F", "-Q", "-q"], 64 * MIB);
    let free = made.place().free.unwrap();
    ntfsfix.run(&[made.name()]).unwrap();
    assert!(made.reason().contains("dirty"), "{}", made.reason());
    ntfsfix.run(&["-d", made.name()]).unwrap();
    assert_eq!(made.place().free, Ok(free));
}

#[test]
fn ntfs_that_is_in_doubt_is_left_alone() {
    let (Some(mkfs), Some(ntfscp)) = (require("mkfs.ntfs"), require("ntfscp")) else { return };
    let whole = || Made::by(&mkfs, &["-F", "-Q", "-q", "-c", "4096"], 64 * MIB);
    assert!(whole().place().free.unwrap() > 32 * MIB);
    // The attribute that has the volume's flags, found by its version.
    let dirty = whole();
    let record: [u8; 1024] = dirty.get(ntfs_record(&dirty, 3));
    let version = record.windows(4).rposition(|bytes| bytes == [3, 1, 0, 0]).unwrap();
    dirty.flip(ntfs_record(&dirty, 3) + version as u64 + 2, 1);
    assert!(dirty.reason().contains("dirty"), "{}", dirty.reason());
    // A log with a client, as of a volume that is in use.
    let busy = whole();
    let log = ntfs_record(&busy, 2);
    let record: [u8; 1024] = busy.get(log);
    let runs = record.windows(4).position(|bytes| bytes == [0x80, 0, 0, 0]).unwrap();
    let first = runs + usize::from(record[runs + 32]);
    let (len_len, offset_len) = (usize::from(record[first] & 15), usize::from(record[first] >> 4));
    let mut unit = [0; 8];
    unit[..offset_len].copy_from_slice(&record[first + 1 + len_len..][..offset_len]);
    let mut page = [0; 4096];
    page[..4].copy_from_slice(b"RSTR");
    page[24] = 48;
    busy.put(u64::from_le_bytes(unit) * 4096, &page);
    assert!(busy.reason().contains("its log"), "{}", busy.reason());
    page[48 + 12..48 + 14].fill(0xFF);
    busy.put(u64::from_le_bytes(unit) * 4096, &page);
    assert!(busy.place().free.is_ok());
    for (content, sleeps) in [(&b"hibr"[..], true), (b"HIBR", true), (b"wake", false), (&[0; 4], false)] {
        let asleep = whole();
        let file = asleep.path.with_file_name("hiberfil.sys");
        fs::write(&file, [content, &[7; 9000]].concat()).unwrap();
        ntfscp.run(&["-f", asleep.name(), file.to_str().unwrap(), "hiberfil.sys"]).unwrap();
        assert_eq!(asleep.place().free.is_err(), sleeps, "{content:?}: {:?}", asleep.place());
    }
    for (number, what) in [(2, "log"), (3, "volume"), (5, "root"), (6, "bitmap")] {
        let torn = whole();
        torn.flip(ntfs_record(&torn, number) + 510, 1);
        assert!(torn.reason().contains("is damaged"), "{what}: {}", torn.reason());
    }
    let larger = whole();
    larger.flip(43, 1);
    assert!(larger.reason().contains("the place it is in"), "{}", larger.reason());
}

#[test]
fn fat_is_free_where_its_table_has_zero() {
    let (Some(mkfs), Some(fsck)) = (require("mkfs.fat"), require("fsck.fat")) else { return };
    for (options, name, mib) in [
        (&["-F", "12"][..], "FAT12", 4),
        (&["-F", "16", "-s", "4"], "FAT16", 64),
        (&["-F", "32", "-s", "1"], "FAT32", 64),
        (&["-F", "32", "-S", "4096", "-s", "1"], "FAT32", 300),
    ] {
        let made = Made::by(&mkfs, options, mib * MIB);
        // "1 files, 2/130812 ..."
        let said = fsck.run(&["-n", "-v", made.name()]).unwrap();
        let number = |words: &str| {
            let line = said.lines().find(|line| line.contains(words)).unwrap_or_else(|| panic!("{words}: {said}"));
            line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
        };
        let unit = number(concat!("bytes per clus", "ter"));
        let (used, all) = said.lines().last().unwrap().split_whitespace().nth(3).unwrap().split_once('/').unwrap();
        let free = (all.parse::<u64>().unwrap() - used.parse::<u64>().unwrap()) * unit;
        let place = made.place();
        assert_eq!((place.file_system, &place.free), (Some(name), &Ok(free)), "{options:?}");
        made.spoil_what_is_free();
        fsck.run(&["-n", made.name()]).unwrap();
        let table = u64::from(u16::from_le_bytes(made.get(14))) * u64::from(u16::from_le_bytes(made.get(11)));
        made.flip(table + 40, 1);
        assert!(made.reason().contains("differ"), "{options:?}: {}", made.reason());
        made.flip(table + 40, 1);
        let dirty = if name == "FAT32" { 65 } else { 37 };
        made.flip(dirty, 1);
        assert!(made.reason().contains("dirty"), "{options:?}: {}", made.reason());
    }
}

#[test]
fn swap_is_free_but_for_its_header_unless_a_system_sleeps_in_it() {
    let Some(mkswap) = require("mkswap") else { return };
    let made = Made::by(&mkswap, &["-q"], 8 * MIB);
    assert_eq!(made.free().ranges, [4096..8 * MIB]);
    made.put(4096 - 10, b"S1SUSPEND\0");
    assert!(made.reason().contains("hibernated"));
}

#[test]
fn what_is_not_read_is_named_and_left_alone() {
    for (at, mark, name) in [(512, &b"LABELONE"[..], "LVM"), (0, b"LUKS\xBA\xBE", "LUKS"), (3, b"-FVE-FS-", "BitLocker")] {
        let made = Made::new(MIB);
        made.put(at, mark);
        assert_eq!(made.place().file_system, Some(name));
        made.reason();
    }
    let raid = Made::new(MIB);
    raid.put(MIB - 8192, &0xA92B_4EFC_u32.to_le_bytes());
    assert_eq!(raid.place().file_system, Some("RAID"));
    assert!(Made::new(MIB).reason().contains("no file system"));
    Made::new(512).reason();
}

#[test]
fn each_partition_is_looked_at_and_doubtful_ones_are_left_alone() {
    let (Some(sgdisk), Some(mke2fs), Some(mkswap)) = (require("sgdisk"), require("mke2fs"), require("mkswap")) else { return };
    let made = Made::new(64 * MIB);
    sgdisk.run(&["-n", "1:2048:+32M", "-n", "2:0:+8M", "-n", "3:0:+4M", "-n", "4:0:0", made.name()]).unwrap();
    let ext = Made::by(&mke2fs, &["-t", "ext4", "-q", "-F"], 32 * MIB);
    let swap = Made::by(&mkswap, &["-q"], 8 * MIB);
    made.put(MIB, &fs::read(&ext.path).unwrap());
    made.put(33 * MIB, &fs::read(&swap.path).unwrap());
    made.put(41 * MIB + 512, b"LABELONE");
    let free = made.free();
    let found: Vec<_> = free.places.iter().map(|place| (place.partition, place.file_system, place.free.is_ok())).collect();
    assert_eq!(
        found,
        [(Some(1), Some("ext4"), true), (Some(2), Some("swap"), true), (Some(3), Some("LVM"), false), (Some(4), None, false)]
    );
    let own = ext.free().ranges.iter().map(|range| range.start + MIB..range.end + MIB).collect::<Vec<_>>();
    assert_eq!(free.ranges[..own.len()], own);
    // An old file system that was not wiped.
    made.put(33 * MIB, b"LUKS\xBA\xBE");
    assert!(made.free().places[1].free.clone().unwrap_err().contains("swap and LUKS at once"));
    // A table that was not.
    made.put(1024, &ext.get::<1024>(1024));
    assert!(made.free().places.iter().all(|place| place.free.clone().unwrap_err().contains("remnant")));
}

/// The corpus has an owner of each kind of those that are not read, on a disk and in a partition, and over an ext4.
#[test]
fn the_fuzz_corpus_tells_other_owners() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/guest_fs");
    let ext4 = told_disk(&fs::read(folder.join("ext4")).unwrap());
    let size = ext4.len() as u64;
    let wanted = [
        "md 0.90",
        "DRBD 8.3",
        "VIA",
        "Silicon",
        "JMicron",
        "Storage Spaces",
        "LVM1",
        "bcachefs",
        "BitLocker To Go",
        "swsusp",
        "HFS+",
        "UFS",
        "GFS2",
        "an MBR",
        "the end of a GPT",
        "Sun",
        "Apple",
    ];
    for (index, owner) in foreign::all(size).into_iter().filter(|owner| wanted.contains(&owner.name)).enumerate() {
        let mut disk = if index % 2 == 0 { ext4.clone() } else { vec![0; ext4.len()] };
        for (at, bytes) in owner.pieces {
            disk[at as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        let path = folder.join(format!("owner-{}", owner.name.replace(' ', "-").replace('+', "plus")));
        if std::env::var_os("CORPUS_UPDATE").is_some() {
            fs::write(&path, tell_disk(&disk)).unwrap();
        }
        let again = Made::new(MIB);
        fs::write(&again.path, told_disk(&fs::read(&path).unwrap())).unwrap();
        assert!(again.free().places.iter().all(|place| place.free.is_err()), "{}: {:?}", owner.name, again.free());
    }
}

/// The corpus of the fuzz target `guest_fs` begins with sound file systems; `CORPUS_UPDATE=1` writes them anew.
#[test]
fn the_fuzz_corpus_tells_sound_file_systems() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/guest_fs");
    let ext = ["-q", "-F", "-O"];
    let made: [(&str, &str, &[&str], u64); 9] = [
        (
            "ext4",
            "mke2fs",
            &["-t", "ext4", "-b", "1024", ext[0], ext[1], ext[2], "^metadata_csum,^has_journal,^resize_inode"],
            10,
        ),
        ("ext4-summed", "mke2fs", &["-t", "ext4", "-b", "1024", ext[0], ext[1], ext[2], "^resize_inode,^has_journal"], 10),
        ("ext4-meta", "mke2fs", &["-t", "ext4", "-b", "1024", ext[0], ext[1], ext[2], "meta_bg,^resize_inode,^metadata_csum"], 9),
        ("ext4-units", "mke2fs", &["-t", "ext4", "-b", "4096", ext[0], ext[1], ext[2], "bigalloc,^metadata_csum"], 16),
        ("ntfs", "mkfs.ntfs", &["-F", "-Q", "-q"], 4),
        ("fat12", "mkfs.fat", &["-F", "12"], 2),
        ("fat16", "mkfs.fat", &["-F", "16", "-s", "1"], 4),
        ("fat32", "mkfs.fat", &["-F", "32", "-s", "1"], 34),
        ("swap", "mkswap", &["-q"], 1),
    ];
    for (name, tool, options, mib) in made {
        let path = folder.join(name);
        if std::env::var_os("CORPUS_UPDATE").is_some() {
            fs::create_dir_all(&folder).unwrap();
            fs::write(&path, tell_disk(&fs::read(Made::by(&require(tool).unwrap(), options, mib * MIB).path).unwrap())).unwrap();
        }
        let again = Made::new(MIB);
        fs::write(&again.path, told_disk(&fs::read(&path).unwrap())).unwrap();
        assert!(again.place().free.is_ok_and(|free| free > 0), "{name}: {:?}", again.place());
    }
}
