//! Chains of many images, and the largest tables.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use vhd_core::Disk;

use super::Place;
use super::files::{Random, new_child, new_dynamic, open};
use crate::measure::{Goal, Row, Sample, Subject, Unit, alternate};
use crate::process::{run, vhd};

const LAYERS: u8 = 30;

/// Random reads of 4 KiB for half a second.
fn random_reads(disk: &Disk, random: &mut Random) -> Result<Sample> {
    let mut buffer = page();
    let pages = disk.size() / 4096;
    let (began, mut count) = (Instant::now(), 0_u32);
    while began.elapsed() < Duration::from_millis(500) {
        for _ in 0..64 {
            disk.read_at(&mut buffer, random.below(pages) * 4096)?;
        }
        count += 64;
    }
    Ok(Sample::of(f64::from(count) / began.elapsed().as_secs_f64()))
}

/// Where each 4 KiB of a chain are: what is left of a read when nobody has to be asked.
struct Bare {
    files: Vec<std::fs::File>,
    places: Vec<(u8, u64)>,
}

impl Bare {
    /// `paths` has the base first.
    fn of(disk: &Disk, paths: &[PathBuf]) -> Result<Self> {
        let files = paths.iter().rev().map(std::fs::File::open).collect::<std::io::Result<_>>()?;
        let mut places = Vec::new();
        disk.extents(0..disk.size(), &mut |extent| {
            for at in extent.range.clone().step_by(4096) {
                places.push((extent.depth as u8, extent.offset.unwrap_or(0) + (at - extent.range.start)));
            }
            Ok(())
        })?;
        Ok(Self { files, places })
    }

    fn random_reads(&self, random: &mut Random) -> Result<Sample> {
        use std::os::unix::fs::FileExt;
        let mut buffer = page();
        let (began, mut count) = (Instant::now(), 0_u32);
        while began.elapsed() < Duration::from_millis(500) {
            for _ in 0..64 {
                let (depth, offset) = self.places[random.below(self.places.len() as u64) as usize];
                self.files[usize::from(depth)].read_exact_at(&mut buffer, offset)?;
            }
            count += 64;
        }
        Ok(Sample::of(f64::from(count) / began.elapsed().as_secs_f64()))
    }
}

fn page() -> vhd_core::storage::AlignedBuffer {
    vhd_core::storage::AlignedBuffer::new(4096)
}

/// 4 KiB random reads through 30 layers of which each wrote 3 %, all in memory, against one layer.
pub fn read(place: &Place) -> Result<Vec<Row>> {
    let gib = if place.long { 4 } else { 1 };
    let size = gib << 30;
    let paths: Vec<PathBuf> = (0..LAYERS).map(|layer| place.memory.join(format!("{layer}.vhd"))).collect();
    let mut random = Random(3);
    let noise = random.bytes(1 << 20);
    new_dynamic(&paths[0], size, 1)?;
    let base = open(&paths[0], true)?;
    for mib in 0..size >> 20 {
        base.write_at(&noise, mib << 20)?;
    }
    base.close()?;
    drop(base);
    for layer in 1..LAYERS {
        let (child, parent) = (&paths[usize::from(layer)], &paths[usize::from(layer) - 1]);
        new_child(child, parent, layer + 1)?;
        let disk = open(child, true)?;
        for _ in 0..size / 4096 * 3 / 100 {
            disk.write_at(&noise[..4096], random.below(size / 4096) * 4096)?;
        }
        disk.close()?;
    }
    // The same leaf again, so that it can be open in both ways at once.
    let (leaf, same) = (&paths[usize::from(LAYERS) - 1], place.memory.join("same.vhd"));
    std::fs::copy(leaf, &same)?;
    let (one, all, writable) = (open(&paths[0], false)?, open(leaf, false)?, open(&same, true)?);
    let mut warm = vec![0; 1 << 20];
    for _ in 0..2 {
        for mib in 0..size >> 20 {
            all.read_at(&mut warm, mib << 20)?;
            writable.read_at(&mut warm, mib << 20)?;
        }
    }
    let [mut a, mut b, mut c, mut d] = [5; 4].map(Random);
    let bare = Bare::of(&all, &paths)?;
    let mut subjects = [
        Subject::new("1 layer", || random_reads(&one, &mut a)),
        Subject::new("30 layers", || random_reads(&all, &mut b)).with_target(0.85),
        Subject::new("30 layers, open for writing", || random_reads(&writable, &mut d)).with_target(0.85),
        Subject::new("bare preads of the same places", || bare.random_reads(&mut c)).being_floor(),
    ];
    let rows = alternate("4 KiB random read, warm", Unit::PerSecond, place.rounds, &mut subjects);
    drop(subjects);
    drop(writable);
    paths.iter().chain([&same]).for_each(|path| drop(std::fs::remove_file(path)));
    rows
}

/// Opening a chain of 30 disks of 2040 GiB.
pub fn open_all(place: &Place) -> Result<Vec<Row>> {
    let paths: Vec<PathBuf> = (0..LAYERS).map(|layer| place.memory.join(format!("{layer}.vhd"))).collect();
    new_dynamic(&paths[0], 2040 << 30, 1)?;
    for layer in 1..LAYERS {
        new_child(&paths[usize::from(layer)], &paths[usize::from(layer) - 1], layer + 1)?;
    }
    let leaf = paths[usize::from(LAYERS) - 1].clone();
    let vhd = vhd()?;
    let mut subjects = [
        Subject::new("vhd --version", || run(std::process::Command::new(&vhd).arg("--version"))),
        Subject::new("vhd read, 30 x 2040 GiB, 1 byte", || {
            run(std::process::Command::new(&vhd).arg("read").arg(&leaf).args(["--offset", "1T", "--length", "1"]))
        })
        .with(Goal::Value(0.1))
        .with(Goal::Memory(64 << 20)),
    ];
    let rows = alternate("open a chain and read a byte", Unit::Seconds, place.rounds, &mut subjects);
    drop(subjects);
    paths.iter().for_each(|path| drop(std::fs::remove_file(path)));
    rows
}

/// Structure of the largest image with every block allocated, in a sparse file.
pub fn check(place: &Place) -> Result<Vec<Row>> {
    use std::os::unix::fs::FileExt;
    let path = place.disk.join("full.vhd");
    new_dynamic(&path, 2040 << 30, 1)?;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path)?;
    let mut header = [0; 1024];
    file.read_exact_at(&mut header, 512)?;
    let table = u64::from_be_bytes(header[16..24].try_into()?);
    let mut footer = [0; 512];
    file.read_exact_at(&mut footer, 0)?;
    let blocks = 2040_u64 << 9;
    // Bitmaps are in the sector before data that begins on a page.
    let first = (table + blocks * 4).next_multiple_of(4096) + 4096;
    let stride = (2 << 20) + 4096;
    let entries: Vec<u8> = (0..blocks).flat_map(|n| (((first - 512 + n * stride) / 512) as u32).to_be_bytes()).collect();
    file.write_all_at(&entries, table)?;
    let end = first + blocks * stride + 4096;
    file.set_len(end.next_multiple_of(4096))?;
    file.write_all_at(&footer, end.next_multiple_of(4096) - 512)?;
    let vhd = vhd()?;
    let mut subjects = [
        Subject::new("vhd --version", || run(std::process::Command::new(&vhd).arg("--version"))),
        Subject::new("vhd check", || run(std::process::Command::new(&vhd).arg("check").arg(&path))).with(Goal::Value(2.0)),
    ];
    let rows = alternate("check of a full 2040 GiB image", Unit::Seconds, place.rounds, &mut subjects);
    drop(subjects);
    std::fs::remove_file(&path)?;
    rows
}
