//! Master boot records, with logical partitions.

use std::ops::Range;

use super::{MAX_PARTITIONS, PartitionTable, PartitionType, Seen, Structure, u32_at};
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
    pub(super) fn is_used(self) -> bool {
        self.kind != 0 && self.len > 0
    }

    /// True when it does not begin at the sector that has it.
    pub(super) fn is_partition(self) -> bool {
        self.is_used() && self.start > 0
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

/// Lists the partitions. Returns what describes them.
pub(super) fn read(disk: &Seen<'_>, slots: &[Slot; 4], table: &mut PartitionTable) -> Result<Vec<Structure>> {
    let mut structures = vec![Structure { range: 0..SECTOR, name: "the partition table".to_owned() }];
    let mut extended = None;
    for (number, slot) in (1..).zip(slots).filter(|(_, slot)| slot.is_used()) {
        if slot.is_extended() {
            if extended.replace(*slot).is_some() {
                table.doubt(format!("partition {number} is a second extended one"));
            }
            continue;
        }
        if slot.kind == PROTECTIVE {
            table.doubt("the first sector says that there is a GPT, and there is none".to_owned());
        }
        table.add(disk, number, SECTOR, slot.start..slot.start + slot.len, PartitionType::Mbr(slot.kind), String::new());
    }
    let Some(extended) = extended else { return Ok(structures) };
    let inside = extended.start * SECTOR..(extended.start + extended.len) * SECTOR;
    let is_apart = |range: &Range<u64>| range.end <= inside.start || inside.end <= range.start;
    if let Some(primary) = table.partitions.iter().find(|primary| !is_apart(&primary.range)) {
        table.doubt(format!("partition {} overlaps the extended one", primary.number));
    }
    let first = table.partitions.len();
    logical(disk, extended, table, &mut structures)?;
    let is_inside = |range: &Range<u64>| inside.start <= range.start && range.end <= inside.end;
    if let Some(logical) = table.partitions[first..].iter().find(|logical| !is_inside(&logical.range)) {
        table.doubt(format!("partition {} is outside of the extended one", logical.number));
    }
    Ok(structures)
}

/// Follows the chain of logical partitions: each link has one, and says where the next link is.
fn logical(disk: &Seen<'_>, extended: Slot, table: &mut PartitionTable, structures: &mut Vec<Structure>) -> Result<()> {
    let end = extended.start + extended.len;
    if extended.start == 0 || end > disk.size / SECTOR {
        table.doubt(format!("the extended partition ends at sector {end}, the disk has {}", disk.size / SECTOR));
    }
    let mut at = extended.start;
    let mut sector = [0; SECTOR as usize];
    for number in 5..5 + MAX_PARTITIONS as u32 {
        if at >= disk.size / SECTOR {
            table.doubt(format!("logical partition {number} would be described at sector {at}, beyond the disk"));
            return Ok(());
        }
        disk.read_at(&mut sector, at * SECTOR)?;
        let Some(entries) = entries(&sector) else {
            table.doubt(format!("sector {at}, which should describe logical partition {number}, has no signature"));
            return Ok(());
        };
        let name = format!("the description of partition {number}");
        structures.push(Structure { range: at * SECTOR..(at + 1) * SECTOR, name });
        let [this, next, ..] = entries;
        if this.is_used() && !this.is_extended() {
            let start = at + this.start;
            table.add(disk, number, SECTOR, start..start + this.len, PartitionType::Mbr(this.kind), String::new());
        }
        if !next.is_extended() {
            return Ok(());
        }
        let following = extended.start + next.start;
        if following <= at {
            table.doubt(format!("logical partition {number} is followed by one described at sector {following}: a loop"));
            return Ok(());
        }
        at = following;
    }
    table.doubt(format!("has more than {MAX_PARTITIONS} logical partitions"));
    Ok(())
}
