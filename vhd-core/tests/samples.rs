//! Goal: files that other programs made on other machines open, are told truly, and survive a write.
//!
//! Method: copies of the samples in `shared/samples` beside the project (or in `VHD_SAMPLES`), which are not part of
//! it; where there are none, that is said loudly. What each file is stands in a table made from its manifest.
//! It would fail if one of them did not open, were told wrong, or a write changed more than it should.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vhd_core::chain::Chain;
use vhd_core::ops::check::{CheckOptions, Severity, check};
use vhd_core::storage::FileStorage;
use vhd_testkit::fixture::{batmap_checksum, get_u32};
use vhd_testkit::reference::ReferenceChain;
use vhd_testkit::tagged::run;
use vhd_testkit::tools::VhdiMount;

use self::support::{open, options, read_all};

const MIB: u64 = 1 << 20;

/// What a sample is: name, creator, current size, geometry's size, allocated blocks, parent.
type Sample = (&'static str, &'static [u8; 4], u64, u64, u32, Option<&'static str>);

const SAMPLES: [Sample; 6] = [
    ("hyperv2012r2-dynamic.vhd", b"win ", 127 << 30, 136_363_130_880, 0, None),
    ("tapdisk-batmap.vhd", b"tap\0", 40 * MIB, 41_909_760, 0, None),
    ("vbox.vhd", b"vbox", 40 * MIB, 41_909_760, 0, None),
    ("virtualpc-dynamic.vhd", b"vpc ", 136_365_211_648, 136_363_130_880, 0, None),
    ("win8.vhd", b"win ", 40 * MIB, 41_909_760, 0, None),
    ("win8-child.vhd", b"win ", 40 * MIB, 41_909_760, 0, Some("win8.vhd")),
];

/// Copies of all samples in a folder of the test's own.
fn copies() -> Option<TempDir> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/samples");
    let source = std::env::var_os("VHD_SAMPLES").map_or(beside, PathBuf::from);
    if !source.join("win8.vhd").is_file() {
        // They may not be copied into the project, so their absence is no failure anywhere.
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "SKIPPED: no samples in {}: set VHD_SAMPLES", source.display());
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    for (name, ..) in SAMPLES {
        fs::copy(source.join(name), folder.path().join(name)).unwrap();
    }
    Some(folder)
}

#[test]
fn samples_are_told_truly() {
    let Some(folder) = copies() else { return };
    for (name, creator, size, geometry, blocks, parent) in SAMPLES {
        let path = folder.path().join(name);
        let image = Chain::open_image(&path, &options(false)).unwrap();
        let footer = image.footer();
        assert_eq!((footer.creator().app, image.size(), footer.geometry().size()), (*creator, size, geometry), "{name}");
        assert_eq!(image.layout().unwrap().block_size(), 2 << 20, "{name}");
        assert_eq!(image.count_allocated().unwrap(), blocks, "{name}");
        drop(image);
        let disk = open(&path, false);
        let found = disk.layer_path(1).map(|path| path.file_name().unwrap().to_str().unwrap().to_owned());
        assert_eq!(found.as_deref(), parent, "{name}");
        // All of them are empty: known from metadata alone, and true of the bytes too.
        let extents = disk.extents_in(0..size).unwrap();
        assert!(extents.len() == 1 && extents[0].state.reads_zero(), "{name}: {extents:?}");
        if size == 40 * MIB {
            assert!(read_all(&disk).iter().all(|&byte| byte == 0), "{name}");
        }
        let storage = FileStorage::open(&path, false).unwrap();
        let report = check(&storage, &path, &CheckOptions { deep: true, ..CheckOptions::default() }).unwrap();
        let bad: Vec<_> = report.findings.iter().filter(|finding| finding.severity >= Severity::Warning).collect();
        assert!(bad.is_empty(), "{name}: {bad:?}");
    }
}

/// The layouts in which QEMU destroys what is beside its write.
#[test]
fn one_sector_at_1_mib_changes_that_sector_alone() {
    let Some(folder) = copies() else { return };
    for (name, .., parent) in SAMPLES.into_iter().filter(|sample| sample.2 == 40 * MIB) {
        // The child last, or its parent would be written beside it.
        let path = folder.path().join(name);
        let mut forced = options(true);
        forced.image.force = name == "win8.vhd";
        let disk = vhd_core::Disk::open(&path, &forced).unwrap();
        let sector = run(1, 2048, 1, 1);
        disk.write_at(&sector, MIB).unwrap();
        disk.close().unwrap();
        drop(disk);
        let mut guest = vec![0; 40 << 20];
        guest[1 << 20..][..512].copy_from_slice(&sector);
        let paths: Vec<_> = [Some(name), parent].into_iter().flatten().map(|name| folder.path().join(name)).collect();
        assert!(ReferenceChain::open_paths(&paths).unwrap().read_all().unwrap() == guest, "{name}");
        assert!(read_all(&open(&path, false)) == guest, "{name}");
        // libvhdi takes a bit for the later ones of its byte: in a child its view would be another, were the rest of
        // the block not zeros in both.
        if let Some(libvhdi) = VhdiMount::find() {
            assert!(libvhdi.to_raw(&path).unwrap() == guest, "{name}, libvhdi");
        }
    }
}

#[test]
fn a_sample_of_tapdisk_has_its_batmap_cleared() {
    let Some(folder) = copies() else { return };
    let path = folder.path().join("tapdisk-batmap.vhd");
    let batmap = 0x800;
    let before = fs::read(&path).unwrap();
    assert_eq!(before[batmap..batmap + 8], *b"tdbatmap");
    let disk = open(&path, true);
    disk.write_at(&[1; 512], MIB).unwrap();
    disk.close().unwrap();
    let after = fs::read(&path).unwrap();
    let map = batmap + 512..batmap + 512 + get_u32(&before, batmap + 16) as usize * 512;
    assert!(after[map.clone()].iter().all(|&byte| byte == 0));
    assert_eq!(get_u32(&after, batmap + 24), batmap_checksum(&after[map]));
}
