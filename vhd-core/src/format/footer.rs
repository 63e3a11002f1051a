//! The footer: 512 bytes at the end of every VHD, and in dynamic and differencing ones a copy at offset 0.

use std::mem::{offset_of, size_of};

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::ones_complement;
use super::{FOOTER_LEN, Geometry, HEADER_LEN, SECTOR, Stage, Timestamp};

/// First eight bytes of a footer.
pub const FOOTER_COOKIE: [u8; 8] = *b"conectix";
const VERSION_1: u32 = 0x0001_0000;
/// Feature bit that the specification wants set always.
const FEATURE_RESERVED: u32 = 2;
/// Data offset of a fixed disk.
const NO_DATA_OFFSET: u64 = u64::MAX;
const CHECKSUM: std::ops::Range<usize> = 64..68;

/// The footer as bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct FooterBytes {
    cookie: [u8; 8],
    features: U32,
    version: U32,
    data_offset: U64,
    timestamp: U32,
    creator_app: [u8; 4],
    creator_version: U32,
    creator_os: [u8; 4],
    original_size: U64,
    current_size: U64,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    disk_type: U32,
    checksum: U32,
    uuid: [u8; 16],
    saved_state: u8,
    hidden: u8,
    reserved: [u8; 426],
}

const _: () = {
    assert!(size_of::<FooterBytes>() == FOOTER_LEN);
    assert!(offset_of!(FooterBytes, data_offset) == 16);
    assert!(offset_of!(FooterBytes, current_size) == 48);
    assert!(offset_of!(FooterBytes, disk_type) == 60);
    assert!(offset_of!(FooterBytes, checksum) == CHECKSUM.start);
    assert!(offset_of!(FooterBytes, uuid) == 68);
    assert!(offset_of!(FooterBytes, hidden) == 85);
};

/// The kinds of image that the format has. Linked and undo disks are differencing ones to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskType {
    /// Type 2: all data, then the footer.
    Fixed,
    /// Type 3: blocks allocated as they are written.
    Dynamic,
    /// Type 4: a dynamic image over a parent.
    Differencing,
}

impl DiskType {
    fn from_code(code: u32) -> Result<Self, FooterError> {
        match code {
            2 => Ok(Self::Fixed),
            3 => Ok(Self::Dynamic),
            4 => Ok(Self::Differencing),
            _ => Err(FooterError::DiskType(code)),
        }
    }

    fn code(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }

    /// The word that the command line uses: `fixed`, `dynamic`, `differencing`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fixed => "fixed",
            Self::Dynamic => "dynamic",
            Self::Differencing => "differencing",
        }
    }
}

/// Who made an image: application, its version, and the host's system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Creator {
    /// Four characters: `win `, `vpc `, `vbox`, `tap\0`, …
    pub app: [u8; 4],
    /// Major version in the upper 16 bits.
    pub version: u32,
    /// `Wi2k` or `Mac `; tapdisk writes zeros.
    pub os: [u8; 4],
}

impl Creator {
    /// What this project writes: Windows 10's, because QEMU and others size a disk by its geometry when they do
    /// not know its creator.
    pub const WINDOWS_10: Self = Self { app: *b"win ", version: 0x000A_0000, os: *b"Wi2k" };
}

/// What is wrong with bytes that should be a footer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FooterError {
    /// The cookie is another one.
    #[error("no footer: found {}, expected \"conectix\"", printable(.0))]
    Cookie([u8; 8]),
    /// It bears the mark of an operation that rebuilds the file in stages.
    #[error("no footer: found the mark \"{}\" of an unfinished operation", .0.cookie().escape_ascii())]
    Marked(Stage),
    /// The checksum is not that of the bytes.
    #[error("footer checksum is {found:#010x}, its bytes give {computed:#010x}")]
    Checksum {
        /// In the file.
        found: u32,
        /// Of the file's bytes.
        computed: u32,
    },
    /// A version of the format that was never published.
    #[error("footer format version is {0:#010x}, expected 0x00010000")]
    Version(u32),
    /// A type that is none, reserved or deprecated.
    #[error("disk type is {0}, expected 2 (fixed), 3 (dynamic) or 4 (differencing)")]
    DiskType(u32),
    /// The data offset can't be that of a dynamic header.
    #[error("footer data offset is {0:#x}, expected the place of a dynamic header (a multiple of 512, from 0x200)")]
    DataOffset(u64),
}

fn printable(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes.escape_ascii())
}

/// A footer whose cookie, version, type and data offset are right. The checksum is right too, unless it was
/// parsed by [`Footer::parse_tolerant`]; it is always right in [`Footer::to_bytes`].
#[derive(Clone)]
pub struct Footer {
    bytes: FooterBytes,
    disk_type: DiskType,
}

/// What a new image's footer says.
#[derive(Clone, Debug)]
pub struct NewFooter {
    /// Kind of image.
    pub disk_type: DiskType,
    /// Bytes of the disk.
    pub size: u64,
    /// Identifier of the image.
    pub uuid: [u8; 16],
    /// Who makes it.
    pub creator: Creator,
    /// When.
    pub timestamp: Timestamp,
}

impl Footer {
    /// Reads a footer.
    ///
    /// # Errors
    /// Anything [`FooterError`] names. A checksum that is right only with byte 85 cleared is accepted: tapdisk
    /// 0.1 and 1.1 set that byte without mending the checksum.
    pub fn parse(bytes: &[u8; FOOTER_LEN]) -> Result<Self, FooterError> {
        let footer = Self::parse_tolerant(bytes)?;
        let (found, computed) = (footer.bytes.checksum.get(), footer.computed_checksum());
        let visible = || {
            let mut copy = footer.clone();
            copy.bytes.hidden = 0;
            copy.computed_checksum()
        };
        if found == computed || (footer.bytes.hidden != 0 && found == visible()) {
            Ok(footer)
        } else {
            Err(FooterError::Checksum { found, computed })
        }
    }

    /// Reads a footer whatever its checksum.
    ///
    /// # Errors
    /// Anything [`FooterError`] names but the checksum.
    pub fn parse_tolerant(bytes: &[u8; FOOTER_LEN]) -> Result<Self, FooterError> {
        if let Some((stage, _)) = Self::unmarked(bytes) {
            return Err(FooterError::Marked(stage));
        }
        let bytes = FooterBytes::read_from_bytes(bytes).unwrap_or_else(|_| unreachable!("both are 512 bytes"));
        if bytes.cookie != FOOTER_COOKIE {
            return Err(FooterError::Cookie(bytes.cookie));
        }
        if bytes.version.get() != VERSION_1 {
            return Err(FooterError::Version(bytes.version.get()));
        }
        let disk_type = DiskType::from_code(bytes.disk_type.get())?;
        let offset = bytes.data_offset.get();
        if disk_type != DiskType::Fixed && (offset < FOOTER_LEN as u64 || offset % SECTOR != 0 || offset > i64::MAX as u64) {
            return Err(FooterError::DataOffset(offset));
        }
        Ok(Self { bytes, disk_type })
    }

    /// Reads a footer of which fields can't be, and rights those: version, disk type and data offset. `header` is what a
    /// dynamic header in the usual place says that the disk is, `room` the bytes before the trailing footer. Returns what was
    /// wrong, in words; `None` for what has neither cookie nor checksum.
    pub(crate) fn salvage(bytes: &[u8; FOOTER_LEN], header: Option<DiskType>, room: u64) -> Option<(Self, Vec<String>)> {
        let mut bytes = FooterBytes::read_from_bytes(bytes).unwrap_or_else(|_| unreachable!("both are 512 bytes"));
        let mut wrong = Vec::new();
        if bytes.cookie != FOOTER_COOKIE {
            let found = std::mem::replace(&mut bytes.cookie, FOOTER_COOKIE);
            // Where the rest has the checksum of a footer it is one.
            if (Self { bytes, disk_type: DiskType::Fixed }).computed_checksum() != bytes.checksum.get() {
                return None;
            }
            wrong.push(FooterError::Cookie(found).to_string());
        }
        if bytes.version.get() != VERSION_1 {
            wrong.push(FooterError::Version(bytes.version.get()).to_string());
            bytes.version = U32::new(VERSION_1);
        }
        let offset = bytes.data_offset.get();
        let may_lead = offset >= FOOTER_LEN as u64 && offset % SECTOR == 0 && offset <= i64::MAX as u64;
        let disk_type = match (DiskType::from_code(bytes.disk_type.get()), header) {
            // The bytes of a fixed disk may be anything, but its footer leads nowhere.
            (Ok(DiskType::Fixed) | Err(_), Some(disk_type)) if may_lead => disk_type,
            (Ok(known), _) => known,
            (Err(_), None) if may_lead && offset < room => DiskType::Dynamic,
            (Err(_), Some(disk_type)) if offset != NO_DATA_OFFSET && bytes.current_size.get() != room => disk_type,
            (Err(_), _) => DiskType::Fixed,
        };
        if bytes.disk_type.get() != disk_type.code() {
            let found = bytes.disk_type.get();
            wrong.push(format!(
                "the footer's disk type is {found}; it is taken to be {} ({})",
                disk_type.code(),
                disk_type.name()
            ));
            bytes.disk_type = U32::new(disk_type.code());
        }
        if disk_type != DiskType::Fixed && !may_lead {
            wrong.push(FooterError::DataOffset(offset).to_string());
            bytes.data_offset = U64::new(FOOTER_LEN as u64);
        }
        Some((Self { bytes, disk_type }, wrong))
    }

    /// A footer for a new image. The dynamic header of a dynamic or differencing one follows at offset 512.
    #[must_use]
    pub fn new(new: &NewFooter) -> Self {
        let geometry = Geometry::for_sectors(new.size / SECTOR);
        let dynamic = new.disk_type != DiskType::Fixed;
        let bytes = FooterBytes {
            cookie: FOOTER_COOKIE,
            features: U32::new(FEATURE_RESERVED),
            version: U32::new(VERSION_1),
            data_offset: U64::new(if dynamic { FOOTER_LEN as u64 } else { NO_DATA_OFFSET }),
            timestamp: U32::new(new.timestamp.0),
            creator_app: new.creator.app,
            creator_version: U32::new(new.creator.version),
            creator_os: new.creator.os,
            original_size: U64::new(new.size),
            current_size: U64::new(new.size),
            cylinders: U16::new(geometry.cylinders),
            heads: geometry.heads,
            sectors: geometry.sectors,
            disk_type: U32::new(new.disk_type.code()),
            checksum: U32::ZERO,
            uuid: new.uuid,
            saved_state: 0,
            hidden: 0,
            reserved: [0; 426],
        };
        Self { bytes, disk_type: new.disk_type }
    }

    /// The bytes to write, with their checksum. All bytes that this type does not know are as they were read.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; FOOTER_LEN] {
        let mut bytes = self.bytes;
        bytes.checksum = U32::new(self.computed_checksum());
        zerocopy::transmute!(bytes)
    }

    /// The mark that this footer becomes: see [`Stage`]. That of a size has the size before where a fixed disk's version and type
    /// are, which are known.
    pub(super) fn marked(&self, stage: Stage) -> [u8; FOOTER_LEN] {
        let mut marked = self.clone();
        marked.bytes.cookie = stage.cookie();
        if let Stage::Resize { from } = stage {
            marked.bytes.version = U32::new((from >> 32) as u32);
            marked.bytes.disk_type = U32::new(from as u32);
        }
        marked.to_bytes()
    }

    /// The mark that these bytes are, and the footer that it was made of.
    pub(super) fn unmarked(bytes: &[u8; FOOTER_LEN]) -> Option<(Stage, Self)> {
        let mut marked = FooterBytes::read_from_bytes(bytes).ok()?;
        let from = u64::from(marked.version.get()) << 32 | u64::from(marked.disk_type.get());
        let stages = [Stage::ConvertSource, Stage::ConvertTarget, Stage::Merge, Stage::Resize { from }];
        let stage = stages.into_iter().find(|stage| stage.cookie() == marked.cookie)?;
        if ones_complement(bytes, CHECKSUM) != marked.checksum.get() {
            return None;
        }
        marked.cookie = FOOTER_COOKIE;
        if let Stage::Resize { .. } = stage {
            (marked.version, marked.disk_type) = (U32::new(VERSION_1), U32::new(DiskType::Fixed.code()));
        }
        let bytes: [u8; FOOTER_LEN] = zerocopy::transmute!(marked);
        Some((stage, Self::parse_tolerant(&bytes).ok()?))
    }

    fn computed_checksum(&self) -> u32 {
        ones_complement(self.bytes.as_bytes(), CHECKSUM)
    }

    /// Kind of image.
    #[must_use]
    pub fn disk_type(&self) -> DiskType {
        self.disk_type
    }

    /// Feature bits: 1 temporary, 2 reserved (always set).
    #[must_use]
    pub fn features(&self) -> u32 {
        self.bytes.features.get()
    }

    /// File offset of the dynamic header, for all but fixed disks.
    #[must_use]
    pub fn header_offset(&self) -> Option<u64> {
        (self.disk_type != DiskType::Fixed).then(|| self.bytes.data_offset.get())
    }

    /// First byte after footer copy and dynamic header, for all but fixed disks.
    #[must_use]
    pub fn header_end(&self) -> Option<u64> {
        self.header_offset().map(|offset| offset + HEADER_LEN as u64)
    }

    /// When the image was made.
    #[must_use]
    pub fn timestamp(&self) -> Timestamp {
        Timestamp(self.bytes.timestamp.get())
    }

    /// Who made it.
    #[must_use]
    pub fn creator(&self) -> Creator {
        Creator { app: self.bytes.creator_app, version: self.bytes.creator_version.get(), os: self.bytes.creator_os }
    }

    /// Bytes of the disk when it was created.
    #[must_use]
    pub fn original_size(&self) -> u64 {
        self.bytes.original_size.get()
    }

    /// Bytes of the disk now: what everyone but Virtual PC and old QEMU shows to a guest.
    #[must_use]
    pub fn current_size(&self) -> u64 {
        self.bytes.current_size.get()
    }

    /// The geometry that is recorded, right or not.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry { cylinders: self.bytes.cylinders.get(), heads: self.bytes.heads, sectors: self.bytes.sectors }
    }

    /// Identifier of the image, compared bytewise.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        self.bytes.uuid
    }

    /// True when a virtual machine's saved state relies on this image as it is.
    #[must_use]
    pub fn saved_state(&self) -> bool {
        self.bytes.saved_state != 0
    }

    /// tapdisk's `hidden` byte: set on images that exist for their children only.
    #[must_use]
    pub fn hidden(&self) -> bool {
        self.bytes.hidden != 0
    }

    /// True when the reserved bytes hold anything but zeros.
    #[must_use]
    pub fn has_reserved_data(&self) -> bool {
        self.bytes.reserved.iter().any(|&byte| byte != 0)
    }

    /// Leads to a dynamic header at another file offset.
    pub(crate) fn set_header_offset(&mut self, offset: u64) {
        self.bytes.data_offset = U64::new(offset);
    }

    /// Gives the disk another size, and the geometry that goes with it. The original size stays.
    pub(crate) fn set_size(&mut self, size: u64) {
        let geometry = Geometry::for_sectors(size / SECTOR);
        self.bytes.current_size = U64::new(size);
        self.bytes.cylinders = U16::new(geometry.cylinders);
        self.bytes.heads = geometry.heads;
        self.bytes.sectors = geometry.sectors;
    }

    /// Notes whether a virtual machine's saved state relies on this image as it is.
    pub fn set_saved_state(&mut self, saved: bool) {
        self.bytes.saved_state = saved.into();
    }

    /// Gives the image another identifier.
    pub fn set_uuid(&mut self, uuid: [u8; 16]) {
        self.bytes.uuid = uuid;
    }
}

impl std::fmt::Debug for Footer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Footer")
            .field("disk_type", &self.disk_type)
            .field("current_size", &self.current_size())
            .field("creator", &self.creator())
            .finish_non_exhaustive()
    }
}

/// Two footers are equal when all their bytes are, the checksum aside.
impl PartialEq for Footer {
    fn eq(&self, other: &Self) -> bool {
        self.to_bytes() == other.to_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Footer {
        Footer::new(&NewFooter {
            disk_type: DiskType::Dynamic,
            size: 40 << 20,
            uuid: [7; 16],
            creator: Creator::WINDOWS_10,
            timestamp: Timestamp(1),
        })
    }

    #[test]
    fn survives_the_round_trip_with_bytes_it_does_not_know() {
        let mut bytes = sample().to_bytes();
        bytes[300] = 0x5a;
        bytes[84] = 1;
        let sum = ones_complement(&bytes, CHECKSUM);
        bytes[CHECKSUM].copy_from_slice(U32::new(sum).as_bytes());
        let footer = Footer::parse(&bytes).unwrap();
        assert!(footer.saved_state() && footer.has_reserved_data());
        assert_eq!(footer.to_bytes(), bytes);
    }

    #[test]
    fn every_wrong_field_is_named() {
        let good = sample().to_bytes();
        let with = |offset: usize, value: u8| {
            let mut bytes = good;
            bytes[offset] = value;
            Footer::parse(&bytes).unwrap_err()
        };
        assert!(matches!(with(0, b'x'), FooterError::Cookie(_)));
        assert!(matches!(with(12, 9), FooterError::Version(_)));
        for code in [0, 1, 5, 6, 7] {
            assert_eq!(with(63, code), FooterError::DiskType(code.into()));
        }
        assert!(matches!(with(23, 1), FooterError::DataOffset(_)));
        assert!(matches!(with(70, 8), FooterError::Checksum { .. }));
    }

    #[test]
    fn fields_that_can_not_be_are_put_right() {
        let good = sample();
        let salvaged = |changes: &[(usize, u8)], header| {
            let mut bytes = good.to_bytes();
            changes.iter().for_each(|&(at, value)| bytes[at] = value);
            Footer::salvage(&bytes, header, 40 << 20)
        };
        let dynamic = Some(DiskType::Dynamic);
        for change in [(13, 9), (63, 6), (23, 1), (0, b'x')] {
            let (footer, wrong) = salvaged(&[change], dynamic).unwrap();
            assert!(footer == good && wrong.len() == 1, "{wrong:?}");
        }
        assert_eq!(salvaged(&[(0, b'x'), (70, 8)], dynamic), None, "neither cookie nor checksum");
        let type_of = |changes: &[(usize, u8)], header| salvaged(changes, header).unwrap().0.disk_type();
        let mut fixed_of_type_6: Vec<_> = (16..24).map(|at| (at, 0xFF)).collect();
        fixed_of_type_6.push((63, 6));
        assert_eq!(type_of(&fixed_of_type_6, None), DiskType::Fixed);
        assert_eq!(type_of(&fixed_of_type_6, dynamic), DiskType::Fixed, "a guest's bytes may look like a header");
        assert_eq!(type_of(&[(63, 2)], dynamic), DiskType::Dynamic, "its footer leads to a header");
        assert_eq!(type_of(&[(63, 6)], None), DiskType::Dynamic);
    }

    #[test]
    fn hidden_byte_may_miss_in_the_checksum() {
        let mut bytes = sample().to_bytes();
        bytes[85] = 1;
        assert!(Footer::parse(&bytes).unwrap().hidden());
        bytes[86] = 1;
        assert!(Footer::parse(&bytes).is_err());
    }
}
