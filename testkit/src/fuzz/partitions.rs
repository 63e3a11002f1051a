//! Partition tables.

use std::sync::Arc;

use vhd_core::Disk;
use vhd_core::chain::{Chain, Layer, RawFile};
use vhd_core::partition::{MAX_PARTITIONS, PartitionTable, TableKind};
use vhd_core::storage::MemoryStorage;

/// Bytes of the disk: it begins and ends with what is fuzzed.
const SIZE: usize = 1 << 20;

/// Target `partition_table`: the first bytes, and where there are enough the last, of a disk.
///
/// # Panics
/// When a partition is not inside the disk, or two have one number.
pub fn partition_table(data: &[u8]) {
    let mut bytes = vec![0; SIZE];
    let first = data.len().min(SIZE / 2);
    bytes[..first].copy_from_slice(&data[..first]);
    // The backup of a GPT ends the disk.
    let last = first.min(33 * 512);
    bytes[SIZE - last..].copy_from_slice(&data[first - last..first]);
    let storage = MemoryStorage::new(bytes);
    let raw = RawFile::new(Arc::new(storage), std::path::Path::new("fuzzed.raw"), true).expect("memory has a length");
    let disk = Disk::new(Chain::of(Layer::Raw(Arc::new(raw))));
    let table = PartitionTable::read(&disk).expect("memory can be read");
    assert!(table.partitions.len() <= MAX_PARTITIONS && table.problems.len() <= 3 * MAX_PARTITIONS + 3);
    for (index, partition) in table.partitions.iter().enumerate() {
        let range = &partition.range;
        assert!(0 < range.start && range.start < range.end && range.end <= disk.size(), "{range:?}");
        assert!(table.partitions[..index].iter().all(|other| other.number != partition.number), "{}", partition.number);
    }
    if let TableKind::Gpt(gpt) = &table.kind {
        assert!(gpt.backup_len() < disk.size());
    }
}
