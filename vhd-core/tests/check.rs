//! `ops::check` against images that other code made: what is sound must pass without a warning, each kind of damage must
//! be told by its code, and no bytes may make it panic.
//!
//! The table of damages names the codes that each must give; a last test asserts that every code there is was given.

#![allow(clippy::unwrap_used, reason = "a test that can't make its own input has nothing better to do than panic")]

#[path = "support/damages.rs"]
mod damages;

use std::collections::BTreeSet;
use std::path::Path;

use tempfile::TempDir;
use vhd_core::chain::ParentPolicy;
use vhd_core::format::{Creator, Timestamp};
use vhd_core::image::{CreateOptions, NewKind, OpenOptions, ParentLink, create};
use vhd_core::ops::check::{CheckOptions, Code, Report, Severity, check, check_chain};
use vhd_core::storage::{FileStorage, MemoryStorage};
use vhd_core::{ErrorKind, Progress};
use vhd_testkit::fixture::{
    Bits, BlockFill, Creator as Maker, Fill, FixtureSpec, Kind, Layout, Locator, Parent, catalogue, refresh_checksums,
};

use self::damages::{BASE_UUID, MIB, at, cases, child, dynamic, fixed, parent, set_bat_entry};

fn check_bytes(bytes: Vec<u8>, deep: bool) -> Report {
    let options = CheckOptions { deep, ..CheckOptions::default() };
    check(&MemoryStorage::new(bytes), Path::new("test.vhd"), &options).expect("readable")
}

fn codes(report: &Report) -> BTreeSet<Code> {
    report.findings.iter().map(|finding| finding.code).collect()
}

fn at_least(report: &Report, severity: Severity) -> Vec<String> {
    let bad = report.findings.iter().filter(|finding| finding.severity >= severity);
    bad.map(|finding| format!("{} {}: {}", finding.code, finding.place, finding.message)).collect()
}

#[test]
fn each_damage_is_told_by_its_code() {
    let mut wrong = Vec::new();
    for case in cases() {
        let report = check_bytes(case.bytes, case.deep);
        let found = codes(&report);
        let expected: BTreeSet<_> = case.expected.iter().copied().collect();
        let surprising = found.difference(&expected).any(|code| code.severity() > Severity::Note);
        if !expected.is_subset(&found) || surprising {
            wrong.push(format!("{}: expected {expected:?}, found {:#?}", case.name, at_least(&report, Severity::Note)));
        }
        for finding in &report.findings {
            assert!(!finding.message.contains('\n') && !finding.place.is_empty(), "{finding:?}");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What may be wrong with a fixture of the catalogue: all others are sound.
fn expected_of(name: &str) -> &'static [Code] {
    match name {
        "dynamic-slack" => &[Code::LeakedSpace],
        "clear-bit-over-data" | "clear-bit-after-set" | "tapdisk" => &[Code::BitmapClearOverData],
        "footer-missing" => &[Code::TrailingFooterMissing],
        "footer-c7" => &[Code::TrailingFooterTapdisk],
        "footer-bad-checksum" | "header-copy-bad-checksum" => &[Code::FooterChecksum],
        "header-copy-wiped" => &[Code::HeaderCopyMissing],
        "footers-disagree" => &[Code::FootersDisagree],
        "footers-bad-checksums" | "fixed-bad-checksum" => &[Code::FooterChecksum, Code::NoValidFooter],
        "header-bad-checksum" => &[Code::HeaderChecksum],
        "bat-past-end" => &[Code::BlockOutside],
        _ => &[],
    }
}

#[test]
fn sound_images_of_every_layout_pass() {
    let mut wrong = Vec::new();
    for fixture in catalogue() {
        let report = check_bytes(fixture.to_bytes().0, true);
        let bad: BTreeSet<_> = codes(&report).into_iter().filter(|code| code.severity() > Severity::Note).collect();
        if bad != expected_of(fixture.name).iter().copied().collect() {
            wrong.push(format!("{}: {:#?}", fixture.name, at_least(&report, Severity::Warning)));
        }
        assert_eq!(report.ok(), bad.iter().all(|code| code.severity() != Severity::Error));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn new_images_pass() {
    let link = ParentLink {
        uuid: BASE_UUID,
        name: "base.vhd".into(),
        relative: "base.vhd".into(),
        absolute: "/vm/base.vhd".into(),
        own: None,
    };
    for kind in [NewKind::Fixed { preallocate: false }, NewKind::Dynamic, NewKind::Differencing(link)] {
        for (size, block_size) in [(5 * MIB + 512, 2 << 20), (64 * MIB, 512 << 10)] {
            let storage = MemoryStorage::default();
            let options = CreateOptions {
                kind: kind.clone(),
                size,
                block_size,
                uuid: [9; 16],
                creator: Creator::WINDOWS_10,
                timestamp: Timestamp::now(),
            };
            create(&storage, &options).unwrap();
            let report = check_bytes(storage.to_vec(), true);
            assert_eq!(at_least(&report, Severity::Note), Vec::<String>::new(), "{kind:?}");
        }
    }
}

type Damage = fn(&mut Vec<u8>);

#[test]
fn what_a_crash_of_our_writer_leaves_is_no_error_and_repairable() {
    let zeros_at_the_end = |bytes: &mut Vec<u8>| bytes.resize(bytes.len() + (16 << 20), 0);
    let footer_at_the_end = |bytes: &mut Vec<u8>| {
        let footer = bytes[..512].to_vec();
        bytes.resize(bytes.len() + (16 << 20) - 512, 0);
        bytes.extend(footer);
    };
    let header_copy_only = |bytes: &mut Vec<u8>| {
        bytes[70] ^= 1;
        refresh_checksums(bytes);
    };
    let crashes: [(Damage, Code); 3] = [
        (zeros_at_the_end, Code::StaleTrailingFooter),
        (footer_at_the_end, Code::LeakedSpace),
        (header_copy_only, Code::FootersDisagree),
    ];
    for layout in [Layout::Classic, Layout::Windows8, Layout::Tapdisk] {
        for (crash, code) in crashes {
            let (mut bytes, _) = dynamic(layout).to_bytes();
            crash(&mut bytes);
            let report = check_bytes(bytes, true);
            assert!(report.ok() && codes(&report).contains(&code), "{layout:?} {code}: {report:#?}");
            assert!(report.findings.iter().all(|finding| finding.repairable || finding.severity == Severity::Note));
        }
    }
}

/// Where the BAT lost a block, what nothing names may be that block.
#[test]
fn leaked_space_is_repairable_only_where_nothing_else_is_wrong() {
    let leaked = |report: &Report| report.findings.iter().find(|finding| finding.code == Code::LeakedSpace).cloned().unwrap();
    for (other, repairable) in [(0xFFFF_FFFF, true), (0x00FF_FFFF, false)] {
        let (mut bytes, placed) = dynamic(Layout::Classic).to_bytes();
        set_bat_entry(&mut bytes, &placed, 0, other);
        assert_eq!(leaked(&check_bytes(bytes, false)).repairable, repairable);
    }
}

#[test]
fn other_files_are_no_vhds() {
    for bytes in [vec![], vec![0; 100], vec![0; 511], vec![7; 512], vec![0; 100_000]] {
        let error = check(&MemoryStorage::new(bytes), Path::new("x"), &CheckOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotVhd);
    }
}

/// Every prefix of a sector's length, and every byte of the metadata turned over: nothing may panic.
#[test]
fn no_bytes_make_it_panic() {
    for spec in [dynamic(Layout::Tapdisk), child(parent()), dynamic(Layout::Windows8)] {
        let spec = FixtureSpec { block_size: 4096, size: 16 * 4096, ..spec };
        let spec = FixtureSpec { blocks: spec.blocks.into_iter().filter(|(block, _)| *block < 16).collect(), ..spec };
        let (bytes, placed) = spec.to_bytes();
        for len in (0..bytes.len()).step_by(512) {
            let options = CheckOptions { deep: true, ..CheckOptions::default() };
            let _ = check(&MemoryStorage::new(bytes[..len].to_vec()), Path::new("x"), &options);
        }
        let metadata = (0..4096).chain(at(placed.footer)..bytes.len());
        for index in metadata {
            for value in [0, 1, 0x7F, 0xFF] {
                let mut bytes = bytes.clone();
                bytes[index] = value;
                let options = CheckOptions { deep: true, ..CheckOptions::default() };
                let _ = check(&MemoryStorage::new(bytes.clone()), Path::new("x"), &options);
                refresh_checksums(&mut bytes);
                let _ = check(&MemoryStorage::new(bytes), Path::new("x"), &options);
            }
        }
    }
}

/// A disk of 2040 GiB of which every block is allocated, in a file that is nearly all hole; `sector` gives the entries.
fn full_disk(path: &Path, sector: impl Fn(u32) -> u32) -> Report {
    use std::os::unix::fs::FileExt;
    let spec = FixtureSpec::new(Kind::Dynamic, Layout::Classic, 2040 << 30);
    let placed = spec.write_to(path).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let bat: Vec<u8> = (0..placed.bat_entries).flat_map(|block| sector(block).to_be_bytes()).collect();
    file.write_all_at(&bat, placed.bat).unwrap();
    let end = placed.footer + u64::from(placed.bat_entries) * ((2 << 20) + 512);
    file.write_all_at(&[0; 512], placed.footer).unwrap();
    file.write_all_at(&spec.footer(), end).unwrap();
    let storage = FileStorage::open(path, false).unwrap();
    check(&storage, path, &CheckOptions::default()).unwrap()
}

#[test]
fn a_full_table_of_2040_gib_is_checked_and_its_findings_are_bounded() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("full.vhd");
    let entries = 1_044_480_u32;
    let first = (1536 + entries * 4) / 512;
    // In an order that is neither the file's nor its reverse.
    let sound = full_disk(&path, |block| first + (u64::from(block) * 7919 % u64::from(entries)) as u32 * 4097);
    assert_eq!(at_least(&sound, Severity::Warning), Vec::<String>::new());
    let same = full_disk(&path, |_| first);
    let overlapping = full_disk(&path, |block| first + block);
    let zeroed = full_disk(&path, |_| 0);
    let worst = [(same, Code::BlockDuplicate), (overlapping, Code::BlocksOverlap), (zeroed, Code::BlockOverMetadata)];
    for (report, code) in worst {
        let listed: Vec<_> = report.findings.iter().filter(|finding| finding.code == code).collect();
        assert_eq!(listed.len(), 101, "{code}");
        assert!(listed[100].message.starts_with("and 104"), "{}", listed[100].message);
    }
}

/// A child beside a base, both written by the fixtures.
fn family(folder: &Path, parent: Parent, base: FixtureSpec) -> Report {
    let path = folder.join("child.vhd");
    child(parent).write_to(&path).unwrap();
    base.write_to(&folder.join("base.vhd")).unwrap();
    let policy = ParentPolicy::default();
    let storage = FileStorage::open(&path, false).unwrap();
    check(&storage, &path, &CheckOptions { parents: Some(&policy), ..CheckOptions::default() }).unwrap()
}

fn base() -> FixtureSpec {
    FixtureSpec { uuid: BASE_UUID, ..dynamic(Layout::Classic) }
}

fn family_cases() -> Vec<(Report, &'static [Code])> {
    let folder = TempDir::new().unwrap();
    let path = folder.path();
    let mut reports: Vec<(Report, &'static [Code])> = vec![
        (family(path, parent(), base()), &[Code::LocatorDead]),
        (
            family(path, parent(), FixtureSpec { uuid: [3; 16], ..base() }),
            &[Code::LocatorDead, Code::LocatorWrongParent, Code::ParentNotFound],
        ),
        (family(path, parent(), FixtureSpec { size: 3 * MIB, ..base() }), &[Code::LocatorDead, Code::ParentSizeDiffers]),
        (family(path, Parent { timestamp: 1, ..parent() }, base()), &[Code::LocatorDead, Code::ParentTimestamp]),
    ];
    let outside = folder.path().join("inner");
    std::fs::create_dir(&outside).unwrap();
    let report = family(&outside, parent().locator(Locator::macx("file://../child.vhd")), base());
    reports.push((report, &[Code::LocatorDead, Code::ParentNameDiffers]));
    // The base is a child of its own child.
    let back = Parent::named(*b"fixture-uuid-001", "child.vhd").locator(Locator::w2ru(".\\child.vhd"));
    FixtureSpec { uuid: BASE_UUID, ..child(back) }.write_to(&path.join("base.vhd")).unwrap();
    let policy = ParentPolicy::default();
    let options = CheckOptions { parents: Some(&policy), ..CheckOptions::default() };
    child(parent()).write_to(&path.join("child.vhd")).unwrap();
    let chain = check_chain(&path.join("child.vhd"), &options).unwrap();
    assert_eq!(chain.len(), 2);
    reports.push((chain[1].clone(), &[Code::ChainLoop]));
    reports
}

#[test]
fn locators_are_followed_to_the_parent() {
    for (report, expected) in family_cases() {
        assert_eq!(codes(&report), expected.iter().copied().collect(), "{report:#?}");
    }
}

#[test]
fn a_chain_is_checked_to_its_base() {
    let folder = TempDir::new().unwrap();
    let fixture = catalogue().into_iter().find(|fixture| fixture.name == "chain-three").unwrap();
    let paths = fixture.write_into(folder.path()).unwrap();
    let policy = ParentPolicy::default();
    let options = CheckOptions { deep: true, parents: Some(&policy), progress: None };
    let reports = check_chain(&paths[0], &options).unwrap();
    assert_eq!(reports.iter().map(|report| report.path.clone()).collect::<Vec<_>>(), paths);
    assert!(reports.iter().all(Report::ok));
}

/// A host that fails to read one range.
#[derive(Debug)]
struct BadSector(MemoryStorage, std::ops::Range<u64>);

impl vhd_core::storage::Storage for BadSector {
    fn read_vectored_at(&self, bufs: &mut [std::io::IoSliceMut<'_>], offset: u64) -> std::io::Result<()> {
        let len: usize = bufs.iter().map(|buf| buf.len()).sum();
        if offset < self.1.end && self.1.start < offset + len as u64 {
            return Err(std::io::Error::from_raw_os_error(5));
        }
        self.0.read_vectored_at(bufs, offset)
    }
    fn write_vectored_at(&self, _: &[std::io::IoSlice<'_>], _: u64) -> std::io::Result<()> {
        panic!("a check wrote")
    }
    fn len(&self) -> std::io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, _: u64) -> std::io::Result<()> {
        panic!("a check wrote")
    }
    fn sync(&self) -> std::io::Result<()> {
        panic!("a check wrote")
    }
    fn punch_hole(&self, _: std::ops::Range<u64>) -> std::io::Result<()> {
        panic!("a check wrote")
    }
    fn zero_range(&self, _: std::ops::Range<u64>) -> std::io::Result<()> {
        panic!("a check wrote")
    }
    fn allocate(&self, _: std::ops::Range<u64>) -> std::io::Result<()> {
        panic!("a check wrote")
    }
    fn next_data(&self, offset: u64) -> std::io::Result<Option<std::ops::Range<u64>>> {
        self.0.next_data(offset)
    }
    fn can_grow(&self) -> bool {
        true
    }
    fn allocated(&self) -> std::io::Result<u64> {
        self.0.allocated()
    }
}

#[test]
fn what_the_host_cannot_read_is_told_by_a_deep_check_and_the_rest_is_read() {
    let spec = dynamic(Layout::Classic).block(6, BlockFill { bits: Bits::None, ..BlockFill::full(Fill::Byte(7)) });
    let (bytes, placed) = spec.to_bytes();
    let bitmap = placed.blocks[&0];
    for bad in [bitmap..bitmap + 512, bitmap + 4096..bitmap + 4608] {
        let storage = BadSector(MemoryStorage::new(bytes.clone()), bad);
        let options = CheckOptions { deep: true, ..CheckOptions::default() };
        let report = check(&storage, Path::new("x"), &options).unwrap();
        assert_eq!(codes(&report), [Code::Unreadable, Code::BitmapClearOverData].into());
    }
    let storage = BadSector(MemoryStorage::new(bytes), 0..512);
    assert_eq!(check(&storage, Path::new("x"), &CheckOptions::default()).unwrap_err().kind(), ErrorKind::Io);
}

#[test]
fn a_deep_check_counts_its_bytes_and_can_be_stopped() {
    for spec in [dynamic(Layout::Classic), fixed(), child(parent())] {
        let progress = Progress::default();
        let options = CheckOptions { deep: true, progress: Some(&progress), parents: None };
        let storage = MemoryStorage::new(spec.to_bytes().0);
        check(&storage, Path::new("x"), &options).unwrap();
        assert!(progress.total() > 0 && progress.done() == progress.total());
        progress.cancel();
        assert_eq!(check(&storage, Path::new("x"), &options).unwrap_err().kind(), ErrorKind::Cancelled);
    }
}

#[test]
fn virtual_pc_and_qemu_images_pass() {
    for creator in [Maker::VIRTUAL_PC, Maker::QEMU, Maker::VIRTUALBOX] {
        let report = check_bytes(FixtureSpec { creator, ..dynamic(Layout::Classic) }.to_bytes().0, true);
        assert_eq!(at_least(&report, Severity::Note), Vec::<String>::new());
    }
}

/// Blocks that a guest freed, and room that a killed process grew: the host has it back, and the next block comes there.
#[test]
fn space_that_was_given_back_is_no_damage_and_other_space_is() {
    use vhd_core::Disk;
    use vhd_core::chain::ChainOptions;
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    for layout in [Layout::Classic, Layout::Windows8, Layout::Tapdisk] {
        let path = folder.path().join("disk.vhd");
        damages::full(layout).write_to(&path).unwrap();
        let look = || check(&FileStorage::open(&path, false).unwrap(), &path, &CheckOptions::default()).unwrap();
        let image = OpenOptions { writable: true, background_flush: None, ..OpenOptions::default() };
        let disk = Disk::open(&path, &ChainOptions { image, ..ChainOptions::default() }).unwrap();
        let block = u64::from(damages::BLOCK);
        for freed in [1, 2, 4] {
            disk.zero(freed * block..(freed + 1) * block, vhd_core::block::ZeroMode::Free).unwrap();
        }
        disk.close().unwrap();
        drop(disk);
        let report = look();
        assert!(at_least(&report, Severity::Warning).is_empty(), "{layout:?}: {report:#?}");
        assert!(codes(&report).contains(&Code::FreeSpace), "{layout:?}: {report:#?}");
        // A byte of what nothing names is another matter.
        let at = report.findings.iter().find(|finding| finding.code == Code::FreeSpace).unwrap().message.clone();
        let at = at.rsplit("0x").find_map(|word| u64::from_str_radix(word.split(' ').next()?, 16).ok()).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], at - 200_000).unwrap();
        assert!(codes(&look()).contains(&Code::LeakedSpace), "{layout:?}: {:#?}", look());
    }
}

#[test]
fn every_code_has_a_test_and_a_name_of_its_own() {
    let mut found: BTreeSet<Code> = cases().into_iter().flat_map(|case| case.expected.iter().copied()).collect();
    found.extend(family_cases().into_iter().flat_map(|(_, expected)| expected.iter().copied()));
    found.extend([Code::Unreadable, Code::Interrupted, Code::FreeSpace]);
    let missing: Vec<_> = Code::ALL.iter().filter(|code| !found.contains(code)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let names: BTreeSet<_> = Code::ALL.iter().map(|code| code.name()).collect();
    assert_eq!(names.len(), Code::ALL.len());
    assert!(names.iter().all(|name| name.chars().all(|letter| letter.is_ascii_lowercase() || letter == '-')));
}
