//! tapdisk's batmap: a bit per block that says "all its sectors are written, the sector bitmap need not be read".
//!
//! Only tapdisk reads it. An image that another program wrote without knowing of it would lie to tapdisk, so it is
//! cleared at the first open for writing: all bits zero means "look at the sector bitmaps".

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::SECTOR;

/// First eight bytes of a batmap header.
pub const BATMAP_COOKIE: [u8; 8] = *b"tdbatmap";

/// The batmap header's first fields; a marker, key hash and padding follow and are left as they are.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct BatmapBytes {
    cookie: [u8; 8],
    offset: U64,
    sectors: U32,
    version: U32,
    checksum: U32,
}

/// Where a batmap is, and its header sector.
#[derive(Clone)]
pub struct Batmap {
    sector: [u8; 512],
    fields: BatmapBytes,
}

impl Batmap {
    /// File offset at which tapdisk puts the batmap header: the sector after the BAT.
    #[must_use]
    pub fn header_offset(bat_offset: u64, max_table_entries: u32) -> u64 {
        (bat_offset + u64::from(max_table_entries) * super::BAT_ENTRY_LEN).next_multiple_of(SECTOR)
    }

    /// Reads a batmap header; `None` when the sector holds something else or names an impossible place.
    #[must_use]
    pub fn parse(sector: &[u8; 512]) -> Option<Self> {
        let (fields, _) = BatmapBytes::read_from_prefix(sector).ok()?;
        let plausible = fields.cookie == BATMAP_COOKIE
            && fields.offset.get() % SECTOR == 0
            && fields
                .offset
                .get()
                .checked_add(u64::from(fields.sectors.get()) * SECTOR)
                .is_some_and(|end| end <= i64::MAX as u64);
        plausible.then_some(Self { sector: *sector, fields })
    }

    /// File offset of the map.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.fields.offset.get()
    }

    /// Bytes of the map.
    #[must_use]
    pub fn len(&self) -> u64 {
        u64::from(self.fields.sectors.get()) * SECTOR
    }

    /// True when the map has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.fields.sectors.get() == 0
    }

    /// The checksum that is recorded for the map.
    #[must_use]
    pub fn checksum(&self) -> u32 {
        self.fields.checksum.get()
    }

    /// The header sector for a map of zeros: the sum of no bits is zero, so the checksum is its complement.
    #[must_use]
    pub fn cleared(&self) -> [u8; 512] {
        self.cleared_at(self.offset(), self.fields.sectors.get())
    }

    /// The header sector for a map of zeros that has another place and as many sectors.
    pub(crate) fn cleared_at(&self, offset: u64, sectors: u32) -> [u8; 512] {
        let mut fields = self.fields;
        fields.offset = U64::new(offset);
        fields.sectors = U32::new(sectors);
        fields.checksum = U32::new(!0);
        let mut sector = self.sector;
        sector[..size_of::<BatmapBytes>()].copy_from_slice(fields.as_bytes());
        sector
    }
}
