//! Cylinders, heads and sectors of an ATA disk, as the footer records them.

use super::SECTOR;

/// 65535 cylinders × 16 heads × 255 sectors × 512 bytes: the largest size that CHS expresses (127.5 GiB),
/// and the largest disk that Virtual PC's and Virtual Server's IDE controllers show.
pub const IDE_LIMIT: u64 = 65535 * 16 * 255 * SECTOR;

/// Disk geometry of the footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads of a cylinder.
    pub heads: u8,
    /// Sectors of a track.
    pub sectors: u8,
}

impl Geometry {
    /// The geometry that the specification's appendix computes for a disk of `sectors` sectors. It rounds
    /// down, so [`Self::size`] is often a little less than the disk.
    #[must_use]
    pub fn for_sectors(sectors: u64) -> Self {
        let total = sectors.min(65535 * 16 * 255);
        let (per_track, heads, cylinder_heads);
        if total >= 65535 * 16 * 63 {
            (per_track, heads, cylinder_heads) = (255, 16, total / 255);
        } else {
            let mut s = 17;
            let mut cth = total / s;
            let mut h = cth.div_ceil(1024).max(4);
            if cth >= h * 1024 || h > 16 {
                (s, h) = (31, 16);
                cth = total / s;
            }
            if cth >= h * 1024 {
                (s, h) = (63, 16);
                cth = total / s;
            }
            (per_track, heads, cylinder_heads) = (s, h, cth);
        }
        Self { cylinders: (cylinder_heads / heads) as u16, heads: heads as u8, sectors: per_track as u8 }
    }

    /// Bytes that this geometry addresses.
    #[must_use]
    pub fn size(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors) * SECTOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_sizes_that_other_tools_wrote() {
        // win8.vhd, vbox.vhd and tapdisk's sample: 40 MiB.
        let forty = Geometry::for_sectors((40 << 20) / SECTOR);
        assert_eq!((forty.cylinders, forty.heads, forty.sectors), (0x03c3, 5, 17));
        assert_eq!(forty.size(), 41_909_760);
        // The Hyper-V 2012 R2 sample: 127 GiB.
        let big = Geometry::for_sectors((127 << 30) / SECTOR);
        assert_eq!((big.cylinders, big.heads, big.sectors), (0xfefe, 16, 255));
        // Beyond the limit it is pinned.
        let max = Geometry::for_sectors((2040_u64 << 30) / SECTOR);
        assert_eq!((max.cylinders, max.heads, max.sectors), (65535, 16, 255));
    }

    #[test]
    fn never_exceeds_the_disk() {
        for sectors in (0..5_000_000_u64).step_by(997).chain([1, 16, 17, 67, 68, 69, 65535 * 16 * 63 - 1, 65535 * 16 * 63]) {
            assert!(Geometry::for_sectors(sectors).size() <= sectors * SECTOR, "{sectors}");
        }
    }
}
