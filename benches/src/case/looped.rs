//! ext4 in a loop device over the mount's file, against ext4 in a loop device over a raw file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::Place;
use super::files::{Random, new_dynamic};
use crate::measure::{Row, Sample, Subject, Unit, alternate};
use crate::process::{Server, output, run, shell, vhd};

const SIZE: u64 = 3 << 30;
/// Transactions of the load that syncs after each.
const TRANSACTIONS: u32 = 100;

/// A file system that is mounted from a file.
struct Looped {
    name: &'static str,
    device: String,
    folder: PathBuf,
}

impl Looped {
    fn new(name: &'static str, file: &Path, folder: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&folder)?;
        // As `vhd mount --fs` has it.
        let device = output("losetup", &["--find", "--show", "--direct-io=on", &file.to_string_lossy()])?.trim().to_owned();
        // From here on the drop gives everything back.
        let looped = Self { name, device, folder };
        // All of it now, so that nothing is left to the background.
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", &looped.device]))?;
        run(Command::new("mount").arg(&looped.device).arg(&looped.folder))?;
        Ok(looped)
    }

    fn at(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn fio(&self, rw: &str, seconds: f64) -> Result<Sample> {
        let file = self.at("fio");
        let line = format!(
            "fio --name=j --filename={file} --size=512m --direct=1 --ioengine=io_uring --iodepth=32 --bs=4k --rw={rw} --time_based \
             --runtime={}ms --randrepeat=0 --norandommap --fallocate=none --output-format=json",
            (seconds * 1e3) as u64
        );
        let text = output("sh", &["-c", &line])?;
        let told: serde_json::Value = serde_json::from_str(text.get(text.find('{').context("fio")?..).unwrap_or(""))?;
        let of = |way: &str| told["jobs"][0][way]["iops"].as_f64().unwrap_or(0.0);
        Ok(Sample::of(of("read") + of("write")))
    }

    fn untar(&self, archive: &Path) -> Result<Sample> {
        let tree = self.at("tree");
        let sample = shell(&format!("mkdir {tree}; tar -xf {} -C {tree}; sync -f {tree}", archive.display()));
        shell(&format!("rm -rf {tree}; sync -f {}", self.folder.display()))?;
        Ok(Sample { memory: None, ..sample? })
    }

    fn transactions(&self, script: &Path) -> Result<Sample> {
        let base = self.at("base.db");
        let sample = shell(&format!("sqlite3 {base} < {}", script.display()));
        let _ = std::fs::remove_file(&base);
        Ok(Sample { memory: None, ..sample? })
    }
}

impl Drop for Looped {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.folder).status();
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

/// Small files, as source trees have them.
fn archive(folder: &Path) -> Result<PathBuf> {
    let (tree, archive) = (folder.join("source"), folder.join("source.tar"));
    let mut random = Random(11);
    for n in 0..3000 {
        let place = tree.join(format!("{}", n / 50));
        std::fs::create_dir_all(&place)?;
        let len = random.below(30_000) as usize;
        std::fs::write(place.join(format!("{n}")), random.bytes(len))?;
    }
    shell(&format!("tar -cf {} -C {} .", archive.display(), tree.display()))?;
    std::fs::remove_dir_all(&tree)?;
    Ok(archive)
}

fn script(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("script.sql");
    let mut file = BufWriter::new(File::create(&path)?);
    writeln!(file, "pragma journal_mode = delete; pragma synchronous = full; create table t (n integer primary key, text);")?;
    for n in 0..TRANSACTIONS {
        writeln!(file, "insert into t values ({n}, hex(randomblob(200)));")?;
    }
    file.flush()?;
    Ok(path)
}

type Work<'a> = (&'a str, Unit, &'a dyn Fn(&Looped) -> Result<Sample>);

pub fn file_systems(place: &Place) -> Result<Vec<Row>> {
    let (archive, script) = (archive(&place.memory)?, script(&place.memory)?);
    let seconds = place.seconds();
    let costs: [Work<'_>; 3] = [
        ("random read 4 KiB, depth 32, memory", Unit::PerSecond, &|one| one.fio("randread", seconds)),
        ("random write 4 KiB, depth 32, memory", Unit::PerSecond, &|one| one.fio("randwrite", seconds)),
        ("untar 3000 files, synced, memory", Unit::Seconds, &|one| one.untar(&archive)),
    ];
    let syncs: [Work<'_>; 1] = [("sqlite, a sync for each transaction, disk", Unit::Seconds, &|one| one.transactions(&script))];
    let mut rows = over_all(&place.memory, &costs, place.rounds)?;
    rows.extend(over_all(&place.disk, &syncs, place.rounds)?);
    Ok(rows)
}

/// The same work on a raw file, on an image, and on another raw file through the least that FUSE can be; all empty, in a folder.
fn over_all(folder: &Path, works: &[Work<'_>], rounds: usize) -> Result<Vec<Row>> {
    let [raw, other, image] = ["loop.img", "other.img", "loop.vhd"].map(|name| folder.join(name));
    let [mounted, floor] = ["mounted", "floor"].map(|name| folder.join(name));
    for path in [&raw, &other] {
        File::create(path)?.set_len(SIZE)?;
    }
    new_dynamic(&image, SIZE, 1)?;
    for folder in [&mounted, &floor] {
        std::fs::create_dir_all(folder)?;
    }
    let (file, floor_file) = (mounted.join("disk.raw"), floor.join("disk.raw"));
    let server = Server::start(Command::new(vhd()?).args(["mount", "--foreground"]).arg(&image).arg(&mounted), &file)?;
    let mut command = Command::new(std::env::current_exe()?);
    let floor_server = Server::start(command.arg("--serve-floor").arg(&other).arg(&floor), &floor_file)?;
    let measured = in_loops(folder, [&raw, &file, &floor_file], works, rounds);
    for folder in [&mounted, &floor] {
        let _ = Command::new("umount").arg("-l").arg(folder).status();
    }
    drop((server, floor_server));
    for path in [raw, other, image] {
        let _ = std::fs::remove_file(path);
    }
    measured
}

fn in_loops(folder: &Path, files: [&Path; 3], works: &[Work<'_>], rounds: usize) -> Result<Vec<Row>> {
    let loops = [
        Looped::new("loop over the raw file", files[0], folder.join("in-raw"))?,
        Looped::new("loop over the mount's disk.raw", files[1], folder.join("in-vhd"))?,
        Looped::new("loop over fuser, pread and pwrite on a raw file", files[2], folder.join("in-floor"))?,
    ];
    let mut rows = Vec::new();
    for (work, unit, run) in works {
        let target = if *unit == Unit::Seconds { 1.0 / 0.7 } else { 0.7 };
        let mut subjects = [
            Subject::new(loops[0].name, || run(&loops[0])),
            Subject::new(loops[1].name, || run(&loops[1])).with_target(target),
            Subject::new(loops[2].name, || run(&loops[2])).being_floor(),
        ];
        rows.extend(alternate(&format!("ext4 in a loop device: {work}"), *unit, rounds, &mut subjects)?);
    }
    Ok(rows)
}
