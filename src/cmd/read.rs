//! `vhd read`

use std::path::PathBuf;

use clap::Args;
use vhd_core::ops::copy::write_to;
use vhd_core::{Disk, Error, ErrorKind, Progress};

use super::ChainArgs;
use crate::output::Answer;
use crate::sizes;

/// Arguments of `vhd read`.
#[derive(Debug, Args)]
pub struct ReadArgs {
    /// The image
    image: PathBuf,
    /// First byte
    #[arg(long, value_name = "N", value_parser = sizes::parse)]
    offset: u64,
    /// Bytes
    #[arg(long, value_name = "N", value_parser = sizes::parse)]
    length: u64,
    #[command(flatten)]
    open: ChainArgs,
}

impl ReadArgs {
    pub fn run(&self) -> Result<Answer, Error> {
        let disk = Disk::open(&self.image, &self.open.options(false, false))?;
        let end = self.offset.checked_add(self.length).filter(|&end| end <= disk.size()).ok_or_else(|| {
            let message = format!("{} bytes at {} are not inside the disk of {} bytes", self.length, self.offset, disk.size());
            Error::new(ErrorKind::OutOfRange, message).at(&self.image)
        })?;
        write_to(&disk, self.offset..end, &mut std::io::stdout().lock(), &Progress::default())?;
        Ok(Answer::Yes)
    }
}
