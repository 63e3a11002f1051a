//! What the type of a partition says of what is in it.

use super::PartitionType;

/// What a type is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Any file system.
    Files,
    /// A FAT file system.
    Fat,
    /// A Linux swap area.
    Swap,
    /// Something else, which owns this partition alone.
    Other(&'static str),
    /// The database or the data of what owns the whole disk, whatever other partitions say.
    WholeDisk(&'static str),
    /// Not known here.
    Unknown,
}

/// Types of an MBR. The last column of docs/free-space.md is this.
const MBR: &[(&[u8], Purpose)] = &[
    // NTFS and what shares its type, hidden, Windows' recovery; Linux.
    (&[0x07, 0x17, 0x27, 0x83], Purpose::Files),
    // FAT12, FAT16, FAT32 and those reached by LBA, each hidden too; EFI system partition.
    (&[0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E, 0x11, 0x14, 0x16, 0x1B, 0x1C, 0x1E, 0xEF], Purpose::Fat),
    (&[0x82], Purpose::Swap),
    (&[0x42], Purpose::WholeDisk("a dynamic disk of Windows (LDM)")),
    (&[0xE7], Purpose::WholeDisk("Storage Spaces")),
    (&[0x86, 0x87, 0x8B, 0x8C, 0xB6, 0xB7, 0xBB, 0xBC, 0xC6, 0xC7], Purpose::Other("a volume set of Windows NT")),
    (&[0x8E], Purpose::Other("LVM")),
    (&[0xFD], Purpose::Other("a RAID of Linux")),
    (&[0xE8], Purpose::Other("LUKS")),
    (&[0xBE, 0xBF], Purpose::Other("Solaris or ZFS")),
    (&[0xA5, 0xA6, 0xA9], Purpose::Other("a BSD")),
    (&[0xA8, 0xAB, 0xAF], Purpose::Other("macOS")),
    (&[0xFB, 0xFC], Purpose::Other("VMware")),
    (&[0x84, 0xA0, 0xA1], Purpose::Other("a hibernated system")),
    (&[0xEE], Purpose::Other("a GPT")),
];

/// Types of a GPT.
const GPT: &[(&str, Purpose)] = &[
    // Linux: file systems, what systemd finds by type (root, home, srv, var, tmp), the extended boot loader's.
    ("0fc63daf-8483-4772-8e79-3d69d8477de4", Purpose::Files),
    ("44479540-f297-41b2-9af7-d131d5f0458a", Purpose::Files),
    ("4f68bce3-e8cd-4db1-96e7-fbcaf984b709", Purpose::Files),
    ("69dad710-2ce4-4e3c-b16c-21a1d49abed3", Purpose::Files),
    ("b921b045-1df0-41c3-af44-4c6f280d3fae", Purpose::Files),
    ("933ac7e1-2eb4-4f13-b844-0e14e2aef915", Purpose::Files),
    ("3b8f8425-20e0-4f3b-907f-1a25a76f98e8", Purpose::Files),
    ("4d21b016-b534-45c2-a9fb-5c16e091fd2d", Purpose::Files),
    ("7ec6f557-3bc5-4aca-b293-16ef5df639d1", Purpose::Files),
    ("bc13c2ff-59e6-4262-a352-b275fd6f7172", Purpose::Files),
    // Windows: basic data, recovery.
    ("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", Purpose::Files),
    ("de94bba4-06d1-4d40-a16a-bfd50179d6ac", Purpose::Files),
    // EFI system partition.
    ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", Purpose::Fat),
    ("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f", Purpose::Swap),
    ("5808c8aa-7e8f-42e0-85d2-e1e90434cfb3", Purpose::WholeDisk("a dynamic disk of Windows (LDM)")),
    ("af9b60a0-1431-4f62-bc68-3311714a69ad", Purpose::WholeDisk("a dynamic disk of Windows (LDM)")),
    ("e75caf8f-f680-4cee-afa3-b001e56efc2d", Purpose::WholeDisk("Storage Spaces")),
    ("381cfccc-7288-11e0-92ee-000c2911d0b2", Purpose::WholeDisk("VMware vSAN")),
    ("e6d6d379-f507-44c2-a23c-238f2a3df928", Purpose::Other("LVM")),
    ("a19d880f-05fc-4d3b-a006-743f0f84911e", Purpose::Other("a RAID of Linux")),
    ("ca7d7ccb-63ed-4c53-861c-1742536059cc", Purpose::Other("LUKS")),
    ("7ffec5c9-2d00-49b7-8941-3ea10a5586b7", Purpose::Other("dm-crypt")),
    ("6a898cc3-1dd2-11b2-99a6-080020736631", Purpose::Other("ZFS")),
    ("516e7cba-6ecf-11d6-8ff8-00022d09712b", Purpose::Other("ZFS")),
    ("516e7cb4-6ecf-11d6-8ff8-00022d09712b", Purpose::Other("FreeBSD")),
    ("516e7cb6-6ecf-11d6-8ff8-00022d09712b", Purpose::Other("FreeBSD")),
    ("516e7cb8-6ecf-11d6-8ff8-00022d09712b", Purpose::Other("FreeBSD's volume manager")),
    ("48465300-0000-11aa-aa11-00306543ecac", Purpose::Other("HFS+")),
    ("7c3457ef-0000-11aa-aa11-00306543ecac", Purpose::Other("APFS")),
    ("53746f72-6167-11aa-aa11-00306543ecac", Purpose::Other("Core Storage of macOS")),
    ("52414944-0000-11aa-aa11-00306543ecac", Purpose::Other("a RAID of macOS")),
    ("52414944-5f4f-11aa-aa11-00306543ecac", Purpose::Other("a RAID of macOS")),
    ("aa31e02a-400f-11db-9590-000c2911d1b8", Purpose::Other("VMFS")),
    ("9d275380-40ad-11db-bf97-000c2911d1b8", Purpose::Other("VMware")),
    ("9198effc-31c0-11db-8f78-000c2911d1b8", Purpose::Other("VMware")),
    ("4fbd7e29-9d25-41b8-afd0-062c0ceff05d", Purpose::Other("Ceph")),
    ("e3c9e316-0b5c-4db8-817d-f92df00215ae", Purpose::Other("Windows' reserved space")),
    ("21686148-6449-6e6f-744e-656564454649", Purpose::Other("a boot loader")),
];

impl PartitionType {
    /// What it is for.
    #[must_use]
    pub fn purpose(self) -> Purpose {
        let found = match self {
            Self::Mbr(code) => MBR.iter().find(|(codes, _)| codes.contains(&code)).map(|(_, purpose)| *purpose),
            Self::Gpt(guid) => {
                let text = guid.hyphenated().to_string();
                GPT.iter().find(|(known, _)| *known == text).map(|(_, purpose)| *purpose)
            }
        };
        found.unwrap_or(Purpose::Unknown)
    }
}
