//! `ops::check` against images that other code made: what is sound must pass without a warning, each kind of damage must
//! be told by its code, and no bytes may make it panic.
//!
//! The table of damages names the codes that each must give; a last test asserts that every code there is was given.

#![allow(clippy::unwrap_used, reason = "a test that can't make its own input has nothing better to do than panic")]

use std::collections::BTreeSet;
use std::path::Path;

use tempfile::TempDir;
use vhd_core::chain::ParentPolicy;
use vhd_core::format::{Creator, Timestamp};
use vhd_core::image::{CreateOptions, NewKind, ParentLink, create};
use vhd_core::ops::check::{CheckOptions, Code, Report, Severity, check, check_chain};
use vhd_core::storage::{FileStorage, MemoryStorage};
use vhd_core::{ErrorKind, Progress};
use vhd_testkit::fixture::{
    Bits, BlockFill, Creator as Maker, Fill, FixtureSpec, Kind, Layout, Locator, Parent, Placed, Trailing, catalogue, get_u32,
    put_u32, put_u64, refresh_checksums,
};

const MIB: u64 = 1 << 20;
const BLOCK: u32 = 512 << 10;
const BASE_UUID: [u8; 16] = *b"uuid-of-the-base";

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

/// Blocks 0 and 5 of eight, each sector a tag.
fn dynamic(layout: Layout) -> FixtureSpec {
    FixtureSpec { block_size: BLOCK, ..FixtureSpec::new(Kind::Dynamic, layout, 4 * MIB) }
        .block(0, BlockFill::tags(1, 1))
        .block(5, BlockFill::tags(1, 2))
}

fn parent() -> Parent {
    Parent::named(BASE_UUID, "base.vhd").locator(Locator::w2ku("C:\\vm\\base.vhd")).locator(Locator::w2ru(".\\base.vhd"))
}

fn child(parent: Parent) -> FixtureSpec {
    FixtureSpec { block_size: BLOCK, parent: Some(parent), ..FixtureSpec::new(Kind::Differencing, Layout::Classic, 4 * MIB) }
        .block(2, BlockFill::tags_present(2, 1, [0, 9, 1023]))
}

fn fixed() -> FixtureSpec {
    FixtureSpec::new(Kind::Fixed, Layout::Classic, 4 * MIB).block(0, BlockFill::tags(1, 1))
}

/// One kind of damage, and the codes that tell it; notes aside, there may be no others.
struct Case {
    name: &'static str,
    expected: &'static [Code],
    deep: bool,
    bytes: Vec<u8>,
}

fn case(name: &'static str, spec: FixtureSpec, expected: &'static [Code], damage: fn(&mut Vec<u8>, &Placed)) -> Case {
    let (mut bytes, placed) = spec.to_bytes();
    damage(&mut bytes, &placed);
    Case { name, expected, deep: false, bytes }
}

/// Damage under a right checksum, in both footers and the header alike.
fn summed(name: &'static str, spec: FixtureSpec, expected: &'static [Code], damage: fn(&mut Vec<u8>, &Placed)) -> Case {
    let mut case = case(name, spec, expected, damage);
    refresh_checksums(&mut case.bytes);
    case
}

fn untouched(name: &'static str, spec: FixtureSpec, expected: &'static [Code]) -> Case {
    case(name, spec, expected, |_, _| {})
}

fn deep(case: Case) -> Case {
    Case { deep: true, ..case }
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

/// Changes both footers.
fn in_footers(bytes: &mut [u8], placed: &Placed, change: impl Fn(&mut [u8])) {
    change(&mut bytes[..512]);
    change(&mut bytes[at(placed.footer)..]);
}

fn in_footer(bytes: &mut [u8], placed: &Placed, change: impl Fn(&mut [u8])) {
    change(&mut bytes[at(placed.footer)..]);
}

fn bat_entry(bytes: &[u8], placed: &Placed, block: u64) -> u32 {
    get_u32(bytes, at(placed.bat + block * 4))
}

fn set_bat_entry(bytes: &mut [u8], placed: &Placed, block: u64, sector: u32) {
    put_u32(bytes, at(placed.bat + block * 4), sector);
}

fn footer_cases() -> Vec<Case> {
    let classic = || dynamic(Layout::Classic);
    let with_trailing = |trailing| FixtureSpec { trailing, ..classic() };
    let mut grown = untouched("a file that grew without its footer", classic(), &[Code::StaleTrailingFooter]);
    grown.bytes.resize(grown.bytes.len() + 4096, 0);
    let mut odd = untouched("a byte too many", fixed(), &[Code::FileUnaligned]);
    odd.bytes.insert(0, 0);
    vec![
        grown,
        odd,
        untouched("no trailing footer", with_trailing(Trailing::Missing), &[Code::TrailingFooterMissing]),
        untouched("0xC7", with_trailing(Trailing::TapdiskOpen), &[Code::TrailingFooterTapdisk]),
        untouched("511 bytes", with_trailing(Trailing::Short511), &[Code::FooterShort]),
        case("no header copy", classic(), &[Code::HeaderCopyMissing], |bytes, _| bytes[..512].fill(0)),
        case("trailing checksum", classic(), &[Code::FooterChecksum], |bytes, placed| bytes[at(placed.footer) + 30] ^= 1),
        case("copy checksum", classic(), &[Code::FooterChecksum], |bytes, _| bytes[30] ^= 1),
        case("both checksums", classic(), &[Code::FooterChecksum, Code::NoValidFooter], |bytes, placed| {
            in_footers(bytes, placed, |footer| footer[30] ^= 1);
        }),
        case("fixed checksum", fixed(), &[Code::FooterChecksum, Code::NoValidFooter], |bytes, placed| {
            in_footer(bytes, placed, |footer| footer[30] ^= 1);
        }),
        case("no footers, a header", classic(), &[Code::HeaderCopyMissing, Code::NoValidFooter, Code::TrailingFooterMissing], {
            |bytes, placed| in_footers(bytes, placed, |footer| footer[..512].fill(0))
        }),
        summed("version", classic(), &[Code::FooterVersion], |bytes, placed| {
            in_footer(bytes, placed, |footer| footer[13] = 2);
        }),
        summed("type 6", classic(), &[Code::DiskTypeUnknown], |bytes, placed| {
            in_footer(bytes, placed, |footer| footer[63] = 6);
        }),
        summed("data offset", classic(), &[Code::FooterDataOffset], |bytes, placed| {
            in_footer(bytes, placed, |footer| footer[23] = 1);
        }),
        summed("footers disagree", classic(), &[Code::FootersDisagree], |bytes, _| put_u64(bytes, 48, 3 * MIB)),
        summed("fixed data offset", fixed(), &[Code::FixedDataOffset], |bytes, placed| {
            in_footer(bytes, placed, |footer| put_u64(footer, 16, 0xFFFF_FFFF));
        }),
        untouched("hidden, unsummed", FixtureSpec { hidden: 1, hidden_unsummed: true, ..classic() }, {
            &[Code::Hidden, Code::FooterChecksumHidden]
        }),
        untouched("features", FixtureSpec { features: 0x11, ..classic() }, {
            &[Code::FeaturesReservedClear, Code::FeaturesUnknown, Code::Temporary]
        }),
        untouched("saved state", FixtureSpec { saved_state: 1, ..classic() }, &[Code::SavedState]),
        untouched("future", FixtureSpec { timestamp: 0xFFFF_FFF0, ..classic() }, &[Code::TimestampFuture]),
        untouched("no UUID", FixtureSpec { uuid: [0; 16], ..classic() }, &[Code::UuidZero]),
        summed("reserved bytes", classic(), &[Code::FooterReserved], |bytes, placed| {
            in_footers(bytes, placed, |footer| footer[300] = 7);
        }),
    ]
}

fn size_cases() -> Vec<Case> {
    let classic = || dynamic(Layout::Classic);
    fn set_size(bytes: &mut [u8], placed: &Placed, size: u64) {
        in_footers(bytes, placed, |footer| put_u64(footer, 48, size));
    }
    vec![
        summed("size 0", classic(), &[Code::SizeZero], |bytes, placed| set_size(bytes, placed, 0)),
        summed("size not of sectors", classic(), &[Code::SizeUnaligned], |bytes, placed| set_size(bytes, placed, 4 * MIB - 5)),
        summed("size beyond everything", classic(), &[Code::SizeTooLarge, Code::BatTooSmall], |bytes, placed| {
            set_size(bytes, placed, 1 << 60);
        }),
        summed("size beyond Windows", classic(), &[Code::SizeWindows, Code::SizeIdeLimit, Code::BatTooSmall], |bytes, placed| {
            set_size(bytes, placed, (2040 << 30) + 512);
        }),
        untouched("resized", FixtureSpec { original_size: MIB, ..classic() }, &[Code::Resized]),
        untouched("geometry", FixtureSpec { geometry: Some((9, 4, 17)), ..classic() }, &[Code::GeometryMismatch]),
        summed("fixed, cut", fixed(), &[Code::FixedDataShort], |bytes, _| {
            bytes.drain(..512);
        }),
        untouched("fixed, room", FixtureSpec { slack: 4096, ..fixed() }, &[Code::FixedTrailingRoom]),
    ]
}

fn header_cases() -> Vec<Case> {
    let classic = || dynamic(Layout::Classic);
    vec![
        summed("header beyond the end", classic(), &[Code::HeaderOutside], |bytes, placed| {
            in_footers(bytes, placed, |footer| put_u64(footer, 16, 1 << 40));
        }),
        summed("no header", classic(), &[Code::HeaderMissing], |bytes, _| bytes[512..520].fill(b'x')),
        case("header checksum", classic(), &[Code::HeaderChecksum], |bytes, _| bytes[550] ^= 1),
        summed("header version", classic(), &[Code::HeaderVersion], |bytes, _| bytes[512 + 25] = 2),
        summed("next offset", classic(), &[Code::HeaderNext], |bytes, _| put_u64(bytes, 512 + 8, 0)),
        summed("header reserved", classic(), &[Code::HeaderReserved], |bytes, _| bytes[512 + 800] = 1),
        summed("block size", classic(), &[Code::BlockSize], |bytes, _| put_u32(bytes, 512 + 32, 3 << 20)),
        untouched("unusual block size", FixtureSpec { block_size: 4096, blocks: [].into(), ..classic() }, {
            &[Code::BlockSizeUnusual]
        }),
        summed("BAT offset", classic(), &[Code::BatOffset], |bytes, _| put_u64(bytes, 512 + 16, 0x601)),
        summed("BAT beyond the end", classic(), &[Code::BatOutside], |bytes, _| put_u64(bytes, 512 + 16, 1 << 50)),
        summed("BAT over the header", classic(), &[Code::MetadataOverlap, Code::BlockOverMetadata, Code::LeakedSpace], {
            |bytes, _| put_u64(bytes, 512 + 16, 1024)
        }),
        summed("BAT of zeros", classic(), &[Code::BlockOverMetadata, Code::LeakedSpace], |bytes, placed| {
            bytes[at(placed.bat)..][..32].fill(0);
        }),
        untouched("BAT too small", FixtureSpec { max_table_entries: Some(7), ..classic() }, &[Code::BatTooSmall]),
        untouched("BAT larger", FixtureSpec { extra_bat_entries: 1000, ..classic() }, &[Code::BatLarger]),
        case("extra entry", FixtureSpec { extra_bat_entries: 1, ..classic() }, &[Code::BatExtraUsed], |bytes, placed| {
            set_bat_entry(bytes, placed, 8, 77);
        }),
    ]
}

fn block_cases() -> Vec<Case> {
    let classic = || dynamic(Layout::Classic);
    vec![
        case("beyond the end", classic(), &[Code::BlockOutside], |bytes, placed| set_bat_entry(bytes, placed, 1, 0xFF_FFFF)),
        case("cut", FixtureSpec { trailing: Trailing::Missing, ..classic() }, &[Code::BlockCut, Code::TrailingFooterMissing], {
            |bytes, _| bytes.truncate(bytes.len() - 4096)
        }),
        case("over the footer", classic(), &[Code::BlockOverFooter], |bytes, placed| {
            let last = bat_entry(bytes, placed, 5);
            set_bat_entry(bytes, placed, 5, last + 1);
        }),
        case("over metadata", classic(), &[Code::BlockOverMetadata, Code::LeakedSpace], |bytes, placed| {
            set_bat_entry(bytes, placed, 0, 3);
            set_bat_entry(bytes, placed, 5, 0xFFFF_FFFF);
        }),
        case("duplicate", classic(), &[Code::BlockDuplicate], |bytes, placed| {
            let first = bat_entry(bytes, placed, 0);
            set_bat_entry(bytes, placed, 7, first);
        }),
        case("overlap", classic(), &[Code::BlocksOverlap], |bytes, placed| {
            let first = bat_entry(bytes, placed, 0);
            set_bat_entry(bytes, placed, 7, first + 9);
        }),
        case("leaked block", classic(), &[Code::LeakedSpace], |bytes, placed| set_bat_entry(bytes, placed, 0, 0xFFFF_FFFF)),
        untouched("leaked tail", FixtureSpec { slack: 4 * MIB, ..dynamic(Layout::Windows8) }, &[Code::LeakedSpace]),
        deep(untouched("data under clear bits", classic().block(1, BlockFill::tags_present(1, 1, [4])), {
            &[Code::BitmapClearOverData]
        })),
        deep(case("QEMU's trace", classic(), &[Code::QemuDamage], |bytes, placed| {
            let footer = bytes[..512].to_vec();
            let data = at(placed.blocks[&5] + placed.bitmap_len);
            bytes[data + 10 * 512..][..512].copy_from_slice(&footer);
        })),
    ]
}

fn batmap_cases() -> Vec<Case> {
    let tapdisk = || dynamic(Layout::Tapdisk);
    vec![
        case("no batmap", tapdisk(), &[Code::BatmapMissing], |bytes, placed| {
            bytes[at(placed.batmap.unwrap())..][..8].fill(0);
        }),
        case("batmap elsewhere", tapdisk(), &[Code::BatmapPlace], |bytes, placed| {
            put_u64(bytes, at(placed.batmap.unwrap()) + 8, 1 << 40);
        }),
        case("batmap checksum", tapdisk(), &[Code::BatmapChecksum], |bytes, placed| {
            bytes[at(placed.batmap.unwrap()) + 24] ^= 1;
        }),
        case("batmap bit of no block", tapdisk(), &[Code::BatmapUnallocated], |bytes, placed| {
            let header = at(placed.batmap.unwrap());
            // Bits 0, 5 and 7 instead of 0 and 5: one more in the sum, so one less in its complement.
            bytes[header + 512] |= 1;
            let sum = get_u32(bytes, header + 24);
            put_u32(bytes, header + 24, sum - 1);
        }),
        deep(case("batmap bit of a partial block", tapdisk(), &[Code::BatmapNotFull, Code::BitmapClearOverData], {
            |bytes, placed| bytes[at(placed.blocks[&0])] = 0x7F
        })),
        case("batmap over a block", tapdisk(), &[Code::BlockOverMetadata, Code::LeakedSpace], |bytes, placed| {
            let sector = u32::try_from(placed.batmap.unwrap() / 512).unwrap();
            set_bat_entry(bytes, placed, 0, sector);
            set_bat_entry(bytes, placed, 5, 0xFFFF_FFFF);
            bytes[at(placed.batmap.unwrap()) + 512..][..512].fill(0);
            put_u32(bytes, at(placed.batmap.unwrap()) + 24, 0xFFFF_FFFF);
        }),
    ]
}

/// Field `field` of locator `slot`.
fn locator(slot: usize, field: usize) -> usize {
    512 + 576 + slot * 24 + field
}

fn locator_cases() -> Vec<Case> {
    let child = || child(parent());
    let named = || Parent::named(BASE_UUID, "base.vhd");
    let with = |parent| FixtureSpec { parent: Some(parent), ..child() };
    vec![
        untouched("unknown code", with(parent().locator(Locator::new(*b"Zorx", *b"x"))), &[Code::LocatorUnknown]),
        untouched("two of a code", with(parent().locator(Locator::w2ru(".\\base.vhd"))), &[Code::LocatorDuplicate]),
        summed("beyond the end", child(), &[Code::LocatorOutside], |bytes, _| put_u64(bytes, locator(0, 16), 1 << 40)),
        summed("no payload", child(), &[Code::LocatorEmpty], |bytes, _| put_u32(bytes, locator(1, 8), 0)),
        summed("no room", child(), &[Code::LocatorSpace], |bytes, _| put_u32(bytes, locator(0, 4), 0)),
        summed("one over the other", child(), &[Code::LocatorsOverlap], |bytes, placed| {
            put_u64(bytes, locator(1, 16), placed.locators[0]);
        }),
        summed("over the BAT", child(), &[Code::MetadataOverlap, Code::ParentNameDiffers], |bytes, placed| {
            put_u64(bytes, locator(0, 16), placed.bat);
        }),
        untouched("half a unit", with(named().locator(Locator::new(*b"W2ru", *b"b\0a"))), &[Code::LocatorUndecodable]),
        untouched("not UTF-8", with(named().locator(Locator::new(*b"MacX", *b"file://./\xFF/base.vhd"))), {
            &[Code::LocatorUndecodable]
        }),
        untouched("a NUL", with(named().locator(Locator::w2ru(".\\base.vhd\0"))), &[Code::LocatorNul]),
        untouched("too long", with(named().locator(Locator::new(*b"W2ku", vec![1; 70_000]))), &[Code::LocatorUndecodable]),
        untouched("no locators", with(named()), &[Code::LocatorNone]),
        untouched("other name", with(named().locator(Locator::w2ru(".\\other.vhd"))), &[Code::ParentNameDiffers]),
        untouched("no name", with(Parent { name: vec![], ..parent() }), &[Code::ParentNameEmpty]),
        untouched("raw parent", with(Parent { uuid: [0; 16], ..parent() }), &[Code::ParentRaw]),
        untouched("own parent", with(Parent { uuid: *b"fixture-uuid-001", ..parent() }), &[Code::ParentSelf]),
        summed("parent of a dynamic disk", dynamic(Layout::Classic), &[Code::ParentUnexpected], |bytes, _| {
            bytes[512 + 40] = 1;
        }),
    ]
}

fn cases() -> Vec<Case> {
    let groups = [footer_cases(), size_cases(), header_cases(), block_cases(), batmap_cases(), locator_cases()];
    groups.into_iter().flatten().collect()
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
    let link =
        ParentLink { uuid: BASE_UUID, name: "base.vhd".into(), relative: "base.vhd".into(), absolute: "/vm/base.vhd".into() };
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

#[test]
fn every_code_has_a_test_and_a_name_of_its_own() {
    let mut found: BTreeSet<Code> = cases().into_iter().flat_map(|case| case.expected.iter().copied()).collect();
    found.extend(family_cases().into_iter().flat_map(|(_, expected)| expected.iter().copied()));
    found.insert(Code::Unreadable);
    let missing: Vec<_> = Code::ALL.iter().filter(|code| !found.contains(code)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let names: BTreeSet<_> = Code::ALL.iter().map(|code| code.name()).collect();
    assert_eq!(names.len(), Code::ALL.len());
    assert!(names.iter().all(|name| name.chars().all(|letter| letter.is_ascii_lowercase() || letter == '-')));
}
