//! `vhd diff`

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use vhd_core::Error;
use vhd_core::chain::Chain;
use vhd_core::ops::diff::diff;

use super::ChainArgs;
use crate::output::{Answer, Context};

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
        let changed = diff(&chain, &self.old)?;
        let entries: Vec<_> =
            changed.into_iter().map(|range| Entry { start: range.start, length: range.end - range.start }).collect();
        let mut text = String::new();
        for Entry { start, length } in &entries {
            let _ = writeln!(text, "{start:>16} {length:>16}");
        }
        context.print(&text, &entries)?;
        Ok(if entries.is_empty() { Answer::Yes } else { Answer::No })
    }
}
