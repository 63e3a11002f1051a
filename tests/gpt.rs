//! Goal: whatever changes the size of a disk leaves its GPT whole, with the backup at the new end; of sectors of 512 and of 4096
//! bytes.
//!
//! Method: tables by sgdisk, in files and on loop devices with large sectors; each is copied and resized by every command that
//! makes a disk of another size, and judged by sgdisk --verify. What is in the partitions stays as it is.
//! It would fail if a header, a checksum or the protective MBR were wrong, or a large sector were taken for eight small ones. It
//! needs root and loop devices.

#![allow(missing_docs, clippy::unwrap_used)]
#![allow(clippy::little_endian_bytes, reason = "partition tables are little-endian")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use support::mounts::Place;
use support::{done, json, names_in, noise, refused, run, vhd_fed};

const MIB: u64 = 1 << 20;

/// A file as a loop device with sectors of so many bytes.
struct Loop(String);

impl Loop {
    fn new(path: &Path, sector: u64) -> Self {
        let device = run("losetup", &["-f", "--show", "-b", &sector.to_string(), path.to_str().unwrap()]);
        Self(device.trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("losetup", &["-d", &self.0]);
    }
}

/// A disk with a GPT of two partitions, which hold something.
fn made(folder: &Path, name: &str, size: u64, sector: u64) -> PathBuf {
    let path = folder.join(name);
    File::create(&path).unwrap().set_len(size).unwrap();
    let device = Loop::new(&path, sector);
    run("sgdisk", &["-n1:0:+20M", "-n2:0:+8M", "-c2:second", &device.0]);
    run("sync", &[&device.0]);
    drop(device);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&noise(1, 100_000), MIB).unwrap();
    file.write_all_at(&noise(2, 100_000), 29 * MIB - 100_000).unwrap();
    path
}

/// Fails unless sgdisk finds the table of a raw disk whole, its partitions hold what they did, and the first sector protects
/// all of the disk.
#[track_caller]
fn verify(path: &Path, source: &Path, sector: u64) {
    let size = fs::metadata(path).unwrap().len();
    let device = Loop::new(path, sector);
    let said = run("sgdisk", &["--verify", &device.0]);
    assert!(said.contains("No problems found"), "{}: {said}", path.display());
    assert!(
        run("sgdisk", &["--print", &device.0]).contains("second"),
        "{}: sgdisk takes no table for a good one",
        path.display()
    );
    drop(device);
    let (found, expected) = (fs::read(path).unwrap(), fs::read(source).unwrap());
    let parts = MIB as usize..29 * MIB as usize;
    assert!(found[parts.clone()] == expected[parts], "{}", path.display());
    let last = (size / sector - 1) as u32;
    assert_eq!(found[446 + 12..][..4], last.to_le_bytes(), "{}", path.display());
    // No other backup is left for programs that search.
    let heads = found.chunks(512).filter(|sector| sector.starts_with(b"EFI PART")).count();
    assert_eq!(heads, 2, "{}", path.display());
}

fn possible() -> Option<Place> {
    Place::new(&["sgdisk", "losetup", "mke2fs", "python3"])
}

#[test]
fn every_change_of_the_size_takes_the_backup_of_a_gpt_along() {
    let Some(place) = possible() else { return };
    let dir = place.path();
    for (sector, size) in [(512, 40 * MIB + 512 * 7), (4096, 40 * MIB + 4096 * 7)] {
        let source = made(dir, "disk.img", size, sector);
        for line in [
            "convert disk.img new.vhd --to fixed --align 1M --overwrite",
            "convert disk.img new.vhd --align 1M --overwrite",
            "convert disk.img new.vhd --size 100M --overwrite",
        ] {
            done(dir, line);
            done(dir, "convert new.vhd back.img --overwrite");
            verify(&dir.join("back.img"), &source, sector);
        }
        // What only has its backup gets its first table again: beyond the old end nobody would look for that.
        let damaged = dir.join("damaged.img");
        fs::copy(&source, &damaged).unwrap();
        File::options().write(true).open(&damaged).unwrap().write_all_at(&[0; 512], sector).unwrap();
        done(dir, "convert damaged.img new.vhd --size 100M --overwrite");
        done(dir, "convert new.vhd back.img --overwrite");
        verify(&dir.join("back.img"), &source, sector);
        done(dir, "convert damaged.img new.vhd --overwrite");
        done(dir, "resize new.vhd 100M");
        done(dir, "convert new.vhd back.img --overwrite");
        verify(&dir.join("back.img"), &source, sector);
        done(dir, "convert disk.img back.img --align 4M --overwrite");
        verify(&dir.join("back.img"), &source, sector);
        // Over another image, whose old content goes.
        done(dir, "create old.vhd --size 64M --overwrite");
        vhd_fed(dir, "write old.vhd --offset 50000000", &noise(3, 1 << 20));
        done(dir, "convert disk.img old.vhd --into");
        done(dir, "convert old.vhd back.img --overwrite");
        verify(&dir.join("back.img"), &source, sector);
        // As bytes of a stream.
        let output = vhd_fed(dir, "convert - new.vhd --size 80M --overwrite", &fs::read(&source).unwrap());
        assert!(output.status.success());
        done(dir, "convert new.vhd back.img --overwrite");
        verify(&dir.join("back.img"), &source, sector);
        for kind in ["fixed", "dynamic"] {
            done(dir, &format!("convert disk.img new.vhd --to {kind} --overwrite"));
            // A copy of the same size is the same to the last byte.
            done(dir, "compare new.vhd disk.img");
            for line in ["resize new.vhd 77M", "resize new.vhd 41M --shrink", "resize new.vhd 43003904"] {
                done(dir, line);
                done(dir, "convert new.vhd back.img --overwrite");
                verify(&dir.join("back.img"), &source, sector);
            }
            // The backup would lie in the last partition.
            let said = refused(dir, "resize new.vhd 29M --shrink");
            assert!(said.contains("partition 2"), "{said}");
        }
    }
}

#[test]
fn partitions_of_a_gpt_with_large_sectors_are_shown_and_compacted() {
    let Some(place) = possible() else { return };
    let dir = place.path();
    let path = made(dir, "disk.img", 64 * MIB, 4096);
    let system = dir.join("system.img");
    File::create(&system).unwrap().set_len(20 * MIB).unwrap();
    run("mke2fs", &["-q", "-F", "-t", "ext4", "-b", "4096", system.to_str().unwrap()]);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&noise(5, 18 * MIB as usize), 2 * MIB).unwrap();
    file.write_all_at(&fs::read(&system).unwrap()[..4 * MIB as usize], MIB).unwrap();
    done(dir, "convert disk.img disk.vhd --block-size 512K");
    done(dir, "mount disk.vhd disk");
    let names = names_in(&dir.join("disk"));
    assert_eq!(names, ["disk.raw", "info.json", "layers", "map.json", "p1", "p2"]);
    assert_eq!(fs::metadata(dir.join("disk/p1")).unwrap().len(), 20 * MIB);
    done(dir, "unmount disk");
    done(dir, "mount --fs disk.vhd:p1 disk");
    fs::write(dir.join("disk/file"), "text").unwrap();
    done(dir, "unmount disk");
    let said = json(dir, "compact disk.vhd --free-space", 0);
    assert_eq!(said[0]["free_space"][0]["file_system"], "ext4", "{said}");
    assert!(
        said[0]["blocks_dropped"].as_u64() > Some(20) && said[0]["free_space"][0]["free"].as_u64() > Some(10 * MIB),
        "{said}"
    );
    done(dir, "resize disk.vhd 99M");
    done(dir, "convert disk.vhd back.img");
    let device = Loop::new(&dir.join("back.img"), 4096);
    assert!(run("sgdisk", &["--verify", &device.0]).contains("No problems found"));
}

/// Moves the first partition's end in the backup alone, with right checksums.
const OTHER_BACKUP: &str = r#"
import struct, sys, zlib
with open(sys.argv[1], "r+b") as disk:
    disk.seek(-512, 2); at = disk.tell(); header = bytearray(disk.read(512))
    entries_at, count, size = struct.unpack_from("<QII", header, 72)
    disk.seek(entries_at * 512); entries = bytearray(disk.read(count * size))
    struct.pack_into("<Q", entries, 40, struct.unpack_from("<Q", entries, 40)[0] - 8)
    disk.seek(entries_at * 512); disk.write(entries)
    struct.pack_into("<II", header, 84, size, zlib.crc32(entries))
    struct.pack_into("<I", header, 16, 0)
    struct.pack_into("<I", header, 16, zlib.crc32(header[:92]))
    disk.seek(at); disk.write(header)
"#;

#[test]
fn a_backup_that_says_something_else_is_not_written_over() {
    let Some(place) = possible() else { return };
    let dir = place.path();
    let path = made(dir, "disk.img", 40 * MIB, 512);
    run("python3", &["-c", OTHER_BACKUP, path.to_str().unwrap()]);
    done(dir, "convert disk.img new.vhd --size 64M");
    done(dir, "convert new.vhd back.img");
    let (old, new) = (fs::read(&path).unwrap(), fs::read(dir.join("back.img")).unwrap());
    assert!(old[..] == new[..old.len()]);
    // One that would be cut off is data like any other.
    done(dir, "convert disk.img small.vhd");
    let said = refused(dir, "resize small.vhd 39M --shrink");
    assert!(said.contains("holds data"), "{said}");
    made(dir, "disk.img", 40 * MIB, 512);
    done(dir, "convert disk.img small.vhd --overwrite");
    done(dir, "resize small.vhd 39M --shrink");
}
