//! Goal: what others made is read and written here as they mean it, and what was made or written here is read by them.
//!
//! Method: images of qemu-img, of this project and of the test kit's catalogue are read through the core, written
//! through it, and read back by QEMU, by libvhdi and by the kit's reference, byte for byte. What the two tools get wrong
//! is in the catalogue's verdicts: QEMU ignores sector bitmaps and parents, libvhdi takes a set bit for the later ones of
//! its byte and fails past the end of a smaller parent. `samples.rs` does the same with files from other machines.
//! It would fail on a wrong size, a misplaced byte, or an image that only this project can open.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use vhd_core::block::ZeroMode;
use vhd_core::image::NewKind;
use vhd_core::{Disk, ErrorKind};
use vhd_testkit::fixture::{Fixture, Kind, Verdict, batmap_checksum, catalogue, get_u32};
use vhd_testkit::model::ModelDisk;
use vhd_testkit::reference::ReferenceChain;
use vhd_testkit::tagged::{compare, run};
use vhd_testkit::tools::{QemuImg, QemuIo, VhdiMount};

use self::support::{files_of, new_child, new_image, open, options, read_all};

const MIB: u64 = 1 << 20;

fn write(disk: &Disk, model: &mut ModelDisk, at: u64, bytes: &[u8]) {
    disk.write_at(bytes, at).unwrap();
    model.write(at, bytes);
}

fn discard(disk: &Disk, model: &mut ModelDisk, range: std::ops::Range<u64>) {
    disk.zero(range.clone(), ZeroMode::Free).unwrap();
    model.write_zeroes(range);
}

fn content(model: &ModelDisk) -> Vec<u8> {
    model.read(0..model.size())
}

#[test]
fn images_of_qemu_are_read_and_written() {
    let (Some(qemu), Some(io)) = (QemuImg::find(), QemuIo::find()) else { return };
    let folder = tempfile::tempdir().unwrap();
    for create in ["subformat=dynamic", "subformat=fixed", "subformat=dynamic,force_size=on", "subformat=fixed,force_size=on"] {
        let path = folder.path().join(create.replace([',', '='], "-") + ".vhd");
        qemu.run(&["create", "-q", "-f", "vpc", "-o", create, path.to_str().unwrap(), "9M"]).unwrap();
        io.run(&path, &["write -P 0xaa 1M 512", "write -P 0xbb 4193792 1024", "write -P 0xcc 0 512"]).unwrap();
        let disk = open(&path, true);
        let mut model = ModelDisk::new(disk.size());
        if create.contains("force_size") {
            assert_eq!(disk.size(), 9 * MIB, "{create}");
        }
        model.write(MIB, &[0xAA; 512]);
        model.write(4_193_792, &[0xBB; 1024]);
        model.write(0, &[0xCC; 512]);
        compare(&read_all(&disk), &content(&model), 0).unwrap();

        // Into blocks that QEMU made, into new ones, and over the disk's end.
        write(&disk, &mut model, MIB + 100, &[1; 2000]);
        write(&disk, &mut model, 7 * MIB, &run(1, 7 * 2048, 16, 1));
        let last = disk.size() - 512;
        write(&disk, &mut model, last, &[2; 512]);
        discard(&disk, &mut model, 0..2 * MIB);
        disk.close().unwrap();
        drop(disk);
        compare(&qemu.to_raw(&path).unwrap(), &content(&model), 0).unwrap();
        qemu.run(&["check", "-q", "-f", "vpc", path.to_str().unwrap()]).unwrap_or_else(|error| {
            // Not every version can check a VHD.
            assert!(error.contains("does not support checks"), "{error}");
            String::new()
        });
        // And on: QEMU writes to a block of ours, and to a new one. It puts that behind the last block without zeroing what
        // stands there: our footer stands where its own did, so that only the new block's bitmap meets it.
        io.run(&path, &["write -P 0xdd 7168k 4096", "write -P 0xee 512k 512"]).unwrap();
        model.write(MIB / 2, &[0xEE; 512]);
        model.write(7 * MIB, &[0xDD; 4096]);
        compare(&read_all(&open(&path, false)), &content(&model), 0).unwrap();
    }
}

/// Writes and discards of all sorts, in and over blocks.
fn exercise(disk: &Disk, model: &mut ModelDisk) {
    let size = disk.size();
    let end = |at: u64, len: u64| (at + len).min(size);
    for (at, len) in [(0, 512), (3 * MIB - 1024, 4096), (5 * MIB + 7, 1000), (size / 2, 70_000), (size - 512, 512)] {
        if at < size {
            let bytes = run(1, at / 512, (end(at, len) - at).div_ceil(512), len);
            write(disk, model, at, &bytes[..(end(at, len) - at) as usize]);
        }
    }
    let hole = size / 3..end(size / 3, 3 * MIB);
    discard(disk, model, hole.clone());
    if hole.end - hole.start > 4096 {
        write(disk, model, hole.start + 1024, &[0x77; 512]);
    }
}

#[test]
fn images_made_here_are_read_by_others() {
    let (Some(qemu), Some(libvhdi)) = (QemuImg::find(), VhdiMount::find()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let fixed = NewKind::Fixed { preallocate: true };
    for (kind, block_size) in [(NewKind::Dynamic, 512 << 10), (NewKind::Dynamic, 2 << 20), (fixed, 2 << 20)] {
        {
            // Sizes that geometry can't tell, that fill no block, no page; the least and some more.
            for size in [512, 4096, 3 * MIB, 3 * MIB + 512, 10 * MIB - 1024, 16 * MIB + 7 * 512] {
                let path = folder.path().join("image.vhd");
                let _ = fs::remove_file(&path);
                new_image(&path, kind.clone(), size, block_size);
                let mut model = ModelDisk::new(size);
                compare(&qemu.to_raw(&path).unwrap(), &content(&model), 0).unwrap();
                let disk = open(&path, true);
                exercise(&disk, &mut model);
                disk.close().unwrap();
                drop(disk);
                compare(&qemu.to_raw(&path).unwrap(), &content(&model), 0).unwrap();
                compare(&libvhdi.to_raw(&path).unwrap(), &content(&model), 0).unwrap();
                let reference = ReferenceChain::open_paths(&[&path]).unwrap();
                compare(&reference.read_all().unwrap(), &content(&model), 0).unwrap();
            }
        }
    }
}

/// Without being told which size counts, because our creator is one that it knows.
#[test]
fn qemu_knows_the_size_of_our_images() {
    let Some(qemu) = QemuImg::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    for size in [3 * MIB + 512, 40 * MIB, 127 << 30, 2040 << 30] {
        let path = folder.path().join("image.vhd");
        let _ = fs::remove_file(&path);
        new_image(&path, NewKind::Dynamic, size, 2 << 20);
        let info = qemu.run(&["info", "-f", "vpc", "--output=json", path.to_str().unwrap()]).unwrap();
        assert!(info.contains(&format!("\"virtual-size\": {size},")), "{size}: {info}");
    }
}

#[test]
fn chains_made_here_are_read_by_libvhdi() {
    let Some(libvhdi) = VhdiMount::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    let size = 9 * MIB;
    let paths: Vec<PathBuf> = (0..4).map(|n| folder.path().join(format!("layer {n}.vhd"))).collect();
    new_image(&paths[0], NewKind::Dynamic, size, 2 << 20);
    let mut model = ModelDisk::new(size);
    for (n, path) in paths.iter().enumerate() {
        if n > 0 {
            new_child(path, &paths[n - 1]);
            model.snapshot();
        }
        let disk = open(path, true);
        // In runs of 4 KiB: libvhdi gets no other bitmaps right.
        let n = n as u64;
        write(&disk, &mut model, n * MIB, &run(n as u32, n * 2048, 64, n));
        write(&disk, &mut model, 5 * MIB + n * 8192, &run(n as u32, 10240 + n * 16, 32, n));
        discard(&disk, &mut model, n * MIB..n * MIB + 4096);
        disk.close().unwrap();
        drop(disk);
        compare(&libvhdi.to_raw(path).unwrap(), &content(&model), 0).unwrap();
    }
}

#[test]
fn the_catalogue_opens_and_reads_as_it_says() {
    for fixture in catalogue() {
        let folder = tempfile::tempdir().unwrap();
        let paths = fixture.write_into(folder.path()).unwrap();
        let before = files_of(folder.path());
        let read = Disk::open(&paths[0], &options(false)).and_then(|disk| {
            let mut bytes = vec![0xEE; disk.size() as usize];
            disk.read_at(&mut bytes, 0).map(|()| bytes)
        });
        match read {
            Ok(bytes) => {
                assert!(fixture.readable, "{} should not be readable", fixture.name);
                compare(&bytes, &fixture.guest(), 0).unwrap_or_else(|error| panic!("{}: {error}", fixture.name));
            }
            Err(error) => {
                assert!(!fixture.readable, "{}: {error}", fixture.name);
                support::assert_error(&error, ErrorKind::Corrupt, fixture.name);
            }
        }
        assert!(files_of(folder.path()) == before, "{}: reading changed a file", fixture.name);
    }
}

/// Opens a fixture for writing, whatever it says about saved states.
fn open_forced(path: &Path) -> Disk {
    let mut forced = options(true);
    forced.image.force = true;
    Disk::open(path, &forced).unwrap()
}

#[test]
fn one_sector_written_is_one_sector_changed() {
    for fixture in catalogue().into_iter().filter(|fixture| fixture.readable) {
        let folder = tempfile::tempdir().unwrap();
        let paths = fixture.write_into(folder.path()).unwrap();
        let parents: Vec<_> = paths[1..].iter().map(|path| fs::read(path).unwrap()).collect();
        let mut guest = fixture.guest();
        let last = guest.len() as u64 - 512;
        // In blocks that are there and not, over bits that are set and clear, at the disk's end; the first one by itself.
        let places: Vec<_> =
            [MIB, 9 * 512, 2 * MIB + 512, 4 * MIB + 4 * 512, last].into_iter().filter(|&at| at <= last).collect();
        for places in [&places[..1], &places[1..]] {
            let disk = open_forced(&paths[0]);
            compare(&read_all(&disk), &guest, 0).unwrap_or_else(|error| panic!("{}, opened: {error}", fixture.name));
            for &at in places {
                let sector = run(9, at / 512, 1, 1);
                disk.write_at(&sector, at).unwrap();
                guest[at as usize..][..512].copy_from_slice(&sector);
            }
            disk.close().unwrap();
            drop(disk);
            let read = ReferenceChain::open_paths(&paths).unwrap().read_all().unwrap();
            compare(&read, &guest, 0).unwrap_or_else(|error| panic!("{}, {places:?} written: {error}", fixture.name));
        }
        for (path, bytes) in paths[1..].iter().zip(parents) {
            assert!(fs::read(path).unwrap() == bytes, "{}: a parent was written", fixture.name);
        }
    }
}

/// Promise P3: once it was open for writing here, others open it.
#[test]
fn after_being_open_for_writing_others_open_it_too() {
    let (Some(qemu), Some(libvhdi)) = (QemuImg::find(), VhdiMount::find()) else { return };
    let mut wrong = Vec::new();
    for fixture in catalogue().into_iter().filter(|fixture| fixture.readable) {
        let folder = tempfile::tempdir().unwrap();
        let paths = fixture.write_into(folder.path()).unwrap();
        open_forced(&paths[0]).close().unwrap();
        let guest = fixture.guest();
        let readers = [
            ("qemu", fixture.readers.qemu, qemu.to_raw(&paths[0])),
            ("libvhdi", fixture.readers.libvhdi, libvhdi.to_raw(&paths[0])),
        ];
        for (reader, verdict, read) in readers {
            // What it gets wrong in sound images it gets wrong here; there is no other reason not to read it.
            let excused = match verdict {
                Verdict::Differs(why) => why != "believes the header copy",
                Verdict::Refuses(why) => why.contains("past the parent's end"),
                Verdict::Agrees => false,
            };
            let read = read.and_then(|bytes| compare(&bytes, &guest, 0));
            if let (Err(error), false) = (read, excused) {
                wrong.push(format!("{}, {reader}: {error}", fixture.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn named(name: &str) -> Fixture {
    catalogue().into_iter().find(|fixture| fixture.name == name).unwrap()
}

/// The two layouts in which QEMU 7.2 destroys what is beside its write.
#[test]
fn a_new_block_keeps_off_gaps_footer_and_batmap() {
    for name in ["windows8-empty", "windows8", "windows8-gap-ff", "tapdisk", "bat-preallocated", "footer-c7"] {
        let fixture = named(name);
        let folder = tempfile::tempdir().unwrap();
        let path = fixture.write_into(folder.path()).unwrap().remove(0);
        let mut guest = fixture.guest();
        let disk = open(&path, true);
        // Block 2 is absent in each of them, and the last whole one.
        disk.write_at(&[0x42; 512], 5 * MIB).unwrap();
        disk.close().unwrap();
        drop(disk);
        guest[5 * MIB as usize..][..512].fill(0x42);
        let read = ReferenceChain::open_paths(&[&path]).unwrap().read_all().unwrap();
        compare(&read, &guest, 0).unwrap_or_else(|error| panic!("{name}: {error}"));
        if let Some(libvhdi) = VhdiMount::find() {
            compare(&libvhdi.to_raw(&path).unwrap(), &guest, 0).unwrap_or_else(|error| panic!("{name}, libvhdi: {error}"));
        }
        if let Some(qemu) = QemuImg::find()
            && fixture.readers.qemu == Verdict::Agrees
        {
            compare(&qemu.to_raw(&path).unwrap(), &guest, 0).unwrap_or_else(|error| panic!("{name}, qemu: {error}"));
        }
    }
}

/// All bits zero says "look at the sector bitmaps", which is always true.
#[test]
fn a_batmap_is_cleared_by_the_first_open_for_writing() {
    let mut cleared = 0;
    for fixture in catalogue().into_iter().filter(|fixture| fixture.readable && fixture.leaf.kind != Kind::Fixed) {
        let folder = tempfile::tempdir().unwrap();
        let paths = fixture.write_into(folder.path()).unwrap();
        let (before, placed) = fixture.to_bytes();
        let Some(batmap) = placed.batmap.map(|at| at as usize) else { continue };
        let map = batmap + 512..batmap + 512 + placed.batmap_len as usize;
        cleared += usize::from(before[map.clone()].iter().any(|&byte| byte != 0));
        drop(open(&paths[0], false));
        assert!(fs::read(&paths[0]).unwrap() == before);
        drop(open(&paths[0], true));
        let after = fs::read(&paths[0]).unwrap();
        assert!(after[map.clone()].iter().all(|&byte| byte == 0), "{}: not cleared", fixture.name);
        assert_eq!(get_u32(&after, batmap + 24), batmap_checksum(&after[map]), "{}", fixture.name);
        assert!(after[batmap..batmap + 24] == before[batmap..batmap + 24], "{}: another field changed", fixture.name);
    }
    assert!(cleared >= 3, "too few fixtures have something to clear");
}
