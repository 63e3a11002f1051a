//! Whose a place of a disk is, and whether that is beyond doubt.

use super::signatures::{Looked, Owner};
use super::{Problem, Recognised, Volume, What, at_once, ntfs, recognise};
use crate::block::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::partition::{OtherCopy, PartitionTable, PartitionType, Purpose, TableKind};

/// What is known of a disk with a partition table, whatever is in a single partition.
pub(super) struct Survey {
    /// Why nothing on it is beyond doubt.
    pub(super) everywhere: Option<String>,
    /// The partition in which a system sleeps: in its memory may be what others hold.
    sleeper: Option<u32>,
}

impl Survey {
    pub(super) fn of(disk: &Disk, table: &PartitionTable) -> Result<Self> {
        let everywhere = match (&table.doubt, whole_disk_owner(table)) {
            (Some(doubt), _) => Some(format!("its partition table is in doubt: {doubt}")),
            (None, Some(why)) => Some(why),
            (None, None) => remnant(disk, table)?,
        };
        let mut sleeper = None;
        if everywhere.is_none() {
            for partition in &table.partitions {
                if sleeps(&Volume { disk, range: partition.range.clone() })? {
                    sleeper = Some(partition.number);
                    break;
                }
            }
        }
        Ok(Self { everywhere, sleeper })
    }

    /// Why a partition is left alone, whatever is in it.
    pub(super) fn doubt(&self, number: u32) -> Option<String> {
        let sleeper = self.sleeper.filter(|sleeper| *sleeper != number);
        self.everywhere.clone().or_else(|| {
            sleeper.map(|sleeper| {
                format!("a hibernated system is in partition {sleeper}: what this one holds may be in its memory; shut it down for good")
            })
        })
    }
}

/// Why a table of which only one copy is whole is not believed when something is to be dropped. It is good enough to find
/// the files that it leads to.
pub(super) fn damaged_copy(table: &PartitionTable) -> Option<String> {
    let TableKind::Gpt(gpt) = &table.kind else { return None };
    let problem = table.problems.first().filter(|_| gpt.other == OtherCopy::Damaged)?;
    Some(format!("its partition table is in doubt: {problem}; gdisk puts it right"))
}

/// Says that a type of a partition gives the whole disk to someone.
fn whole_disk_owner(table: &PartitionTable) -> Option<String> {
    table.partitions.iter().find_map(|partition| match partition.kind.purpose() {
        Purpose::WholeDisk(owner) => {
            let (number, kind) = (partition.number, partition.kind);
            Some(format!("the disk belongs to {owner}, which says whose each part is (partition {number} has type {kind})"))
        }
        _ => None,
    })
}

/// Says what the disk as a whole looks like, besides what has the table.
fn remnant(disk: &Disk, table: &PartitionTable) -> Result<Option<String>> {
    let own: &[&str] = match table.kind {
        TableKind::Gpt(_) => &["a GPT", "a partition table"],
        _ => &["a partition table"],
    };
    let found = recognise(&Volume { disk, range: 0..disk.size() })?;
    let other = found.iter().find(|found| !own.contains(&found.name));
    Ok(other.map(|Recognised { name, what }| match what {
        What::Owned(Owner::Other(why)) => format!("the disk as a whole looks like {name}: {why}"),
        _ => format!("the disk as a whole looks like {name}, so its partition table may be a remnant"),
    }))
}

/// True when a system that sleeps is in a volume.
fn sleeps(volume: &Volume<'_>) -> Result<bool> {
    let look = || -> super::Found<bool> {
        let signatures = Looked::new(volume)?.signatures()?;
        Ok(signatures.iter().any(|found| found.owner == Owner::Sleeper) || ntfs::sleeps(volume)?)
    };
    match look() {
        Ok(sleeps) => Ok(sleeps),
        Err(Problem::Host(error)) => Err(error),
        // That is told of its place.
        Err(Problem::Doubt(_)) => Ok(false),
    }
}

impl Owner {
    /// Why nothing of a place is free.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Files => "its free space is not read here",
            Self::Sleeper => "a hibernated system is in it",
            Self::Table => "partitions of its own are in it",
            Self::Other(why) => why,
        }
    }
}

/// Says why a type does not fit what was found in a partition.
pub(super) fn refuse_type(kind: PartitionType, name: &str) -> Option<String> {
    let is_for = |what: &str| Some(format!("its type {kind} is for {what}, and it looks like {name}"));
    match kind.purpose() {
        Purpose::Files => None,
        Purpose::Fat if name.starts_with("FAT") => None,
        Purpose::Swap if name == "swap" => None,
        Purpose::Fat => is_for("FAT"),
        Purpose::Swap => is_for("swap"),
        Purpose::Other(owner) | Purpose::WholeDisk(owner) => Some(format!("its type {kind} says that it belongs to {owner}")),
        Purpose::Unknown => Some(format!("its type {kind} is none that file systems are looked for in")),
    }
}

/// Says why the file system in a partition, or on a whole disk that has none, must not be written, as far as that is known:
/// another owner, several that claim the place, a table that is in doubt. A file system that can't be read here, or that was
/// not left clean, is no reason.
///
/// # Errors
/// As the disk can't be read; `InvalidInput` when it has no such partition.
pub fn refuse_writes(disk: &Disk, partition: Option<u32>) -> Result<Option<String>> {
    let table = PartitionTable::read(disk)?;
    let asleep = || Ok(Some(format!("{}; shut it down for good", Owner::Sleeper.reason())));
    let Some(number) = partition else {
        let whole = Volume { disk, range: 0..disk.size() };
        return if sleeps(&whole)? { asleep() } else { Ok(refuse_place(&recognise(&whole)?, None)) };
    };
    let Some(partition) = table.get(number) else {
        return Err(Error::new(ErrorKind::InvalidInput, format!("has no partition p{number}")));
    };
    let survey = Survey::of(disk, &table)?;
    match survey.doubt(number) {
        None if survey.sleeper == Some(number) => return asleep(),
        None => {}
        doubt => return Ok(doubt),
    }
    let found = recognise(&Volume { disk, range: partition.range.clone() })?;
    Ok(refuse_place(&found, Some(partition.kind)))
}

fn refuse_place(found: &[Recognised], kind: Option<PartitionType>) -> Option<String> {
    match found {
        // Whoever mounts it finds none either.
        [] => None,
        [one] => match one.what {
            What::Owned(Owner::Files) | What::System(_) => kind.and_then(|kind| refuse_type(kind, one.name)),
            What::Owned(owner) => Some(format!("it looks like {}: {}", one.name, owner.reason())),
        },
        several => Some(at_once(several)),
    }
}
