//! Whose a place is, by what its owners write into it: file systems that are not read here, members of what spans several
//! disks, what is encrypted, tables of partitions. Any of them means that nothing of the place is free.
//!
//! Each line of the table is a fact of a published layout. It is held against libblkid in `tests/space_owners.rs`.

use super::checks;
use super::{Found, Volume};

/// Bytes at the start of a volume that are read at once: most signatures are there.
const HEAD: u64 = 0x1_1000;

/// Bytes by which something is recognised.
pub(super) struct Signature {
    /// What it is.
    pub(super) name: &'static str,
    pub(super) owner: Owner,
    places: &'static [At],
    magic: &'static [u8],
    /// More that must be so, where the bytes are few: it gets the place of the first of them.
    check: Option<Check>,
}

type Check = fn(&Looked<'_>, u64) -> Found<bool>;

/// Who owns a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// A file system that Linux may mount and write.
    Files,
    /// A system that sleeps, with the state of its file systems in memory.
    Sleeper,
    /// A table of partitions.
    Table,
    /// Anything else, for the reason given.
    Other(&'static str),
}

/// Where a signature is.
#[derive(Clone, Copy)]
enum At {
    /// Bytes from the start.
    Front(u64),
    /// So many bytes before the end, which is rounded down to units of the second number first, then so many on.
    Back(u64, u64, u64),
}
use At::{Back, Front};

/// Before the last sector, or several.
const fn sectors(count: u64, then: u64) -> At {
    Back(count * 512, 512, then)
}

const ENCRYPTED: Owner = Owner::Other("encrypted: what is free can't be seen");
const RAID: Owner = Owner::Other("a member of a RAID: others have a part of it");
const VOLUMES: Owner = Owner::Other("it belongs to a volume manager, whose volumes are not read here");
const CACHE: Owner = Owner::Other("it belongs to a cache or a store, whose content is not read here");
const FOREIGN: Owner = Owner::Other("its free space is not read here, and it is not written here");
const DATABASE: Owner = Owner::Other("the database of Windows' dynamic disks (LDM) is on it, which says whose each part is");
const SPACES: Owner = Owner::Other("it belongs to Storage Spaces, which say whose each part is");
const SHARED: Owner = Owner::Other("several machines share it, so that one must not write it by itself");
const MAPPED: Owner = Owner::Other("it belongs to the device mapper, which says whose each part is");

const fn is(name: &'static str, owner: Owner, places: &'static [At], magic: &'static [u8]) -> Signature {
    Signature { name, owner, places, magic, check: None }
}

const fn checked(name: &'static str, owner: Owner, places: &'static [At], magic: &'static [u8], check: Check) -> Signature {
    Signature { name, owner, places, magic, check: Some(check) }
}

const LABELS: &[At] = &[Front(0), Front(512), Front(1024), Front(1536)];
const MD_MAGIC: &[u8] = &[0xFC, 0x4E, 0x2B, 0xA9];
const BITLOCKER: &[u8] = &[0x3B, 0xD6, 0x67, 0x49, 0x29, 0x2E, 0xD8, 0x4A, 0x83, 0x99, 0xF6, 0xA3, 0x39, 0xE3, 0xD0, 0x01];
const BITLOCKER_USED_SPACE: &[u8] =
    &[0x3B, 0x4D, 0xA8, 0x92, 0x80, 0xDD, 0x0E, 0x4D, 0x9E, 0x4E, 0xB1, 0xE3, 0x28, 0x4E, 0xAE, 0xD8];
const BCACHE: &[u8] = &[0xC6, 0x85, 0x73, 0xF6, 0x4E, 0x1A, 0x45, 0xCA, 0x82, 0x65, 0xF5, 0x7F, 0x48, 0xBA, 0x6D, 0x81];
const BCACHEFS: &[u8] = &[0xC6, 0x85, 0x73, 0xF6, 0x66, 0xCE, 0x90, 0xA9, 0xD9, 0x6A, 0x60, 0xCF, 0x80, 0x3D, 0xF7, 0xEF];
const TUX_ON_ICE: &[u8] = &[0xED, 0xC3, 0x02, 0xE9, 0x98, 0x56, 0xE5, 0x0C];
/// Where a swap area of any size of unit has its signature: at the end of the first.
const SWAP_ENDS: &[At] = &[Front(4086), Front(8182), Front(16374), Front(32758), Front(65526)];
const UFS: &[At] = &[Front(1372), Front(8192 + 1372), Front(65536 + 1372), Front(262_144 + 1372)];
const SYSV: &[At] = &[Front(1016), Front(10_232), Front(16_376), Front(19_448)];
const VOLUME_DESCRIPTORS: &[At] = &[Front(32_769)];
const LUKS2_COPIES: &[At] = &[
    Front(0x4000),
    Front(0x8000),
    Front(0x1_0000),
    Front(0x2_0000),
    Front(0x4_0000),
    Front(0x8_0000),
    Front(0x10_0000),
    Front(0x20_0000),
    Front(0x40_0000),
];
const PROMISE: &[At] = &[
    sectors(16, 0),
    sectors(63, 0),
    sectors(255, 0),
    sectors(256, 0),
    sectors(399, 0),
    sectors(591, 0),
    sectors(675, 0),
    sectors(735, 0),
    sectors(911, 0),
    sectors(951, 0),
    sectors(974, 0),
    sectors(991, 0),
    sectors(3087, 0),
];
const AMIGA: &[At] = &[
    Front(0),
    Front(512),
    Front(1024),
    Front(1536),
    Front(2048),
    Front(2560),
    Front(3072),
    Front(3584),
    Front(4096),
    Front(4608),
    Front(5120),
    Front(5632),
    Front(6144),
    Front(6656),
    Front(7168),
    Front(7680),
];
/// The last sector, of 512 or 4096 bytes.
const LAST: &[At] = &[sectors(1, 0), Back(4096, 4096, 0)];

/// What others than the file systems that are read here write.
#[rustfmt::skip]
static SIGNATURES: &[Signature] = &[
    // Several disks as one.
    is("LVM", VOLUMES, LABELS, b"LABELONE"),
    checked("LVM", VOLUMES, &[Front(0)], b"HM", checks::lvm1),
    is("RAID", RAID, &[Back(0x1_0000, 0x1_0000, 0), Back(0x2000, 0x1000, 0), Front(0), Front(0x1000)], MD_MAGIC),
    is("RAID", RAID, &[Back(0x1_0000, 0x1_0000, 0)], &[0xA9, 0x2B, 0x4E, 0xFC]),
    is("RAID (DDF)", RAID, &[sectors(1, 0), sectors(257, 0)], &[0xDE, 0x11, 0xDE, 0x11]),
    is("RAID (Intel)", RAID, &[sectors(2, 0), Back(8192, 4096, 0)], b"Intel Raid ISM Cfg Sig. "),
    is("RAID (LSI)", RAID, &[sectors(1, 0)], b"$XIDE$"),
    checked("RAID (VIA)", RAID, &[sectors(1, 0)], &[0x55, 0xAA], checks::via),
    checked("RAID (Silicon)", RAID, &[sectors(1, 0x60)], &[0, 0, 0, 0x2F], checks::silicon),
    is("RAID (NVIDIA)", RAID, &[sectors(2, 0)], b"NVIDIA  "),
    is("RAID (Promise)", RAID, PROMISE, b"Promise Technology, Inc."),
    is("RAID (HighPoint)", RAID, &[sectors(11, 0)], &[0xF3, 0x16, 0x78, 0x5A]),
    is("RAID (HighPoint)", RAID, &[Front(4640)], &[0xF0, 0x16, 0x78, 0x5A]),
    is("RAID (HighPoint)", RAID, &[sectors(11, 0), Front(4640)], &[0xFD, 0x16, 0x78, 0x5A]),
    is("RAID (Adaptec)", RAID, &[sectors(1, 0)], &[0x37, 0xFC, 0x4D, 0x1E]),
    checked("RAID (JMicron)", RAID, &[sectors(1, 0)], b"JM", checks::jmicron),
    // A dynamic disk has three heads: in front, and two in the last MiB. On a GPT all are in a partition.
    is("LDM", DATABASE, &[Front(3072), sectors(1, 0), sectors(192, 0), Front(0), Back(4096, 4096, 0)], b"PRIVHEAD"),
    is("LDM", DATABASE, &[sectors(2047, 0), sectors(2046, 0), Front(512), Front(1024)], b"TOCBLOCK"),
    is("Storage Spaces", SPACES, &[Front(0), Front(4096)], b"SPACEDB "),
    is("Storage Spaces", SPACES, &[Front(0), Front(4096)], b"SDBC    "),
    is("Stratis", VOLUMES, &[Front(516), Front(4612)], b"!Stra0tis\x86\xff\x02^\x41rh"),
    is("VDO", VOLUMES, &[Front(0)], b"dmvdo001"),
    is("DRBD", RAID, &[Back(4096, 4096, 60), Back(4096, 1024, 60), Back(128 << 20, 4096, 60)], &[0x83, 0x74, 0x02, 0x6A]),
    is("DRBD", RAID, &[Back(4096, 4096, 60), Back(4096, 1024, 60), Back(128 << 20, 4096, 60)], &[0x83, 0x74, 0x02, 0x6B]),
    is("DRBD", RAID, &[Back(4096, 4096, 60), Back(4096, 1024, 60), Back(128 << 20, 4096, 60)], &[0x83, 0x74, 0x02, 0x6C]),
    is("DRBD", RAID, &[Back(4096, 4096, 60), Back(4096, 1024, 60), Back(128 << 20, 4096, 60)], &[0x83, 0x74, 0x02, 0x6D]),
    is("DRBD", RAID, &[Front(0)], b"$DRBDmgr=q"),
    is("DRBD", RAID, &[Front(0)], b"DRBDdlh*"),
    is("bcache", CACHE, &[Front(4096 + 24)], BCACHE),
    is("bcachefs", CACHE, &[Front(4096 + 24), Front((2 << 20) + 24), Back(1 << 20, 512, 24)], BCACHEFS),
    is("BlueStore of Ceph", CACHE, &[Front(0)], b"bluestore block device"),
    is("mpool", CACHE, &[Front(0)], b"mpoolDev"),
    is("Oracle ASM", VOLUMES, &[Front(32)], b"ORCLDISK"),
    is("UBI", VOLUMES, &[Front(0)], b"UBI#"),
    is("a snapshot of the device mapper", MAPPED, &[Front(0)], b"SnAp"),
    is("hashes of dm-verity", MAPPED, &[Front(0)], b"verity\0\0"),
    is("dm-integrity", MAPPED, &[Front(0)], b"integrt\0"),
    // Encrypted.
    is("LUKS", ENCRYPTED, &[Front(0)], b"LUKS\xBA\xBE"),
    is("LUKS", ENCRYPTED, LUKS2_COPIES, b"SKUL\xBA\xBE"),
    is("BitLocker", ENCRYPTED, &[Front(3)], b"-FVE-FS-"),
    is("BitLocker", ENCRYPTED, &[Front(160), Front(424)], BITLOCKER),
    is("BitLocker", ENCRYPTED, &[Front(160), Front(424)], BITLOCKER_USED_SPACE),
    checked("Core Storage of macOS", ENCRYPTED, &[Front(88)], b"CS", checks::core_storage),
    // Asleep. The first is an out-of-tree variant's.
    is("hibernated swap", Owner::Sleeper, &[Front(0)], TUX_ON_ICE),
    is("hibernated swap", Owner::Sleeper, SWAP_ENDS, b"S1SUSPEND"),
    is("hibernated swap", Owner::Sleeper, SWAP_ENDS, b"S2SUSPEND"),
    is("hibernated swap", Owner::Sleeper, SWAP_ENDS, b"ULSUSPEND"),
    is("hibernated swap", Owner::Sleeper, SWAP_ENDS, b"LINHIB0001"),
    is("hibernated swap", Owner::Sleeper, SWAP_ENDS, TUX_ON_ICE),
    is("an old swap area", FOREIGN, SWAP_ENDS, b"SWAP-SPACE"),
    // Pools and file systems of other systems, and those that several machines share.
    checked("ZFS", VOLUMES, &[Front(0)], b"", checks::zfs),
    is("VMFS", SHARED, &[Front(0x10_0000)], &[0x0D, 0xD0, 0x01, 0xC0]),
    is("VMFS", SHARED, &[Front(0x20_0000), Front(0x120_0000)], &[0x5E, 0xF1, 0xAB, 0x2F]),
    is("ReFS", FOREIGN, &[Front(0)], b"\0\0\0ReFS\0"),
    is("ReFS", FOREIGN, &[Front(3)], b"ReFS\0\0\0\0"),
    is("APFS", FOREIGN, &[Front(32)], b"NXSB"),
    checked("HFS+", FOREIGN, &[Front(1024)], b"H+", checks::hfs_plus),
    checked("HFS+", FOREIGN, &[Front(1024)], b"HX", checks::hfs_plus),
    checked("HFS", FOREIGN, &[Front(1024)], b"BD", checks::hfs),
    is("GFS2", SHARED, &[Front(0x1_0000)], &[1, 0x16, 0x19, 0x70]),
    is("OCFS", SHARED, &[Front(8192)], b"OracleCFS"),
    is("OCFS2", SHARED, &[Front(1024), Front(2048), Front(4096), Front(8192)], b"OCFSV2"),
    is("ScoutFS", SHARED, &[Front(0x1_0004)], &[0x8B, 0x42, 0x3C, 0x10]),
    is("NSS", FOREIGN, &[Front(4096)], b"SPB5"),
    is("VxFS", FOREIGN, &[Front(1024)], &[0xF5, 0xFC, 1, 0xA5]),
    is("VxFS", FOREIGN, &[Front(8192)], &[0xA5, 1, 0xFC, 0xF5]),
    is("UFS", FOREIGN, UFS, &[0x54, 0x19, 1, 0]),
    is("UFS", FOREIGN, UFS, &[0, 1, 0x19, 0x54]),
    is("UFS", FOREIGN, UFS, &[0x19, 1, 0x54, 0x19]),
    is("UFS", FOREIGN, UFS, &[0x19, 0x54, 1, 0x19]),
    is("UFS", FOREIGN, UFS, &[0x12, 0x56, 0x19, 0]),
    is("UFS", FOREIGN, UFS, &[0, 0x19, 0x56, 0x12]),
    is("UFS", FOREIGN, UFS, &[0x14, 0x50, 9, 0]),
    is("UFS", FOREIGN, UFS, &[0, 9, 0x50, 0x14]),
    is("UFS", FOREIGN, UFS, &[0x95, 0x21, 0x61, 0]),
    is("UFS", FOREIGN, UFS, &[0, 0x61, 0x21, 0x95]),
    is("UFS", FOREIGN, UFS, &[0x94, 0x19, 0x23, 5]),
    is("UFS", FOREIGN, UFS, &[5, 0x23, 0x19, 0x94]),
    is("System V", FOREIGN, SYSV, &[0x20, 0x7E, 0x18, 0xFD]),
    is("System V", FOREIGN, SYSV, &[0xFD, 0x18, 0x7E, 0x20]),
    is("Xenix", FOREIGN, &[Front(2040)], &[0x2B, 0x55, 0x44]),
    is("Xenix", FOREIGN, &[Front(2040)], &[0x44, 0x55, 0x2B]),
    is("HPFS", FOREIGN, &[Front(0x2000)], &[0x49, 0xE8, 0x95, 0xF9]),
    is("BFS", FOREIGN, &[Front(0)], &[0xCE, 0xFA, 0xAD, 0x1B]),
    is("BeFS", FOREIGN, &[Front(32), Front(544)], b"BFS1"),
    is("BeFS", FOREIGN, &[Front(32), Front(544)], b"1SFB"),
    is("EXFS", FOREIGN, &[Front(0)], b"EXFS"),
    // File systems that Linux mounts.
    is("exFAT", Owner::Files, &[Front(3)], b"EXFAT   "),
    is("XFS", Owner::Files, &[Front(0)], b"XFSB"),
    checked("a log of XFS", FOREIGN, &[Front(0)], b"", checks::xfs_log),
    is("Btrfs", Owner::Files, &[Front(0x1_0040)], b"_BHRfS_M"),
    is("F2FS", Owner::Files, &[Front(1024), Front(5120)], &[0x10, 0x20, 0xF5, 0xF2]),
    is("ReiserFS", Owner::Files, &[Front(0x2034), Front(0x1_0034), Front(0x2014)], b"ReIsEr"),
    is("Reiser4", Owner::Files, &[Front(0x1_0000)], b"ReIsEr4"),
    is("JFS", Owner::Files, &[Front(0x8000)], b"JFS1"),
    checked("NILFS2", Owner::Files, &[Front(1030), sectors(8, 6)], &[0x34, 0x34], checks::nilfs),
    is("UDF", Owner::Files, VOLUME_DESCRIPTORS, b"BEA01"),
    is("UDF", Owner::Files, VOLUME_DESCRIPTORS, b"NSR0"),
    is("UDF", Owner::Files, VOLUME_DESCRIPTORS, b"BOOT2"),
    is("UDF", Owner::Files, VOLUME_DESCRIPTORS, b"CDW02"),
    is("UDF", Owner::Files, VOLUME_DESCRIPTORS, b"TEA01"),
    is("ISO 9660", Owner::Files, VOLUME_DESCRIPTORS, b"CD001"),
    is("ISO 9660", Owner::Files, &[Front(32_777)], b"CDROM"),
    is("SquashFS", Owner::Files, &[Front(0)], b"hsqs"),
    is("SquashFS", Owner::Files, &[Front(0)], b"sqsh"),
    is("EROFS", Owner::Files, &[Front(1024)], &[0xE2, 0xE1, 0xF5, 0xE0]),
    is("cramfs", Owner::Files, &[Front(0), Front(512)], &[0x45, 0x3D, 0xCD, 0x28]),
    is("cramfs", Owner::Files, &[Front(0), Front(512)], &[0x28, 0xCD, 0x3D, 0x45]),
    is("romfs", Owner::Files, &[Front(0)], b"-rom1fs-"),
    is("UBIFS", FOREIGN, &[Front(0)], &[0x31, 0x18, 0x10, 6]),
    is("zonefs", FOREIGN, &[Front(0)], b"SFOZ"),
    checked("Minix", Owner::Files, &[Front(1024)], b"", checks::minix),
    // Tables of partitions.
    is("a GPT", Owner::Table, &[Front(512), Front(4096)], b"EFI PART"),
    is("a GPT", Owner::Table, LAST, b"EFI PART"),
    checked("a partition table", Owner::Table, &[Front(0)], b"", checks::master_boot_record),
    checked("a partition table of Apple", Owner::Table, &[Front(0)], b"ER", checks::apple),
    is("a partition table of SGI", Owner::Table, &[Front(0)], &[0x0B, 0xE5, 0xA9, 0x41]),
    checked("a partition table of Sun", Owner::Table, &[Front(508)], &[0xDA, 0xBE], checks::sun),
    is("a partition table of BSD", Owner::Table, &[Front(512), Front(64), Front(128)], &[0x57, 0x45, 0x56, 0x82]),
    is("a partition table of AIX", Owner::Table, &[Front(0)], &[0xC9, 0xC2, 0xD4, 0xC1]),
    is("a partition table of Amiga", Owner::Table, AMIGA, b"RDSK"),
    is("a partition table of Ultrix", Owner::Table, &[Front(16_312)], &[0x57, 0x29, 3, 0]),
];

/// A volume whose signatures are looked for.
pub(super) struct Looked<'a> {
    volume: &'a Volume<'a>,
    head: Vec<u8>,
}

impl<'a> Looked<'a> {
    pub(super) fn new(volume: &'a Volume<'a>) -> Found<Self> {
        Ok(Self { volume, head: volume.read(0, HEAD.min(volume.len()))? })
    }

    pub(super) fn len(&self) -> u64 {
        self.volume.len()
    }

    /// Bytes of the volume; none where it is too small for them.
    pub(super) fn bytes(&self, at: u64, len: u64) -> Found<Option<Vec<u8>>> {
        let Some(end) = at.checked_add(len).filter(|end| *end <= self.volume.len()) else { return Ok(None) };
        match self.head.get(at as usize..end as usize) {
            Some(bytes) if end <= HEAD => Ok(Some(bytes.to_vec())),
            _ => self.volume.read(at, len).map(Some),
        }
    }

    /// All that is recognised, each name once.
    pub(super) fn signatures(&self) -> Found<Vec<&'static Signature>> {
        let mut found: Vec<&Signature> = Vec::new();
        for signature in SIGNATURES {
            if found.iter().all(|other| other.name != signature.name) && signature.is_on(self)? {
                found.push(signature);
            }
        }
        Ok(found)
    }
}

impl At {
    /// The byte of a volume of `len` bytes; none where it is too small.
    fn on(self, len: u64) -> Option<u64> {
        match self {
            Front(at) => Some(at),
            Back(before, unit, then) => (len / unit * unit).checked_sub(before)?.checked_add(then),
        }
    }
}

impl Signature {
    fn is_on(&self, looked: &Looked<'_>) -> Found<bool> {
        for at in self.places.iter().filter_map(|place| place.on(looked.len())) {
            let is_here = looked.bytes(at, self.magic.len() as u64)?.is_some_and(|bytes| bytes == self.magic);
            if is_here && self.check.map_or(Ok(true), |check| check(looked, at))? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;
    use std::path::Path;

    use super::*;

    /// The rows of docs/free-space.md: those of one name together.
    fn table() -> String {
        let mut table = String::from("\n| signature | at | why |\n|---|---|---|\n");
        let mut done: Vec<&str> = Vec::new();
        for signature in SIGNATURES {
            if done.contains(&signature.name) {
                continue;
            }
            done.push(signature.name);
            let mut places = Vec::new();
            for place in SIGNATURES.iter().filter(|other| other.name == signature.name).flat_map(|other| other.places) {
                let place = match *place {
                    Front(at) => format!("{at}"),
                    Back(before, _, 0) => format!("-{before}"),
                    Back(before, _, then) => format!("-{before} + {then}"),
                };
                if !places.contains(&place) {
                    places.push(place);
                }
            }
            let star = if signature.owner == Owner::Files { "*" } else { "" };
            let _ = writeln!(table, "| {}{star} | {} | {} |", signature.name, places.join(", "), signature.owner.reason());
        }
        table.push('\n');
        table
    }

    #[test]
    fn the_documents_list_every_signature() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/free-space.md");
        let page = std::fs::read_to_string(&path).unwrap();
        let (head, rest) = page.split_once("<!-- signatures -->\n").unwrap();
        let (told, tail) = rest.split_once("<!-- end -->\n").unwrap();
        if std::env::var_os("DOCS_UPDATE").is_some() {
            std::fs::write(&path, format!("{head}<!-- signatures -->\n{}<!-- end -->\n{tail}", table())).unwrap();
        } else {
            assert!(told == table(), "DOCS_UPDATE=1 writes the table of docs/free-space.md anew");
        }
    }

    #[test]
    fn a_place_before_the_end_is_inside_or_none() {
        for len in [0, 1, 511, 512, 4095, 65_536, 65_537, 1 << 20, (1 << 20) + 512] {
            for place in SIGNATURES.iter().flat_map(|signature| signature.places) {
                if let Back(before, unit, then) = *place {
                    let at = place.on(len);
                    assert!(at.is_none_or(|at| at <= len && at >= then), "{len}: {before} {unit} {then}");
                }
            }
        }
    }
}
