//! Merging a child in which a quarter changed, and compacting a large image.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::Place;
use super::files::{Random, new_child, new_dynamic, noise, open};
use crate::measure::{Row, Subject, Unit, alternate};
use crate::process::{run, shell, vhd};

const BLOCK: u64 = 2 << 20;

fn fill(path: &Path, size: u64) -> Result<()> {
    let bytes = Random(7).bytes(1 << 20);
    let disk = open(path, true)?;
    for mib in 0..size >> 20 {
        disk.write_at(&bytes, mib << 20)?;
    }
    Ok(disk.close()?)
}

pub fn merge(place: &Place) -> Result<Vec<Row>> {
    let size: u64 = if place.long { 2 << 30 } else { 1 << 30 };
    let path = |name: &str| place.memory.join(name);
    let (base, child) = (path("base.vhd"), path("child.vhd"));
    let (from, to) = (path("from.img"), path("to.img"));
    noise(&from, size >> 22)?;
    noise(&to, size >> 22)?;
    let dd = format!("dd if={} of={} bs=1M conv=notrunc status=none", from.display(), to.display());
    let vhd = vhd()?;
    let mut rows = Vec::new();
    for (case, piece, target) in [("whole blocks", BLOCK, 1.1), ("4 KiB of every 16", 4096, 2.5)] {
        new_dynamic(&base, size, 1)?;
        fill(&base, size)?;
        new_child(&child, &base, 2)?;
        let bytes = Random(9).bytes(piece as usize);
        let disk = open(&child, true)?;
        for at in (0..size).step_by(4 * piece as usize) {
            disk.write_at(&bytes, at)?;
        }
        disk.close()?;
        drop(disk);
        // The child stays, so that it can be merged again: the same bytes each time.
        let mut subjects = [
            Subject::new("dd conv=notrunc of what changed", || shell(&dd)),
            Subject::new("vhd merge", || run(Command::new(&vhd).arg("merge").arg(&child))).with_target(target),
        ];
        rows.extend(alternate(&format!("merge, a quarter changed: {case}"), Unit::Seconds, place.rounds, &mut subjects)?);
    }
    for path in [base, child, from, to] {
        let _ = std::fs::remove_file(path);
    }
    Ok(rows)
}

/// A large image of which a twentieth holds data, every fourth block of it zeros.
pub fn compact(place: &Place) -> Result<Vec<Row>> {
    let (size, data) = if place.long { (100_u64 << 30, 5_u64 << 30) } else { (20 << 30, 1 << 30) };
    let image = place.memory.join("compact.vhd");
    let blocks = data / BLOCK;
    let bytes = Random(3).bytes(BLOCK as usize);
    let zeros = vec![0; BLOCK as usize];
    let prepare = || {
        new_dynamic(&image, size, 1)?;
        let disk = open(&image, true)?;
        for n in 0..blocks {
            disk.write_at(if n % 4 == 3 { &zeros } else { &bytes }, n * (size / blocks) / BLOCK * BLOCK)?;
        }
        anyhow::Ok(disk.close()?)
    };
    // Of the blocks that stay, those behind the new end move: a quarter of all.
    let (raw, to) = (place.memory.join("all.img"), place.memory.join("moved.img"));
    noise(&raw, data >> 20)?;
    let moved = data / 4 * 3 / 4;
    let reference = format!(
        "cat {0} > /dev/null; dd if={0} of={1} bs=1M count={2} conv=notrunc status=none",
        raw.display(),
        to.display(),
        moved >> 20
    );
    let vhd = vhd()?;
    let case = format!("compact, {} GiB with {} of data, a quarter of the blocks zero", size >> 30, data >> 30);
    let mut subjects = [
        Subject::new("cat of the data, dd of what moves", || shell(&reference)),
        Subject::new("vhd compact", || {
            prepare()?;
            run(Command::new(&vhd).arg("compact").arg(&image))
        })
        .with_target(1.1),
    ];
    let rows = alternate(&case, Unit::Seconds, place.rounds, &mut subjects);
    drop(subjects);
    for path in [image, raw, to] {
        let _ = std::fs::remove_file(path);
    }
    rows
}
