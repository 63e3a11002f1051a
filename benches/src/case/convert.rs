//! Copies between raw files and dynamic disks.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::{Place, files};
use crate::measure::{Goal, Row, Sample, Subject, Unit, alternate};
use crate::process::{exists, run, shell, vhd};

struct Files {
    raw: PathBuf,
    vhd: PathBuf,
    out: PathBuf,
    command: PathBuf,
}

impl Files {
    fn new(folder: &Path) -> Result<Self> {
        let path = |name: &str| folder.join(name);
        Ok(Self { raw: path("source.img"), vhd: path("source.vhd"), out: path("out"), command: vhd()? })
    }

    fn convert(&self, from: &Path, to: &str) -> Command {
        let mut command = Command::new(&self.command);
        command.args(["convert", "--overwrite", "--to", to]).arg(from).arg(self.out.with_extension(ending(to)));
        command
    }

    fn qemu(&self, from: (&str, &Path), to: &str, in_place: bool) -> Command {
        let mut command = Command::new("qemu-img");
        command.arg("convert").args(in_place.then_some("-n")).args(["-f", from.0, "-O", to]);
        if to == "vpc" && !in_place {
            command.args(["-o", "subformat=dynamic,force_size=on"]);
        }
        command.arg(from.1).arg(self.out.with_extension(if to == "vpc" { "vhd" } else { "img" }));
        command
    }

    fn remove(&self) {
        for path in [&self.raw, &self.vhd, &self.out.with_extension("img"), &self.out.with_extension("vhd")] {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn ending(to: &str) -> &str {
    if to == "raw" { "img" } else { "vhd" }
}

/// All of it random, in memory, into files that exist: what the tool itself costs.
pub fn in_memory(place: &Place) -> Result<Vec<Row>> {
    let mib = if place.long { 4096 } else { 1024 };
    let files = Files::new(&place.memory)?;
    files::noise(&files.raw, mib)?;
    run(&mut files.convert(&files.raw, "dynamic"))?;
    std::fs::rename(files.out.with_extension("vhd"), &files.vhd)?;
    // Both targets exist, and hold all that is written.
    std::fs::copy(&files.raw, files.out.with_extension("img"))?;
    std::fs::copy(&files.vhd, files.out.with_extension("vhd"))?;
    let dd =
        format!("dd if={} of={} bs=1M conv=notrunc status=none", files.raw.display(), files.out.with_extension("img").display());
    // Two of them at once, half each: what copying with two threads costs the processors that share a memory.
    let half = mib / 2;
    let two = format!(
        "dd if={0} of={1} bs=1M count={half} conv=notrunc status=none & \
         dd if={0} of={1} bs=1M skip={half} seek={half} conv=notrunc status=none; wait",
        files.raw.display(),
        files.out.with_extension("img").display()
    );
    let into = || {
        let mut command = Command::new(&files.command);
        command.args(["convert", "--into"]).args([&files.raw, &files.out.with_extension("vhd")]);
        command
    };
    let mut rows = Vec::new();
    let mut subjects = vec![
        Subject::new("dd bs=1M conv=notrunc", || shell(&dd)),
        Subject::new("vhd", || run(&mut into())).with_target(0.8).with(Goal::Cpu(1.0)),
        Subject::new("two dd at once, half each", || shell(&two)).being_floor(),
    ];
    if exists("qemu-img") {
        subjects.push(Subject::new("qemu-img -n", || run(&mut files.qemu(("raw", &files.raw), "vpc", true))));
    }
    rows.extend(alternate("raw to dynamic, random, memory", Unit::Seconds, place.rounds, &mut subjects)?);
    drop(subjects);
    let mut subjects = vec![
        Subject::new("dd bs=1M conv=notrunc", || shell(&dd)),
        Subject::new("vhd", || run(&mut files.convert(&files.vhd, "raw"))).with_target(0.8).with(Goal::Cpu(1.0)),
        Subject::new("two dd at once, half each", || shell(&two)).being_floor(),
    ];
    if exists("qemu-img") {
        subjects.push(Subject::new("qemu-img -n", || run(&mut files.qemu(("vpc", &files.vhd), "raw", true))));
    }
    rows.extend(alternate("dynamic to raw, random, memory", Unit::Seconds, place.rounds, &mut subjects)?);
    drop(subjects);
    files.remove();
    Ok(rows)
}

/// Runs it, and syncs what it wrote: both count.
fn synced(command: &mut Command, out: &Path) -> Result<Sample> {
    let _ = std::fs::remove_file(out);
    let ran = run(command)?;
    let sync = run(Command::new("sync").arg("-d").arg(out))?;
    let cpu = ran.cpu.zip(sync.cpu).map(|(a, b)| a + b);
    Ok(Sample { value: ran.value + sync.value, cpu, memory: ran.memory })
}

/// All of it random, on a disk, to a new file, with the sync.
pub fn on_disk(place: &Place) -> Result<Vec<Row>> {
    let mib = if place.long { 2048 } else { 512 };
    let files = Files::new(&place.disk)?;
    files::noise(&files.raw, mib)?;
    run(&mut files.convert(&files.raw, "dynamic"))?;
    std::fs::rename(files.out.with_extension("vhd"), &files.vhd)?;
    let (img, vhd) = (files.out.with_extension("img"), files.out.with_extension("vhd"));
    let mut rows = Vec::new();
    for (case, source, to) in [("raw to dynamic", &files.raw, "dynamic"), ("dynamic to raw", &files.vhd, "raw")] {
        let out = if to == "raw" { &img } else { &vhd };
        let (from, qemu_to) = if to == "raw" { ("vpc", "raw") } else { ("raw", "vpc") };
        let mut subjects = vec![
            Subject::new("cp --sparse=never", || {
                synced(Command::new("cp").args(["--sparse=never", "--reflink=never"]).arg(&files.raw).arg(&img), &img)
            }),
            Subject::new("vhd", || synced(&mut files.convert(source, to), out)).with_target(1.02),
        ];
        if exists("qemu-img") {
            subjects.push(Subject::new("qemu-img", || synced(&mut files.qemu((from, source), qemu_to, false), out)));
        }
        rows.extend(alternate(&format!("{case}, random, disk, synced"), Unit::Seconds, place.rounds, &mut subjects)?);
    }
    files.remove();
    Ok(rows)
}

/// A tenth of it data, in long runs and in short ones, in memory, to a new file.
pub fn sparse(place: &Place) -> Result<Vec<Row>> {
    let mib = if place.long { 16_384 } else { 4096 };
    let files = Files::new(&place.memory)?;
    let (img, vhd) = (files.out.with_extension("img"), files.out.with_extension("vhd"));
    let mut rows = Vec::new();
    for (runs, run_len, target) in [("2 MiB", 2_u64 << 20, 1.0), ("64 KiB", 64 << 10, 1.2)] {
        files::raw(&files.raw, mib, run_len, run_len * 10)?;
        run(&mut files.convert(&files.raw, "dynamic"))?;
        std::fs::rename(&vhd, &files.vhd)?;
        for (case, source, to) in [("raw to dynamic", &files.raw, "dynamic"), ("dynamic to raw", &files.vhd, "raw")] {
            let out = if to == "raw" { &img } else { &vhd };
            let (from, qemu_to) = if to == "raw" { ("vpc", "raw") } else { ("raw", "vpc") };
            let fresh = |command: &mut Command, out: &Path| {
                let _ = std::fs::remove_file(out);
                run(command)
            };
            let mut subjects = vec![
                Subject::new("cp --sparse=always", || {
                    fresh(Command::new("cp").args(["--sparse=always", "--reflink=never"]).arg(&files.raw).arg(&img), &img)
                }),
                Subject::new("vhd", || fresh(&mut files.convert(source, to), out)).with_target(target),
            ];
            if exists("qemu-img") {
                subjects.push(Subject::new("qemu-img", || fresh(&mut files.qemu((from, source), qemu_to, false), out)));
            }
            rows.extend(alternate(
                &format!("{case}, a tenth in runs of {runs}, memory"),
                Unit::Seconds,
                place.rounds,
                &mut subjects,
            )?);
        }
    }
    files.remove();
    Ok(rows)
}
