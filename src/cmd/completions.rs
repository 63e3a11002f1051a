//! `vhd completions`

use std::io::Write;

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use vhd_core::Error;

use crate::output::{Answer, output_error};

/// Arguments of `vhd completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

impl CompletionsArgs {
    pub fn run(&self) -> Result<Answer, Error> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut crate::Cli::command(), "vhd", &mut script);
        std::io::stdout().write_all(&script).map_err(output_error)?;
        Ok(Answer::Yes)
    }
}
