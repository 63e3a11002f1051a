//! `vhd map`

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use vhd_core::block::{BlockDevice, Extent};
use vhd_core::{Disk, Error};

use super::ChainArgs;
use crate::output::{Answer, Context, Found, ShownPath, output_error, write_entry};

/// Arguments of `vhd map`.
#[derive(Debug, Args)]
pub struct MapArgs {
    /// The image
    image: PathBuf,
    #[command(flatten)]
    open: ChainArgs,
}

/// One entry of the JSON of `vhd map`: a contract.
#[derive(Serialize)]
struct Entry<'a> {
    start: u64,
    length: u64,
    state: &'static str,
    depth: usize,
    path: ShownPath<'a>,
    offset: Option<u64>,
}

impl MapArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let disk = Disk::open(&self.image, &self.open.options(false, false))?;
        let walk = |visit: &mut dyn FnMut(Extent) -> Result<(), Error>| disk.extents(0..disk.size(), visit);
        let found = Found::of(&walk)?;
        let mut out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
        let head = format!("{:>16} {:>16} {:<7} {:>5} {:>16}  path\n", "start", "length", "state", "depth", "offset");
        out.write_all(if context.json { b"[" } else { head.as_bytes() }).map_err(output_error)?;
        let mut first = true;
        found.each(&mut |extent| {
            let path = disk.layer_path(extent.depth).unwrap_or_else(|| self.image.clone());
            let written = if context.json { json(&mut out, &extent, &path, first) } else { line(&mut out, &extent, &path) };
            first = false;
            written.map_err(output_error)
        })?;
        out.write_all(if context.json { b"\n]\n" } else { b"" }).and_then(|()| out.flush()).map_err(output_error)?;
        Ok(Answer::Yes)
    }
}

/// The document of `vhd map` for a disk that is open.
pub(super) fn write_document(disk: &dyn BlockDevice, out: &mut dyn Write) -> Result<(), Error> {
    let mut out = out;
    out.write_all(b"[").map_err(output_error)?;
    let mut first = true;
    disk.extents(0..disk.capabilities().size, &mut |extent| {
        let path = disk.layer_path(extent.depth).unwrap_or_default();
        let written = json(&mut out, &extent, &path, first);
        first = false;
        written.map_err(output_error)
    })?;
    out.write_all(b"\n]\n").map_err(output_error)
}

fn json(out: &mut impl Write, extent: &Extent, path: &Path, first: bool) -> io::Result<()> {
    let Extent { range, state, depth, offset } = extent;
    let (length, state) = (range.end - range.start, state.name());
    let entry = Entry { start: range.start, length, state, depth: *depth, path: ShownPath(path), offset: *offset };
    write_entry(out, &entry, first)
}

fn line(out: &mut impl Write, extent: &Extent, path: &Path) -> io::Result<()> {
    let Extent { range, state, depth, offset } = extent;
    let (start, length, state) = (range.start, range.end - range.start, state.name());
    let offset = offset.map_or("-".into(), |offset| offset.to_string());
    writeln!(out, "{start:>16} {length:>16} {state:<7} {depth:>5} {offset:>16}  {}", path.display())
}
