//! Reads a chain the slow and obvious way.
//!
//! One sector at a time, nothing cached, straight from the specification: a
//! clear bit of a dynamic disk is zeros whatever lies under it, a clear bit of
//! a differencing disk is the parent's sector, past a parent's end is zeros,
//! and the size is the current size.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::tagged::SECTOR;

/// The bytes of a host file.
pub trait Source {
    /// Length in bytes.
    ///
    /// # Errors
    /// Why the length can't be had.
    fn size(&self) -> Result<u64, String>;

    /// Fills `buf` from byte offset `at`.
    ///
    /// # Errors
    /// When the bytes end past the file, or can't be read.
    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), String>;
}

impl Source for Vec<u8> {
    fn size(&self) -> Result<u64, String> {
        Ok(self.as_slice().len() as u64)
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), String> {
        let start = usize::try_from(at).map_err(|e| e.to_string())?;
        let bytes = self.get(start..).and_then(|rest| rest.get(..buf.len()));
        buf.copy_from_slice(bytes.ok_or_else(|| format!("byte {at}: past the file"))?);
        Ok(())
    }
}

impl Source for File {
    fn size(&self) -> Result<u64, String> {
        Ok(self.metadata().map_err(|e| e.to_string())?.len())
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), String> {
        self.read_exact_at(buf, at).map_err(|e| format!("byte {at}: {e}"))
    }
}

// What a file is to the guest.
enum Content {
    Fixed,
    Blocks { differencing: bool, bat: u64, entries: u32, block_size: u32, parent: [u8; 16] },
    Raw,
}

struct Image {
    file: Box<dyn Source>,
    size: u64,
    uuid: [u8; 16],
    content: Content,
}

/// A chain of VHD files, opened for reading.
pub struct ReferenceChain {
    // Leaf first.
    images: Vec<Image>,
}

impl ReferenceChain {
    /// Opens a leaf and its parents, leaf first.
    ///
    /// # Errors
    /// What is wrong with a file, or how the files don't belong together.
    pub fn open(files: Vec<Box<dyn Source>>) -> Result<Self, String> {
        Self::open_over(files, None)
    }

    /// Like [`open`](Self::open), over a raw disk that the last file's parent
    /// id of zeros stands for.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_over(files: Vec<Box<dyn Source>>, raw: Option<Box<dyn Source>>) -> Result<Self, String> {
        let mut images = Vec::new();
        for (depth, file) in files.into_iter().enumerate() {
            images.push(Image::open(file).map_err(|e| format!("depth {depth}: {e}"))?);
        }
        if let Some(file) = raw {
            images.push(Image { size: file.size()?, file, uuid: [0; 16], content: Content::Raw });
        }
        for (depth, image) in images.iter().enumerate() {
            match (image.parent(), images.get(depth + 1)) {
                (None, None) => {}
                (Some(uuid), Some(parent)) if uuid == parent.uuid => {}
                (Some(_), Some(_)) => return Err(format!("depth {depth}: wrong parent")),
                (Some(_), None) => return Err(format!("depth {depth}: no parent given")),
                (None, Some(_)) => return Err(format!("depth {depth}: has no parent")),
            }
        }
        Ok(Self { images })
    }

    /// Opens files by path, leaf first.
    ///
    /// # Errors
    /// As for [`open`](Self::open), and when a file can't be opened.
    pub fn open_paths<P: AsRef<std::path::Path>>(paths: &[P]) -> Result<Self, String> {
        let mut files: Vec<Box<dyn Source>> = Vec::new();
        for path in paths {
            let file = File::open(path).map_err(|e| e.to_string())?;
            files.push(Box::new(file));
        }
        Self::open(files)
    }

    /// Size in bytes of the disk a guest sees.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.images[0].size
    }

    /// One sector as a guest sees it; zeros past the end.
    ///
    /// # Errors
    /// When a file says something impossible about the sector.
    pub fn sector(&self, lba: u64) -> Result<[u8; SECTOR], String> {
        for (depth, image) in self.images.iter().enumerate() {
            let found = image.sector(lba);
            if let Some(bytes) = found.map_err(|e| format!("depth {depth}, sector {lba}: {e}"))? {
                return Ok(bytes);
            }
        }
        Ok([0; SECTOR])
    }

    /// A range of bytes as a guest sees it.
    ///
    /// # Errors
    /// As for [`sector`](Self::sector), and when the range ends past the disk.
    pub fn read(&self, range: Range<u64>) -> Result<Vec<u8>, String> {
        if range.end > self.size() {
            return Err(format!("{range:?} ends past the disk"));
        }
        let first = range.start / SECTOR as u64;
        let mut bytes = Vec::new();
        for lba in first..range.end.div_ceil(SECTOR as u64) {
            bytes.extend(self.sector(lba)?);
        }
        let skip = index(range.start - first * SECTOR as u64)?;
        let len = index(range.end - range.start)?;
        Ok(bytes[skip..skip + len].to_vec())
    }

    /// The whole disk.
    ///
    /// # Errors
    /// As for [`sector`](Self::sector).
    pub fn read_all(&self) -> Result<Vec<u8>, String> {
        self.read(0..self.size())
    }
}

impl Image {
    fn open(file: Box<dyn Source>) -> Result<Self, String> {
        let footer = footer(&*file)?;
        let content = match u32_at(&footer, 60) {
            2 => Content::Fixed,
            kind @ (3 | 4) => blocks(&*file, u64_at(&footer, 16), kind == 4)?,
            other => return Err(format!("disk type {other}")),
        };
        Ok(Self { file, size: u64_at(&footer, 48), uuid: uuid_at(&footer, 68), content })
    }

    fn parent(&self) -> Option<[u8; 16]> {
        match self.content {
            Content::Blocks { differencing: true, parent, .. } => Some(parent),
            _ => None,
        }
    }

    // `None`: look in the parent.
    fn sector(&self, lba: u64) -> Result<Option<[u8; SECTOR]>, String> {
        let disk_offset = lba * SECTOR as u64;
        let mut bytes = [0; SECTOR];
        // The last sector may be cut short; what follows it is not the disk's.
        let left = self.size.saturating_sub(disk_offset).min(SECTOR as u64);
        let part = &mut bytes[..index(left)?];
        if part.is_empty() {
            return Ok(Some(bytes));
        }
        let Content::Blocks { differencing, bat, entries, block_size, .. } = self.content else {
            self.file.read(disk_offset, part)?;
            return Ok(Some(bytes));
        };
        let absent = if differencing { None } else { Some([0; SECTOR]) };

        let block = disk_offset / u64::from(block_size);
        if block >= u64::from(entries) {
            return Err(format!("block {block} is past the BAT"));
        }
        let entry = u64::from(self.u32(bat + block * 4)?);
        if entry == 0xFFFF_FFFF {
            return Ok(absent);
        }
        let bitmap = entry * SECTOR as u64;
        let sector = disk_offset % u64::from(block_size) / SECTOR as u64;
        let mut bits = [0];
        self.file.read(bitmap + sector / 8, &mut bits)?;
        if bits[0] & (0x80 >> (sector % 8)) == 0 {
            return Ok(absent);
        }
        let sectors = u64::from(block_size) / SECTOR as u64;
        let bitmap_len = sectors.div_ceil(8).div_ceil(SECTOR as u64) * SECTOR as u64;
        self.file.read(bitmap + bitmap_len + sector * SECTOR as u64, part)?;
        Ok(Some(bytes))
    }

    fn u32(&self, at: u64) -> Result<u32, String> {
        let mut bytes = [0; 4];
        self.file.read(at, &mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }
}

// The trailing footer if it is good, else the header copy.
fn footer(file: &dyn Source) -> Result<[u8; SECTOR], String> {
    let len = file.size()?;
    for (from_end, size) in [(512, 512), (511, 511), (len, 512)] {
        let mut bytes = [0; SECTOR];
        let Some(at) = len.checked_sub(from_end) else {
            continue;
        };
        if file.read(at, &mut bytes[..size]).is_err() || !bytes.starts_with(b"conectix") {
            continue;
        }
        // At the start of a fixed disk stands what the guest wrote there.
        if at == 0 && from_end == len && !matches!(u32_at(&bytes, 60), 3 | 4) {
            continue;
        }
        if sums_up(&bytes, 64) {
            return Ok(bytes);
        }
        // Old tapdisks hid a disk without redoing the checksum.
        bytes[85] = 0;
        if sums_up(&bytes, 64) {
            return Ok(bytes);
        }
    }
    Err("no good footer at either end".to_owned())
}

fn blocks(file: &dyn Source, at: u64, differencing: bool) -> Result<Content, String> {
    let mut header = [0; 1024];
    file.read(at, &mut header)?;
    if !header.starts_with(b"cxsparse") || !sums_up(&header, 36) {
        return Err("bad dynamic header".to_owned());
    }
    let block_size = u32_at(&header, 32);
    if block_size < 512 || !block_size.is_power_of_two() {
        return Err(format!("block size {block_size}"));
    }
    Ok(Content::Blocks {
        differencing,
        bat: u64_at(&header, 16),
        entries: u32_at(&header, 28),
        block_size,
        parent: uuid_at(&header, 40),
    })
}

// Ones' complement of the sum of all bytes but those of the field itself.
fn sums_up(bytes: &[u8], field: usize) -> bool {
    let all: u32 = bytes.iter().map(|b| u32::from(*b)).sum();
    let own: u32 = bytes[field..field + 4].iter().map(|b| u32::from(*b)).sum();
    u32_at(bytes, field) == !(all - own)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn uuid_at(bytes: &[u8], at: usize) -> [u8; 16] {
    bytes[at..at + 16].try_into().unwrap()
}

fn index(value: u64) -> Result<usize, String> {
    usize::try_from(value).map_err(|e| e.to_string())
}
