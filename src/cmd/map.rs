//! `vhd map`

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use vhd_core::{Disk, Error};

use super::ChainArgs;
use crate::output::{Answer, Context};

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
struct Entry {
    start: u64,
    length: u64,
    state: &'static str,
    depth: usize,
    path: PathBuf,
    offset: Option<u64>,
}

impl MapArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let disk = Disk::open(&self.image, &self.open.options(false, false))?;
        let entries: Vec<_> = disk
            .extents_in(0..disk.size())?
            .into_iter()
            .map(|extent| Entry {
                start: extent.range.start,
                length: extent.range.end - extent.range.start,
                state: extent.state.name(),
                depth: extent.depth,
                path: disk.layer_path(extent.depth).unwrap_or(&self.image).to_owned(),
                offset: extent.offset,
            })
            .collect();
        let mut text = format!("{:>16} {:>16} {:<7} {:>5} {:>16}  path\n", "start", "length", "state", "depth", "offset");
        for entry in entries.iter().filter(|_| !context.json) {
            let offset = entry.offset.map_or("-".into(), |offset| offset.to_string());
            let Entry { start, length, state, depth, path, .. } = entry;
            let _ = writeln!(text, "{start:>16} {length:>16} {state:<7} {depth:>5} {offset:>16}  {}", path.display());
        }
        context.print(&text, &entries)?;
        Ok(Answer::Yes)
    }
}
