//! What owns a place whose makers are not at hand, byte by byte from their published layouts. Other people's programs judge
//! that each is what it says: libblkid, mdadm, ldmtool.

#![allow(clippy::little_endian_bytes, reason = "most of them are little-endian")]

/// Something that owns a volume.
#[derive(Clone, Debug)]
pub struct Foreign {
    /// What it is.
    pub name: &'static str,
    /// The type that libblkid gives it. Debian's may be too old for some, or not know them at all.
    pub blkid: Option<&'static str>,
    /// A word of what is said of it.
    pub told: &'static str,
    /// Places of the volume and their bytes.
    pub pieces: Vec<(u64, Vec<u8>)>,
}

fn foreign(
    name: &'static str,
    blkid: impl Into<Option<&'static str>>,
    told: &'static str,
    pieces: Vec<(u64, Vec<u8>)>,
) -> Foreign {
    Foreign { name, blkid: blkid.into(), told, pieces }
}

/// A structure of so many bytes, of which some fields are set.
fn structure(len: usize, fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fields.iter().for_each(|(at, value)| bytes[*at..][..value.len()].copy_from_slice(value));
    bytes
}

/// All of them, for a volume of `size` bytes: whole pages, 4 MiB or more.
#[must_use]
pub fn all(size: u64) -> Vec<Foreign> {
    [raids(size), volume_managers(size), encrypted(), sleepers(size), file_systems(size), tables(size)].concat()
}

fn raids(size: u64) -> Vec<Foreign> {
    let last = size - 512;
    let md = |place: u64, version: u32| vec![(place, md_superblock(size, place, version))];
    let sectors = (size / 512).to_le_bytes();
    let mut via = structure(51, &[(0, &[0x55, 0xAA]), (2, &[1])]);
    via[50] = via.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte));
    let mut silicon = structure(512, &[(0x60, &[0, 0, 0, 0x2F]), (0x6C, &sectors), (0x10C, &[2, 0])]);
    let sum =
        silicon.chunks(2).take(0x13E / 2).fold(0_u16, |sum, pair| sum.wrapping_add(u16::from(pair[0]) | u16::from(pair[1]) << 8));
    silicon[0x13E..0x140].copy_from_slice(&sum.wrapping_neg().to_le_bytes());
    let mut jmicron = structure(0x80, &[(0, b"JM\x01\x00")]);
    let sum = jmicron.chunks(2).fold(0_u16, |sum, pair| sum.wrapping_add(u16::from(pair[0]) | u16::from(pair[1]) << 8));
    jmicron[4..6].copy_from_slice(&sum.wrapping_neg().to_le_bytes());
    let mut ddf = structure(512, &[(0, &[0xDE, 0x11, 0xDE, 0x11, 0xFF, 0xFF, 0xFF, 0xFF]), (8, b"vhd-test"), (32, b"01.02.00")]);
    let crc = crc32(&ddf);
    ddf[4..8].copy_from_slice(&crc.to_be_bytes());
    let adaptec = structure(512, &[(0, &[0x37, 0xFC, 0x4D, 0x1E]), (256, b"DPTM")]);
    let nvidia = {
        let mut bytes = structure(120, &[(0, b"NVIDIA  "), (8, &30_u32.to_le_bytes()), (16, &[0x64, 0])]);
        let sum = bytes.chunks(4).fold(0_u32, |sum, word| sum.wrapping_add(le32(word)));
        bytes[12..16].copy_from_slice(&sum.wrapping_neg().to_le_bytes());
        bytes
    };
    let drbd = structure(512, &[(0, &(size / 512).to_be_bytes()), (60, &[0x83, 0x74, 2, 0x6B]), (64, &8_u32.to_be_bytes())]);
    vec![
        foreign("md 0.90", "linux_raid_member", "RAID", vec![(size - 0x1_0000, md_090(size))]),
        foreign("md 1.0", "linux_raid_member", "RAID", md(size - 0x2000, 0)),
        foreign("md 1.1", "linux_raid_member", "RAID", md(0, 1)),
        foreign("md 1.2", "linux_raid_member", "RAID", md(4096, 2)),
        foreign("DDF", "ddf_raid_member", "RAID", vec![(last, ddf)]),
        foreign("Intel", "isw_raid_member", "RAID", vec![(size - 1024, b"Intel Raid ISM Cfg Sig. 1.1.00".to_vec())]),
        foreign("LSI", "lsi_mega_raid_member", "RAID", vec![(last, b"$XIDE$".to_vec())]),
        foreign("VIA", "via_raid_member", "RAID", vec![(last, via)]),
        foreign("Silicon", "silicon_medley_raid_member", "RAID", vec![(last, silicon)]),
        foreign("NVIDIA", "nvidia_raid_member", "RAID", vec![(size - 1024, nvidia)]),
        foreign(
            "Promise",
            "promise_fasttrack_raid_member",
            "RAID",
            vec![(size - 63 * 512, b"Promise Technology, Inc.".to_vec())],
        ),
        foreign("HighPoint 45x", "hpt45x_raid_member", "RAID", vec![(size - 11 * 512, vec![0xF3, 0x16, 0x78, 0x5A])]),
        foreign("HighPoint 37x", "hpt37x_raid_member", "RAID", vec![(4640, vec![0xF0, 0x16, 0x78, 0x5A])]),
        foreign("Adaptec", "adaptec_raid_member", "RAID", vec![(last, adaptec)]),
        foreign("JMicron", "jmicron_raid_member", "RAID", vec![(last, jmicron)]),
        foreign("DRBD 8.3", "drbd", "DRBD", vec![(size - 4096, drbd)]),
    ]
}

/// A superblock of Linux's RAID, version 1: `minor` says where it is.
fn md_superblock(size: u64, place: u64, minor: u32) -> Vec<u8> {
    let data = if minor == 0 { 0_u64 } else { 2048 };
    let mut bytes = structure(
        256,
        &[
            (0, &0xA92B_4EFC_u32.to_le_bytes()),
            (4, &1_u32.to_le_bytes()),
            (16, b"vhd-test-of-raid"),
            (32, b"vhd:0"),
            (72, &1_u32.to_le_bytes()),
            (80, &(size / 512 - 4096).to_le_bytes()),
            (92, &2_u32.to_le_bytes()),
            (128, &data.to_le_bytes()),
            (136, &(size / 512 - 4096).to_le_bytes()),
            (144, &(place / 512).to_le_bytes()),
            (168, b"vhd-test-of-disk"),
            (200, &1_u64.to_le_bytes()),
            (208, &u64::MAX.to_le_bytes()),
        ],
    );
    let sum: u64 = bytes.chunks(4).map(|word| u64::from(le32(word))).sum();
    bytes[216..220].copy_from_slice(&((sum >> 32) as u32).wrapping_add(sum as u32).to_le_bytes());
    bytes
}

/// A superblock of Linux's RAID, version 0.90.
fn md_090(size: u64) -> Vec<u8> {
    let word = |at: usize, value: u32| (at * 4, value.to_le_bytes());
    let kib = (size / 1024) as u32 - 64;
    let fields = [
        word(0, 0xA92B_4EFC),
        word(2, 90),
        word(5, 0x1234_5678),
        word(7, 1),
        word(8, kib),
        word(9, 2),
        word(10, 2),
        word(33, 1),
        word(34, 2),
        word(35, 2),
        word(39, 1),
    ];
    let fields: Vec<(usize, &[u8])> = fields.iter().map(|(at, value)| (*at, &value[..])).collect();
    let mut bytes = structure(4096, &fields);
    let sum: u64 = bytes.chunks(4).map(|word| u64::from(le32(word))).sum();
    bytes[152..156].copy_from_slice(&((sum >> 32) as u32).wrapping_add(sum as u32).to_le_bytes());
    bytes
}

fn volume_managers(size: u64) -> Vec<Foreign> {
    let bcachefs = [0xC6, 0x85, 0x73, 0xF6, 0x66, 0xCE, 0x90, 0xA9, 0xD9, 0x6A, 0x60, 0xCF, 0x80, 0x3D, 0xF7, 0xEF];
    vec![
        foreign("Storage Spaces", None, "Storage Spaces", vec![(0, storage_space()), (4096, b"SDBC    ".to_vec())]),
        foreign("LVM1", "LVM1_member", "LVM", vec![(0, b"HM\x01\x00".to_vec())]),
        foreign("Oracle ASM", "oracleasm", "Oracle ASM", vec![(32, b"ORCLDISKVOL1".to_vec())]),
        foreign("VDO", "vdo", "VDO", vec![(0, b"dmvdo001".to_vec())]),
        foreign("BlueStore", "ceph_bluestore", "Ceph", vec![(0, b"bluestore block device\n".to_vec())]),
        foreign("mpool", None, "mpool", vec![(0, b"mpoolDev".to_vec())]),
        foreign("bcachefs", None, "bcachefs", vec![(4096 + 24, bcachefs.to_vec())]),
        foreign("a snapshot", "DM_snapshot_cow", "device mapper", vec![(0, b"SnAp".to_vec())]),
        foreign("dm-integrity", "DM_integrity", "dm-integrity", vec![(0, b"integrt\0\x01".to_vec())]),
        foreign("dm-verity", "DM_verity_hash", "dm-verity", vec![(0, b"verity\0\0\x01\0\0\0".to_vec())]),
        foreign("UBI", "ubi", "UBI", vec![(0, b"UBI#\x01".to_vec())]),
        foreign("a head of LDM", None, "LDM", vec![(3072, b"PRIVHEAD".to_vec())]),
        foreign("the last head of LDM", None, "LDM", vec![(size - 512, b"PRIVHEAD".to_vec())]),
    ]
}

/// What begins the partition of a disk in a pool: its version is that of Windows 10 and later.
fn storage_space() -> Vec<u8> {
    structure(4096, &[(0, b"SPACEDB "), (8, &[0, 2, 0, 0x40]), (32, b"vhd-test-of-pool"), (48, b"vhd-test-of-disk")])
}

fn encrypted() -> Vec<Foreign> {
    let guid = [0x3B, 0xD6, 0x67, 0x49, 0x29, 0x2E, 0xD8, 0x4A, 0x83, 0x99, 0xF6, 0xA3, 0x39, 0xE3, 0xD0, 1];
    let place = (1_u64 << 20).to_le_bytes();
    let metadata =
        || (1 << 20, structure(512, &[(0, b"-FVE-FS-"), (10, &[2, 0]), (64, &[48, 0, 0, 0, 1, 0, 0, 0, 48, 0, 0, 0, 48])]));
    let boot = |jump: &[u8], fields: &[(usize, &[u8])]| {
        structure(512, &[&[(0, jump), (11, &[0, 2, 8]), (510, &[0x55, 0xAA])], fields].concat())
    };
    let windows7 = boot(b"\xEB\x58\x90-FVE-FS-", &[(160, &guid), (176, &place)]);
    let vista = boot(b"\xEB\x52\x90-FVE-FS-", &[]);
    // It shows a FAT32 to systems that know nothing of it.
    let to_go = boot(b"\xEB\x58\x90MSWIN4.1", &[(82, b"FAT32   "), (424, &guid), (440, &place)]);
    vec![
        foreign("BitLocker", "BitLocker", "BitLocker", vec![(0, windows7), metadata()]),
        foreign("BitLocker of Vista", "BitLocker", "BitLocker", vec![(0, vista)]),
        foreign("BitLocker To Go", "BitLocker", "BitLocker", vec![(0, to_go), metadata()]),
        foreign("the second head of LUKS2", None, "LUKS", vec![(0x8000, b"SKUL\xBA\xBE\x00\x02".to_vec())]),
    ]
}

fn sleepers(size: u64) -> Vec<Foreign> {
    let swap = |signature: &[u8]| {
        let pages = (size / 4096 - 1) as u32;
        vec![(1024, structure(8, &[(0, &1_u32.to_le_bytes()), (4, &pages.to_le_bytes())])), (4086, signature.to_vec())]
    };
    vec![
        foreign("swsusp", "swsuspend", "hibernated", swap(b"S1SUSPEND")),
        foreign("uswsusp", "swsuspend", "hibernated", swap(b"S2SUSPEND")),
        foreign("TuxOnIce", "swsuspend", "hibernated", vec![(0, vec![0xED, 0xC3, 2, 0xE9, 0x98, 0x56, 0xE5, 0x0C])]),
        foreign("an old swap area", "swap", "swap area", vec![(4086, b"SWAP-SPACE".to_vec())]),
    ]
}

fn file_systems(size: u64) -> Vec<Foreign> {
    let refs = structure(512, &[(3, b"ReFS\0\0\0\0"), (16, b"FSRS"), (32, &[0, 2, 0, 0])]);
    let hfs_plus = |signature: &[u8], version: u8| {
        let fields: &[(usize, &[u8])] = &[(0, signature), (2, &[0, version]), (40, &4096_u32.to_be_bytes())];
        vec![(1024, structure(512, fields))]
    };
    let gfs2 = structure(128, &[(0, &[1, 0x16, 0x19, 0x70]), (24, &1801_u32.to_be_bytes()), (28, &1900_u32.to_be_bytes())]);
    let ufs = structure(1376, &[(1372, &0x0001_1954_u32.to_le_bytes())]);
    vec![
        foreign("ReFS", "ReFS", "ReFS", vec![(0, refs)]),
        foreign("APFS", "apfs", "APFS", vec![(0, apfs(size))]),
        foreign("HFS+", "hfsplus", "HFS+", hfs_plus(b"H+", 4)),
        foreign("HFSX", "hfsplus", "HFS+", hfs_plus(b"HX", 5)),
        foreign("a volume of VMFS", "VMFS_volume_member", "VMFS", vec![(1 << 20, vec![0x0D, 0xD0, 1, 0xC0, 5])]),
        foreign("VMFS", "VMFS", "VMFS", vec![(2 << 20, vec![0x5E, 0xF1, 0xAB, 0x2F, 5])]),
        foreign("GFS2", "gfs2", "GFS2", vec![(0x1_0000, gfs2)]),
        foreign("OCFS", "ocfs", "OCFS", vec![(8192, b"OracleCFS".to_vec())]),
        foreign("NSS", "nss", "NSS", vec![(4096, b"SPB5".to_vec())]),
        foreign("VxFS", "vxfs", "VxFS", vec![(1024, vec![0xF5, 0xFC, 1, 0xA5, 4])]),
        foreign("UFS", "ufs", "UFS", vec![(8192, ufs)]),
        foreign("HPFS", "hpfs", "HPFS", vec![(0x2000, vec![0x49, 0xE8, 0x95, 0xF9]), (0x2200, vec![0x49, 0x18, 0x91, 0xF9])]),
        foreign("System V", "sysv", "System V", vec![(1016, 0xFD18_7E20_u32.to_le_bytes().to_vec())]),
        foreign("UBIFS", None, "UBIFS", vec![(0, vec![0x31, 0x18, 0x10, 6])]),
        foreign("zonefs", "zonefs", "zonefs", vec![(0, b"SFOZ".to_vec())]),
    ]
}

fn tables(size: u64) -> Vec<Foreign> {
    let mbr =
        structure(512, &[(450, &[0x83]), (454, &2048_u32.to_le_bytes()), (458, &4096_u32.to_le_bytes()), (510, &[0x55, 0xAA])]);
    let apple = vec![(0, b"ER\x02\x00".to_vec()), (512, b"PM\0\0\0\0\0\x01".to_vec())];
    let mut sun = structure(512, &[(508, &[0xDA, 0xBE])]);
    (sun[510], sun[511]) = (0xDA, 0xBE);
    vec![
        foreign("an MBR", None, "partition", vec![(0, mbr)]),
        foreign("the end of a GPT", None, "GPT", vec![(size - 512, b"EFI PART\0\0\x01\0".to_vec())]),
        foreign("a GPT of 4096", None, "GPT", vec![(4096, b"EFI PART\0\0\x01\0".to_vec())]),
        foreign("Apple", None, "Apple", apple),
        foreign("Sun", None, "Sun", vec![(0, sun)]),
        foreign("SGI", None, "SGI", vec![(0, vec![0x0B, 0xE5, 0xA9, 0x41])]),
        foreign("BSD", None, "BSD", vec![(512, vec![0x57, 0x45, 0x56, 0x82])]),
        foreign("Amiga", None, "Amiga", vec![(1024, b"RDSK".to_vec())]),
    ]
}

/// A container's superblock, with the checksum that all of its objects have.
fn apfs(size: u64) -> Vec<u8> {
    let mut bytes = structure(
        4096,
        &[
            (8, &[1]),
            (16, &[1]),
            (24, &[1]),
            (27, &[0x80]),
            (32, b"NXSB"),
            (36, &4096_u32.to_le_bytes()),
            (40, &(size / 4096).to_le_bytes()),
            (72, b"vhd-test-of-apfs"),
        ],
    );
    let (mut low, mut high) = (0_u64, 0_u64);
    for word in bytes[8..].chunks(4) {
        low = (low + u64::from(le32(word))) % 0xFFFF_FFFF;
        high = (high + low) % 0xFFFF_FFFF;
    }
    let first = 0xFFFF_FFFF - (low + high) % 0xFFFF_FFFF;
    let second = 0xFFFF_FFFF - (low + first) % 0xFFFF_FFFF;
    bytes[..8].copy_from_slice(&(second << 32 | first).to_le_bytes());
    bytes
}

/// The database of a dynamic disk of Windows with one disk and no volume, for the sectors from `at` on, 2048 of them. `head`
/// is a further place of its head.
#[must_use]
pub fn ldm(head: u64, at: u64, data: std::ops::Range<u64>) -> Vec<(u64, Vec<u8>)> {
    const DISK: &[u8] = b"0a1b2c3d-1111-2222-3333-444455556666";
    const GROUP: &[u8] = b"0a1b2c3d-7777-8888-9999-aaaabbbbcccc";
    let long = u64::to_be_bytes;
    let privhead = structure(
        512,
        &[
            (0, b"PRIVHEAD"),
            (12, &[0, 2, 0, 12]),
            (48, DISK),
            (112, DISK),
            (176, GROUP),
            (240, b"vhd-test"),
            (283, &long(data.start)),
            (291, &long(data.end - data.start)),
            (299, &long(at)),
            (307, &long(2048)),
        ],
    );
    let tocblock = structure(
        512,
        &[
            (0, b"TOCBLOCK"),
            (36, b"config"),
            (46, &long(17)),
            (54, &long(1481)),
            (70, b"log"),
            (80, &long(1498)),
            (88, &long(224)),
        ],
    );
    let vmdb = structure(
        512,
        &[
            (0, b"VMDB"),
            (4, &3_u32.to_be_bytes()),
            (8, &128_u32.to_be_bytes()),
            (12, &512_u32.to_be_bytes()),
            (16, &[0, 1, 0, 4, 0, 10]),
            (22, b"vhd-test"),
            (53, GROUP),
            (117, &long(1)),
            (125, &long(1)),
            (145, &1_u32.to_be_bytes()),
        ],
    );
    let disk = vblk(1, 0x34, &[&[1, 1, 5][..], b"Disk1", &[DISK.len() as u8], DISK].concat());
    let group = vblk(2, 0x35, &[&[1, 2, 8][..], b"vhd-test", &[GROUP.len() as u8], GROUP].concat());
    let sector = |number: u64| (at + number) * 512;
    let mut pieces = vec![(head * 512, privhead.clone()), (sector(1856), privhead.clone()), (sector(2047), privhead)];
    pieces.extend([1, 2, 2045, 2046].map(|number| (sector(number), tocblock.clone())));
    pieces.push((sector(17), [vmdb, disk, group].concat()));
    pieces
}

/// A record of the database.
fn vblk(number: u32, kind: u8, content: &[u8]) -> Vec<u8> {
    let len = content.len() as u32;
    let fields: &[(usize, &[u8])] = &[
        (0, b"VBLK"),
        (4, &(number + 3).to_be_bytes()),
        (8, &number.to_be_bytes()),
        (12, &[0, 0, 0, 1]),
        (19, &[kind]),
        (20, &len.to_be_bytes()),
        (24, content),
    ];
    structure(128, fields)
}

fn le32(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// CRC-32 as Ethernet has it, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}
