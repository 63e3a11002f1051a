//! Partition tables.

use std::sync::Arc;

use vhd_core::Disk;
use vhd_core::chain::{Chain, Layer, RawFile};
use vhd_core::partition::{MAX_PARTITIONS, OtherCopy, PartitionTable, TableKind, move_gpt, will_move_gpt};
use vhd_core::storage::MemoryStorage;

/// Bytes of the disk: it begins and ends with what is fuzzed.
const SIZE: usize = 1 << 20;
/// Bytes that the end of the disk has of it: the backup of a GPT, of large sectors too.
const END: usize = 5 * 4096;

fn disk_of(bytes: Vec<u8>) -> Disk {
    let storage = MemoryStorage::new(bytes);
    let raw = RawFile::new(Arc::new(storage), std::path::Path::new("fuzzed.raw"), false).expect("memory has a length");
    Disk::new(Chain::of(Layer::Raw(Arc::new(raw))))
}

/// Target `partition_table`: the first bytes, and where there are enough the last, of a disk.
///
/// # Panics
/// When a partition is not inside the disk, two have one number, or a table is another after its disk grew.
pub fn partition_table(data: &[u8]) {
    let mut bytes = vec![0; SIZE];
    let first = data.len().min(SIZE / 2);
    bytes[..first].copy_from_slice(&data[..first]);
    // The backup of a GPT ends the disk.
    let last = first.min(END);
    bytes[SIZE - last..].copy_from_slice(&data[first - last..first]);
    let disk = disk_of(bytes.clone());
    let table = PartitionTable::read(&disk).expect("memory can be read");
    assert!(table.partitions.len() <= MAX_PARTITIONS && table.problems.len() <= 3 * MAX_PARTITIONS + 3);
    assert!(table.doubt.is_none() || !table.problems.is_empty());
    for (index, partition) in table.partitions.iter().enumerate() {
        let range = &partition.range;
        assert!(0 < range.start && range.start < range.end && range.end <= disk.size(), "{range:?}");
        assert!(table.partitions[..index].iter().all(|other| other.number != partition.number), "{}", partition.number);
    }
    let TableKind::Gpt(gpt) = &table.kind else { return };
    assert!(gpt.backup_len() < disk.size());
    for more in [512, 4096, 12288, SIZE] {
        let size = (SIZE + more) as u64;
        let mut larger = bytes.clone();
        larger.resize(SIZE + more, 0);
        let larger = disk_of(larger);
        let moves = will_move_gpt(&table, size);
        assert_eq!(move_gpt(&larger, SIZE as u64, size).expect("memory can be written"), moves);
        let now = PartitionTable::read(&larger).expect("memory can be read");
        let TableKind::Gpt(moved) = &now.kind else { panic!("the table is gone") };
        assert!(!moves || (!moved.is_apart_from_end(size) && moved.other == OtherCopy::Same && !moved.from_backup), "{now:?}");
        let same = |a: &PartitionTable, b: &PartitionTable| a.partitions.iter().all(|partition| b.partitions.contains(partition));
        assert!(same(&table, &now), "{table:?} became {now:?}");
    }
}
