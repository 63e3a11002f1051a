//! `vhd`: opens, serves, repairs and runs virtual hard disks on Linux.

mod cmd;
mod input;
mod output;
mod sizes;

use std::process::ExitCode;

use clap::Parser;

use crate::cmd::Command;
use crate::output::{Context, report_failure};

/// Opens, serves, repairs and runs virtual hard disks (VHD).
#[derive(Debug, Parser)]
#[command(name = "vhd", version, max_term_width = 110, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: output::GlobalArgs,
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let context = Context::new(&cli.global);
    match cli.command.run(&context) {
        Ok(answer) => answer.into(),
        Err(failure) => report_failure(&context, &failure),
    }
}

/// Help and version succeed; anything else could not be done. With `--json` the reason is JSON too.
fn usage(error: &clap::Error) -> ExitCode {
    if error.use_stderr() && std::env::args().any(|argument| argument == "--json") {
        let text = error.to_string();
        // What is missing may be listed line by line; usage and tips follow an empty one.
        let lines: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
        let message = lines.join(" ");
        let message = message.trim_start_matches("error: ");
        let _ = output::write_json(&serde_json::json!({ "error": { "kind": "usage", "message": message } }));
        return ExitCode::from(2);
    }
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS }
}
