//! Files through FUSE: the mount against the least that a FUSE file over a raw file can be, and against others.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Place, files};
use crate::measure::{Goal, Row, Sample, Subject, Unit, alternate};
use crate::process::{Server, exists, shell, vhd};

/// A disk as a file, and who serves it.
struct Served {
    name: &'static str,
    file: PathBuf,
    mount: PathBuf,
    /// The least of the work that it can be asked for in a reasonable time.
    is_slow: bool,
    is_writable: bool,
    is_floor: bool,
    server: Server,
}

impl Served {
    fn start(name: &'static str, folder: PathBuf, file: &str, command: &mut Command) -> Result<Self> {
        std::fs::create_dir_all(&folder)?;
        let file = folder.join(file);
        let server = Server::start(command, &file)?;
        Ok(Self { name, file, mount: folder, is_slow: false, is_writable: true, is_floor: false, server })
    }

    fn fio(&self, arguments: &[&str], seconds: f64) -> Result<Sample> {
        let before = self.server.cpu()?;
        let output = Command::new("fio")
            .args(["--name=j", "--direct=1", "--time_based", "--output-format=json", "--randrepeat=0"])
            .args(["--norandommap", "--clocksource=clock_gettime"])
            .arg(format!("--runtime={}ms", (seconds * 1e3) as u64))
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
        Ok(Sample { value: number("iops"), cpu: Some(cpu), memory: Some(self.server.memory()?) })
    }

    /// A read through the page cache, of which nothing is there at first; seconds for all of it.
    fn cold(&self, mib: u64) -> Result<Sample> {
        let part = if self.is_slow { 64 } else { 1 };
        let file = self.file.display();
        shell(&format!("dd if={file} iflag=nocache count=0 status=none"))?;
        let before = self.server.cpu()?;
        let read = shell(&format!("dd if={file} of=/dev/null bs=1M count={} status=none", mib / part))?;
        let cpu = (self.server.cpu()? - before) * part as f64;
        Ok(Sample { value: read.value * part as f64, cpu: Some(cpu), memory: Some(self.server.memory()?) })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // The server itself ends with it.
        let _ = Command::new("umount").arg("-l").arg(&self.mount).status();
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

fn servers(memory: &Path, [raw, copy]: [&Path; 2], [image, for_qemu]: [&Path; 2]) -> Result<Vec<Served>> {
    let mut found = Vec::new();
    let folder = |name: &str| memory.join(name);
    let least = |name, file: &Path, folder: PathBuf| {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--serve-floor").arg(file).arg(&folder);
        Served::start(name, folder, "disk.raw", &mut command)
    };
    found.push(least("fuser, pread and pwrite on the raw file", raw, folder("floor"))?);
    let mut own = Command::new(vhd()?);
    own.args(["mount", "--foreground"]).arg(image).arg(folder("vhd"));
    found.push(Served::start("vhd mount", folder("vhd"), "disk.raw", &mut own)?);
    if exists("qemu-storage-daemon") {
        found.push(storage_daemon(memory, for_qemu)?);
    }
    if exists("vhdimount") {
        let mut other = Command::new("vhdimount");
        // It stays in the foreground then.
        other.arg("-v").arg(image).arg(folder("vhdimount")).stderr(Stdio::null());
        let mut served = Served::start("vhdimount", folder("vhdimount"), "vhdi1", &mut other)?;
        (served.is_slow, served.is_writable) = (true, false);
        found.push(served);
    }
    // The reference once more: what it differs by says nothing of who serves.
    let mut floor = least("the same on a copy of the raw file", copy, folder("floor-of-copy"))?;
    floor.is_floor = true;
    found.push(floor);
    Ok(found)
}

fn storage_daemon(memory: &Path, image: &Path) -> Result<Served> {
    let (file, ready) = (memory.join("daemon.raw"), memory.join("daemon.pid"));
    std::fs::write(&file, "")?;
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--blockdev").arg(format!("driver=file,node-name=f,filename={},aio=threads", image.display()));
    command.args(["--blockdev", "driver=vpc,node-name=v,file=f", "--export"]);
    command.arg(format!("type=fuse,id=e,node-name=v,mountpoint={},writable=on,growable=off", file.display()));
    command.arg("--pidfile").arg(&ready);
    let server = Server::start(&mut command, &ready)?;
    Ok(Served {
        name: "qemu-storage-daemon, vpc",
        mount: file.clone(),
        file,
        is_slow: false,
        is_writable: true,
        is_floor: false,
        server,
    })
}

fn subject<'a>(served: &Served, run: impl FnMut() -> Result<Sample> + 'a) -> Subject<'a> {
    let subject = Subject::new(served.name, run);
    if served.is_floor { subject.being_floor() } else { subject }
}

pub fn fuse(place: &Place) -> Result<Vec<Row>> {
    let mib = if place.long { 2048 } else { 1024 };
    let (raw, image) = (place.memory.join("fuse.img"), place.memory.join("fuse.vhd"));
    // A copy for the floor, and one for QEMU, which would write to the image that is served.
    let (copy, for_qemu) = (place.memory.join("copy.img"), place.memory.join("daemon.vhd"));
    files::alike(&[&raw, &copy], &[&image, &for_qemu], mib)?;
    let servers = servers(&place.memory, [&raw, &copy], [&image, &for_qemu])?;
    let mut rows = Vec::new();
    for (load, arguments) in LOADS {
        let able = servers.iter().filter(|served| served.is_writable || !load.contains("write"));
        let subject = |served| subject(served, move || served.fio(arguments, place.short_seconds()));
        let mut subjects: Vec<_> =
            able.map(subject).enumerate().map(|(n, one)| if n == 1 { one.with_target(0.95) } else { one }).collect();
        rows.extend(alternate(&format!("FUSE {load}"), Unit::PerSecond, place.rounds, &mut subjects)?);
    }
    let subjects = servers.iter().map(|served| subject(served, || served.cold(mib)));
    // 2 GB a second at least.
    let most = (mib << 20) as f64 / 2e9;
    let mut subjects: Vec<_> = subjects
        .enumerate()
        .map(|(n, one)| if n == 1 { one.with_target(1.0 / 0.95).with(Goal::Value(most)) } else { one })
        .collect();
    rows.extend(alternate("FUSE buffered sequential read, cold", Unit::Seconds, place.rounds, &mut subjects)?);
    Ok(rows)
}
