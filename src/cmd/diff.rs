//! `vhd diff`

use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use vhd_core::chain::Chain;
use vhd_core::ops::diff::diff;
use vhd_core::{Error, ErrorKind};

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
    /// Who named the images the other way round learns that.
    fn with_order(&self, error: Error) -> Error {
        let is_other_way = error.kind() == ErrorKind::InvalidInput
            && Chain::open(&self.old, &self.open.options(false, false))
                .is_ok_and(|chain| diff(&chain, &self.new, &mut |_| Ok(())).is_ok());
        if !is_other_way {
            return error;
        }
        let message = format!("came after {}: name the older image first", self.new.display());
        Error::new(ErrorKind::InvalidInput, message).at(&self.old)
    }

    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let chain = Chain::open(&self.new, &self.open.options(false, false))?;
        let walk = |visit: &mut dyn FnMut(Range<u64>) -> Result<(), Error>| diff(&chain, &self.old, visit);
        let found = Found::of(&walk).map_err(|error| self.with_order(error))?;
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
