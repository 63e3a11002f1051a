//! The dynamic header, and where BAT, locators and batmap lie.

use super::footer::Basis;
use super::{Check, Code, Region, be32, be64, checksum};
use crate::error::Result;
use crate::format::{
    BAT_ENTRY_LEN, DiskType, DynamicHeader, HEADER_COOKIE, HEADER_LEN, HeaderError, MAX_BLOCK_SIZE, MAX_DISK_SIZE,
    MIN_BLOCK_SIZE, SECTOR, Timestamp,
};
use crate::layout::Layout;

const HEADER: &str = "dynamic header";
/// A BAT with room for this many blocks more than twice those of the disk is worth a word.
const MANY_ENTRIES: u64 = 128;

/// A header with its cookie, whatever else is wrong with it.
pub(super) struct Header {
    pub(super) at: u64,
    pub(super) bytes: [u8; HEADER_LEN],
    /// The same header with fields that can't be right replaced: for reading the rest of it.
    pub(super) parsed: DynamicHeader,
    block_size: Option<u32>,
    bat_offset: Option<u64>,
    pub(super) max_entries: u32,
}

/// Where the BAT is, and what it is for.
pub(super) struct Table {
    pub(super) offset: u64,
    /// Entries in the file that name blocks of the disk.
    pub(super) entries: u32,
    /// Entries in the file beyond those.
    pub(super) extra: u32,
    pub(super) layout: Layout,
    /// All entries that the disk needs are in the file.
    pub(super) complete: bool,
}

impl Check<'_> {
    /// Checks the header's own fields. `None` when there is no header.
    pub(super) fn header(&mut self, basis: &Basis, at: u64) -> Result<Option<Header>> {
        if at.saturating_add(HEADER_LEN as u64) > self.file_len {
            let message = format!("should be at {at:#x}, beyond the end of the file ({:#x} bytes)", self.file_len);
            self.add(Code::HeaderOutside, HEADER, message);
            return Ok(None);
        }
        let mut bytes = [0; HEADER_LEN];
        self.read(&mut bytes, at)?;
        if !bytes.starts_with(&HEADER_COOKIE) {
            let message = format!("found \"{}\" at {at:#x}, expected \"cxsparse\"", bytes[..8].escape_ascii());
            self.add(Code::HeaderMissing, HEADER, message);
            return Ok(None);
        }
        let (found, computed) = (be32(&bytes, 36), checksum(&bytes, 36));
        if found != computed {
            self.add(Code::HeaderChecksum, HEADER, HeaderError::Checksum { found, computed }.to_string());
        }
        let version = be32(&bytes, 24);
        if version != 0x0001_0000 {
            self.add(Code::HeaderVersion, HEADER, HeaderError::Version(version).to_string());
        }
        let next = be64(&bytes, 8);
        if next != u64::MAX {
            self.add(Code::HeaderNext, HEADER, format!("next offset is {next:#x}, expected all ones"));
        }
        let locators_reserved = (0..8).any(|slot| be32(&bytes, 576 + slot * 24 + 12) != 0);
        if be32(&bytes, 60) != 0 || bytes[768..].iter().any(|&byte| byte != 0) || locators_reserved {
            self.add(Code::HeaderReserved, HEADER, "reserved bytes are not all zero");
        }
        if basis.disk_type == DiskType::Differencing {
            self.timestamp(Timestamp(be32(&bytes, 56)), "parent time stamp");
        }
        let block_size = self.block_size(be32(&bytes, 32));
        let bat_offset = self.bat_offset(be64(&bytes, 16));
        let Ok(parsed) = DynamicHeader::parse_tolerant(&readable(&bytes)) else { return Ok(None) };
        Ok(Some(Header { at, parsed, block_size, bat_offset, max_entries: be32(&bytes, 28), bytes }))
    }

    fn block_size(&mut self, size: u32) -> Option<u32> {
        if !size.is_power_of_two() || !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&size) {
            self.add(Code::BlockSize, HEADER, HeaderError::BlockSize(size).to_string());
            return None;
        }
        if size != 2 << 20 && size != 512 << 10 {
            let message = format!("block size is {size}: Windows takes 512 KiB and 2 MiB only, QEMU writes 2 MiB only");
            self.add(Code::BlockSizeUnusual, HEADER, message);
        }
        Some(size)
    }

    fn bat_offset(&mut self, offset: u64) -> Option<u64> {
        if offset < SECTOR || !offset.is_multiple_of(SECTOR) || offset > i64::MAX as u64 {
            self.add(Code::BatOffset, HEADER, HeaderError::BatOffset(offset).to_string());
            return None;
        }
        Some(offset)
    }

    /// Checks where the BAT lies and how large it is. `None` when there is no telling.
    pub(super) fn table(&mut self, basis: &Basis, header: &Header, regions: &mut Vec<Region>) -> Option<Table> {
        let (offset, block_size) = (header.bat_offset?, header.block_size?);
        let max = u64::from(header.max_entries);
        // Without a footer the table tells how large the disk is at most.
        let size = basis.size.unwrap_or((max * u64::from(block_size)).min(MAX_DISK_SIZE));
        let layout = Layout::new(size, block_size);
        let needed = u64::from(layout.blocks());
        if max < needed {
            let message = format!("has {max} entries, a disk of {size} bytes needs {needed}");
            self.add(Code::BatTooSmall, "BAT", message);
        } else if max > 2 * needed + MANY_ENTRIES {
            self.add(Code::BatLarger, "BAT", format!("has {max} entries, a disk of {size} bytes needs only {needed}"));
        }
        let named = needed.min(max);
        let end = offset.saturating_add(named * BAT_ENTRY_LEN);
        if end > self.file_len {
            let message = format!("lies at {offset:#x} to {end:#x}, beyond the end of the file ({:#x} bytes)", self.file_len);
            self.add(Code::BatOutside, "BAT", message);
        }
        let present = self.file_len.saturating_sub(offset) / BAT_ENTRY_LEN;
        let entries = named.min(present);
        regions.push(Region {
            range: offset.min(self.file_len)..end.min(self.file_len),
            name: "BAT".into(),
            reserved_end: offset.saturating_add(max * BAT_ENTRY_LEN).next_multiple_of(SECTOR),
        });
        // No disk has more blocks than that, so whatever follows is no BAT.
        let extra = max.min(present).min(MAX_DISK_SIZE / u64::from(block_size)).saturating_sub(entries);
        let complete = entries == needed;
        // All of these are bounded by `max`, which has 32 bits.
        Some(Table { offset, entries: entries as u32, extra: extra as u32, layout, complete })
    }

    /// Each two pieces of metadata that share bytes.
    pub(super) fn metadata_overlaps(&mut self, regions: &[Region]) {
        for (index, a) in regions.iter().enumerate() {
            for b in &regions[index + 1..] {
                if !a.overlaps(&b.range) || b.range.is_empty() {
                    continue;
                }
                let both_locators = a.name.starts_with("locator") && b.name.starts_with("locator");
                let code = if both_locators { Code::LocatorsOverlap } else { Code::MetadataOverlap };
                let span = |region: &Region| format!("{:#x} to {:#x}", region.range.start, region.range.end);
                let message = format!("lies at {}, over the {} at {}", span(b), a.name, span(a));
                self.add(code, b.name.clone(), message);
            }
        }
    }
}

/// The header with version, block size and BAT offset replaced by usual ones: those are judged by themselves.
fn readable(bytes: &[u8; HEADER_LEN]) -> [u8; HEADER_LEN] {
    let mut bytes = *bytes;
    bytes[16..24].copy_from_slice(&1536_u64.to_be_bytes());
    bytes[24..28].copy_from_slice(&0x0001_0000_u32.to_be_bytes());
    bytes[32..36].copy_from_slice(&(2_u32 << 20).to_be_bytes());
    bytes
}
