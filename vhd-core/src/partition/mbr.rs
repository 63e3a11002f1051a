//! Master boot records, with logical partitions.

use super::{MAX_PARTITIONS, PartitionTable, PartitionType, u32_at};
use crate::block::Disk;
use crate::error::Result;
use crate::format::SECTOR;

/// Type of the entry that stands for a GPT.
pub(super) const PROTECTIVE: u8 = 0xEE;
/// Types of extended partitions: DOS, Windows 95, Linux.
const EXTENDED: [u8; 3] = [0x05, 0x0F, 0x85];
/// Where the four entries begin.
pub(super) const ENTRIES: usize = 446;
/// Bytes of an entry.
const ENTRY_LEN: usize = 16;

/// One of the four entries.
#[derive(Clone, Copy)]
pub(super) struct Slot {
    status: u8,
    pub(super) kind: u8,
    start: u64,
    len: u64,
}

impl Slot {
    fn is_used(self) -> bool {
        self.kind != 0 && self.len > 0
    }

    fn is_extended(self) -> bool {
        self.is_used() && EXTENDED.contains(&self.kind)
    }
}

fn entries(sector: &[u8]) -> Option<[Slot; 4]> {
    let slot = |index: usize| {
        let entry = &sector[ENTRIES + index * ENTRY_LEN..][..ENTRY_LEN];
        let (start, len) = (u64::from(u32_at(entry, 8)), u64::from(u32_at(entry, 12)));
        Slot { status: entry[0], kind: entry[4], start, len }
    };
    (sector[510..512] == [0x55, 0xAA]).then(|| std::array::from_fn(slot))
}

/// The entries of a disk's first sector, if that is a master boot record. The first sector of a file system has the same
/// signature, and anything where the entries would be.
pub(super) fn slots(sector: &[u8], disk_size: u64) -> Option<[Slot; 4]> {
    let slots = entries(sector)?;
    let plausible = |slot: &Slot| matches!(slot.status, 0 | 0x80) && (!slot.is_used() || slot.start < disk_size / SECTOR);
    (slots.iter().all(plausible) && slots.iter().any(|slot| slot.is_used())).then_some(slots)
}

/// Lists the partitions.
pub(super) fn read(disk: &Disk, slots: &[Slot; 4], table: &mut PartitionTable) -> Result<()> {
    let mut extended = None;
    for (number, slot) in (1..).zip(slots).filter(|(_, slot)| slot.is_used()) {
        if slot.is_extended() {
            if extended.replace(*slot).is_some() {
                table.problems.push(format!("partition {number} is a second extended one"));
            }
            continue;
        }
        table.add(disk, number, slot.start..slot.start + slot.len, PartitionType::Mbr(slot.kind), String::new());
    }
    extended.map_or(Ok(()), |extended| logical(disk, extended, table))
}

/// Follows the chain of logical partitions: each link has one, and says where the next link is.
fn logical(disk: &Disk, extended: Slot, table: &mut PartitionTable) -> Result<()> {
    let end = extended.start + extended.len;
    if extended.start == 0 || end > disk.size() / SECTOR {
        table.problems.push(format!("the extended partition ends at sector {end}, the disk has {}", disk.size() / SECTOR));
    }
    let mut at = extended.start;
    let mut sector = [0; SECTOR as usize];
    for number in 5..5 + MAX_PARTITIONS as u32 {
        if at >= disk.size() / SECTOR {
            table.problems.push(format!("logical partition {number} would be described at sector {at}, beyond the disk"));
            return Ok(());
        }
        disk.read_at(&mut sector, at * SECTOR)?;
        let Some(entries) = entries(&sector) else {
            table.problems.push(format!("sector {at}, which should describe logical partition {number}, has no signature"));
            return Ok(());
        };
        let [this, next, ..] = entries;
        if this.is_used() && !this.is_extended() {
            let start = at + this.start;
            table.add(disk, number, start..start + this.len, PartitionType::Mbr(this.kind), String::new());
        }
        if !next.is_extended() {
            return Ok(());
        }
        let following = extended.start + next.start;
        if following <= at {
            table.problems.push(format!("logical partition {number} is followed by one described at sector {following}: a loop"));
            return Ok(());
        }
        at = following;
    }
    table.problems.push(format!("has more than {MAX_PARTITIONS} logical partitions"));
    Ok(())
}
