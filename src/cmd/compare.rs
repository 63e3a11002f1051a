//! `vhd compare`

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Serialize;
use vhd_core::chain::{Chain, is_vhd_name};
use vhd_core::ops::copy::compare;
use vhd_core::{Disk, Error};
use vhd_nbd::source;

use super::ChainArgs;
use crate::output::{Answer, Context};

/// Arguments of `vhd compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// A VHD, a raw file, or the URI of an NBD export
    a: PathBuf,
    /// Another
    b: PathBuf,
    /// What A is, where its name does not say
    #[arg(long, value_name = "FORMAT")]
    from_a: Option<SourceFormat>,
    /// What B is, where its name does not say
    #[arg(long, value_name = "FORMAT")]
    from_b: Option<SourceFormat>,
    #[command(flatten)]
    open: ChainArgs,
}

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SourceFormat {
    Vhd,
    Raw,
}

/// Opens a disk to read it. A file counts as a VHD by its name or because the user says so: a footer at the end of a raw
/// file proves nothing, a guest can write one. What an NBD server has is raw: its URI is taken, too.
pub fn open_source(path: &Path, format: Option<SourceFormat>, open: &ChainArgs, context: &Context) -> Result<Disk, Error> {
    if let Some(uri) = path.to_str().filter(|text| source::is_uri(text)) {
        return source::open(uri, context.stop());
    }
    let by_name = if is_vhd_name(path) { SourceFormat::Vhd } else { SourceFormat::Raw };
    match format.unwrap_or(by_name) {
        SourceFormat::Vhd => Disk::open(path, &open.options(false, false)),
        SourceFormat::Raw => Ok(Disk::new(Chain::open_raw(path, false)?)),
    }
}

#[derive(Serialize)]
struct Document {
    equal: bool,
    size_a: u64,
    size_b: u64,
    first_difference: Option<u64>,
}

impl CompareArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let a = open_source(&self.a, self.from_a, &self.open, context)?;
        let b = open_source(&self.b, self.from_b, &self.open, context)?;
        let found = context.with_progress("compare", |progress| compare(&a, &b, progress))?;
        // Where one ends and the other goes on, they differ too.
        let first_difference = found.or((a.size() != b.size()).then_some(a.size().min(b.size())));
        let text = match (found, first_difference) {
            (Some(at), _) => format!("differ at byte {at}\n"),
            (None, Some(_)) => format!("differ in size: {} and {} bytes; the same as far as both go\n", a.size(), b.size()),
            (None, None) => "equal\n".into(),
        };
        let document = Document { equal: first_difference.is_none(), size_a: a.size(), size_b: b.size(), first_difference };
        context.print(&text, &document)?;
        Ok(if document.equal { Answer::Yes } else { Answer::No })
    }
}
