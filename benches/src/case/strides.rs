//! Small writes on a disk, past the page cache: over blocks that are there, and to blocks that are not.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Instant;

use anyhow::Result;
use vhd_core::Disk;
use vhd_core::chain::ChainOptions;
use vhd_core::storage::AlignedBuffer;

use super::Place;
use super::files::{Random, new_dynamic, options};
use crate::measure::{Row, Sample, Subject, Unit, alternate};

/// Each write is in another block, and somewhere else in it: 2 MiB and a page further on.
const STRIDE: u64 = (2 << 20) + 4096;
const SIZE: u64 = 1 << 30;
const O_DIRECT: i32 = 0o40000;

/// So many writes at a time, each by a thread of its own; writes a second.
fn writes(depth: u64, total: u64, flush_every: Option<u64>, target: &(dyn Target + '_)) -> Result<Sample> {
    let began = Instant::now();
    std::thread::scope(|scope| {
        let each = |thread: u64| {
            let mut buffer = AlignedBuffer::new(4096);
            buffer.fill(thread as u8 + 1);
            for n in (thread..total).step_by(depth as usize) {
                target.write(&buffer, n * STRIDE % target.size() / 4096 * 4096)?;
                if flush_every.is_some_and(|every| n % every == every - 1) {
                    target.flush()?;
                }
            }
            anyhow::Ok(())
        };
        let running: Vec<_> = (0..depth).map(|thread| scope.spawn(move || each(thread))).collect();
        running.into_iter().try_for_each(|thread| thread.join().expect("a thread panicked"))
    })?;
    Ok(Sample::of(total as f64 / began.elapsed().as_secs_f64()))
}

trait Target: Sync {
    fn write(&self, bytes: &[u8], at: u64) -> Result<()>;
    fn flush(&self) -> Result<()>;
    fn size(&self) -> u64;
}

impl Target for Disk {
    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        Ok(self.write_at(bytes, at)?)
    }

    fn flush(&self) -> Result<()> {
        let device: &dyn vhd_core::block::BlockDevice = &**self;
        Ok(device.flush()?)
    }

    fn size(&self) -> u64 {
        self.size()
    }
}

struct Raw(File, u64);

impl Target for Raw {
    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        Ok(self.0.write_all_at(bytes, at)?)
    }

    fn flush(&self) -> Result<()> {
        Ok(self.0.sync_data()?)
    }

    fn size(&self) -> u64 {
        self.1
    }
}

fn direct(path: &std::path::Path, size: u64) -> Result<Raw> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).custom_flags(O_DIRECT).open(path)?;
    file.set_len(size)?;
    Ok(Raw(file, size))
}

pub fn overwrite(place: &Place) -> Result<Vec<Row>> {
    let (image, raw) = (place.disk.join("strides.vhd"), place.disk.join("strides.img"));
    let total = if place.long { 40_000 } else { 10_000 };
    super::files::noise(&raw, SIZE >> 20)?;
    new_dynamic(&image, SIZE, 1)?;
    let disk = Disk::open(&image, &ChainOptions { direct: true, ..options(true) })?;
    let noise = Random(1).bytes(1 << 20);
    for mib in 0..SIZE >> 20 {
        disk.write_at(&noise, mib << 20)?;
    }
    Target::flush(&disk)?;
    let raw_file = direct(&raw, SIZE)?;
    let mut rows = Vec::new();
    for depth in [1, 32] {
        let mut subjects = [
            Subject::new("raw file", || writes(depth, total, None, &raw_file)),
            Subject::new("vhd", || writes(depth, total, None, &disk)).with_target(0.9),
        ];
        let case = format!("4 KiB overwrite by strides of 2 MiB, direct, disk, depth {depth}");
        rows.extend(alternate(&case, Unit::PerSecond, place.rounds, &mut subjects)?);
    }
    drop(disk);
    std::fs::remove_file(&image)?;
    std::fs::remove_file(&raw)?;
    Ok(rows)
}

pub fn allocate(place: &Place) -> Result<Vec<Row>> {
    let (image, raw) = (place.disk.join("strides.vhd"), place.disk.join("strides.img"));
    let (total, size) = (4000, 32 << 30);
    let mut rows = Vec::new();
    for depth in [1, 32] {
        let sparse = || {
            let _ = std::fs::remove_file(&raw);
            writes(depth, total, Some(64), &direct(&raw, size)?)
        };
        let allocating = || {
            new_dynamic(&image, size, 1)?;
            let disk = Disk::open(&image, &ChainOptions { direct: true, ..options(true) })?;
            writes(depth, total, Some(64), &disk)
        };
        let mut subjects = [Subject::new("sparse raw file", sparse), Subject::new("vhd", allocating).with_target(0.5)];
        let case = format!("4 KiB writes that allocate a block each, direct, disk, a flush every 64, depth {depth}");
        rows.extend(alternate(&case, Unit::PerSecond, place.rounds, &mut subjects)?);
    }
    let _ = std::fs::remove_file(&image);
    let _ = std::fs::remove_file(&raw);
    Ok(rows)
}
