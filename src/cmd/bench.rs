//! `vhd bench`

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use vhd_core::block::ExtentState;
use vhd_core::storage::AlignedBuffer;
use vhd_core::{Disk, Error, ErrorKind, Progress};

use super::ChainArgs;
use crate::output::{Answer, Context};

/// Bytes of a sequential read.
const LARGE: usize = 1 << 20;
/// Bytes of a random one.
const SMALL: usize = 4096;
/// Runs of data that are read at most: what comes after them on the disk is not looked at, and a list of all could be long.
const MAX_RUNS: usize = 1 << 20;
/// Turns of which the median counts, each of the disk and of the bare file.
const TURNS: usize = 5;

/// Arguments of `vhd bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// The image; it is only read
    image: PathBuf,
    /// Seconds in all
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    #[command(flatten)]
    open: ChainArgs,
}

/// One line of the JSON of `vhd bench`.
#[derive(Serialize)]
struct Figure {
    /// What was done.
    what: &'static str,
    /// MiB or requests a second, of the disk.
    disk: f64,
    /// The same of the files that hold it, read at the same places without asking anybody.
    file: f64,
    unit: &'static str,
    /// Median of the ratios of the two in the same turn.
    ratio: f64,
}

/// Where the data of a disk is: what is left of a read when nobody has to be asked.
struct Places {
    files: Vec<File>,
    /// Bytes of the disk, depth, and where in that layer's file.
    runs: Vec<(std::ops::Range<u64>, usize, u64)>,
    /// Bytes before each run, and in all.
    starts: Vec<u64>,
}

impl BenchArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let disk = Disk::open(&self.image, &self.open.options(false, false))?;
        let places = Places::of(&disk)?;
        if places.len() < LARGE as u64 {
            let message = format!("holds {} bytes of data, which is too little to measure; expected 1 MiB or more", places.len());
            return Err(Error::new(ErrorKind::InvalidInput, message).at(&self.image));
        }
        let each = Duration::from_secs(u64::from(self.seconds)) / (2 * 2 * TURNS as u32 + 2);
        let figures = context.with_progress("bench", |progress| {
            let sequential = compare("sequential read, 1 MiB", "MiB/s", LARGE, each, &disk, &places, progress)?;
            Ok([sequential, compare("random read, 4 KiB", "/s", SMALL, each, &disk, &places, progress)?])
        })?;
        let mut text = format!("{:24}{:>14}{:>18}{:>8}\n", "", "this disk", "its files alone", "ratio");
        for figure in &figures {
            let (disk, file) = (format!("{:.0} {}", figure.disk, figure.unit), format!("{:.0} {}", figure.file, figure.unit));
            text += &format!("{:24}{disk:>14}{file:>18}{:>8.2}\n", figure.what, figure.ratio);
        }
        text += "Only reads, through the page cache. Ratio 1: as fast as bare reads of the files at the same places.\n";
        context.print(&text, &figures)?;
        Ok(Answer::Yes)
    }
}

/// Both in turn, after a first read of each that brings what fits into the page cache.
fn compare(
    what: &'static str,
    unit: &'static str,
    len: usize,
    each: Duration,
    disk: &Disk,
    places: &Places,
    progress: &Progress,
) -> Result<Figure, Error> {
    // From MiB a second to requests.
    let scale = if len == LARGE { 1.0 } else { LARGE as f64 / SMALL as f64 };
    let mut samples = Vec::new();
    for turn in 0..=TURNS {
        // The same places for both: random ones from the same beginning.
        let of_disk = rate(len, each, places.len(), turn as u64, progress, &mut |buffer, at| {
            let (at, len) = places.disk_at(at, len);
            disk.read_at(&mut buffer[..len], at).map(|()| len)
        })?;
        let of_file = rate(len, each, places.len(), turn as u64, progress, &mut |buffer, at| places.read(at, buffer))?;
        if turn > 0 {
            samples.push((of_disk * scale, of_file * scale));
        }
    }
    let median = |of: &dyn Fn(&(f64, f64)) -> f64| {
        let mut values: Vec<f64> = samples.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Ok(Figure { what, disk: median(&|s| s.0), file: median(&|s| s.1), unit, ratio: median(&|s| s.0 / s.1) })
}

/// Fills a buffer, or the front of it, from a place; says how much.
type Read<'a> = &'a mut dyn FnMut(&mut [u8], u64) -> Result<usize, Error>;

/// MiB a second of reads at places below `end`: one after the other when they are large, else all over.
fn rate(len: usize, each: Duration, end: u64, seed: u64, progress: &Progress, read: Read<'_>) -> Result<f64, Error> {
    let mut buffer = AlignedBuffer::new(len);
    let steps = end / len as u64;
    let (mut state, mut next, mut bytes) = (seed, 0, 0_u64);
    let began = Instant::now();
    while began.elapsed() < each {
        for _ in 0..if len == LARGE { 1 } else { 64 } {
            // A full period over all places is not needed: a multiplicative walk scatters well enough.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let step = if len == LARGE { next % steps } else { (state >> 24) % steps };
            next += 1;
            bytes += read(&mut buffer, step * len as u64)? as u64;
        }
        progress.advance(0)?;
    }
    Ok(bytes as f64 / LARGE as f64 / began.elapsed().as_secs_f64())
}

impl Places {
    fn of(disk: &Disk) -> Result<Self, Error> {
        let (mut files, mut runs, mut starts, mut len) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for depth in 0..disk.capabilities().layers {
            let path = disk.layer_path(depth).unwrap_or_default();
            files.push(File::open(&path).map_err(|error| Error::io(error, "can't be opened").at(&path))?);
        }
        let all = disk.extents(0..disk.size(), &mut |extent| {
            if runs.len() >= MAX_RUNS {
                return Err(Error::new(ErrorKind::Cancelled, "enough"));
            }
            if let (ExtentState::Data, Some(offset)) = (extent.state, extent.offset) {
                starts.push(len);
                len += extent.range.end - extent.range.start;
                runs.push((extent.range, extent.depth, offset));
            }
            Ok(())
        });
        all.or_else(|error| if error.kind() == ErrorKind::Cancelled { Ok(()) } else { Err(error) })?;
        starts.push(len);
        Ok(Self { files, runs, starts })
    }

    /// Bytes of data.
    fn len(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// The run that holds the data's byte `at`, and how far into it that is.
    fn find(&self, at: u64) -> (usize, u64) {
        let run = self.starts.partition_point(|start| *start <= at).saturating_sub(1).min(self.runs.len() - 1);
        (run, at - self.starts[run])
    }

    /// Where on the disk the data's byte `at` is, and how many follow there, at most `len`.
    fn disk_at(&self, at: u64, len: usize) -> (u64, usize) {
        let (run, within) = self.find(at);
        let range = &self.runs[run].0;
        let start = range.start + within;
        (start, len.min(usize::try_from(range.end - start).unwrap_or(len)))
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> Result<usize, Error> {
        let (_, len) = self.disk_at(at, buffer.len());
        let (run, within) = self.find(at);
        let (_, depth, offset) = &self.runs[run];
        let read = self.files[*depth].read_exact_at(&mut buffer[..len], offset + within);
        read.map_err(|error| Error::io(error, "can't be read"))?;
        Ok(len)
    }
}
