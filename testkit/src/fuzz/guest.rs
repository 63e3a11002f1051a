//! File systems of a guest, whose free space is read.

use std::path::Path;
use std::sync::Arc;

use vhd_core::Disk;
use vhd_core::chain::{Chain, Layer, RawFile};
use vhd_core::guestfs::{free_space, refuse_writes};
use vhd_core::storage::MemoryStorage;

use super::Input;

const SECTOR: usize = 512;
/// Bytes of a disk at most.
const MAX_SIZE: usize = 40 << 20;

/// A disk as the input tells it, so that one with a file system takes little: its size in MiB, then pieces. Each is a
/// sector's number, how many there are, and one byte that fills them or 0 and their bytes.
#[must_use]
pub fn told_disk(data: &[u8]) -> Vec<u8> {
    let mut input = Input(data);
    let mut disk = vec![0; (usize::from(input.byte()) << 20).clamp(SECTOR, MAX_SIZE)];
    while !input.is_empty() {
        let (at, count, fill) = (input.number(3) as usize * SECTOR, input.number(2) as usize * SECTOR, input.byte());
        let end = at.saturating_add(count).min(disk.len());
        let Some(place) = disk.get_mut(at..end.max(at)) else { continue };
        match fill {
            0 => place.iter_mut().for_each(|byte| *byte = input.byte()),
            fill => place.fill(fill),
        }
    }
    disk
}

/// The input that tells a disk: what [`told_disk`] reads. Long runs of anything but one byte are left out.
#[must_use]
pub fn tell_disk(disk: &[u8]) -> Vec<u8> {
    let mut input = vec![(disk.len() >> 20) as u8];
    let sectors: Vec<&[u8]> = disk.chunks(SECTOR).collect();
    let fill = |index: usize| sectors[index].iter().all(|byte| *byte == sectors[index][0]).then(|| sectors[index][0]);
    let mut at = 0;
    while at < sectors.len() {
        let first = at;
        while at < sectors.len() && at - first < 0xFFFF && fill(at) == fill(first) {
            at += 1;
        }
        let bytes = &disk[first * SECTOR..(at * SECTOR).min(disk.len())];
        if fill(first) == Some(0) || (fill(first).is_none() && at - first > 100) {
            continue;
        }
        input.extend_from_slice(&(first as u32).to_be_bytes()[1..]);
        input.extend_from_slice(&((at - first) as u16).to_be_bytes());
        input.push(fill(first).unwrap_or(0));
        if fill(first).is_none() {
            input.extend_from_slice(bytes);
        }
    }
    input
}

/// Target `guest_fs`: what is free on a disk of any content.
///
/// # Panics
/// When what is free is not inside what it was found in, is not the same twice, or is where nothing may be written.
pub fn guest_fs(data: &[u8]) {
    let storage = Arc::new(MemoryStorage::new(told_disk(data)));
    let raw = RawFile::new(storage, Path::new("fuzzed.img"), true).expect("memory can be examined");
    let disk = Disk::new(Chain::of(Layer::Raw(Arc::new(raw))));
    let free = free_space(&disk).expect("memory can be read");
    assert!(free.ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "not ascending and apart");
    let trusted: Vec<_> = free.places.iter().filter(|place| place.free.is_ok()).collect();
    for range in &free.ranges {
        assert!(range.start < range.end && range.end <= disk.size());
        let inside = |at: u64| trusted.iter().any(|place| place.range.contains(&at));
        assert!(inside(range.start) && inside(range.end - 1), "outside of all that is trusted");
    }
    let told: u64 = trusted.iter().filter_map(|place| place.free.as_ref().ok()).sum();
    assert_eq!(told, free.ranges.iter().map(|range| range.end - range.start).sum::<u64>());
    assert!(free_space(&disk).expect("memory can be read") == free);
    for place in &free.places {
        let refused = refuse_writes(&disk, place.partition).expect("memory can be read");
        assert!(place.free.is_err() || refused.is_none(), "free, and not to be written: {place:?}, {refused:?}");
    }
}
