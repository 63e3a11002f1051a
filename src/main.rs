//! `vhd`: opens, serves, repairs and runs virtual hard disks on Linux.

mod cmd;
mod input;
mod output;
mod sizes;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::cmd::{Command, Helped};
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
    let mut arguments: Vec<_> = std::env::args_os().collect();
    match cmd::mount_helper(&arguments) {
        Some(Helped::Run(translated)) => arguments = translated,
        Some(Helped::Fake) => return ExitCode::SUCCESS,
        None => {}
    }
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let context = Context::new(&cli.global);
    let status = match cli.command.run(&context) {
        Ok(answer) => answer.into(),
        Err(failure) => report_failure(&context, failure),
    };
    vhd_service::log::flush();
    status
}

/// The command that the arguments ask for, as far as there is one: `vhd undo start`.
fn command_named(arguments: impl Iterator<Item = OsString>) -> String {
    let (mut command, mut name) = (&Cli::command(), String::from("vhd"));
    for argument in arguments {
        let Some(found) = command.find_subcommand(&argument) else { continue };
        command = found;
        name.push(' ');
        name.push_str(found.get_name());
    }
    name
}

/// Help and version succeed; anything else could not be done, for a reason of one line. With `--json` the reason is JSON.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.to_string();
    // What is missing may be listed line by line; usage and tips follow an empty one.
    let lines: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    let message = lines.join(" ");
    let message = message.trim_start_matches("error: ");
    if std::env::args_os().any(|argument| argument == "--json") {
        let _ = output::write_json(&serde_json::json!({ "error": { "kind": "usage", "message": message } }));
    } else if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        // Who asks for nothing wants to know what there is.
        let _ = error.print();
    } else {
        eprintln!("vhd: {message}; see {} --help", command_named(std::env::args_os().skip(1)));
    }
    ExitCode::from(2)
}
