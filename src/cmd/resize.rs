//! `vhd resize`

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use vhd_core::Error;
use vhd_core::ops::resize::{ResizeOptions, Resized, resize};

use super::ChainArgs;
use crate::output::{Answer, Context, ShownPath};
use crate::sizes;

/// Arguments of `vhd resize`.
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// The image: of any kind; of a chain the leaf
    image: PathBuf,
    /// Its new size: bytes, or with K, M, G or T
    #[arg(value_parser = sizes::parse)]
    size: u64,
    /// It may become smaller, as long as no data and no partition is in the way
    #[arg(long)]
    shrink: bool,
    /// Cut off what is in the way
    #[arg(long, requires = "shrink")]
    discard_data: bool,
    /// Go on although a saved state relies on the image or it has children, which could not be used any more
    #[arg(long)]
    force: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    open: ChainArgs,
}

/// The JSON of `vhd resize`.
#[derive(Serialize)]
struct Document<'a> {
    path: ShownPath<'a>,
    size_before: u64,
    virtual_size: u64,
    bytes_moved: u64,
    gpt_moved: bool,
    notes: &'a [String],
    done: bool,
}

impl ResizeArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let options =
            ResizeOptions { shrink: self.shrink, discard_data: self.discard_data, force: self.force, dry_run: self.dry_run };
        let chain = self.open.options(false, self.force);
        let resized = context.with_progress("resize", |progress| resize(&self.image, self.size, &options, &chain, progress))?;
        for note in &resized.notes {
            context.note(&format!("{}: {note}", self.image.display()));
        }
        let document = Document {
            path: ShownPath(&self.image),
            size_before: resized.from,
            virtual_size: resized.to,
            bytes_moved: resized.bytes_moved,
            gpt_moved: resized.moves_gpt,
            notes: &resized.notes,
            done: !self.dry_run,
        };
        context.print(&self.text(&resized), &document)?;
        Ok(Answer::Yes)
    }

    fn text(&self, resized: &Resized) -> String {
        let would = if self.dry_run { "would be " } else { "" };
        let gpt = if resized.moves_gpt {
            ["  the GPT's backup would move to the new end\n", "  the GPT's backup moved to the new end\n"]
        } else {
            [""; 2]
        };
        let moved = match (resized.bytes_moved, self.dry_run) {
            (0, _) => String::new(),
            (bytes, true) => format!("  {} would be moved to make room\n", sizes::show(bytes)),
            (bytes, false) => format!("  {} moved to make room\n", sizes::show(bytes)),
        };
        format!(
            "{}: {would}{} instead of {}\n{moved}{}",
            self.image.display(),
            sizes::show(resized.to),
            sizes::show(resized.from),
            gpt[usize::from(!self.dry_run)],
        )
    }
}
