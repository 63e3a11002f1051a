//! `vhd write`

use std::path::PathBuf;

use clap::Args;
use vhd_core::ops::copy::read_from;
use vhd_core::{Disk, Error, ErrorKind};

use super::ChainArgs;
use crate::input::Input;
use crate::output::{Answer, Context, ShownPath};
use crate::sizes;

/// Arguments of `vhd write`.
#[derive(Debug, Args)]
pub struct WriteArgs {
    /// The image
    image: PathBuf,
    /// First byte
    #[arg(long, value_name = "N", value_parser = sizes::parse)]
    offset: u64,
    /// Write even if a saved state or a child relies on the image
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    open: ChainArgs,
}

impl WriteArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        let disk = Disk::open(&self.image, &self.open.options(true, self.force))?;
        let written =
            context.with_progress("write", |progress| read_from(&mut Input::new(progress)?, &disk, self.offset, false, progress));
        // What was written before a failure is made durable too: it is in the image.
        disk.close()?;
        let length = written.map_err(|error| match error.kind() {
            ErrorKind::OutOfRange => {
                Error::new(error.kind(), format!("{}; what fits was written", error.message())).at(&self.image)
            }
            _ => error.at(&self.image),
        })?;
        context.print("", &serde_json::json!({ "path": ShownPath(&self.image), "offset": self.offset, "length": length }))?;
        Ok(Answer::Yes)
    }
}
