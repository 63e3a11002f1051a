//! What is recognised so that it is left alone, and named.

use super::{Found, Recognised, Volume, doubt, u32_at};

/// Bytes that say what a volume is: where, which, its name, and why nothing of it is freed.
type Mark = (u64, &'static [u8], &'static str, &'static str);

const UNKNOWN: &str = "its free space is not read here";
const ENCRYPTED: &str = "encrypted: what is free can't be seen";

const MARKS: [Mark; 15] = [
    (0, b"LABELONE", "LVM", "a physical volume of LVM: its logical volumes are not read here"),
    (512, b"LABELONE", "LVM", "a physical volume of LVM: its logical volumes are not read here"),
    (1024, b"LABELONE", "LVM", "a physical volume of LVM: its logical volumes are not read here"),
    (1536, b"LABELONE", "LVM", "a physical volume of LVM: its logical volumes are not read here"),
    (0, b"LUKS\xBA\xBE", "LUKS", ENCRYPTED),
    (3, b"-FVE-FS-", "BitLocker", ENCRYPTED),
    (3, b"EXFAT   ", "exFAT", UNKNOWN),
    (3, b"ReFS\0\0\0\0", "ReFS", UNKNOWN),
    (0, b"XFSB", "XFS", UNKNOWN),
    (0x10040, b"_BHRfS_M", "Btrfs", UNKNOWN),
    (0x10034, b"ReIsEr", "ReiserFS", UNKNOWN),
    (1024, &[0x10, 0x20, 0xF5, 0xF2], "F2FS", UNKNOWN),
    (32, b"NXSB", "APFS", UNKNOWN),
    (1024, b"H+\0\x04", "HFS+", UNKNOWN),
    (32769, b"CD001", "ISO 9660", UNKNOWN),
];

/// Superblocks of Linux's software RAID begin with this.
const RAID_MAGIC: u32 = 0xA92B_4EFC;

/// Recognises what is none of the file systems that are read.
pub(super) fn recognise(volume: &Volume<'_>) -> Found<Option<Recognised>> {
    for (at, mark, name, why) in MARKS {
        let len = mark.len() as u64;
        if at + len <= volume.len() && volume.read(at, len)? == mark {
            return Ok(Some(Recognised { name, system: doubt(why) }));
        }
    }
    let len = volume.len();
    // Version 1.1 and 1.2 in front, 1.0 and 0.90 at the end.
    let places = [Some(0), Some(4096), len.checked_sub(8192).map(|at| at & !4095), (len & !0xFFFF).checked_sub(0x1_0000)];
    for at in places.into_iter().flatten().filter(|at| at + 4 <= len) {
        if u32_at(&volume.read(at, 4)?, 0) == RAID_MAGIC {
            return Ok(Some(Recognised { name: "RAID", system: doubt("a member of a RAID: others have a part of it") }));
        }
    }
    Ok(None)
}
