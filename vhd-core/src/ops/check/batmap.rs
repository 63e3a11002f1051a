//! tapdisk's batmap against the file, its checksum and the BAT.

use super::footer::Basis;
use super::header::{Header, Table};
use super::{Check, Code, Region};
use crate::error::Result;
use crate::format::{BAT_UNUSED, BATMAP_COOKIE, Batmap, SECTOR};
use crate::image::{Entries, TablePart};

const PLACE: &str = "batmap";
/// tapdisk writes a batmap from this creator version on.
const FIRST_VERSION: u32 = 0x0001_0002;

/// The bits of a batmap, as many as the disk has blocks.
pub(super) struct Map {
    bits: Vec<u8>,
    blocks: u32,
}

impl Map {
    /// True when the map calls a block full.
    pub(super) fn is_full(&self, block: u32) -> bool {
        self.bits.get(block as usize / 8).is_some_and(|byte| byte >> (7 - block % 8) & 1 == 1)
    }
}

impl Check<'_> {
    /// Checks where the batmap lies and what its checksum says. Only tapdisk's images have one: elsewhere that sector
    /// may be anything.
    pub(super) fn batmap(
        &mut self,
        basis: &Basis,
        header: &Header,
        table: &Table,
        regions: &mut Vec<Region>,
    ) -> Result<Option<Map>> {
        let at = Batmap::header_offset(table.offset, header.max_entries);
        if basis.creator.app != *b"tap\0" {
            return Ok(None);
        }
        let mut sector = [0; SECTOR as usize];
        if at.saturating_add(SECTOR) <= self.file_len {
            self.read(&mut sector, at)?;
        }
        if !sector.starts_with(&BATMAP_COOKIE) {
            if basis.creator.version >= FIRST_VERSION {
                let message = format!("not found at {at:#x}: tapdisk {:#x} writes one", basis.creator.version);
                self.add(Code::BatmapMissing, PLACE, message);
            }
            return Ok(None);
        }
        regions.push(Region::new(at..at + SECTOR, "batmap header"));
        let Some(batmap) = Batmap::parse(&sector) else {
            self.add(Code::BatmapPlace, PLACE, "its map is said to lie where none can be");
            return Ok(None);
        };
        let (start, end) = (batmap.offset(), batmap.offset() + batmap.len());
        if start < at + SECTOR || end > self.file_len {
            let message = format!(
                "map lies at {start:#x} to {end:#x}, expected between its header at {at:#x} and the end of the file ({:#x} bytes)",
                self.file_len
            );
            self.add(Code::BatmapPlace, PLACE, message);
            return Ok(None);
        }
        regions.push(Region::new(start..end, PLACE));
        let blocks = table.layout.blocks();
        if batmap.len() * 8 < u64::from(blocks) {
            let message = format!("map has {} bits, the disk has {blocks} blocks", batmap.len() * 8);
            self.add(Code::BatmapPlace, PLACE, message);
        }
        let bits = self.batmap_sums(&batmap, basis, blocks)?;
        Ok(Some(Map { bits, blocks }))
    }

    /// Reads the map, compares its checksum, and returns the bits of the disk's blocks.
    ///
    /// tapdisk 1.1 sums signed bytes, and some count only the sectors that the current size needs: any of these will do.
    fn batmap_sums(&mut self, batmap: &Batmap, basis: &Basis, blocks: u32) -> Result<Vec<u8>> {
        let short_len = basis.size.map_or(batmap.len(), |size| (size >> 24).next_multiple_of(SECTOR).max(SECTOR));
        let mut bits = Vec::new();
        let (mut unsigned, mut signed) = (0_u32, 0_u32);
        let mut accepted = Vec::new();
        let mut bytes = vec![0; 64 << 10];
        let mut done = 0;
        while done < batmap.len() {
            let until = if done < short_len { short_len.min(batmap.len()) } else { batmap.len() };
            let len = (until - done).min(bytes.len() as u64) as usize;
            let chunk = &mut bytes[..len];
            self.read(chunk, batmap.offset() + done)?;
            for &byte in &*chunk {
                unsigned = unsigned.wrapping_add(u32::from(byte));
                signed = signed.wrapping_add_signed(i32::from(byte.cast_signed()));
            }
            let wanted = (blocks as usize).div_ceil(8).saturating_sub(bits.len());
            bits.extend_from_slice(&chunk[..wanted.min(len)]);
            done += len as u64;
            if done == short_len || done == batmap.len() {
                accepted.extend([!unsigned, !signed]);
            }
        }
        if !accepted.is_empty() && !accepted.contains(&batmap.checksum()) {
            let computed = accepted.last().copied().unwrap_or(!0);
            let message = format!("checksum is {:#010x}, its map gives {computed:#010x}", batmap.checksum());
            self.add(Code::BatmapChecksum, PLACE, message);
        }
        Ok(bits)
    }

    /// Bits for blocks that are not allocated: tapdisk takes them at their word when the block is.
    pub(super) fn batmap_against_bat(&mut self, map: &Map, table: &Table) -> Result<()> {
        let (storage, len) = (self.storage, self.file_len);
        let judge = |this: &mut Self, block: u32| {
            if map.is_full(block) {
                this.findings.add_with(Code::BatmapUnallocated, || {
                    (format!("batmap bit {block}"), "is set, but the block is not allocated".into())
                });
            }
        };
        TablePart { offset: table.offset, blocks: 0..table.entries }.scan(storage, &mut |entries| {
            match entries {
                Entries::Zeros(blocks) => blocks.into_iter().for_each(|block| judge(self, block)),
                Entries::Read(first, entries) => {
                    for (block, entry) in (first..).zip(entries) {
                        let sector = u32::from_be_bytes(*entry);
                        if sector == 0 || sector == BAT_UNUSED || u64::from(sector) * SECTOR >= len {
                            judge(self, block);
                        }
                    }
                }
            }
            Ok(true)
        })?;
        (table.entries..map.blocks).for_each(|block| judge(self, block));
        Ok(())
    }
}
