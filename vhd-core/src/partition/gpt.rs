//! GUID partition tables, as the UEFI specification (chapter 5) has them, of disks with sectors of 512 and of 4096 bytes.

use std::ops::Range;

use uuid::Uuid;

use super::mbr::{ENTRIES, PROTECTIVE, Slot};
use super::{PartitionTable, PartitionType, Seen, Structure, u32_at, u64_at};
use crate::error::Result;
use crate::format::SECTOR;

const SIGNATURE: &[u8; 8] = b"EFI PART";
/// Bytes of a sector that a table may count in. An image does not say which its guest saw.
const SECTORS: [u64; 2] = [SECTOR, 4096];
/// Bytes of a header that are known.
const HEADER_LEN: usize = 92;
/// Bytes of all entries at most: 64 times what everyone writes.
const MAX_ENTRIES_LEN: u64 = 1 << 20;
/// Bytes of an entry at least.
const ENTRY_LEN: u32 = 128;
/// Fields of a header: which sector it is, its other, the first and the last sector for partitions, its entries.
const OWN_AT: usize = 24;
const OTHER_AT: usize = 32;
const FIRST_USABLE: usize = 40;
const LAST_USABLE: usize = 48;
const ENTRIES_AT: usize = 72;
const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);

/// A table that was found whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpt {
    /// Bytes of a sector, in which it counts.
    sector: u64,
    /// The header's sector, as it was found; its place and its other's place aside, both headers are the same.
    header: Vec<u8>,
    entries: Vec<u8>,
    /// Sectors where the backup's entries begin and its header is, as the primary header has it.
    backup_at: u64,
    /// True when the backup was taken, because the primary is damaged.
    pub from_backup: bool,
    /// What the other of both is, the backup or the primary.
    pub other: OtherCopy,
}

/// The copy of a table that does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherCopy {
    /// Whole, and with the same partitions.
    Same,
    /// Whole, and with others.
    Differs,
    /// Damaged or gone.
    Damaged,
}

/// Both copies as they were found: what is wrong with one is said of it.
struct Copies {
    sector: u64,
    primary: std::result::Result<Gpt, String>,
    backup: std::result::Result<Gpt, String>,
}

/// Reads the table of a disk; `None` where there is none. `slots` are those of the master boot record, if there is one.
pub(super) fn read(disk: &Seen<'_>, slots: Option<&[Slot; 4]>, table: &mut PartitionTable) -> Result<Option<Gpt>> {
    let mut found = Vec::new();
    for sector in SECTORS {
        found.push(Copies::read(disk, sector)?);
    }
    let whole = |copies: &Copies| copies.primary.is_ok() || copies.backup.is_ok();
    let Some(index) = found.iter().position(whole) else {
        // What is said of the size in which there was something.
        let damaged = found.iter().find(|copies| copies.primary != Err(NO_SIGNATURE.into()));
        if let (Some(Copies { primary: Err(what), backup: Err(backup), .. }), Some(_)) = (damaged, slots) {
            table.doubt(format!("the GPT at sector 1 {what}, and its backup {backup}"));
        }
        return Ok(None);
    };
    if found[index + 1..].iter().any(whole) {
        table.doubt("there are two GPTs, one of sectors of 512 bytes and one of 4096".to_owned());
    }
    let gpt = found.swap_remove(index).judge(disk, slots, table);
    gpt.iter().for_each(|gpt| gpt.list(disk, table));
    Ok(gpt)
}

const NO_SIGNATURE: &str = "is not there";

impl Copies {
    fn read(disk: &Seen<'_>, sector: u64) -> Result<Self> {
        let primary = Gpt::read(disk, sector, 1, false)?;
        let last = (disk.size / sector).saturating_sub(1);
        let backup_at = primary.as_ref().map_or(last, |gpt| gpt.backup_at);
        // One header in the place of both would be its own backup.
        let backup = if backup_at == 1 { Err(NO_SIGNATURE.into()) } else { Gpt::read(disk, sector, backup_at, true)? };
        Ok(Self { sector, primary, backup })
    }

    /// The copy that counts, and what is wrong with it all.
    fn judge(self, disk: &Seen<'_>, slots: Option<&[Slot; 4]>, table: &mut PartitionTable) -> Option<Gpt> {
        let last = (disk.size / self.sector).saturating_sub(1);
        let gpt = match (self.primary, self.backup) {
            (Ok(gpt), Ok(backup)) if gpt.says_the_same(&backup) => {
                if gpt.backup_at != last {
                    table.problems.push(format!("the GPT's backup is at sector {}, the disk ends at {last}", gpt.backup_at));
                }
                gpt
            }
            (Ok(gpt), Ok(_)) => {
                table.doubt("the GPT and its backup are both whole, and differ".to_owned());
                Gpt { other: OtherCopy::Differs, ..gpt }
            }
            (Ok(gpt), Err(what)) => {
                table.problems.push(format!("the GPT's backup at sector {} {what}", gpt.backup_at));
                Gpt { other: OtherCopy::Damaged, ..gpt }
            }
            (Err(what), Ok(gpt)) => {
                table.problems.push(format!("the GPT at sector 1 {what}; its backup is used"));
                Gpt { other: OtherCopy::Damaged, ..gpt }
            }
            (Err(_), Err(_)) => return None,
        };
        match slots {
            None => table.doubt("the first sector does not say that there is a GPT".to_owned()),
            Some(slots) if slots.iter().any(|slot| slot.is_used() && slot.kind != PROTECTIVE) => {
                table.doubt("the first sector has partitions of its own beside the GPT (a hybrid MBR)".to_owned());
            }
            Some(_) => {}
        }
        Some(gpt)
    }
}

impl Gpt {
    /// Reads the header in a sector and the entries that it names; or what is wrong with them.
    fn read(disk: &Seen<'_>, sector: u64, at: u64, is_backup: bool) -> Result<std::result::Result<Self, String>> {
        let all = disk.size / sector;
        if at >= all {
            return Ok(Err("is beyond the end of the disk".into()));
        }
        let mut header = vec![0; sector as usize];
        disk.read_at(&mut header, at * sector)?;
        if header[..8] != SIGNATURE[..] {
            return Ok(Err(NO_SIGNATURE.into()));
        }
        let len = u32_at(&header, 12) as usize;
        if !(HEADER_LEN..=sector as usize).contains(&len) {
            return Ok(Err(format!("has a header of {len} bytes")));
        }
        if header_crc(&header, len) != u32_at(&header, 16) {
            return Ok(Err("has a header with a wrong CRC".into()));
        }
        if u64_at(&header, OWN_AT) != at {
            return Ok(Err(format!("says that it is at sector {}", u64_at(&header, OWN_AT))));
        }
        let (entries_at, count, entry_len) = (u64_at(&header, ENTRIES_AT), u32_at(&header, 80), u32_at(&header, 84));
        let entries_len = u64::from(count) * u64::from(entry_len);
        if entry_len < ENTRY_LEN || !entry_len.is_power_of_two() || entries_len > MAX_ENTRIES_LEN {
            return Ok(Err(format!("has {count} entries of {entry_len} bytes")));
        }
        if entries_at < 2 || entries_at.saturating_add(entries_len.div_ceil(sector)) > all {
            return Ok(Err(format!("has its entries at sector {entries_at}")));
        }
        let mut entries = vec![0; entries_len as usize];
        disk.read_at(&mut entries, entries_at * sector)?;
        if CRC.checksum(&entries) != u32_at(&header, 88) {
            return Ok(Err("has entries with a wrong CRC".into()));
        }
        let backup_at = if is_backup { at } else { u64_at(&header, OTHER_AT) };
        Ok(Ok(Self { sector, header, entries, backup_at, from_backup: is_backup, other: OtherCopy::Same }))
    }

    /// True when a copy has the same partitions in the same disk.
    fn says_the_same(&self, other: &Self) -> bool {
        let told = |gpt: &Self| [FIRST_USABLE..LAST_USABLE + 8, 56..72, 80..88].map(|fields| gpt.header[fields].to_vec());
        told(self) == told(other) && self.entries == other.entries
    }

    fn list(&self, disk: &Seen<'_>, table: &mut PartitionTable) {
        let usable = u64_at(&self.header, FIRST_USABLE)..u64_at(&self.header, LAST_USABLE).saturating_add(1);
        let entries = self.entries.chunks_exact(self.entry_len());
        for (number, entry) in (1..).zip(entries).filter(|(_, entry)| entry[..16] != [0; 16]) {
            if table.is_full() {
                return;
            }
            let kind = PartitionType::Gpt(guid(&entry[..16]));
            let units = entry[56..128].as_chunks::<2>().0.iter().map(|pair| u16::from_le_bytes(*pair));
            let name = char::decode_utf16(units.take_while(|unit| *unit != 0));
            let name = name.map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect();
            let sectors = u64_at(entry, 32)..u64_at(entry, 40).saturating_add(1);
            if sectors.start < usable.start || sectors.end > usable.end {
                table.doubt(format!("partition {number} is outside of the GPT's sectors {} to {}", usable.start, usable.end - 1));
            }
            table.add(disk, number, self.sector, sectors, kind, name);
        }
    }

    /// What a partition must not have: the first sector, the headers and the entries.
    pub(super) fn structures(&self) -> Vec<Structure> {
        let bytes = |sectors: Range<u64>| sectors.start * self.sector..sectors.end.saturating_mul(self.sector);
        let count = self.entries_sectors();
        let primary = if self.from_backup { 2 } else { u64_at(&self.header, ENTRIES_AT) };
        vec![
            Structure { range: bytes(0..2), name: "the GPT".to_owned() },
            Structure { range: bytes(primary..primary + count), name: "the GPT's entries".to_owned() },
            Structure { range: self.backup(), name: "the GPT's backup".to_owned() },
        ]
    }

    /// The first byte behind all partitions, those that are not on the disk among them.
    pub(super) fn partitions_end(&self) -> u64 {
        let entries = self.entries.chunks_exact(self.entry_len()).filter(|entry| entry[..16] != [0; 16]);
        let last = entries.map(|entry| u64_at(entry, 40)).max();
        last.map_or(0, |last| last.saturating_add(1).saturating_mul(self.sector))
    }

    fn entry_len(&self) -> usize {
        u32_at(&self.header, 84) as usize
    }

    fn entries_sectors(&self) -> u64 {
        (self.entries.len() as u64).div_ceil(self.sector)
    }

    /// Bytes of a sector, in which the table counts: 512 or 4096.
    #[must_use]
    pub fn sector(&self) -> u64 {
        self.sector
    }

    /// Bytes of the disk that the backup takes where the primary header says it is.
    #[must_use]
    pub fn backup(&self) -> Range<u64> {
        let end = self.backup_at.saturating_add(1).saturating_mul(self.sector);
        end.saturating_sub(self.backup_len())..end
    }

    /// True when the backup is not where a disk of `size` bytes ends.
    #[must_use]
    pub fn is_apart_from_end(&self, size: u64) -> bool {
        self.backup_at.checked_add(1) != Some(size / self.sector)
    }

    /// Bytes at the end of a disk that the backup needs; and where a disk of `size` bytes has them.
    #[must_use]
    pub fn backup_len(&self) -> u64 {
        (self.entries_sectors() + 1) * self.sector
    }

    /// The first byte of the backup on a disk of `size` bytes: none, where there is no room for it.
    #[must_use]
    pub fn backup_on(&self, size: u64) -> Option<u64> {
        let start = (size / self.sector * self.sector).checked_sub(self.backup_len())?;
        // The primary, and a sector between them.
        (start / self.sector > 2 + self.entries_sectors()).then_some(start)
    }

    /// What to write for a disk of `size` bytes, as places and bytes: first the backup, at its end; then the primary
    /// header, and the sector that protects both from programs which know no GPT (given as it is now in `first_sector`).
    /// Where [`backup_on`](Self::backup_on) is none, there is nothing to write.
    ///
    /// Order and barriers are the caller's: the primary counts as long as it is whole, so it comes after the backup.
    #[must_use]
    pub fn for_size(&self, size: u64, first_sector: &[u8; SECTOR as usize]) -> [Vec<(u64, Vec<u8>)>; 2] {
        if self.backup_on(size).is_none() {
            return [Vec::new(), Vec::new()];
        }
        let sector = self.sector;
        let last = size / sector - 1;
        let backup_entries = last - self.entries_sectors();
        // The primary entries are where the primary says; a backup does not know, but everyone writes them there.
        let entries_at = if self.from_backup { 2 } else { u64_at(&self.header, ENTRIES_AT) };
        let mut padded = self.entries.clone();
        padded.resize((self.entries_sectors() * sector) as usize, 0);
        let backup = self.header_for(last, 1, backup_entries, backup_entries - 1);
        let primary = self.header_for(1, last, entries_at, backup_entries - 1);
        let mut first = vec![(sector, primary), (0, self.protective(first_sector, last))];
        if self.from_backup {
            first.insert(0, (entries_at * sector, padded.clone()));
        }
        [vec![(backup_entries * sector, padded), (last * sector, backup)], first]
    }

    /// The first sector of a disk whose last sector is `last`. What protects the whole disk does so again; in a hybrid that
    /// entry ends before others, and stays.
    fn protective(&self, first_sector: &[u8; SECTOR as usize], last: u64) -> Vec<u8> {
        let mut protective = first_sector.to_vec();
        let slots = protective[ENTRIES..ENTRIES + 64].chunks_exact_mut(16);
        let mut used: Vec<_> = slots.filter(|slot| slot[4] != 0).collect();
        if let [slot] = used.as_mut_slice()
            && slot[4] == PROTECTIVE
        {
            let len = u32::try_from(last).unwrap_or(u32::MAX);
            slot[12..16].copy_from_slice(&len.to_le_bytes());
        }
        protective
    }

    fn header_for(&self, at: u64, other: u64, entries_at: u64, last_usable: u64) -> Vec<u8> {
        let mut header = self.header.clone();
        for (field, value) in [(OWN_AT, at), (OTHER_AT, other), (LAST_USABLE, last_usable), (ENTRIES_AT, entries_at)] {
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
