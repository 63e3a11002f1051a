//! Goal: whatever a file holds, opening it ends in a disk or in one clear error, and a failed open changes no byte.
//!
//! Method: every field of every structure set to hostile values, files cut at every place that matters, and tables of
//! what a file may say or be, each with the kind of error and the words that it must give. Behind all of them stands
//! `vhd_testkit::fuzz::exercise`: it opens in every mode, maps, reads against the test kit's own reader, checks, writes
//! and reopens. Parents, places and hosts that are bad have tests of their own (`bad_parents.rs`, `bad_hosts.rs`).
//! It would fail on a panic, an endless loop, an error of the wrong kind, one that names no file, or a changed byte.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use tempfile::TempDir;
use vhd_core::block::Extent;
use vhd_core::chain::Chain;
use vhd_core::format::{Creator, Timestamp};
use vhd_core::image::{CreateOptions, Image, NewKind, OpenOptions, ParentLink, create};
use vhd_core::storage::MemoryStorage;
use vhd_core::{Disk, ErrorKind};
use vhd_testkit::fixture::{
    Bits, BlockFill, Fill, FixtureSpec, Kind, Layout, Locator, Parent, Placed, Trailing, put_u32, put_u64, refresh_checksums,
};
use vhd_testkit::fuzz::{self, exercise};

use self::support::{assert_error, assert_refused, options, read_all};

const BLOCK: u32 = 4096;
const SIZE: u64 = 9 * 4096 - 512;

/// A small image with whole, partly present and absent blocks.
fn spec(kind: Kind, layout: Layout) -> FixtureSpec {
    let parent = Parent::named(*b"uuid-of-a-parent", "base.vhd")
        .locator(Locator::w2ku("C:\\vm\\base.vhd"))
        .locator(Locator::w2ru(".\\base.vhd"));
    let partly = BlockFill { bits: Bits::Only([0, 1, 7].into()), ..BlockFill::full(Fill::Byte(0x5A)) };
    FixtureSpec {
        block_size: BLOCK,
        gap_fill: 0xFF,
        order: vec![3, 0],
        parent: (kind == Kind::Differencing).then_some(parent),
        ..FixtureSpec::new(kind, layout, SIZE)
    }
    .block(0, BlockFill::tags(1, 1))
    .block(3, partly)
    .block(8, BlockFill::tags(1, 2))
}

fn specs() -> Vec<FixtureSpec> {
    vec![
        spec(Kind::Fixed, Layout::Classic),
        spec(Kind::Dynamic, Layout::Classic),
        spec(Kind::Dynamic, Layout::Windows8),
        spec(Kind::Dynamic, Layout::Tapdisk),
        spec(Kind::Differencing, Layout::WindowsDiff),
        FixtureSpec { trailing: Trailing::Short511, ..spec(Kind::Dynamic, Layout::Classic) },
    ]
}

/// Fields of a footer: offset and bytes.
const FOOTER_FIELDS: [(u64, u64); 19] = [
    (0, 8),
    (8, 4),
    (12, 4),
    (16, 8),
    (24, 4),
    (28, 4),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 2),
    (58, 1),
    (59, 1),
    (60, 4),
    (64, 4),
    (68, 8),
    (84, 1),
    (85, 1),
    (300, 8),
];
/// Fields of a dynamic header up to the locators.
const HEADER_FIELDS: [(u64, u64); 10] = [(0, 8), (8, 8), (16, 8), (24, 4), (28, 4), (32, 4), (36, 4), (40, 8), (56, 4), (64, 8)];
/// Fields of one locator.
const LOCATOR_FIELDS: [(u64, u64); 4] = [(0, 4), (4, 4), (8, 4), (16, 8)];
/// Fields of a batmap header.
const BATMAP_FIELDS: [(u64, u64); 5] = [(0, 8), (8, 8), (16, 4), (20, 4), (24, 4)];

/// File ranges of all fields; a footer's stand in two places.
fn fields(placed: &Placed) -> Vec<Vec<Range<u64>>> {
    let at = |base: u64, (offset, len): (u64, u64)| base + offset..base + offset + len;
    let sparse = placed.header != 0;
    let footers = FOOTER_FIELDS.map(|field| {
        let copy = sparse.then(|| at(placed.footer_copy, field));
        [at(placed.footer, field)].into_iter().chain(copy).collect::<Vec<_>>()
    });
    let mut single: Vec<_> = FOOTER_FIELDS.map(|field| at(placed.footer, field)).into();
    if sparse {
        single.extend(FOOTER_FIELDS.map(|field| at(placed.footer_copy, field)));
        single.extend(HEADER_FIELDS.map(|field| at(placed.header, field)));
        for slot in [0, 1, 7] {
            single.extend(LOCATOR_FIELDS.map(|field| at(placed.header + 576 + slot * 24, field)));
        }
        single.extend((0..4).map(|entry| at(placed.bat + entry * 4, (0, 4))));
        single.extend(placed.batmap.iter().flat_map(|&batmap| BATMAP_FIELDS.map(|field| at(batmap, field))));
        single.extend(placed.blocks.values().map(|&block| at(block, (0, 8))));
    }
    footers.into_iter().chain(single.into_iter().map(|range| vec![range])).collect()
}

/// Values that a field of a file should not be trusted with.
fn hostile(usual: u64) -> [u64; 12] {
    [
        0,
        1,
        3,
        usual ^ 1,
        usual.wrapping_add(512),
        usual.wrapping_sub(512),
        usual << 1,
        512,
        1 << 31,
        i64::MAX as u64 - 511,
        !511,
        u64::MAX,
    ]
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

#[test]
fn every_field_may_hold_anything() {
    for spec in specs() {
        let (good, placed) = spec.to_bytes();
        for places in fields(&placed) {
            let index = |range: &Range<u64>| range.start as usize..(range.end as usize).min(good.len());
            let usual = number(&good[index(&places[0])]);
            for value in hostile(usual) {
                let mut bytes = good.clone();
                for place in &places {
                    let field = &mut bytes[index(place)];
                    let width = field.len();
                    field.copy_from_slice(&value.to_be_bytes()[8 - width..]);
                }
                refresh_checksums(&mut bytes);
                exercise(&bytes);
            }
        }
    }
}

/// A file that can't be opened, and why.
struct Case {
    name: &'static str,
    bytes: Vec<u8>,
    kind: ErrorKind,
    says: &'static str,
}

/// Damage under right checksums.
fn case(name: &'static str, spec: FixtureSpec, kind: ErrorKind, says: &'static str, damage: impl Fn(&mut [u8], &Placed)) -> Case {
    let (mut bytes, placed) = spec.to_bytes();
    damage(&mut bytes, &placed);
    refresh_checksums(&mut bytes);
    Case { name, bytes, kind, says }
}

/// A field of the footer, of both where there are two.
fn in_footers(bytes: &mut [u8], placed: &Placed, at: usize, value: &[u8]) {
    let trailing = placed.footer as usize;
    bytes[trailing + at..][..value.len()].copy_from_slice(value);
    if placed.header != 0 {
        bytes[at..][..value.len()].copy_from_slice(value);
    }
}

fn footer_cases() -> Vec<Case> {
    use ErrorKind::{Corrupt, NotVhd, Unsupported};
    let dynamic = || spec(Kind::Dynamic, Layout::Classic);
    let fixed = || spec(Kind::Fixed, Layout::Classic);
    let footers = |name, kind, says, at, value: &'static [u8]| {
        case(name, dynamic(), kind, says, move |bytes, placed| in_footers(bytes, placed, at, value))
    };
    let mut cases = vec![
        footers("no cookie", NotVhd, "conectix", 0, b"conectiX"),
        footers("poison", NotVhd, "v_poison", 0, b"v_poison"),
        footers("version 2", Unsupported, "version is 0x00020000", 12, &[0, 2, 0, 0]),
        footers("data offset odd", Corrupt, "data offset is 0x201", 16, &[0, 0, 0, 0, 0, 0, 2, 1]),
        footers("data offset over the copy", Corrupt, "data offset is 0x0", 16, &[0; 8]),
        footers("data offset all ones", Corrupt, "data offset", 16, &[0xFF; 8]),
        footers("data offset past the end", Corrupt, "beyond the end", 16, &[0, 0, 0, 1, 0, 0, 0, 0]),
        footers("data offset elsewhere", Corrupt, "no dynamic header", 16, &[0, 0, 0, 0, 0, 0, 6, 0]),
        footers("size 0", Corrupt, "disk size is 0 bytes", 48, &[0; 8]),
        footers("size below a sector", Corrupt, "disk size is 0 bytes", 48, &[0, 0, 0, 0, 0, 0, 1, 255]),
        footers("size all ones", Corrupt, "disk size is", 48, &[0xFF; 8]),
        footers("size of 2 TiB", Corrupt, "disk size is", 48, &[0, 0, 2, 0, 0, 0, 0, 0]),
        footers("size larger than the BAT", Corrupt, "BAT has 9 entries", 48, &[0, 0, 0, 0, 0, 0, 0xA0, 0]),
        case("fixed size larger than the file", fixed(), Corrupt, "was cut short", |bytes, placed| {
            in_footers(bytes, placed, 48, &(SIZE + 512).to_be_bytes());
        }),
        case("fixed, no cookie", fixed(), NotVhd, "conectix", |bytes, placed| in_footers(bytes, placed, 0, b"CONECTIX")),
    ];
    for (name, code) in [("type 0", 0), ("type 1", 1), ("type 5", 5), ("type 6", 6), ("type 7", 7), ("type huge", 0xFF)] {
        cases.push(case(name, dynamic(), Unsupported, "disk type is", |bytes, placed| in_footers(bytes, placed, 63, &[code])));
        cases.push(case(name, fixed(), Unsupported, "disk type is", |bytes, placed| in_footers(bytes, placed, 63, &[code])));
    }
    let (bytes, placed) = fixed().to_bytes();
    let alone = bytes[placed.footer as usize..].to_vec();
    cases.push(Case { name: "fixed, a footer alone", bytes: alone, kind: Corrupt, says: "has only 0 before its footer" });
    for (name, spec) in [("checksums", dynamic()), ("fixed checksum", fixed())] {
        let (mut bytes, placed) = spec.to_bytes();
        in_footers(&mut bytes, &placed, 24, &[0x5A; 4]);
        cases.push(Case { name, bytes, kind: Corrupt, says: "footer checksum is 0x" });
    }
    cases
}

fn header_cases() -> Vec<Case> {
    use ErrorKind::{Corrupt, Unsupported};
    let dynamic = || spec(Kind::Dynamic, Layout::Classic);
    let header = |name, kind, says, at: u64, value: &'static [u8]| {
        case(name, dynamic(), kind, says, move |bytes, placed| {
            bytes[(placed.header + at) as usize..][..value.len()].copy_from_slice(value);
        })
    };
    let (mut sum, placed) = dynamic().to_bytes();
    sum[placed.header as usize + 700] ^= 1;
    vec![
        Case { name: "checksum", bytes: sum, kind: Corrupt, says: "dynamic header checksum is 0x" },
        header("cookie", Corrupt, "no dynamic header", 0, b"cxSparse"),
        header("BAT at 0", Corrupt, "BAT offset is 0x0", 16, &[0; 8]),
        header("BAT off a sector", Corrupt, "BAT offset is 0x601", 16, &[0, 0, 0, 0, 0, 0, 6, 1]),
        header("BAT past the end", Corrupt, "beyond the end of the file", 16, &[0, 0, 0, 0, 0x40, 0, 0, 0]),
        header("BAT at the end of all", Corrupt, "beyond the end of the file", 16, &[0x7F, 255, 255, 255, 255, 255, 0xFE, 0]),
        header("BAT all ones", Corrupt, "BAT offset is", 16, &[0xFF; 8]),
        header("version", Unsupported, "version is 0x00010001", 24, &[0, 1, 0, 1]),
        header("no entries", Corrupt, "BAT has 0 entries", 28, &[0; 4]),
        header("too few entries", Corrupt, "BAT has 8 entries, a disk of 36352 bytes needs 9", 28, &[0, 0, 0, 8]),
        header("block size 0", Unsupported, "block size is 0", 32, &[0; 4]),
        header("block size 512", Unsupported, "block size is 512", 32, &[0, 0, 2, 0]),
        header("block size 3 MiB", Unsupported, "block size is 3145728", 32, &[0, 0x30, 0, 0]),
        header("block size 512 MiB", Unsupported, "block size is 536870912", 32, &[0x20, 0, 0, 0]),
        header("block size all ones", Unsupported, "block size is 4294967295", 32, &[0xFF; 4]),
    ]
}

fn write_file(folder: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn wrong_fields_give_one_clear_error_each() {
    let folder = tempfile::tempdir().unwrap();
    for case in footer_cases().into_iter().chain(header_cases()) {
        println!("{}", case.name);
        let path = write_file(&folder, "image.vhd", &case.bytes);
        assert_refused(&path, &options(false), case.kind, case.says);
        assert_refused(&path, &options(true), case.kind, case.says);
        exercise(&case.bytes);
    }
}

#[test]
fn more_entries_than_needed_are_normal() {
    for entries in [10, 0x1000, u32::MAX] {
        let image = FixtureSpec { max_table_entries: Some(entries), ..spec(Kind::Dynamic, Layout::Classic) };
        let (bytes, _) = image.to_bytes();
        let storage = Arc::new(MemoryStorage::new(bytes.clone()));
        let image_read = Image::open(storage, Path::new("a.vhd"), &OpenOptions::default()).unwrap();
        assert!(read_all(&Disk::new(Chain::of(vhd_core::chain::Layer::Image(image_read)))) == image.guest(&[]));
        exercise(&bytes);
    }
}

/// Where a BAT entry leads that leads to no block: name, image, place, and what is said when it is written, and read.
type BatCase = (&'static str, FixtureSpec, fn(&Placed) -> u64, &'static str, Option<&'static str>);

fn bat_cases() -> Vec<BatCase> {
    let dynamic = || spec(Kind::Dynamic, Layout::Classic);
    let tapdisk = || spec(Kind::Dynamic, Layout::Tapdisk);
    let child = || spec(Kind::Differencing, Layout::WindowsDiff);
    vec![
        ("at the end", dynamic(), |placed| placed.len, "beyond the end", Some("BAT entry 1 names sector")),
        ("far past the end", dynamic(), |_| 0xFFFF_FFFE * 512, "beyond the end", Some("BAT entry 1 names sector")),
        ("over the trailing footer", dynamic(), |placed| placed.footer, "beyond the end of the data", None),
        ("half over the trailing footer", dynamic(), |placed| placed.footer - 2048, "beyond the end of the data", None),
        ("over the header copy", dynamic(), |_| 0, "overlap", Some("inside the metadata")),
        ("over the header", dynamic(), |placed| placed.header, "overlap", Some("inside the metadata")),
        ("half over the header", dynamic(), |placed| placed.header + 512, "overlap", Some("inside the metadata")),
        ("over the BAT", dynamic(), |placed| placed.bat, "overlap", Some("inside the metadata")),
        ("over the batmap", tapdisk(), |placed| placed.batmap.unwrap(), "overlap", Some("inside the metadata")),
        ("over the map", tapdisk(), |placed| placed.batmap.unwrap() + 512, "overlap", Some("inside the metadata")),
        ("over the first locator", child(), |placed| placed.locators[0], "overlap", Some("inside the metadata")),
        ("over the second locator", child(), |placed| placed.locators[1], "overlap", Some("inside the metadata")),
        ("the block of another", dynamic(), |placed| placed.blocks[&0], "overlap", None),
        ("half the block of another", dynamic(), |placed| placed.blocks[&0] + 2048, "overlap", None),
        ("the sector before that of another", dynamic(), |placed| placed.blocks[&0] - 512, "overlap", None),
    ]
}

#[test]
fn wrong_bat_entries_are_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let base = FixtureSpec { uuid: *b"uuid-of-a-parent", ..FixtureSpec::new(Kind::Dynamic, Layout::Classic, SIZE) };
    base.write_to(&folder.path().join("base.vhd")).unwrap();
    for (name, image, target, says, read_says) in bat_cases() {
        println!("{name}");
        let (mut bytes, placed) = image.to_bytes();
        let sector = u32::try_from(target(&placed) / 512).unwrap();
        // Block 1 is absent otherwise.
        put_u32(&mut bytes, placed.bat as usize + 4, sector);
        let path = write_file(&folder, "image.vhd", &bytes);
        assert_refused(&path, &options(true), ErrorKind::Corrupt, says);
        // Reading finds out when it gets there; all other blocks are read.
        let disk = support::open(&path, false);
        let guest = image.guest(&[]);
        let read = |range: Range<u64>| {
            let mut sectors = vec![0xEE; 4096];
            disk.read_at(&mut sectors, range.start).map(|()| sectors == guest[range.start as usize..range.end as usize])
        };
        assert!(read(0..4096).unwrap() && read(8192..12288).unwrap(), "{name}: other blocks");
        if let Some(says) = read_says {
            assert_error(&read(4096..8192).unwrap_err(), ErrorKind::Corrupt, says);
        }
        drop(disk);
        exercise(&bytes);
    }
}

/// What is written when an image is written to must not lie over what is not.
#[test]
fn metadata_over_metadata_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    type Damage = fn(&mut [u8], &Placed);
    let cases: [(&str, Layout, Damage); 6] = [
        ("BAT over the header", Layout::Classic, |bytes, placed| put_u64(bytes, placed.header as usize + 16, 0x200)),
        ("BAT over the header's end", Layout::Classic, |bytes, placed| put_u64(bytes, placed.header as usize + 16, 0x400)),
        ("BAT over the trailing footer", Layout::Classic, |bytes, placed| {
            put_u64(bytes, placed.header as usize + 16, placed.footer);
        }),
        ("batmap over the trailing footer", Layout::Tapdisk, |bytes, placed| {
            put_u64(bytes, placed.batmap.unwrap() as usize + 8, placed.footer);
        }),
        ("batmap over a block", Layout::Tapdisk, |bytes, placed| {
            put_u64(bytes, placed.batmap.unwrap() as usize + 8, placed.blocks[&0]);
        }),
        ("batmap past the end", Layout::Tapdisk, |bytes, placed| {
            put_u64(bytes, placed.batmap.unwrap() as usize + 8, placed.len);
        }),
    ];
    for (name, layout, damage) in cases {
        println!("{name}");
        let (mut bytes, placed) = spec(Kind::Dynamic, layout).to_bytes();
        // Nothing but the overlap is wrong.
        if name.starts_with("BAT") {
            bytes[placed.bat as usize..(placed.bat + placed.bat_len) as usize].fill(0xFF);
        }
        damage(&mut bytes, &placed);
        refresh_checksums(&mut bytes);
        let path = write_file(&folder, "image.vhd", &bytes);
        let says = if name.ends_with("past the end") { "batmap of 512 bytes" } else { "overlap" };
        assert_refused(&path, &options(true), ErrorKind::Corrupt, says);
        exercise(&bytes);
    }
}

/// A locator's place, length and room are claims: its payload may be anywhere, or nowhere.
#[test]
fn locators_of_any_length_anywhere_cost_nothing() {
    let (offset, space, len) = (16, 4, 8);
    for (field, value, outside) in [
        (len, 0xFFFF_FFFF_u64, true),
        (space, 0xFFFF_FFFF, false),
        (offset, u64::MAX, true),
        (offset, u64::MAX - 63, true),
        (offset, i64::MAX as u64, true),
        (offset, 1 << 32, true),
        (offset, 64 << 10, true),
        (offset, 0, false),
        (offset, 0x200, false),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let base = FixtureSpec { uuid: *b"uuid-of-a-parent", ..spec(Kind::Dynamic, Layout::Classic) };
        base.write_to(&folder.path().join("base.vhd")).unwrap();
        for trailing in [Trailing::Footer, Trailing::Missing] {
            let image = FixtureSpec { trailing, ..spec(Kind::Differencing, Layout::Classic) };
            let (mut bytes, placed) = image.to_bytes();
            for slot in 0..2 {
                let at = placed.header as usize + 576 + slot * 24 + field;
                if field == offset { put_u64(&mut bytes, at, value) } else { put_u32(&mut bytes, at, value as u32) }
            }
            refresh_checksums(&mut bytes);
            exercise(&bytes);
            // The header's name finds the parent all the same.
            let path = write_file(&folder, "child.vhd", &bytes);
            assert!(read_all(&support::open(&path, false)) == image.guest(&base.guest(&[])));
            // Where a payload would be, no block may come to lie; room is only a claim.
            if outside {
                assert_refused(&path, &options(true), ErrorKind::Corrupt, "parent locator of");
                continue;
            }
            let written = support::open(&path, true);
            written.write_at(&[7; 4096], 4096).unwrap();
            written.close().unwrap();
            assert!(fs::metadata(&path).unwrap().len() < 1 << 20, "the file grew to where the locator pointed");
        }
    }
}

/// A cut file reads as it did, or says that it can't; it never reads as something else.
#[test]
fn a_cut_file_never_reads_as_another() {
    for spec in specs() {
        let (good, placed) = spec.to_bytes();
        let mut lens: Vec<u64> = (0..3000.min(placed.len)).collect();
        let blocks =
            placed.blocks.values().flat_map(|&at| [at, at + placed.bitmap_len, at + placed.bitmap_len + u64::from(BLOCK)]);
        let ends = placed.locators.iter().copied().chain(blocks).chain(placed.batmap).chain([
            placed.bat + placed.bat_len,
            placed.footer,
            placed.footer + 256,
            placed.footer + 511,
            placed.len,
        ]);
        lens.extend(ends.flat_map(|end| [end.saturating_sub(1), end, end + 1]).filter(|&len| len < placed.len));
        let guest = spec.guest(&[]);
        for len in lens {
            let bytes = good[..len as usize].to_vec();
            // All lengths are opened; what can be done with them is tried on some.
            if len % 61 == 0 || len > 3000 {
                exercise(&bytes);
            }
            check_cut(bytes, &guest);
        }
    }
}

fn check_cut(bytes: Vec<u8>, guest: &[u8]) {
    let len = bytes.len();
    match Image::open(Arc::new(MemoryStorage::new(bytes)), Path::new("cut.vhd"), &OpenOptions::default()) {
        Ok(image) => {
            let disk = Disk::new(Chain::of(vhd_core::chain::Layer::Image(image)));
            assert_eq!(disk.size(), guest.len() as u64);
            for (lba, expected) in guest.chunks(512).enumerate() {
                let mut sector = [0xEE; 512];
                match disk.read_at(&mut sector, lba as u64 * 512) {
                    Ok(()) => assert!(sector == expected, "cut at {len}: sector {lba} reads as something else"),
                    Err(error) => assert_error(&error, ErrorKind::Corrupt, "cut.vhd"),
                }
            }
            // What is lost is no hole either: whoever copies only data would lose it without a word.
            let told = disk.extents(0..disk.size(), &mut |Extent { range, state, .. }| {
                let is_zero = guest[range.start as usize..range.end as usize].iter().all(|byte| *byte == 0);
                assert!(is_zero || !state.reads_zero(), "cut at {len}: {range:?} is said to be zero");
                Ok(())
            });
            told.unwrap_or_else(|error| assert_error(&error, ErrorKind::Corrupt, "cut.vhd"));
        }
        Err(error) => {
            let kind = if len < 511 { ErrorKind::NotVhd } else { error.kind() };
            assert!(matches!(kind, ErrorKind::NotVhd | ErrorKind::Corrupt), "{error}");
            assert_error(&error, kind, "cut.vhd");
        }
    }
}

/// A guest can write to the first sectors of a fixed disk what it likes.
#[test]
fn a_footer_that_a_guest_planted_in_a_fixed_disk_is_data() {
    let folder = tempfile::tempdir().unwrap();
    let (planted, _) = spec(Kind::Dynamic, Layout::Classic).to_bytes();
    let (mut bytes, placed) = FixtureSpec::new(Kind::Fixed, Layout::Classic, 64 << 10).to_bytes();
    bytes[..planted.len()].copy_from_slice(&planted);
    let path = write_file(&folder, "fixed.vhd", &bytes);
    let disk = support::open(&path, false);
    assert!(disk.size() == 64 << 10 && read_all(&disk) == bytes[..64 << 10]);
    drop(disk);
    let disk = support::open(&path, true);
    disk.write_at(&[9; 512], 32 << 10).unwrap();
    disk.close().unwrap();
    drop(disk);
    bytes[32 << 10..][..512].fill(9);
    assert!(fs::read(&path).unwrap() == bytes);
    // When its own footer is damaged, what the guest wrote does not take its place.
    bytes[placed.footer as usize + 30] ^= 1;
    fs::write(&path, &bytes).unwrap();
    for writable in [false, true] {
        assert_refused(&path, &options(writable), ErrorKind::Corrupt, "footer checksum");
    }
    let mut tolerant = options(false);
    tolerant.image.tolerant = true;
    assert!(read_all(&Disk::open(&path, &tolerant).unwrap()) == bytes[..64 << 10]);
    exercise(&bytes);
}

/// By its name a raw file is raw, whatever a guest wrote to it.
#[test]
fn a_raw_file_with_a_planted_footer_is_raw() {
    let folder = tempfile::tempdir().unwrap();
    let (image, _) = spec(Kind::Dynamic, Layout::Classic).to_bytes();
    let mut at_start = vec![0x11; 1 << 20];
    at_start[..image.len()].copy_from_slice(&image);
    let mut at_end = vec![0x11; 1 << 20];
    let fixed = FixtureSpec::new(Kind::Fixed, Layout::Classic, 4096).footer();
    at_end.splice((1 << 20) - 512.., fixed);
    for (name, bytes) in [("start.raw", at_start), ("end.img", at_end), ("whole.raw", image)] {
        let raw = write_file(&folder, name, &bytes);
        assert!(read_all(&Disk::new(Chain::open_raw(&raw, false).unwrap())) == bytes);
        // As a parent too: its size is the file's, and its identifier none.
        let child = folder.path().join(format!("{name}.vhd"));
        support::new_child(&child, &raw);
        assert_refused(&child, &options(false), ErrorKind::Parent, "--raw-parent");
        let mut named = options(false);
        named.parents.raw_parent = Some(raw);
        let disk = Disk::open(&child, &named).unwrap();
        assert!(read_all(&disk) == bytes);
    }
}

#[test]
fn an_image_with_a_saved_state_is_read_and_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let image = FixtureSpec { saved_state: 1, ..spec(Kind::Dynamic, Layout::Classic) };
    let path = folder.path().join("saved.vhd");
    image.write_to(&path).unwrap();
    assert_refused(&path, &options(true), ErrorKind::Refused, "saved state");
    assert!(read_all(&support::open(&path, false)) == image.guest(&[]));
    let mut forced = options(true);
    forced.image.force = true;
    Disk::open(&path, &forced).unwrap().write_at(&[1; 512], 0).unwrap();
    // The byte stays: it is not ours.
    assert_refused(&path, &options(true), ErrorKind::Refused, "saved state");
}

/// An image that this project made, in memory.
fn created(kind: NewKind, size: u64) -> Vec<u8> {
    let storage = MemoryStorage::default();
    let options =
        CreateOptions { kind, size, block_size: BLOCK, uuid: [3; 16], creator: Creator::WINDOWS_10, timestamp: Timestamp(0) };
    create(&storage, &options).unwrap();
    storage.to_vec()
}

fn any_image() -> impl Strategy<Value = Vec<u8>> {
    let link = || ParentLink {
        uuid: *b"uuid-of-a-parent",
        name: "base.vhd".into(),
        relative: "base.vhd".into(),
        absolute: "/vm/base.vhd".into(),
        own: None,
    };
    prop_oneof![
        (0..specs().len()).prop_map(|index| specs()[index].to_bytes().0),
        (1..40_u64).prop_map(|sectors| created(NewKind::Dynamic, sectors * 512)),
        (1..40_u64).prop_map(|sectors| created(NewKind::Fixed { preallocate: false }, sectors * 512)),
        (1..40_u64).prop_map(move |sectors| created(NewKind::Differencing(link()), sectors * 512)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, ..ProptestConfig::default() })]

    #[test]
    fn no_changed_bytes_break_the_reader(
        image in any_image(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 1..9_usize), 1..6),
        near_metadata in any::<bool>(),
        sums in any::<bool>(),
    ) {
        let mut bytes = image;
        for (index, value, len) in changes {
            // Most of a file is data; most of what matters is in the first 8 KiB and the last 512 bytes.
            let at = index.index(if near_metadata { bytes.len().min(8 << 10) } else { bytes.len() });
            let at = if near_metadata && value % 4 == 0 { bytes.len() - 1 - at % bytes.len().min(512) } else { at };
            let end = (at + len).min(bytes.len());
            bytes[at..end].fill(value);
        }
        if sums {
            refresh_checksums(&mut bytes);
        }
        exercise(&bytes);
    }

    #[test]
    fn no_edit_of_a_structure_breaks_the_reader(edits in prop::collection::vec(any::<u8>(), 0..80)) {
        fuzz::mutate_image(&edits);
        fuzz::bat_edits(&edits);
    }
}
