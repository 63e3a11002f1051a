//! Two threads against one, on one disk.

use std::time::Instant;

use anyhow::Result;
use vhd_core::Disk;
use vhd_core::storage::AlignedBuffer;

use super::Place;
use super::files::{Random, new_dynamic, open};
use crate::measure::{Row, Sample, Subject, Unit, alternate};

const SIZE: u64 = 1 << 30;

#[derive(Clone, Copy)]
enum Work {
    Read,
    Overwrite,
    Allocate,
}

/// So many requests of 4 KiB, shared by the threads; requests a second.
fn requests(disk: &Disk, threads: u64, total: u64, work: Work) -> Result<Sample> {
    let began = Instant::now();
    std::thread::scope(|scope| {
        let each = |thread: u64| {
            let mut buffer = AlignedBuffer::new(4096);
            buffer.fill(thread as u8 + 1);
            let mut random = Random(thread);
            for n in 0..total / threads {
                match work {
                    Work::Read => disk.read_at(&mut buffer, random.below(SIZE / 4096) * 4096)?,
                    Work::Overwrite => disk.write_at(&buffer, random.below(SIZE / 4096) * 4096)?,
                    // Each a block of its own.
                    Work::Allocate => disk.write_at(&buffer, (n * threads + thread) * (2 << 20))?,
                }
            }
            Ok::<(), vhd_core::Error>(())
        };
        let running: Vec<_> = (0..threads).map(|thread| scope.spawn(move || each(thread))).collect();
        running.into_iter().try_for_each(|thread| thread.join().expect("a thread panicked"))
    })?;
    Ok(Sample::of(total as f64 / began.elapsed().as_secs_f64()))
}

/// The same on a raw file: what the kernel lets two threads do at once.
fn bare(file: &std::fs::File, threads: u64, total: u64, work: Work) -> Result<Sample> {
    use std::os::unix::fs::FileExt;
    let began = Instant::now();
    std::thread::scope(|scope| {
        let each = |thread: u64| {
            let mut buffer = AlignedBuffer::new(4096);
            let mut random = Random(thread);
            for n in 0..total / threads {
                match work {
                    Work::Read => file.read_exact_at(&mut buffer, random.below(SIZE / 4096) * 4096)?,
                    Work::Overwrite => file.write_all_at(&buffer, random.below(SIZE / 4096) * 4096)?,
                    Work::Allocate => file.write_all_at(&buffer, (n * threads + thread) * (2 << 20))?,
                }
            }
            std::io::Result::Ok(())
        };
        let running: Vec<_> = (0..threads).map(|thread| scope.spawn(move || each(thread))).collect();
        running.into_iter().try_for_each(|thread| thread.join().expect("a thread panicked"))
    })?;
    Ok(Sample::of(total as f64 / began.elapsed().as_secs_f64()))
}

pub fn threads(place: &Place) -> Result<Vec<Row>> {
    let path = place.memory.join("threads.vhd");
    new_dynamic(&path, SIZE, 1)?;
    let disk = open(&path, true)?;
    let noise = Random(1).bytes(1 << 20);
    for mib in 0..SIZE >> 20 {
        disk.write_at(&noise, mib << 20)?;
    }
    disk.flush()?;
    let raw = place.memory.join("threads.img");
    super::files::noise(&raw, SIZE >> 20)?;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&raw)?;
    let mut rows = Vec::new();
    for (name, work) in [("read", Work::Read), ("overwrite", Work::Overwrite)] {
        let mut subjects = [
            Subject::new("1 thread", || requests(&disk, 1, 200_000, work)),
            Subject::new("2 threads", || requests(&disk, 2, 400_000, work)).with_target(1.8),
            Subject::new("raw file, 1 thread", || bare(&file, 1, 200_000, work)),
            Subject::new("raw file, 2 threads", || bare(&file, 2, 400_000, work)).against(2).being_floor(),
        ];
        rows.extend(alternate(&format!("4 KiB random {name}"), Unit::PerSecond, place.rounds, &mut subjects)?);
    }
    disk.close()?;
    drop(disk);
    let allocate = |threads| {
        new_dynamic(&path, 32 << 30, 1)?;
        let disk = open(&path, true)?;
        requests(&disk, threads, 16_000, Work::Allocate)
    };
    let sparse = |threads| {
        file.set_len(0)?;
        bare(&file, threads, 16_000, Work::Allocate)
    };
    let mut subjects = [
        Subject::new("1 thread", || allocate(1)),
        Subject::new("2 threads", || allocate(2)).with_target(1.4),
        Subject::new("raw file, 1 thread", || sparse(1)),
        Subject::new("raw file, 2 threads", || sparse(2)).against(2).being_floor(),
    ];
    rows.extend(alternate("4 KiB writes that allocate a block each", Unit::PerSecond, place.rounds, &mut subjects)?);
    std::fs::remove_file(&path)?;
    std::fs::remove_file(&raw)?;
    Ok(rows)
}
