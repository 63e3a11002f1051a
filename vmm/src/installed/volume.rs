//! File systems of a disk, read from outside: ext2, ext3, ext4 and FAT.
//!
//! They are hostile input. What the crates that read them take for granted is checked first; files have sizes at most;
//! who calls has a thread for it, and a time after which it no longer waits.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;

use ext4_view::{Ext4, Ext4Read};
use vhd_core::Disk;
use vhd_core::partition::PartitionTable;

/// Bytes that are read of a disk at once, and kept.
const WINDOW: u64 = 64 << 10;
/// Entries of a folder that are looked at.
const MAX_ENTRIES: usize = 4096;
/// Groups of blocks in an ext file system at most: those of 2 TiB in the smallest blocks are a quarter of it.
const MAX_GROUPS: u64 = 1 << 20;

/// A range of a disk as a file, read through one window.
struct Slice {
    disk: Disk,
    range: Range<u64>,
    at: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl Slice {
    fn new(disk: &Disk, range: Range<u64>) -> Self {
        Self { disk: disk.clone(), range, at: 0, window: Vec::new(), window_at: 0 }
    }

    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// As many bytes as the window has from there on.
    fn read_some(&mut self, at: u64, bytes: &mut [u8]) -> io::Result<usize> {
        if at >= self.len() || bytes.is_empty() {
            return Ok(0);
        }
        if at < self.window_at || at >= self.window_at + self.window.len() as u64 {
            self.window_at = at - at % WINDOW;
            self.window.resize(WINDOW.min(self.len() - self.window_at) as usize, 0);
            let read = self.disk.read_at(&mut self.window, self.range.start + self.window_at);
            if let Err(error) = read {
                self.window.clear();
                return Err(io::Error::other(error.to_string()));
            }
        }
        let from = &self.window[(at - self.window_at) as usize..];
        let len = from.len().min(bytes.len());
        bytes[..len].copy_from_slice(&from[..len]);
        Ok(len)
    }
}

impl Read for Slice {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let len = self.read_some(self.at, bytes)?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Slice {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.len().checked_add_signed(by),
        };
        self.at = to.ok_or_else(|| io::Error::other("a place before the start"))?;
        Ok(self.at)
    }
}

/// `fatfs` wants to write; nothing here lets it.
impl Write for Slice {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Ext4Read for Slice {
    fn read(&mut self, start: u64, bytes: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.at = start;
        Ok(Read::read_exact(self, bytes)?)
    }
}

enum System {
    Ext(Ext4),
    Fat(Box<fatfs::FileSystem<Slice>>),
}

/// A file system of a disk.
pub struct Volume {
    system: System,
    /// Of which partition; without one it is the whole disk.
    pub partition: Option<u32>,
    /// What boot loaders find it by.
    pub uuid: String,
    /// Its name.
    pub label: String,
}

/// The file systems of a disk that can be read, and what there is besides, for people.
pub fn volumes(disk: &Disk) -> Result<(Vec<Volume>, Vec<String>), String> {
    let table = PartitionTable::read(disk).map_err(|error| error.to_string())?;
    let mut places = vec![(None, 0..disk.size())];
    places.extend(table.partitions.iter().map(|partition| (Some(partition.number), partition.range.clone())));
    let (mut volumes, mut others) = (Vec::new(), Vec::new());
    for (partition, range) in places {
        match (Volume::open(disk, partition, range), partition) {
            (Ok(volume), _) => volumes.push(volume),
            (Err(why), Some(number)) => others.push(format!("partition {number} {why}")),
            (Err(why), None) if table.partitions.is_empty() => others.push(format!("the disk as a whole {why}")),
            (Err(_), None) => {}
        }
    }
    Ok((volumes, others))
}

impl Volume {
    /// The file system in a range, or why there is none.
    fn open(disk: &Disk, partition: Option<u32>, range: Range<u64>) -> Result<Self, String> {
        let mut front = vec![0; 2048];
        let mut slice = Slice::new(disk, range);
        let unreadable = |error: io::Error| format!("can't be read: {error}");
        slice.read_exact(&mut front).map_err(unreadable)?;
        slice.at = 0;
        if front[1024 + 0x38..][..2] == [0x53, 0xEF] {
            check_ext(&front[1024..], slice.len())?;
            let system = Ext4::load(Box::new(slice)).map_err(|error| format!("has an ext file system, but {error}"))?;
            let (uuid, label) = (system.uuid().to_string(), system.label().display().to_string());
            return Ok(Self { system: System::Ext(system), partition, uuid, label });
        }
        // A boot sector of another system is none of FAT, though both end alike.
        if front[510..512] == [0x55, 0xAA] && matches!(front[0], 0xEB | 0xE9) && front[3..11] != *b"NTFS    " {
            check_fat(&front, slice.len())?;
            let system = fatfs::FileSystem::new(slice, fatfs::FsOptions::new());
            let system = system.map_err(|error| format!("has a FAT file system, but {error}"))?;
            let id = system.volume_id();
            let (uuid, label) = (format!("{:04X}-{:04X}", id >> 16, id & 0xFFFF), system.volume_label());
            return Ok(Self { system: System::Fat(Box::new(system)), partition, uuid, label: label.trim().to_owned() });
        }
        Err("has neither an ext nor a FAT file system".to_owned())
    }

    /// A file's bytes; nothing where there is no such file.
    pub fn read(&self, path: &str, max: u64) -> Result<Option<Vec<u8>>, String> {
        let path = absolute(path);
        let too_large = |len: u64| Err(format!("{path}: has {len} bytes, more than {max}"));
        match &self.system {
            System::Ext(system) => {
                use ext4_view::Ext4Error::{IsADirectory, NotADirectory, NotFound};
                let wrong = |error: ext4_view::Ext4Error| format!("{path}: {error}");
                match system.metadata(path.as_str()) {
                    Ok(metadata) if metadata.len() > max => too_large(metadata.len()),
                    Ok(_) => system.read(path.as_str()).map(Some).or_else(|error| match error {
                        IsADirectory => Ok(None),
                        error => Err(wrong(error)),
                    }),
                    Err(NotFound | NotADirectory) => Ok(None),
                    Err(error) => Err(wrong(error)),
                }
            }
            System::Fat(system) => {
                let mut file = match system.root_dir().open_file(path.trim_matches('/')) {
                    Ok(file) => file,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    // A folder.
                    Err(error) if error.kind() == io::ErrorKind::Other => return Ok(None),
                    Err(error) => return Err(format!("{path}: {error}")),
                };
                let mut bytes = Vec::new();
                (&mut file).take(max + 1).read_to_end(&mut bytes).map_err(|error| format!("{path}: {error}"))?;
                if bytes.len() as u64 > max { too_large(bytes.len() as u64) } else { Ok(Some(bytes)) }
            }
        }
    }

    /// The names in a folder, sorted; none where there is no such folder.
    pub fn list(&self, path: &str) -> Vec<String> {
        let path = absolute(path);
        let mut names: Vec<String> = match &self.system {
            System::Ext(system) => {
                let Ok(entries) = system.read_dir(path.as_str()) else { return Vec::new() };
                let named = entries.take(MAX_ENTRIES).map_while(Result::ok);
                named.filter_map(|entry| Some(entry.file_name().as_str().ok()?.to_owned())).collect()
            }
            System::Fat(system) => {
                let root = system.root_dir();
                let folder = path.trim_matches('/');
                let folder = if folder.is_empty() { Ok(root) } else { root.open_dir(folder) };
                let Ok(folder) = folder else { return Vec::new() };
                folder.iter().take(MAX_ENTRIES).map_while(Result::ok).map(|entry| entry.file_name()).collect()
            }
        };
        names.sort();
        names
    }
}

fn absolute(path: &str) -> String {
    format!("/{}", path.trim_start_matches('/'))
}

/// What `ext4-view` would make room for before it looks.
fn check_ext(superblock: &[u8], len: u64) -> Result<(), String> {
    let number = |at: usize| superblock[at..at + 4].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
    let blocks = number(4);
    let groups = blocks.div_ceil(number(0x20).max(1));
    let block = 1024_u64.checked_shl(number(0x18) as u32).unwrap_or(0);
    let wide = number(0x60) & 0x80 != 0 && number(0x150) != 0;
    if groups > MAX_GROUPS || wide || !(1024..=64 << 10).contains(&block) || blocks * block > len {
        return Err(format!("has an ext file system of {blocks} blocks of {block} bytes in {groups} groups, on {len} bytes"));
    }
    Ok(())
}

/// What `fatfs` would compute with before it looks.
fn check_fat(boot: &[u8], len: u64) -> Result<(), String> {
    let number = |at: usize, len: usize| boot[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
    let or_long = |short: u64, long: u64| if short > 0 { short } else { long };
    let (sector, unit, reserved, copies) = (number(11, 2), number(13, 1), number(14, 2), number(16, 1));
    let total = or_long(number(19, 2), number(32, 4));
    let front = reserved + copies * or_long(number(22, 2), number(36, 4)) + (number(17, 2) * 32).div_ceil(sector.max(1));
    if !(512..=4096).contains(&sector) || !unit.is_power_of_two() || front >= total || total * sector > len {
        return Err(format!(
            "has a FAT file system of {total} sectors of {sector} bytes, {front} of them in front, on {len} bytes"
        ));
    }
    Ok(())
}
