//! Kinds of damage to images, each with the codes that tell it: what checks are judged by, and repairs.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]
#![allow(dead_code, reason = "each test file uses a part of it")]

use vhd_core::ops::check::Code;
use vhd_testkit::fixture::{
    BlockFill, FixtureSpec, Kind, Layout, Locator, Parent, Placed, Trailing, get_u32, put_u32, put_u64, refresh_checksums,
};

pub const MIB: u64 = 1 << 20;
pub const BLOCK: u32 = 512 << 10;
pub const BASE_UUID: [u8; 16] = *b"uuid-of-the-base";

/// Blocks 0 and 5 of eight, each sector a tag.
pub fn dynamic(layout: Layout) -> FixtureSpec {
    FixtureSpec { block_size: BLOCK, ..FixtureSpec::new(Kind::Dynamic, layout, 4 * MIB) }
        .block(0, BlockFill::tags(1, 1))
        .block(5, BlockFill::tags(1, 2))
}

/// Blocks 0 to 5 of eight.
pub fn full(layout: Layout) -> FixtureSpec {
    (0..6).fold(FixtureSpec { block_size: BLOCK, ..FixtureSpec::new(Kind::Dynamic, layout, 4 * MIB) }, |spec, block| {
        spec.block(block, BlockFill::tags(1, 10 + u64::from(block)))
    })
}

/// Lays the blocks so many sectors too near to each other, in the order of blocks, as another tool's bug did: each is written over
/// the end of the one before.
fn crowd(bytes: &mut [u8], placed: &Placed, sectors: u32) {
    let slot_len = at(placed.bitmap_len) + BLOCK as usize;
    for (number, (&block, &from)) in (0_u32..).zip(&placed.blocks) {
        let to = at(from) - (sectors * number) as usize * 512;
        bytes.copy_within(at(from)..at(from) + slot_len, to);
        set_bat_entry(bytes, placed, u64::from(block), u32::try_from(to / 512).unwrap());
    }
}

pub fn parent() -> Parent {
    Parent::named(BASE_UUID, "base.vhd").locator(Locator::w2ku("C:\\vm\\base.vhd")).locator(Locator::w2ru(".\\base.vhd"))
}

pub fn child(parent: Parent) -> FixtureSpec {
    FixtureSpec { block_size: BLOCK, parent: Some(parent), ..FixtureSpec::new(Kind::Differencing, Layout::Classic, 4 * MIB) }
        .block(2, BlockFill::tags_present(2, 1, [0, 9, 1023]))
}

pub fn fixed() -> FixtureSpec {
    FixtureSpec::new(Kind::Fixed, Layout::Classic, 4 * MIB).block(0, BlockFill::tags(1, 1))
}

/// One kind of damage, and the codes that tell it; notes aside, there may be no others.
pub struct Case {
    pub name: &'static str,
    pub expected: &'static [Code],
    pub deep: bool,
    pub bytes: Vec<u8>,
    /// The image before it was damaged.
    pub sound: Vec<u8>,
}

fn case(name: &'static str, spec: FixtureSpec, expected: &'static [Code], damage: fn(&mut Vec<u8>, &Placed)) -> Case {
    let (mut bytes, placed) = spec.to_bytes();
    let sound = bytes.clone();
    damage(&mut bytes, &placed);
    Case { name, expected, deep: false, bytes, sound }
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

pub fn at(offset: u64) -> usize {
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

pub fn set_bat_entry(bytes: &mut [u8], placed: &Placed, block: u64, sector: u32) {
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
        case("one sector too near", full(Layout::Classic), &[Code::BlocksOverlap], |bytes, placed| crowd(bytes, placed, 1)),
        case("many on one place", full(Layout::Windows8), &[Code::BlockDuplicate, Code::BlocksOverlap, Code::LeakedSpace], {
            |bytes, placed| {
                let first = bat_entry(bytes, placed, 0);
                for (block, sectors) in [(1, 0), (2, 3), (3, 700), (7, 3), (6, 1100)] {
                    set_bat_entry(bytes, placed, block, first + sectors);
                }
            }
        }),
        case("one of many over metadata", full(Layout::Classic), &[Code::BlockOverMetadata], |bytes, placed| {
            let first = bat_entry(bytes, placed, 0);
            set_bat_entry(bytes, placed, 0, first - 1);
        }),
        case(
            "several cut",
            FixtureSpec { trailing: Trailing::Missing, ..full(Layout::Classic) },
            &[Code::BlockCut, Code::BlockOutside, Code::TrailingFooterMissing],
            |bytes, _| bytes.truncate(bytes.len() - 3 * BLOCK as usize / 2),
        ),
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

pub fn cases() -> Vec<Case> {
    let groups = [footer_cases(), size_cases(), header_cases(), block_cases(), batmap_cases(), locator_cases()];
    groups.into_iter().flatten().collect()
}
