//! Files to measure with.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Result;
use vhd_core::Disk;
use vhd_core::chain::{ChainOptions, ChildOptions, create_child};
use vhd_core::format::{Creator, Timestamp};
use vhd_core::image::{CreateOptions, NewKind, OpenOptions, create_file};

/// Numbers that look random and are the same each time (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let words = len.div_ceil(8);
        let mut bytes: Vec<u8> = (0..words).flat_map(|_| self.next().to_be_bytes()).collect();
        bytes.truncate(len);
        bytes
    }
}

/// A raw file of so many MiB of noise; with `run` and `of`, only the first `run` bytes of every `of` are, the rest holes.
pub fn raw(path: &Path, mib: u64, run: u64, of: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = File::create(path)?;
    file.set_len(mib << 20)?;
    let mut random = Random(1);
    let noise = random.bytes(16 << 20);
    let mut at = 0;
    while at < mib << 20 {
        let from = random.below((noise.len() as u64 - run).max(1)) as usize / 8 * 8;
        file.write_all_at(&noise[from..from + run as usize], at)?;
        at += of;
    }
    file.sync_all()?;
    Ok(())
}

/// Noise all over, written once.
pub fn noise(path: &Path, mib: u64) -> Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut random = Random(2);
    for _ in 0..mib {
        file.write_all(&random.bytes(1 << 20))?;
    }
    file.flush()?;
    Ok(file.get_ref().sync_all()?)
}

/// Raw files and dynamic images with the same noise all over, written by turns: who is written first gets other pages of the
/// host, and to read those may take half as long again.
pub fn alike(raw: &[&Path], images: &[&Path], mib: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let files = raw.iter().map(File::create).collect::<std::io::Result<Vec<_>>>()?;
    let open_new = |(path, id): (&&Path, u8)| {
        new_dynamic(path, mib << 20, id)?;
        open(path, true)
    };
    let disks = images.iter().zip(1..).map(open_new).collect::<Result<Vec<_>>>()?;
    let mut random = Random(2);
    for at in (0..mib).map(|mib| mib << 20) {
        let noise = random.bytes(1 << 20);
        files.iter().try_for_each(|file| file.write_all_at(&noise, at))?;
        disks.iter().try_for_each(|disk| disk.write_at(&noise, at))?;
    }
    files.iter().try_for_each(File::sync_all)?;
    Ok(disks.iter().try_for_each(|disk| disk.close())?)
}

pub fn options(writable: bool) -> ChainOptions {
    let image = OpenOptions { writable, ..OpenOptions::default() };
    ChainOptions { image, ..ChainOptions::default() }
}

pub fn open(path: &Path, writable: bool) -> Result<Disk> {
    Ok(Disk::open(path, &options(writable))?)
}

pub fn new_dynamic(path: &Path, size: u64, id: u8) -> Result<()> {
    let create = CreateOptions {
        kind: NewKind::Dynamic,
        size,
        block_size: 2 << 20,
        uuid: [id.max(1); 16],
        creator: Creator::WINDOWS_10,
        timestamp: Timestamp(0),
    };
    create_file(path, &create, true)?;
    Ok(())
}

pub fn new_child(path: &Path, parent: &Path, id: u8) -> Result<()> {
    create_child(path, parent, &ChildOptions { overwrite: true, ..ChildOptions::new([id.max(1); 16]) }, &options(false))?;
    Ok(())
}
