//! Files through FUSE: the mount against the least that a FUSE file over a raw file can be, and against others.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Place, files};
use crate::measure::{Row, Sample, Subject, Unit, alternate};
use crate::process::{Server, run, shell, vhd};

/// A disk as a file, and who serves it.
struct Served {
    name: &'static str,
    file: PathBuf,
    folder: PathBuf,
    server: Server,
}

impl Served {
    fn start(name: &'static str, folder: PathBuf, file: &str, command: &mut Command) -> Result<Self> {
        std::fs::create_dir_all(&folder)?;
        let file = folder.join(file);
        let server = Server::start(command, &file)?;
        Ok(Self { name, file, folder, server })
    }

    fn fio(&self, arguments: &[&str]) -> Result<Sample> {
        let before = self.server.cpu()?;
        let output = Command::new("fio")
            .args(["--name=j", "--direct=1", "--time_based", "--runtime=1s", "--output-format=json", "--randrepeat=0"])
            .arg("--norandommap")
            .arg(format!("--filename={}", self.file.display()))
            .args(arguments)
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let start = text.find('{').with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        let told: Value = serde_json::from_str(&text[start..])?;
        let number = |key: &str| {
            let job = &told["jobs"][0];
            job["read"][key].as_f64().unwrap_or(0.0) + job["write"][key].as_f64().unwrap_or(0.0)
        };
        let cpu = (self.server.cpu()? - before) / number("total_ios").max(1.0) * 1e6;
        Ok(Sample { value: number("iops"), cpu: Some(cpu), memory: None })
    }

    /// A read through the page cache, of which nothing is there at first.
    fn cold(&self, mib: u64) -> Result<Sample> {
        let file = self.file.display();
        shell(&format!("dd if={file} iflag=nocache count=0 status=none"))?;
        shell(&format!("dd if={file} of=/dev/null bs=1M count={mib} status=none"))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // The server itself ends with it.
        let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
    }
}

const LOADS: [(&str, &[&str]); 6] = [
    ("sequential read 1 MiB, direct", &["--rw=read", "--bs=1m", "--ioengine=psync"]),
    ("sequential write 1 MiB, direct", &["--rw=write", "--bs=1m", "--ioengine=psync"]),
    ("random read 4 KiB, direct, depth 1", &["--rw=randread", "--bs=4k", "--ioengine=psync"]),
    ("random read 4 KiB, direct, depth 32", &["--rw=randread", "--bs=4k", "--ioengine=io_uring", "--iodepth=32"]),
    ("random write 4 KiB, direct, depth 1", &["--rw=randwrite", "--bs=4k", "--ioengine=psync"]),
    ("random write 4 KiB, direct, depth 32", &["--rw=randwrite", "--bs=4k", "--ioengine=io_uring", "--iodepth=32"]),
];

fn servers(memory: &Path, raw: &Path, image: &Path) -> Result<Vec<Served>> {
    let mut found = Vec::new();
    let folder = |name: &str| memory.join(name);
    let mut floor = Command::new(std::env::current_exe()?);
    floor.arg("--serve-floor").arg(raw).arg(folder("floor"));
    found.push(Served::start("fuser, pread and pwrite on the raw file", folder("floor"), "disk.raw", &mut floor)?);
    let mut own = Command::new(vhd()?);
    own.args(["mount", "--foreground"]).arg(image).arg(folder("vhd"));
    found.push(Served::start("vhd mount", folder("vhd"), "disk.raw", &mut own)?);
    Ok(found)
}

pub fn fuse(place: &Place) -> Result<Vec<Row>> {
    let mib = if place.long { 2048 } else { 1024 };
    let (raw, image) = (place.memory.join("fuse.img"), place.memory.join("fuse.vhd"));
    files::noise(&raw, mib)?;
    run(Command::new(vhd()?).arg("convert").arg(&raw).arg(&image))?;
    let servers = servers(&place.memory, &raw, &image)?;
    let mut rows = Vec::new();
    for (load, arguments) in LOADS {
        let subjects = servers.iter().map(|served| Subject::new(served.name, || served.fio(arguments)));
        let mut subjects: Vec<_> =
            subjects.enumerate().map(|(n, one)| if n == 1 { one.with_target(0.95) } else { one }).collect();
        rows.extend(alternate(&format!("FUSE {load}"), Unit::PerSecond, place.rounds, &mut subjects)?);
    }
    let subjects = servers.iter().map(|served| Subject::new(served.name, || served.cold(mib)));
    let mut subjects: Vec<_> =
        subjects.enumerate().map(|(n, one)| if n == 1 { one.with_target(1.0 / 0.95) } else { one }).collect();
    rows.extend(alternate("FUSE buffered sequential read, cold", Unit::Seconds, place.rounds, &mut subjects)?);
    Ok(rows)
}
