//! `vhd vm`

use std::fmt::Write;
use std::path::Path;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use vhd_core::{Error, ErrorKind};
use vhd_service::control::{Request, call};
use vhd_vmm::machine::{running, socket_of};

use crate::output::{Answer, Context};
use crate::sizes;

/// Arguments of `vhd vm`.
#[derive(Debug, Args)]
pub struct VmArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the machines that have a process
    List,
    /// Say what a machine is and how it is with it
    Show(NameArgs),
    /// Make the guest stand still
    Pause(NameArgs),
    /// Let it go on
    Resume(NameArgs),
    /// Turn it off and on, as by its button
    Reset(NameArgs),
    /// Turn it off, as by pulling the plug
    Off(NameArgs),
    /// Put the guest into a file; the next vhd run of this machine goes on from there
    Save(NameArgs),
    /// Give every disk a new leaf, all at one instant
    Snapshot(NameArgs),
}

#[derive(Debug, Args)]
struct NameArgs {
    /// The machine
    name: String,
}

impl VmArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        match &self.action {
            Action::List => list(context),
            Action::Show(args) => {
                let found = ask(&args.name, "show")?;
                context.print(&text_of(&found), &found)?;
                Ok(Answer::Yes)
            }
            Action::Pause(args) => command(context, args, "pause"),
            Action::Resume(args) => command(context, args, "resume"),
            Action::Reset(args) => command(context, args, "reset"),
            Action::Off(args) => command(context, args, "off"),
            Action::Save(args) => command(context, args, "save"),
            Action::Snapshot(args) => {
                let answer = ask(&args.name, "snapshot")?;
                let leaves = answer["leaves"].as_array().into_iter().flatten().filter_map(Value::as_str);
                context.print(&leaves.map(|leaf| format!("{leaf}\n")).collect::<String>(), &answer)?;
                Ok(Answer::Yes)
            }
        }
    }
}

fn ask(name: &str, command: &str) -> Result<Value, Error> {
    let socket = socket_of(name)?;
    call(&socket, &Request::new(command)).map_err(|error| {
        if error.kind() == ErrorKind::NotFound {
            return Error::new(ErrorKind::NotFound, "no machine of this name has a process; vhd vm list tells those that do")
                .at(Path::new(name));
        }
        error
    })
}

/// Success is silent to people.
fn command(context: &Context, args: &NameArgs, command: &str) -> Result<Answer, Error> {
    let answer = ask(&args.name, command)?;
    context.print("", &answer)?;
    Ok(Answer::Yes)
}

fn list(context: &Context) -> Result<Answer, Error> {
    let mut machines = Vec::new();
    let mut text = String::new();
    for name in running()? {
        // One that ends meanwhile is not listed.
        let Ok(found) = ask(&name, "show") else { continue };
        let _ = writeln!(text, "{name:<20} {}", state_of(&found));
        machines.push(json!({ "name": name, "state": found["state"], "reason": found["reason"], "pid": found["pid"] }));
    }
    context.print(&text, &machines)?;
    Ok(Answer::Yes)
}

fn state_of(found: &Value) -> String {
    let state = found["state"].as_str().unwrap_or("unknown");
    found["reason"].as_str().map_or_else(|| state.to_owned(), |reason| format!("{state} ({reason})"))
}

fn text_of(found: &Value) -> String {
    let word = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    let mut text = String::new();
    let _ = writeln!(text, "name          {}", word("name"));
    let _ = writeln!(text, "state         {}", state_of(found));
    let _ = writeln!(text, "CPUs          {}", found["cpus"]);
    let _ = writeln!(text, "memory        {}", sizes::show(found["memory"].as_u64().unwrap_or(0)));
    let _ = writeln!(text, "kernel        {}", found["kernel"].as_str().unwrap_or("as the first disk's boot menu says"));
    for disk in found["disks"].as_array().into_iter().flatten() {
        let image = disk["image"].as_str().unwrap_or_default();
        let read_only = if disk["read_only"].as_bool() == Some(true) { ", read-only" } else { "" };
        let _ = writeln!(
            text,
            "disk {:<9}{image}, {}{read_only}",
            disk["disk"].as_u64().unwrap_or(0),
            sizes::show(disk["size"].as_u64().unwrap_or(0))
        );
    }
    text
}
