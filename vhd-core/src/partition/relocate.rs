//! A GPT follows the end of its disk: its backup belongs into the last sectors.

use super::{Gpt, OtherCopy, PartitionTable, Seen, TableKind};
use crate::block::{Disk, ZeroMode};
use crate::error::Result;
use crate::format::SECTOR;

/// The GPT of `table` whose backup must move for a disk of `size` bytes, and can: a partition may be in its way. A backup with
/// other partitions than the table is not written over.
fn movable(table: &PartitionTable, size: u64) -> Option<&Gpt> {
    let TableKind::Gpt(gpt) = &table.kind else { return None };
    let start = gpt.backup_on(size)?;
    let can = gpt.partitions_end() <= start && gpt.other != OtherCopy::Differs;
    (can && gpt.is_apart_from_end(size)).then_some(gpt)
}

/// True when [`move_gpt`] would move a backup.
#[must_use]
pub fn will_move_gpt(table: &PartitionTable, size: u64) -> bool {
    movable(table, size).is_some()
}

/// Moves the backup of a GPT, on a disk that had `from` bytes, to where one of `size` bytes ends. Whichever header is whole
/// counts at each point. True when there was one to move.
///
/// # Errors
/// As the disk can't be read or written.
pub fn move_gpt(disk: &Disk, from: u64, size: u64) -> Result<bool> {
    let table = PartitionTable::read_of(&Seen { disk, size: from.min(disk.size()) })?;
    let Some(gpt) = movable(&table, size) else { return Ok(false) };
    let mut first_sector = [0; SECTOR as usize];
    disk.read_at(&mut first_sector, 0)?;
    let [backup, primary] = gpt.for_size(size, &first_sector);
    let parts = if gpt.from_backup { [primary, backup] } else { [backup, primary] };
    for part in parts {
        part.iter().try_for_each(|(at, bytes)| disk.write_at(bytes, *at))?;
        disk.flush()?;
    }
    // The old one would be found by programs that search. Where none was, something else may be.
    let (old, new) = (gpt.backup(), gpt.backup_on(size).unwrap_or(size));
    let end = old.end.min(disk.size());
    let old = if size > old.end { old.start..end.min(new) } else { old.start.max(size)..end };
    let is_free = !table.partitions.iter().any(|partition| partition.range.start < old.end && old.start < partition.range.end);
    let is_ours = table.doubt.is_none() && (gpt.from_backup || gpt.other == OtherCopy::Same);
    if is_ours && is_free && !old.is_empty() {
        disk.zero(old, ZeroMode::Free)?;
    }
    disk.flush()?;
    Ok(true)
}
