//! `vhd diff`

use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use vhd_core::Error;
use vhd_core::chain::Chain;
use vhd_core::ops::diff::diff;

use super::ChainArgs;
use crate::output::{Answer, Context, Found, output_error, write_entry};

/// Arguments of `vhd diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// An image further down the chain
    old: PathBuf,
    /// The image that came after it
    new: PathBuf,
    #[command(flatten)]
    open: ChainArgs,
}

/// One entry of the JSON of `vhd diff`: a contract.
#[derive(Serialize)]
struct Entry {
    start: u64,
    length: u64,
}

impl DiffArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let chain = Chain::open(&self.new, &self.open.options(false, false))?;
        let walk = |visit: &mut dyn FnMut(Range<u64>) -> Result<(), Error>| diff(&chain, &self.old, visit);
        let found = Found::of(&walk)?;
        let mut out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
        out.write_all(if context.json { b"[" } else { b"" }).map_err(output_error)?;
        let mut same = true;
        found.each(&mut |range| {
            let entry = Entry { start: range.start, length: range.end - range.start };
            let written = match context.json {
                true => write_entry(&mut out, &entry, same),
                false => writeln!(out, "{:>16} {:>16}", entry.start, entry.length),
            };
            same = false;
            written.map_err(output_error)
        })?;
        out.write_all(if context.json { b"\n]\n" } else { b"" }).and_then(|()| out.flush()).map_err(output_error)?;
        Ok(if same { Answer::Yes } else { Answer::No })
    }
}
