//! NBD over a Unix socket: this server and others, in front of the same clients.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Place, files};
use crate::measure::{Goal, Row, Sample, Subject, Unit, alternate};
use crate::process::{Server, run, vhd};

/// The least that a server of the raw file can be.
const FLOOR: &str = "a loop of recv, pread or pwrite, send on the raw file";

/// This project's, serving what nobody may write: only for reads that are long enough to go without being copied.
const READ_ONLY: &str = "vhd, read-only";

/// A server of the same content as the others.
struct Served {
    name: &'static str,
    server: Server,
    uri: String,
}

impl Served {
    fn start(name: &'static str, command: &mut Command, socket: &Path) -> Result<Self> {
        let server = Server::start(command, socket)?;
        Ok(Self { name, server, uri: format!("nbd+unix:///?socket={}", socket.display()) })
    }

    /// Requests a second, and the server's processor seconds for each million.
    fn fio(&self, arguments: &[&str], size: u64, seconds: f64) -> Result<Sample> {
        let before = self.server.cpu()?;
        let output = Command::new("fio")
            .args(["--name=j", "--ioengine=nbd", "--thread", "--time_based", "--group_reporting"])
            .args([
                "--randrepeat=0",
                "--norandommap",
                "--clocksource=clock_gettime",
                "--output-format=json",
                &format!("--size={size}"),
            ])
            .arg(format!("--runtime={}ms", (seconds * 1e3) as u64))
            .arg(format!("--uri={}", self.uri))
            .args(arguments)
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        // Notes may stand before the document.
        let start = text.find('{').with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        let told: Value = serde_json::from_str(&text[start..])?;
        let job = &told["jobs"][0];
        let number = |key: &str| job["read"][key].as_f64().unwrap_or(0.0) + job["write"][key].as_f64().unwrap_or(0.0);
        let requests = number("total_ios").max(1.0);
        let cpu = Some((self.server.cpu()? - before) / requests * 1e6);
        Ok(Sample { value: number("iops"), cpu, memory: Some(self.server.memory()?) })
    }

    fn copy(&self) -> Result<Sample> {
        let before = self.server.cpu()?;
        let copied = run(Command::new("nbdcopy").args([self.uri.as_str(), "null:"]))?;
        Ok(Sample { value: copied.value, cpu: Some(self.server.cpu()? - before), memory: Some(self.server.memory()?) })
    }
}

/// All servers: the reference first, this project's second.
fn servers(folder: &Path, raw: &Path, [image, read_only, for_qemu]: [&Path; 3], mib: u64) -> Result<Vec<Served>> {
    let socket = |name: &str| folder.join(format!("{name}.sock"));
    let mut found = Vec::new();
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.args(["-f", "-U"]).arg(socket("nbdkit")).arg("file").arg(raw);
    found.push(Served::start("nbdkit file, raw", &mut nbdkit, &socket("nbdkit"))?);
    let mut own = Command::new(vhd()?);
    own.arg("serve").arg(image).arg("--listen").arg(format!("unix:{}", socket("vhd").display()));
    found.push(Served::start("vhd", &mut own, &socket("vhd"))?);
    let mut own = Command::new(vhd()?);
    own.args(["serve", "--read-only"]).arg(read_only).arg("--listen").arg(format!("unix:{}", socket("read-only").display()));
    found.push(Served::start(READ_ONLY, &mut own, &socket("read-only"))?);
    let mut memory = Command::new("nbdkit");
    memory.args(["-f", "-U"]).arg(socket("memory")).args(["memory", &format!("{mib}M")]);
    found.push(Served::start("nbdkit memory", &mut memory, &socket("memory"))?);
    let mut floor = Command::new(std::env::current_exe()?);
    floor.arg("--serve-nbd-floor").arg(raw).arg(socket("floor"));
    found.push(Served::start(FLOOR, &mut floor, &socket("floor"))?);
    let mut qemu = Command::new("qemu-nbd");
    qemu.arg("-k").arg(socket("qemu")).args(["-f", "vpc", "--aio=threads", "-e", "8", "-t"]).arg(for_qemu);
    found.push(Served::start("qemu-nbd, vpc", &mut qemu, &socket("qemu"))?);
    Ok(found)
}

const LOADS: [(&str, &[&str], f64); 7] = [
    ("random read 4 KiB, depth 1", &["--rw=randread", "--bs=4k", "--iodepth=1"], 1.0),
    ("random read 4 KiB, depth 32", &["--rw=randread", "--bs=4k", "--iodepth=32"], 1.0),
    ("random read 4 KiB, 4 connections of depth 8", &["--rw=randread", "--bs=4k", "--iodepth=8", "--numjobs=4"], 1.0),
    ("random write 4 KiB, depth 1", &["--rw=randwrite", "--bs=4k", "--iodepth=1"], 1.0),
    ("random write 4 KiB, depth 32", &["--rw=randwrite", "--bs=4k", "--iodepth=32"], 1.0),
    ("random write 4 KiB, 4 connections of depth 8", &["--rw=randwrite", "--bs=4k", "--iodepth=8", "--numjobs=4"], 1.0),
    ("sequential read 256 KiB, depth 8", &["--rw=read", "--bs=256k", "--iodepth=8"], 1.2),
];

pub fn nbd(place: &Place) -> Result<Vec<Row>> {
    let mib = if place.long { 2048 } else { 512 };
    let (raw, image) = (place.memory.join("nbd.img"), place.memory.join("nbd.vhd"));
    // QEMU's own: it would write to the image that is served. And who writes one keeps others from it.
    let (for_qemu, read_only) = (place.memory.join("qemu.vhd"), place.memory.join("read-only.vhd"));
    files::alike(&[&raw], &[&image, &read_only, &for_qemu], mib)?;
    let servers = servers(&place.memory, &raw, [&image, &read_only, &for_qemu], mib)?;
    let mut rows = Vec::new();
    for (load, arguments, target) in LOADS {
        let is_short = load.starts_with("random");
        let cpu = is_short.then_some(Goal::Cpu(0.75));
        let run = |served: &Served| served.fio(arguments, mib << 20, place.short_seconds());
        let mut subjects = subjects(servers.iter().filter(|served| !is_short || served.name != READ_ONLY), &run, target, cpu);
        rows.extend(alternate(&format!("NBD {load}"), Unit::PerSecond, place.rounds, &mut subjects)?);
    }
    let mut subjects = subjects(servers.iter(), &Served::copy, 1.0 / 1.2, None);
    rows.extend(alternate("NBD, nbdcopy to null", Unit::Seconds, place.rounds, &mut subjects)?);
    Ok(rows)
}

/// Servers at one piece of work, this project's with its goals.
fn subjects<'a>(
    servers: impl Iterator<Item = &'a Served>,
    run: &'a dyn Fn(&Served) -> Result<Sample>,
    target: f64,
    cpu: Option<Goal>,
) -> Vec<Subject<'a>> {
    let subject = |served: &'a Served| {
        let subject = Subject::new(served.name, || run(served));
        match served.name {
            "vhd" | READ_ONLY => cpu.into_iter().fold(subject.with_target(target), Subject::with),
            FLOOR => subject.being_floor(),
            _ => subject,
        }
    };
    servers.map(subject).collect()
}
