//! GUID partition tables, as the UEFI specification (chapter 5) has them.

use uuid::Uuid;

use super::mbr::ENTRIES;
use super::{MAX_PARTITIONS, PartitionTable, PartitionType, u32_at, u64_at};
use crate::block::Disk;
use crate::error::Result;
use crate::format::SECTOR;

const SIGNATURE: &[u8; 8] = b"EFI PART";
/// Bytes of a header that are known.
const HEADER_LEN: usize = 92;
/// Bytes of all entries at most: 64 times what everyone writes.
const MAX_ENTRIES_LEN: u64 = 1 << 20;
/// Bytes of an entry at least.
const ENTRY_LEN: u32 = 128;
const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);

/// A table that was found whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpt {
    /// The header's sector, as it was found; its place and its other's place aside, both headers are the same.
    header: Vec<u8>,
    entries: Vec<u8>,
    /// Sectors where the backup's entries begin and its header is, as the primary header has it.
    backup_at: u64,
    /// True when the backup was taken, because the primary is damaged.
    pub from_backup: bool,
}

/// Reads the table of a disk; `None` where there is none.
pub(super) fn read(disk: &Disk, expected: bool, table: &mut PartitionTable) -> Result<Option<Gpt>> {
    let last = disk.size() / SECTOR - 1;
    let gpt = match Gpt::read(disk, 1, false)? {
        Ok(gpt) => {
            if let Err(what) = Gpt::read(disk, gpt.backup_at, true)? {
                table.problems.push(format!("the GPT's backup at sector {} {what}", gpt.backup_at));
            } else if gpt.backup_at != last {
                table.problems.push(format!("the GPT's backup is at sector {}, the disk ends at {last}", gpt.backup_at));
            }
            gpt
        }
        Err(what) => match Gpt::read(disk, last, true)? {
            Ok(gpt) => {
                table.problems.push(format!("the GPT at sector 1 {what}; its backup is used"));
                gpt
            }
            Err(_) if !expected || what == NO_SIGNATURE => return Ok(None),
            Err(backup) => {
                table.problems.push(format!("the GPT at sector 1 {what}, and its backup {backup}"));
                return Ok(None);
            }
        },
    };
    gpt.list(disk, table);
    Ok(Some(gpt))
}

const NO_SIGNATURE: &str = "is not there";

impl Gpt {
    /// Reads the header in a sector and the entries that it names; or what is wrong with them.
    fn read(disk: &Disk, at: u64, is_backup: bool) -> Result<std::result::Result<Self, String>> {
        let all = disk.size() / SECTOR;
        if at >= all {
            return Ok(Err("is beyond the end of the disk".into()));
        }
        let mut header = vec![0; SECTOR as usize];
        disk.read_at(&mut header, at * SECTOR)?;
        if header[..8] != SIGNATURE[..] {
            return Ok(Err(NO_SIGNATURE.into()));
        }
        let len = u32_at(&header, 12) as usize;
        if !(HEADER_LEN..=SECTOR as usize).contains(&len) {
            return Ok(Err(format!("has a header of {len} bytes")));
        }
        if header_crc(&header, len) != u32_at(&header, 16) {
            return Ok(Err("has a header with a wrong CRC".into()));
        }
        if u64_at(&header, 24) != at {
            return Ok(Err(format!("says that it is at sector {}", u64_at(&header, 24))));
        }
        let (entries_at, count, entry_len) = (u64_at(&header, 72), u32_at(&header, 80), u32_at(&header, 84));
        let entries_len = u64::from(count) * u64::from(entry_len);
        if entry_len < ENTRY_LEN || !entry_len.is_power_of_two() || entries_len > MAX_ENTRIES_LEN {
            return Ok(Err(format!("has {count} entries of {entry_len} bytes")));
        }
        if entries_at < 2 || entries_at.saturating_add(entries_len.div_ceil(SECTOR)) > all {
            return Ok(Err(format!("has its entries at sector {entries_at}")));
        }
        let mut entries = vec![0; entries_len as usize];
        disk.read_at(&mut entries, entries_at * SECTOR)?;
        if CRC.checksum(&entries) != u32_at(&header, 88) {
            return Ok(Err("has entries with a wrong CRC".into()));
        }
        let backup_at = if is_backup { at } else { u64_at(&header, 32) };
        Ok(Ok(Self { header, entries, backup_at, from_backup: is_backup }))
    }

    fn list(&self, disk: &Disk, table: &mut PartitionTable) {
        let entries = self.entries.chunks_exact(self.entry_len());
        for (number, entry) in (1..).zip(entries).filter(|(_, entry)| entry[..16] != [0; 16]).take(MAX_PARTITIONS) {
            let kind = PartitionType::Gpt(guid(&entry[..16]));
            let units = entry[56..128].as_chunks::<2>().0.iter().map(|pair| u16::from_le_bytes(*pair));
            let name = char::decode_utf16(units.take_while(|unit| *unit != 0));
            let name = name.map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect();
            let sectors = u64_at(entry, 32)..u64_at(entry, 40).saturating_add(1);
            table.add(disk, number, sectors, kind, name);
        }
    }

    fn entry_len(&self) -> usize {
        u32_at(&self.header, 84) as usize
    }

    fn entries_sectors(&self) -> u64 {
        (self.entries.len() as u64).div_ceil(SECTOR)
    }

    /// Where the backup's header is, as a sector of the disk.
    #[must_use]
    pub fn backup_at(&self) -> u64 {
        self.backup_at
    }

    /// Bytes at the end of a disk that the backup needs.
    #[must_use]
    pub fn backup_len(&self) -> u64 {
        (self.entries_sectors() + 1) * SECTOR
    }

    /// What to write for a disk of `size` bytes, as places and bytes: first the backup, at its end; then the primary
    /// header, and the sector that protects both from programs which know no GPT (given as it is now in `first_sector`).
    ///
    /// Order and barriers are the caller's: the primary counts as long as it is whole, so it comes after the backup.
    #[must_use]
    pub fn for_size(&self, size: u64, first_sector: &[u8; SECTOR as usize]) -> [Vec<(u64, Vec<u8>)>; 2] {
        let last = size / SECTOR - 1;
        let backup_entries = last - self.entries_sectors();
        // The primary entries are where the primary says; a backup does not know, but everyone writes them there.
        let entries_at = if self.from_backup { 2 } else { u64_at(&self.header, 72) };
        let mut padded = self.entries.clone();
        padded.resize((self.entries_sectors() * SECTOR) as usize, 0);
        let backup = self.header_for(last, 1, backup_entries, backup_entries - 1);
        let primary = self.header_for(1, last, entries_at, backup_entries - 1);
        let mut protective = first_sector.to_vec();
        for slot in protective[ENTRIES..ENTRIES + 64].chunks_exact_mut(16).filter(|slot| slot[4] == super::mbr::PROTECTIVE) {
            let len = u32::try_from(last).unwrap_or(u32::MAX);
            slot[12..16].copy_from_slice(&len.to_le_bytes());
        }
        let mut first = vec![(SECTOR, primary), (0, protective)];
        if self.from_backup {
            first.insert(0, (entries_at * SECTOR, padded.clone()));
        }
        [vec![(backup_entries * SECTOR, padded), (last * SECTOR, backup)], first]
    }

    fn header_for(&self, at: u64, other: u64, entries_at: u64, last_usable: u64) -> Vec<u8> {
        let mut header = self.header.clone();
        for (field, value) in [(24, at), (32, other), (48, last_usable), (72, entries_at)] {
            header[field..field + 8].copy_from_slice(&value.to_le_bytes());
        }
        let crc = header_crc(&header, u32_at(&header, 12) as usize);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        header
    }
}

/// The CRC of a header, for which its own field counts as zero.
fn header_crc(header: &[u8], len: usize) -> u32 {
    let mut bytes = header[..len].to_vec();
    bytes[16..20].fill(0);
    CRC.checksum(&bytes)
}

/// A GUID as UEFI stores it: the first three fields little-endian.
fn guid(bytes: &[u8]) -> Uuid {
    bytes.try_into().map_or(Uuid::nil(), Uuid::from_bytes_le)
}
