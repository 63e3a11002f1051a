//! `vhd unmount`

use std::path::PathBuf;

use clap::Args;
use vhd_core::Error;

use crate::output::{Answer, Context, ShownPath};

/// Arguments of `vhd unmount`.
#[derive(Debug, Args)]
pub struct UnmountArgs {
    /// The folder that was given to vhd mount
    target: PathBuf,
}

impl UnmountArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        vhd_fuse::unmount(&self.target, &mut |note| context.note(note))?;
        context.print("", &serde_json::json!({ "target": ShownPath(&self.target) }))?;
        Ok(Answer::Yes)
    }
}
