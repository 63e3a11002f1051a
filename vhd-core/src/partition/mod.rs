//! Partition tables: what parts of a disk a guest uses for what. Tables are hostile input: every loop is bounded, and
//! what is wrong is said instead of believed.

#![allow(clippy::little_endian_bytes, reason = "partition tables are little-endian")]

mod gpt;
mod mbr;
mod relocate;
mod types;

use std::fmt;
use std::ops::Range;

use uuid::Uuid;

pub use gpt::{Gpt, OtherCopy};
pub use relocate::{move_gpt, will_move_gpt};
pub use types::Purpose;

use crate::block::Disk;
use crate::error::Result;
use crate::format::SECTOR;

/// Partitions that are listed at most: Linux makes no more device nodes of one disk.
pub const MAX_PARTITIONS: usize = 256;

/// Problems that are listed at most.
const MAX_PROBLEMS: usize = 3 * MAX_PARTITIONS;

/// What a table says a partition is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartitionType {
    /// The type byte of an MBR.
    Mbr(u8),
    /// The type GUID of a GPT.
    Gpt(Uuid),
}

impl fmt::Display for PartitionType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mbr(code) => write!(f, "0x{code:02x}"),
            Self::Gpt(guid) => write!(f, "{guid}"),
        }
    }
}

/// One partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// As Linux counts: logical ones of an MBR from 5 on, those of a GPT by slot.
    pub number: u32,
    /// Bytes of the disk, all inside it.
    pub range: Range<u64>,
    /// What it is for.
    pub kind: PartitionType,
    /// Its name in a GPT.
    pub name: String,
}

/// The kind of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableKind {
    /// None that is known: the disk may be empty, or a file system as a whole.
    None,
    /// Master boot record, logical partitions among it.
    Mbr,
    /// GUID partition table.
    Gpt(Box<Gpt>),
}

/// What the partition table of a disk says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionTable {
    /// Its kind.
    pub kind: TableKind,
    /// Ascending by number.
    pub partitions: Vec<Partition>,
    /// What is wrong with it, one sentence each.
    pub problems: Vec<String>,
    /// The first of them that leaves it open whose a part of the disk is. (Others are that one copy of a GPT is damaged, or
    /// not at the end of the disk.)
    pub doubt: Option<String>,
}

/// The first bytes of a disk: it may be larger by now.
struct Seen<'a> {
    disk: &'a Disk,
    size: u64,
}

impl Seen<'_> {
    fn read_at(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        self.disk.read_at(bytes, at)
    }
}

/// A part of the disk that describes partitions, and so is in none.
struct Structure {
    range: Range<u64>,
    name: String,
}

impl PartitionTable {
    /// Reads the table of a disk.
    ///
    /// # Errors
    /// As the disk can't be read; what is wrong with the table is a problem, no error.
    pub fn read(disk: &Disk) -> Result<Self> {
        Self::read_of(&Seen { disk, size: disk.size() })
    }

    /// Reads the table of a disk as it was when it had another size.
    fn read_of(disk: &Seen<'_>) -> Result<Self> {
        let mut table = Self { kind: TableKind::None, partitions: Vec::new(), problems: Vec::new(), doubt: None };
        let mut sector = [0; SECTOR as usize];
        disk.read_at(&mut sector, 0)?;
        let slots = mbr::slots(&sector, disk.size);
        let mut structures = Vec::new();
        if slots.as_ref().is_none_or(|slots| slots.iter().any(|slot| slot.kind == mbr::PROTECTIVE))
            && let Some(gpt) = gpt::read(disk, slots.as_ref(), &mut table)?
        {
            structures = gpt.structures();
            table.kind = TableKind::Gpt(Box::new(gpt));
        } else if let Some(slots) = slots {
            structures = mbr::read(disk, &slots, &mut table)?;
            table.kind = TableKind::Mbr;
        }
        table.find_overlaps(&structures);
        Ok(table)
    }

    /// The partition with this number.
    #[must_use]
    pub fn get(&self, number: u32) -> Option<&Partition> {
        self.partitions.iter().find(|partition| partition.number == number)
    }

    /// Notes a problem that leaves it open whose a part of the disk is.
    fn doubt(&mut self, problem: String) {
        self.doubt.get_or_insert_with(|| problem.clone());
        // Of a hostile table there are as many as partitions, and no more.
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem);
        }
    }

    /// True when no more partitions are listed, which is noted.
    fn is_full(&mut self) -> bool {
        let full = self.partitions.len() >= MAX_PARTITIONS;
        if full {
            self.doubt(format!("has more than {MAX_PARTITIONS} partitions"));
        }
        full
    }

    /// Takes a partition as the table has it, if it is inside the disk.
    fn add(&mut self, disk: &Seen<'_>, number: u32, sector: u64, sectors: Range<u64>, kind: PartitionType, name: String) {
        let all = disk.size / sector;
        if sectors.start >= sectors.end || sectors.start == 0 {
            self.doubt(format!("partition {number} begins at sector {} and has none", sectors.start));
        } else if sectors.end > all {
            self.doubt(format!("partition {number} ends at sector {}, the disk has {all}", sectors.end));
        } else if !self.is_full() {
            self.partitions.push(Partition { number, range: sectors.start * sector..sectors.end * sector, kind, name });
        }
    }

    fn find_overlaps(&mut self, structures: &[Structure]) {
        let mut sorted: Vec<_> = self.partitions.iter().map(|partition| (partition.range.clone(), partition.number)).collect();
        sorted.sort_unstable_by_key(|(range, _)| range.start);
        for pair in sorted.windows(2) {
            let [(first, a), (second, b)] = pair else { continue };
            if first.end > second.start {
                self.doubt(format!("partitions {a} and {b} overlap"));
            }
        }
        for Structure { range, name } in structures {
            if let Some((_, number)) = sorted.iter().find(|(part, _)| part.start < range.end && range.start < part.end) {
                self.doubt(format!("partition {number} overlaps {name}"));
            }
        }
    }
}

/// True when a sector, the first of what should have no partitions, looks like a master boot record, wherever these lie.
pub(crate) fn is_table(sector: &[u8]) -> bool {
    mbr::slots(sector, u64::MAX).is_some_and(|slots| slots.iter().any(|slot| slot.is_partition()))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}
