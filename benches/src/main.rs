//! Runs the benchmarks and writes their table; see `benches/README.md`.

mod case;
mod chart;
mod floor;
mod guard;
mod measure;
mod nbd_floor;
mod process;
mod report;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;

use self::case::{CASES, Place};
use self::report::Report;

/// Measures how far each path is from what the kernel can do, and from what a user would pick instead.
#[derive(Debug, Parser)]
struct Options {
    /// Larger files and more rounds: an hour instead of minutes
    #[arg(long)]
    long: bool,
    /// Only cases whose group begins like this; may be given more than once
    #[arg(long)]
    only: Vec<String>,
    /// Counted rounds of each case; where a goal is near, up to six times as many
    #[arg(long)]
    rounds: Option<usize>,
    /// A folder in memory
    #[arg(long, default_value = "/dev/shm")]
    memory: PathBuf,
    /// A folder on a disk
    #[arg(long, default_value = "/var/tmp")]
    disk: PathBuf,
    /// Put the table and the plot into this folder's performance.md and performance.svg
    #[arg(long, value_name = "FOLDER")]
    publish: Option<PathBuf>,
    /// Do one hot function so many times, and nothing else: for those who count its instructions
    #[arg(long, num_args = 2, value_names = ["NAME", "TIMES"])]
    guard: Option<Vec<String>>,
    /// Serve a raw file on a folder instead, as the reference of the FUSE cases
    #[arg(long, num_args = 2, value_names = ["FILE", "FOLDER"])]
    serve_floor: Option<Vec<PathBuf>>,
    /// Serve a raw file at a Unix socket instead, as the floor of the NBD cases
    #[arg(long, num_args = 2, value_names = ["FILE", "SOCKET"])]
    serve_nbd_floor: Option<Vec<PathBuf>>,
    /// Where the results go
    #[arg(long, default_value = "target/bench")]
    output: PathBuf,
}

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == process::LAUNCH) {
        return process::launch(&arguments.next().context("nothing to launch")?, arguments);
    }
    let options = Options::parse();
    if let Some([name, times]) = options.guard.as_deref() {
        return guard::run(name, times.parse()?);
    }
    if let Some([file, folder]) = options.serve_floor.as_deref() {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        // As many as `vhd mount` has.
        return floor::serve(file, folder, (threads * 2).clamp(8, 16));
    }
    if let Some([file, socket]) = options.serve_nbd_floor.as_deref() {
        return nbd_floor::serve(file, socket);
    }
    let rounds = options.rounds.unwrap_or(if options.long { 9 } else { 5 });
    let (memory, disk) = (tempfile::tempdir_in(&options.memory)?, tempfile::tempdir_in(&options.disk)?);
    let place = Place { memory: memory.path().into(), disk: disk.path().into(), long: options.long, rounds };
    std::fs::create_dir_all(&options.output).with_context(|| options.output.display().to_string())?;
    let mut report = Report::new(&place.memory, &place.disk, rounds);
    for (group, case) in CASES {
        if options.only.is_empty() || options.only.iter().any(|only| group.starts_with(only.as_str())) {
            eprint!("{group} ...");
            let began = Instant::now();
            let measured = case(&place);
            eprintln!(" {:.0} s", began.elapsed().as_secs_f64());
            match measured {
                Ok(rows) => report.rows.extend(rows),
                // The others are worth having all the same.
                Err(error) => report.missing.push(format!("{group}: {error:#}")),
            }
            report.write(&options.output)?;
        }
    }
    if let Some(folder) = &options.publish {
        report.publish(folder)?;
    }
    print!("{}", report.to_markdown());
    Ok(())
}
