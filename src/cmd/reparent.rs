//! `vhd reparent`

use std::path::PathBuf;

use clap::Args;
use vhd_core::Error;
use vhd_core::ops::reparent::reparent;

use super::ChainArgs;
use crate::output::{Answer, Context};

/// Arguments of `vhd reparent`.
#[derive(Debug, Args)]
pub struct ReparentArgs {
    /// The image whose parent is elsewhere now
    child: PathBuf,
    /// The parent: a VHD, or a raw file
    parent: PathBuf,
    /// Take a parent with another UUID or a larger size: the child then shows another content
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    open: ChainArgs,
}

impl ReparentArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        for note in reparent(&self.child, &self.parent, self.force, &self.open.options(false, self.force))? {
            context.note(&format!("{}: {note}", self.child.display()));
        }
        Ok(Answer::Yes)
    }
}
