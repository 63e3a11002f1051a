//! What the fuzz targets do with their bytes: each takes any and must not panic, hang or ask for much memory.
//!
//! Beyond that each has an oracle: what was parsed survives the round trip; a failed open changes nothing, and a check
//! has findings then; what opens reads as the [`reference`](mod@crate::reference) reads it; what was written is read
//! back after a reopen, and nothing else changed; a parent is never taken from where none may be.

mod bounded;
mod crash;
mod exercise;
mod guest;
mod input;
mod journal;
mod machines;
mod partitions;
mod rings;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use vhd_core::block::ZeroMode;
use vhd_core::chain::{Chain, ChainOptions, Layer};
use vhd_core::format::{Batmap, DynamicHeader, Footer, PlatformCode, SECTOR};
use vhd_core::image::{Image, OpenOptions};
use vhd_core::{Disk, ErrorKind};

pub use bounded::Bounded;
pub use crash::crash_ops;
pub use exercise::{assert_well_formed, exercise};
pub use guest::{guest_fs, tell_disk, told_disk};
pub use input::Input;
pub use journal::repair_journal;
pub use machines::machine_files;
pub use partitions::partition_table;
pub use rings::block_rings;

use self::bounded::LIMIT;
use crate::fixture::{
    Bits, BlockFill, Fill, FixtureSpec, Kind, Layout, Locator, Parent, Placed, Trailing, put_u32, put_u64, refresh_checksums,
};
use crate::model::ModelDisk;

const NAME: &str = "fuzzed.vhd";

/// Target `footer_roundtrip`: structures of the format.
///
/// # Panics
/// When what was parsed is not what it is made of again.
pub fn footer_roundtrip(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<512>() {
        if let Ok(footer) = Footer::parse_tolerant(bytes) {
            let again = footer.to_bytes();
            assert!(bytes[..64] == again[..64] && bytes[68..] == again[68..], "bytes outside the checksum changed");
            let reparsed = Footer::parse(&again).expect("what was written is valid");
            assert!(reparsed == footer);
            let _ = (footer.header_end(), footer.geometry().size(), footer.timestamp().to_system_time());
        } else {
            assert!(Footer::parse(bytes).is_err(), "strict takes what tolerant refuses");
        }
        if let Some(batmap) = Batmap::parse(bytes) {
            let cleared = Batmap::parse(&batmap.cleared()).expect("a cleared header is valid");
            assert_eq!((cleared.offset(), cleared.len(), cleared.checksum()), (batmap.offset(), batmap.len(), u32::MAX));
            assert!(batmap.offset().checked_add(batmap.len()).is_some());
        }
    }
    if let Some(bytes) = data.first_chunk::<1024>() {
        match DynamicHeader::parse_tolerant(bytes) {
            Ok(mut header) => {
                assert!(DynamicHeader::parse(&header.to_bytes()).is_ok());
                let entries: Vec<_> = header.locators().collect();
                assert!(entries.iter().all(|entry| entry.reserved_len() >= u64::from(entry.data_length)));
                let name = header.parent_name();
                header.set_parent(header.parent_uuid(), header.parent_timestamp(), &name);
                assert_eq!(header.parent_name(), name);
                header.set_locators(&entries);
                assert!(header.locators().eq(entries));
            }
            Err(_) => assert!(DynamicHeader::parse(bytes).is_err()),
        }
    }
    if let Some((code, payload)) = data.split_first_chunk::<4>() {
        let code = PlatformCode::from_bytes(*code);
        if let Some(text) = code.decode(payload) {
            assert!(text.len() <= payload.len() * 3);
        }
    }
}

/// Target `open_image`: the bytes are a file.
///
/// # Panics
/// When the image does not behave; see [`exercise`].
pub fn open_image(data: &[u8]) {
    exercise(&data[..data.len().min(1 << 20)]);
}

/// A valid image to damage, a small one of any kind and layout.
fn valid_image(choice: u8, block_choice: u8) -> (Vec<u8>, Placed) {
    let block_size = [4096, 8192, 32 << 10, 4096][usize::from(block_choice % 4)];
    let layout = [Layout::Classic, Layout::Windows8, Layout::Tapdisk, Layout::WindowsDiff][usize::from(choice % 4)];
    let kind = match choice >> 2 & 7 {
        0 => Kind::Fixed,
        1..=3 => Kind::Differencing,
        _ => Kind::Dynamic,
    };
    let trailing = match choice >> 5 {
        0 => Trailing::Short511,
        1 => Trailing::Missing,
        2 => Trailing::TapdiskOpen,
        _ => Trailing::Footer,
    };
    let trailing = if kind == Kind::Fixed && trailing != Trailing::Short511 { Trailing::Footer } else { trailing };
    let parent = Parent::named(*b"uuid-of-a-parent", "base.vhd")
        .locator(Locator::w2ku("C:\\vm\\base.vhd"))
        .locator(Locator::w2ru(".\\base.vhd"))
        .locator(Locator::macx("file://./base.vhd"));
    let partly = BlockFill { bits: Bits::Only([0, 1, 7].into()), ..BlockFill::full(Fill::Byte(0x5A)) };
    let spec = FixtureSpec {
        block_size,
        trailing,
        gap_fill: 0xFF,
        parent: (kind == Kind::Differencing).then_some(parent),
        ..FixtureSpec::new(kind, layout, u64::from(block_size) * 9 - 512)
    };
    let spec = spec.block(0, BlockFill::tags(1, 1)).block(3, partly).block(8, BlockFill::tags(1, 2));
    FixtureSpec { order: vec![3, 0], ..spec }.to_bytes()
}

/// The structures of an image: where they are, and how long.
fn structures(placed: &Placed) -> Vec<Range<u64>> {
    let mut list = vec![placed.footer..placed.footer + placed.footer_len.max(1), 0..512];
    if placed.header != 0 {
        list.push(placed.header..placed.header + 1024);
        list.push(placed.header..placed.header + 64);
        list.push(placed.header + 576..placed.header + 768);
        list.push(placed.bat..placed.bat + u64::from(placed.bat_entries) * 4);
        list.extend(placed.batmap.map(|at| at..at + 512 + placed.batmap_len));
        list.extend(placed.blocks.values().map(|&at| at..at + placed.bitmap_len));
        list.extend(placed.locators.iter().map(|&at| at..at + 64));
    }
    list
}

/// Target `mutate_image`: a valid image, edited where it matters, its checksums right again.
///
/// # Panics
/// As [`exercise`].
pub fn mutate_image(data: &[u8]) {
    let mut input = Input(data);
    let (mut bytes, placed) = valid_image(input.byte(), input.byte());
    let structures = structures(&placed);
    let keep_sums = input.byte() % 8 == 0;
    for _ in 0..8 {
        if input.is_empty() {
            break;
        }
        let place = &structures[usize::from(input.byte()) % structures.len()];
        let width = [1, 2, 4, 8][usize::from(input.byte() % 4)];
        let at = place.start + input.number(2) % (place.end - place.start) / width * width;
        let Some(field) = bytes.get_mut(at as usize..(at + width) as usize) else { continue };
        let usual = field.iter().fold(0, |number, &byte| number << 8 | u64::from(byte));
        let value = input.odd_number(usual).to_be_bytes();
        field.copy_from_slice(&value[8 - width as usize..]);
    }
    let cut = input.odd_number(bytes.len() as u64);
    if input.byte() % 16 == 1 && cut < LIMIT {
        bytes.resize(cut as usize, 0);
    }
    if !keep_sums {
        refresh_checksums(&mut bytes);
    }
    exercise(&bytes);
}

/// Target `bat_edits`: any BAT entries, all else sound.
///
/// # Panics
/// As [`exercise`].
pub fn bat_edits(data: &[u8]) {
    let mut input = Input(data);
    let (mut bytes, placed) = valid_image(input.byte() | 0b1_0000, input.byte());
    let blocks: Vec<_> = placed.blocks.values().map(|at| at / SECTOR).collect();
    for _ in 0..16 {
        if input.is_empty() {
            break;
        }
        let entry = u64::from(input.byte()) % u64::from(placed.bat_entries.max(1));
        let usual = blocks.get(usize::from(input.byte()) % blocks.len().max(1)).copied().unwrap_or(0);
        let value = input.odd_number(usual);
        put_u32(&mut bytes, (placed.bat + entry * 4) as usize, value as u32);
    }
    exercise(&bytes);
}

/// Target `disk_ops`: any calls with any ranges on a disk over a parent.
///
/// # Panics
/// When a range inside the disk is refused or one outside is not, or the content is not the model's.
pub fn disk_ops(data: &[u8]) {
    let mut input = Input(data);
    let (disk, mut model) = disk_and_model(input.byte());
    let size = disk.size();
    for step in 0..64_u8 {
        if input.is_empty() {
            break;
        }
        let op = input.byte();
        let start = input.odd_number(u64::from(op) * size / 256);
        let len = input.odd_number(u64::from(op) * 16);
        let end = start.checked_add(len).filter(|&end| end <= size);
        let outcome = match op % 5 {
            // Nobody has a buffer of more than some bytes.
            0 | 1 => {
                let mut bytes = vec![step | 0x80; len.min(size + 1) as usize];
                let done = if op % 5 == 0 { disk.write_at(&bytes, start) } else { disk.read_at(&mut bytes, start) };
                match end {
                    Some(_) if op % 5 == 0 => model.write(start, &bytes),
                    Some(end) => assert!(bytes == model.read(start..end), "read {start}..{end} differs"),
                    None => {}
                }
                done
            }
            2 => {
                let mode = if op & 0x80 == 0 { ZeroMode::Free } else { ZeroMode::Keep };
                let done = disk.zero(start..start.saturating_add(len), mode);
                if let Some(end) = end {
                    model.write_zeroes(start..end);
                }
                done
            }
            3 => check_extents(&disk, &model, start..start.saturating_add(len), end),
            _ => {
                disk.flush().unwrap();
                continue;
            }
        };
        let wanted = if end.is_some() { Ok(()) } else { Err(ErrorKind::OutOfRange) };
        assert_eq!(outcome.map_err(|error| error.kind()), wanted, "{start} {len}");
    }
    let mut all = vec![0; size as usize];
    disk.read_at(&mut all, 0).unwrap();
    crate::tagged::compare(&all, &model.read(0..size), 0).unwrap();
    disk.close().unwrap();
}

fn check_extents(disk: &Disk, model: &ModelDisk, range: Range<u64>, end: Option<u64>) -> vhd_core::Result<()> {
    let mut at = range.start;
    disk.extents(range, &mut |extent| {
        assert!(extent.range.start == at && extent.range.end > at, "extents are not in order");
        at = extent.range.end;
        let zero = extent.state.reads_zero();
        assert!(!zero || model.read(extent.range.clone()).iter().all(|&byte| byte == 0), "{extent:?} is not zero");
        Ok(())
    })?;
    assert_eq!(end, Some(at), "extents end early");
    Ok(())
}

/// A disk in memory and what it holds: fixed, dynamic, or differencing over a parent of another size.
fn disk_and_model(choice: u8) -> (Disk, ModelDisk) {
    let spec = |kind, sectors| FixtureSpec { block_size: 4096, ..FixtureSpec::new(kind, Layout::Windows8, sectors * SECTOR) };
    let open = |spec: &FixtureSpec, writable| {
        let storage = Arc::new(Bounded::new(spec.to_bytes().0));
        let options = OpenOptions { writable, background_flush: None, ..OpenOptions::default() };
        Layer::Image(Image::open(storage, Path::new(NAME), &options).unwrap())
    };
    let parent = spec(Kind::Dynamic, 60).block(0, BlockFill::tags(1, 1)).block(5, BlockFill::tags(1, 2));
    let kind = [Kind::Fixed, Kind::Dynamic, Kind::Differencing][usize::from(choice % 3)];
    let mut leaf = spec(kind, 50 + u64::from(choice) % 31);
    if kind != Kind::Differencing {
        return (Disk::new(Chain::of(open(&leaf, true))), ModelDisk::new(leaf.size));
    }
    leaf.parent = Some(Parent::named(parent.uuid, "base.vhd"));
    let mut model = ModelDisk::new(parent.size);
    model.write(0, &parent.guest(&[]));
    model.snapshot_sized(leaf.size);
    (Disk::new(Chain::over(open(&leaf, true), vec![open(&parent, false)])), model)
}

/// Target `chain_resolve`: a child whose locators and name are any bytes, in a folder beside another one.
///
/// # Panics
/// When a parent is taken that is not in the child's folder or below, or not the one with the right identifier.
pub fn chain_resolve(data: &[u8]) {
    use std::cell::OnceCell;
    thread_local!(static FOLDER: OnceCell<tempfile::TempDir> = const { OnceCell::new() });
    FOLDER.with(|cell| {
        let folder = cell.get_or_init(resolve_folder).path();
        resolve_in(folder, data);
    });
}

const PARENT_UUID: [u8; 16] = *b"uuid-of-a-parent";

/// A folder with candidates of every sort, inside and outside the child's own one.
fn resolve_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("home");
    std::fs::create_dir_all(home.join("sub")).unwrap();
    let image = |uuid| FixtureSpec { uuid, block_size: 4096, ..FixtureSpec::new(Kind::Dynamic, Layout::Classic, 4096) };
    for place in ["home/a.vhd", "home/sub/b.vhd", "c.vhd"] {
        image(PARENT_UUID).write_to(&folder.path().join(place)).unwrap();
    }
    image(*b"uuid-of-no-other").write_to(&home.join("d.vhd")).unwrap();
    std::os::unix::fs::symlink("../c.vhd", home.join("l.vhd")).unwrap();
    folder
}

fn resolve_in(folder: &Path, data: &[u8]) {
    let mut input = Input(data);
    let mut parent = Parent { uuid: PARENT_UUID, ..Parent::default() };
    let flags = input.byte();
    for _ in 0..flags % 9 {
        let code = [*b"W2ru", *b"W2ku", *b"MacX", *b"Wi2r", *b"Wi2k", *b"Mac "][usize::from(input.byte() % 6)];
        let absolute = input.byte() % 4 == 0;
        let len = usize::from(input.byte());
        let mut payload = input.take(len).to_vec();
        if absolute {
            payload.splice(0..0, folder.as_os_str().as_encoded_bytes().iter().copied());
        }
        if code.starts_with(b"W2") {
            payload = payload.iter().flat_map(|&byte| [byte, 0]).collect();
        }
        parent.locators.push(Locator::new(code, payload));
    }
    parent.name = input.take(100).iter().map(|&byte| u16::from(byte)).collect();
    let spec =
        FixtureSpec { parent: Some(parent), block_size: 4096, ..FixtureSpec::new(Kind::Differencing, Layout::Classic, 4096) };
    let (mut bytes, placed) = spec.to_bytes();
    if flags & 0x80 != 0 {
        // Payloads anywhere, of any length.
        let slot = 576 + usize::from(input.byte() % 8) * 24 + placed.header as usize;
        let (length, offset) = (input.odd_number(64), input.odd_number(2048));
        put_u32(&mut bytes, slot + 8, length as u32);
        put_u64(&mut bytes, slot + 16, offset);
        refresh_checksums(&mut bytes);
    }
    let home = folder.join("home");
    let child = home.join("child.vhd");
    std::fs::write(&child, &bytes).unwrap();
    match Disk::open(&child, &ChainOptions::default()) {
        Ok(disk) => {
            let found = disk.layer_path(1).expect("a differencing disk has a parent").canonicalize().unwrap();
            let home = home.canonicalize().unwrap();
            assert!(found == home.join("a.vhd") || found == home.join("sub/b.vhd"), "took {}", found.display());
            disk.read_at(&mut [0; 512], 0).unwrap();
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Parent, "{error}");
            assert_well_formed(&error, &child);
        }
    }
}
