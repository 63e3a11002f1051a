//! Goal: what `--repair=all` says that it gave up is what a reader really lost: no sector less, and no block more.
//!
//! Method: images whose BAT entries are wrong in many ways at once, a table of kinds and random ones. Every sector is read as a reader sees
//! it in the damaged image, in the repaired one, and in the one before it was damaged. What differs must be told, and what is told must
//! be borne out by the damaged table, which is looked at here without the core.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

#[path = "support/damages.rs"]
mod damages;
mod support;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use vhd_core::chain::{Chain, Layer};
use vhd_core::image::{Image, OpenOptions};
use vhd_core::ops::repair::{Repair, RepairMode, plan};
use vhd_core::storage::{MemoryStorage, Storage};
use vhd_core::{Disk, Error};
use vhd_testkit::fixture::{Layout, Placed, get_u32};

use self::damages::{BLOCK, cases, full, set_bat_entry};

const PATH: &str = "test.vhd";

fn repaired(bytes: &[u8]) -> (Repair, Vec<u8>) {
    let (after, repair) = plan(Arc::new(MemoryStorage::new(bytes.to_vec())), Path::new(PATH), RepairMode::All).unwrap();
    let mut repaired = vec![0; after.len().unwrap() as usize];
    after.read_at(&mut repaired, 0).unwrap();
    (repair, repaired)
}

/// Each sector as a reader finds it; nothing where it can't be read.
fn sectors(bytes: &[u8], tolerant: bool) -> Result<Vec<Option<Vec<u8>>>, Error> {
    let open = OpenOptions { tolerant, background_flush: None, ..OpenOptions::default() };
    let image = Image::open(Arc::new(MemoryStorage::new(bytes.to_vec())), Path::new(PATH), &open)?;
    let disk = Disk::new(Chain::of(Layer::Image(image)));
    let read = |at: u64| {
        let mut sector = vec![0; 512];
        disk.read_at(&mut sector, at).ok().map(|()| sector)
    };
    Ok((0..disk.size()).step_by(512).map(read).collect())
}

/// The blocks that a sentence is about.
fn blocks_in(lost: &str) -> BTreeSet<u64> {
    let numbers = |text: &str| -> Vec<u64> {
        text.split(|letter: char| !letter.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect()
    };
    let Some((head, _)) = lost.split_once(':') else { return BTreeSet::new() };
    match numbers(head)[..] {
        [block] if head.starts_with("block ") => [block].into(),
        [a, b] if head.contains(" and ") => [a, b].into(),
        [a, b] | [_, a, b] if head.contains(" to ") => (a..=b).collect(),
        _ => BTreeSet::new(),
    }
}

/// What the entries of a damaged table do to each other, found here: pairs of neighbours in the file that share bytes, and blocks that
/// reach over metadata, the footer or the end.
struct Damage {
    pairs: BTreeSet<(u64, u64, u64, u64)>,
    alone: BTreeSet<u64>,
}

fn damage_of(bytes: &[u8], placed: &Placed, metadata: &[Range<u64>]) -> Damage {
    let slot_len = placed.bitmap_len + u64::from(BLOCK);
    let (mut slots, mut alone) = (Vec::new(), BTreeSet::new());
    for block in 0..u64::from(placed.bat_entries) {
        let entry = get_u32(bytes, (placed.bat + block * 4) as usize);
        let slot = u64::from(entry) * 512..u64::from(entry) * 512 + slot_len;
        if entry == u32::MAX {
            continue;
        }
        let is_over = |part: &Range<u64>| slot.start < part.end && part.start < slot.end;
        if slot.start >= bytes.len() as u64 || metadata.iter().any(is_over) {
            alone.insert(block);
            continue;
        }
        if slot.end > placed.footer.min(bytes.len() as u64) {
            alone.insert(block);
        }
        slots.push((slot.start, block));
    }
    slots.sort_unstable();
    let shared = slots.windows(2).filter(|pair| pair[0].0 + slot_len > pair[1].0);
    let pairs = shared.map(|pair| (pair[0].1, pair[1].1, pair[0].0 + slot_len - pair[1].0, pair[1].0)).collect();
    Damage { pairs, alone }
}

/// Fails unless the list is right. `sound` is the image before it was damaged, where that counts. Returns how many sectors a reader lost.
fn judge(name: &str, bytes: &[u8], sound: Option<&[u8]>, placed: &Placed) -> usize {
    let (repair, after) = repaired(bytes);
    if repair.lost.iter().any(|lost| lost.contains("the BAT is lost") || lost.contains("were found by what fits")) {
        return 0;
    }
    assert!(repair.ok(), "{name}: {repair:?}");
    let told: BTreeSet<u64> = repair.lost.iter().flat_map(|lost| blocks_in(lost)).collect();
    let metadata = [0..512, placed.header..placed.header + 1024, placed.bat..placed.bat + u64::from(placed.bat_entries) * 4];
    let damage = damage_of(bytes, placed, &metadata);
    // Every overlap, with how much and where.
    for (a, b, shared, at) in &damage.pairs {
        let pair = format!("blocks {a} and {b}: both claimed {shared} bytes at {at:#x}");
        let dropped = format!("block {b}: shared {shared} bytes with block {a}");
        let is_told = repair.lost.iter().any(|lost| lost.starts_with(&pair) || lost.starts_with(&dropped));
        assert!(is_told, "{name}: {pair} is not told: {:#?}", repair.lost);
    }
    let mut wrong: BTreeSet<u64> = damage.pairs.iter().flat_map(|(a, b, ..)| [*a, *b]).collect();
    wrong.extend(&damage.alone);
    assert_eq!(told, wrong, "{name}: {:#?}", repair.lost);
    // What a reader lost, of what was there before the damage, and of what was still to be read after it.
    let (before, after) = (sectors(bytes, true).unwrap(), sectors(&after, false).unwrap());
    let sound = sound.map(|sound| sectors(sound, false).unwrap());
    let mut lost = 0;
    for (sector, after) in after.iter().enumerate() {
        let block = sector as u64 * 512 / u64::from(BLOCK);
        let after = after.as_ref().unwrap_or_else(|| panic!("{name}: sector {sector} can't be read"));
        let is_lost = before[sector].as_ref().is_none_or(|before| before != after);
        let is_changed = sound.as_ref().is_some_and(|sound| sound[sector].as_ref() != Some(after));
        assert!(!(is_lost || is_changed) || told.contains(&block), "{name}: sector {sector} is lost: {:#?}", repair.lost);
        lost += usize::from(is_lost || is_changed);
    }
    lost
}

#[test]
fn what_is_given_up_is_what_a_reader_lost() {
    let mut lost = 0;
    for (name, layout) in [
        ("one sector too near", Layout::Classic),
        ("many on one place", Layout::Windows8),
        ("one of many over metadata", Layout::Classic),
        ("several cut", Layout::Classic),
    ] {
        let case = cases().into_iter().find(|case| case.name == name).unwrap();
        let (_, placed) = full(layout).to_bytes();
        let count = judge(name, &case.bytes, Some(&case.sound), &placed);
        println!("{name}: {count} sectors");
        assert!(count > 0, "{name}: nothing is lost");
        lost += count;
    }
    assert!(lost > 1000);
}

/// Of blocks that are laid one sector too near, each loses that sector and no other.
#[test]
fn blocks_that_are_too_near_lose_only_what_they_share() {
    let case = cases().into_iter().find(|case| case.name == "one sector too near").unwrap();
    let (repair, after) = repaired(&case.bytes);
    assert_eq!(repair.lost.iter().filter(|lost| lost.contains("both claimed 512 bytes")).count(), 5, "{:#?}", repair.lost);
    let (after, sound) = (sectors(&after, false).unwrap(), sectors(&case.sound, false).unwrap());
    let lost: Vec<_> = (0..after.len()).filter(|sector| after[*sector] != sound[*sector]).collect();
    assert_eq!(lost, (1..6).map(|block| block * 1024 - 1).collect::<Vec<_>>());
}

/// A wrong entry: which, and what it becomes.
fn entries() -> impl Strategy<Value = Vec<(u8, u8, u32)>> {
    prop::collection::vec((0..8_u8, 0..6_u8, 0..1100_u32), 0..6)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_entries_say_all_that_is_lost_is_told(edits in entries(), aligned in any::<bool>()) {
        let layout = if aligned { Layout::Windows8 } else { Layout::Classic };
        let (sound, placed) = full(layout).to_bytes();
        let mut bytes = sound.clone();
        let entry = |bytes: &[u8], block: u8| get_u32(bytes, (placed.bat + u64::from(block) * 4) as usize);
        for (block, how, by) in edits {
            let other = entry(&bytes, by as u8 % 6);
            let value = match how {
                0 => other,
                1 => other.saturating_add(by),
                2 => other.saturating_sub(by),
                3 => 0x00FF_FFFF,
                4 => by % 16,
                _ => u32::MAX,
            };
            // Forgetting a block is no damage that can be told from a block that was never written.
            if how == 5 && entry(&bytes, block) != u32::MAX {
                continue;
            }
            set_bat_entry(&mut bytes, &placed, u64::from(block), value);
        }
        // An entry that leads to another block's place is wrong, and nothing tells that: what was there before does not count.
        judge("random", &bytes, None, &placed);
    }
}
