//! `vhd vm`

use std::fmt::Write;
use std::path::Path;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use vhd_core::storage::FileStorage;
use vhd_core::{Error, ErrorKind};
use vhd_service::control::{Request, call};
use vhd_vmm::config::{Config, ConfigFile, Reach, What, Word, configured, file_of, name_of};
use vhd_vmm::machine::{is_snapshot_of, running, socket_of};
use vhd_vmm::saved;

use super::ChainArgs;
use super::machine::{MachineArgs, Plan, open_config};
use super::run::{MEMORY, Run};
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
    /// Make the configuration of a machine
    Create(CreateArgs),
    /// Change it; what it says beyond is kept. A machine that runs is what it was until it is started anew
    Set(SetArgs),
    /// Take a configuration over from whoever made it, with every file, device and script that it names: they are listed
    Register(NameArgs),
    /// List the machines that have a process or a configuration in the user's folder
    List,
    /// Say what a machine is and how it is with it
    Show(NameArgs),
    /// Make the guest stand still
    Pause(NameArgs),
    /// Let it go on
    Resume(NameArgs),
    /// Turn it off and on, as by its button
    Reset(NameArgs),
    /// Ask the guest to turn itself off, as by its power button
    Shutdown(NameArgs),
    /// Turn it off, as by pulling the plug
    Off(NameArgs),
    /// Put the guest into a file; vhd vm restore and the next vhd run of this machine go on from there
    Save(NameArgs),
    /// Run the machine on from its saved state, and refuse where there is none
    Restore(StateArgs),
    /// Forget the saved state of a machine
    DiscardState(StateArgs),
    /// Give every disk a new leaf, all at one instant
    Snapshot(NameArgs),
}

#[derive(Debug, Args)]
struct NameArgs {
    /// The machine: its name, or its .vmc file
    name: String,
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// Its name, for a configuration in the user's folder of machines; or a FILE.vmc
    name: String,
    #[command(flatten)]
    machine: MachineArgs,
}

#[derive(Debug, Args)]
struct SetArgs {
    /// The machine: its name, or its .vmc file
    name: String,
    /// Take the disk at this position out
    #[arg(long, value_name = "N")]
    remove_disk: Vec<u8>,
    #[command(flatten)]
    machine: MachineArgs,
}

#[derive(Debug, Args)]
struct StateArgs {
    /// The machine: its name, or its .vmc file
    name: String,
    #[command(flatten)]
    machine: Box<MachineArgs>,
    /// Take the notes of a saved state off its disks even where there is none
    #[arg(long)]
    force: bool,
    /// Run without the sandbox, to debug
    #[arg(long)]
    no_sandbox: bool,
    #[command(flatten)]
    open: ChainArgs,
}

impl VmArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        match &self.action {
            Action::Create(args) => args.run(context),
            Action::Set(args) => args.run(context),
            Action::Register(args) => register(context, &args.name),
            Action::List => list(context),
            Action::Show(args) => show(context, &args.name),
            Action::Pause(args) => command(context, &args.name, "pause"),
            Action::Resume(args) => command(context, &args.name, "resume"),
            Action::Reset(args) => command(context, &args.name, "reset"),
            Action::Shutdown(args) => command(context, &args.name, "shutdown"),
            Action::Off(args) => command(context, &args.name, "off"),
            Action::Save(args) => command(context, &args.name, "save"),
            Action::Restore(args) => args.restore(context),
            Action::DiscardState(args) => args.discard(context),
            Action::Snapshot(args) => snapshot(context, &args.name),
        }
    }
}

impl CreateArgs {
    fn run(&self, context: &Context) -> Result<Answer, Error> {
        let path = file_of(&self.name)?;
        let mut config = Config::default();
        self.machine.apply(&mut config)?;
        for disk in &config.disks {
            // It may be in use, but must be something that can be opened.
            drop(FileStorage::open(&disk.image, false)?);
        }
        if let Some(folder) = path.parent().filter(|_| !self.name.contains('/') && Path::new(&self.name) != path) {
            std::fs::create_dir_all(folder).map_err(|error| Error::io(error, "can't be made for configurations").at(folder))?;
        }
        let mut file = ConfigFile::new(&path)?;
        file.write(&config)?;
        file.save(true)?;
        file.register().inspect_err(|_| drop(std::fs::remove_file(&path)))?;
        context.print(&format!("{}\n", path.display()), &json!({ "config": path.to_string_lossy() }))?;
        Ok(Answer::Yes)
    }
}

impl SetArgs {
    fn run(&self, context: &Context) -> Result<Answer, Error> {
        let mut file = open_config(&self.name)?;
        let (mut config, word) = (file.read()?, file.word()?);
        for position in &self.remove_disk {
            config.remove(*position).map_err(|error| error.at(file.path()))?;
        }
        self.machine.apply(&mut config)?;
        file.write(&config)?;
        file.save(false)?;
        // What others have changed is not taken over with it.
        if word == Word::Users {
            file.register()?;
        } else {
            let here = file.path().display();
            context.note(&format!(
                "{here}: is not registered, so it has no scripts and nothing out of its folder; see vhd vm register"
            ));
        }
        context.print("", &json!({ "config": file.path().to_string_lossy(), "registered": word == Word::Users }))?;
        Ok(Answer::Yes)
    }
}

/// Makes a configuration the user's word, and lists what that takes over.
fn register(context: &Context, machine: &str) -> Result<Answer, Error> {
    let file = open_config(machine)?;
    let config = file.read()?;
    file.register()?;
    let reaches = config.reaches();
    let lines = reaches.iter().map(|reach| format!("{reach}{}\n", if is_device(&reach.path) { " (a device)" } else { "" }));
    let document = json!({
        "config": file.path().to_string_lossy(),
        "registered": true,
        "reaches": reaches.iter().map(told).collect::<Vec<_>>(),
    });
    context.print(&lines.collect::<String>(), &document)?;
    Ok(Answer::Yes)
}

/// Something that a configuration names, in JSON.
fn told(reach: &Reach) -> Value {
    let disk = if let What::Disk(position) = reach.what { Some(position) } else { None };
    let (path, device) = (reach.path.to_string_lossy(), is_device(&reach.path));
    json!({ "what": reach.what.name(), "disk": disk, "path": path, "device": device })
}

fn is_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device() || found.file_type().is_char_device())
}

/// Gives the disks of a running machine new leaves. Its configuration names them then, and is registered if it was: the machine
/// itself can't do that, as whoever got the better of it could take any configuration for the user's.
fn snapshot(context: &Context, machine: &str) -> Result<Answer, Error> {
    let config = ask(machine, "show")?["config"].as_str().map(str::to_owned);
    let before = config.and_then(|config| ConfigFile::open(Path::new(&config)).ok());
    let before = before.filter(|file| file.word().is_ok_and(|word| word == Word::Users));
    let answer = ask(machine, "snapshot")?;
    let leaves: Vec<_> = answer["leaves"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if let Some(mut file) = before {
        let mut config = file.read()?;
        for disk in &mut config.disks {
            // Their folders are as the machine sees them, and those of the disks.
            let names = leaves.iter().filter_map(|leaf| Path::new(leaf).file_name());
            let leaf = names.map(|name| disk.image.with_file_name(name)).find(|leaf| is_snapshot_of(leaf, &disk.image));
            disk.image = leaf.unwrap_or_else(|| disk.image.clone());
        }
        file.write(&config)?;
        let now = ConfigFile::open(file.path())?;
        if now.is_same(&file) {
            file.register()?;
        } else if now.word()? != Word::Users {
            let here = file.path().display();
            context.note(&format!("{here}: has other changes than new leaves, and is not registered any more"));
        }
    }
    context.print(&leaves.iter().map(|leaf| format!("{leaf}\n")).collect::<String>(), &answer)?;
    Ok(Answer::Yes)
}

impl StateArgs {
    /// The machine as its configuration has it, or as options say where it has none.
    fn plan(&self, context: &Context) -> Result<Plan, Error> {
        let mut plan = match Plan::to_run(&self.name, context) {
            Err(error) if error.kind() == ErrorKind::NotFound && self.machine.has_disks() => {
                Plan { name: self.name.clone(), config: Config::default(), file: None }
            }
            plan => plan?,
        };
        self.machine.apply(&mut plan.config)?;
        Ok(plan)
    }

    fn run_of<'a>(&'a self, plan: &'a Plan) -> Run<'a> {
        Run { plan, open: &self.open, force: self.force, no_sandbox: self.no_sandbox }
    }

    fn restore(&self, context: &Context) -> Result<Answer, Error> {
        // One that has a process knows by itself what can be done with it.
        if let Some(answer) = ask_if_running(&self.name, "restore") {
            context.print("", &answer?)?;
            return Ok(Answer::Yes);
        }
        let plan = self.plan(context)?;
        let file = plan.state_file();
        if file.symlink_metadata().is_err() {
            return Err(Error::new(ErrorKind::NotFound, "there is no saved state to go on from; vhd run begins anew").at(&file));
        }
        self.run_of(&plan).run(context)
    }

    fn discard(&self, context: &Context) -> Result<Answer, Error> {
        if let Some(answer) = ask_if_running(&self.name, "discard-state") {
            context.print("", &answer?)?;
            return Ok(Answer::Yes);
        }
        let plan = self.plan(context)?;
        let cleared = self.run_of(&plan).discard_state(context)?;
        let cleared: Vec<_> = cleared.iter().map(|image| image.to_string_lossy()).collect();
        context.print("", &json!({ "state": state_without_process(&plan).0, "cleared": cleared }))?;
        Ok(Answer::Yes)
    }
}

/// The answer of the machine's process; `None` when it has none.
fn ask_if_running(machine: &str, command: &str) -> Option<Result<Value, Error>> {
    let name = name_of_machine(machine);
    match socket_of(&name).and_then(|socket| call(&socket, &Request::new(command))) {
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        answer => Some(answer),
    }
}

/// A file's machine has the file's name.
fn name_of_machine(machine: &str) -> String {
    let path = Path::new(machine);
    let is_file = path.extension().is_some_and(|extension| extension == vhd_vmm::config::EXTENSION);
    if is_file { name_of(path) } else { machine.to_owned() }
}

fn ask(machine: &str, command: &str) -> Result<Value, Error> {
    ask_if_running(machine, command).unwrap_or_else(|| Err(has_no_process(machine)))
}

fn has_no_process(machine: &str) -> Error {
    let message = "no machine of this name has a process; vhd vm list tells those that do";
    Error::new(ErrorKind::NotFound, message).at(Path::new(machine))
}

/// Success is silent to people.
fn command(context: &Context, machine: &str, command: &str) -> Result<Answer, Error> {
    let answer = ask(machine, command)?;
    context.print("", &answer)?;
    Ok(Answer::Yes)
}

fn show(context: &Context, machine: &str) -> Result<Answer, Error> {
    let found = match ask_if_running(machine, "show") {
        Some(found) => found?,
        None if file_of(machine)?.symlink_metadata().is_ok() => describe(&Plan::of(machine, context)?)?,
        None => return Err(has_no_process(machine)),
    };
    context.print(&text_of(&found), &found)?;
    Ok(Answer::Yes)
}

/// A machine that has no process, with the words that one with a process has for itself.
fn describe(plan: &Plan) -> Result<Value, Error> {
    let (state, reason) = state_without_process(plan);
    let beyond: Vec<_> = plan.beyond()?.iter().map(told).collect();
    let config = &plan.config;
    let disks = config.disks.iter().map(|disk| {
        json!({
            "disk": disk.position,
            "image": disk.image.to_string_lossy(),
            "queues": disk.queues.unwrap_or(1),
            "read_only": disk.read_only.unwrap_or(false),
            "serial": disk.serial_number,
            "on_error": disk.on_error.map_or("report", |policy| policy.name()),
            "on_no_space": disk.on_no_space.map_or("pause", |policy| policy.name()),
        })
    });
    Ok(json!({
        "name": plan.name,
        "state": state,
        "reason": reason,
        "pid": null,
        "config": plan.file.as_ref().map(|(file, _)| file.to_string_lossy()),
        "registered": plan.file.as_ref().map(|(_, word)| *word == Word::Users),
        "not_registered": plan.strangers().map(|(_, why)| why),
        "left_out": beyond,
        "cpus": config.cpus.unwrap_or(1),
        "memory": config.memory.unwrap_or(MEMORY),
        "kernel": config.kernel.as_ref().map(|kernel| kernel.to_string_lossy()),
        "command_line": config.append,
        "undo": config.undo.unwrap_or(false),
        "on_event": config.on_event.as_ref().map(|script| script.to_string_lossy()),
        "disks": disks.collect::<Vec<_>>(),
    }))
}

/// The state of a machine that has no process, and why it is not known where it is not.
fn state_without_process(plan: &Plan) -> (&'static str, Option<String>) {
    match saved::look(&plan.state_file()) {
        Ok(Some(_)) => ("saved", None),
        Ok(None) => ("off", None),
        Err(error) => ("unknown", Some(error.to_string())),
    }
}

fn list(context: &Context) -> Result<Answer, Error> {
    let mut machines = Vec::new();
    for name in running()? {
        // One that ends meanwhile is not listed.
        let Ok(found) = ask(&name, "show") else { continue };
        machines.push(json!({ "name": name, "state": found["state"], "reason": found["reason"], "pid": found["pid"] }));
    }
    for file in configured()? {
        let name = name_of(&file);
        if machines.iter().any(|machine| machine["name"].as_str() == Some(&name)) {
            continue;
        }
        // A configuration that is wrong is a machine all the same, and its owner should hear of it.
        let machine = match Plan::of(&file.to_string_lossy(), context).and_then(|plan| describe(&plan)) {
            Ok(machine) => machine,
            Err(error) => json!({ "name": name, "state": "unknown", "reason": error.to_string() }),
        };
        machines.push(json!({ "name": name, "state": machine["state"], "reason": machine["reason"], "pid": null }));
    }
    machines.sort_by(|one, other| one["name"].as_str().cmp(&other["name"].as_str()));
    let mut text = String::new();
    for machine in &machines {
        let _ = writeln!(text, "{:<20} {}", machine["name"].as_str().unwrap_or_default(), state_of(machine));
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
    if let Some(config) = found["config"].as_str() {
        let why = found["not_registered"].as_str().unwrap_or("is not registered");
        let registered = if found["registered"].as_bool() == Some(true) { "registered" } else { why };
        let _ = writeln!(text, "configuration {config} ({registered})");
    }
    if let Some(script) = found["on_event"].as_str() {
        let _ = writeln!(text, "at events     {script}");
    }
    for disk in found["disks"].as_array().into_iter().flatten() {
        let image = disk["image"].as_str().unwrap_or_default();
        let size = disk["size"].as_u64().map_or_else(String::new, |size| format!(", {}", sizes::show(size)));
        let read_only = if disk["read_only"].as_bool() == Some(true) { ", read-only" } else { "" };
        let _ = writeln!(text, "disk {:<9}{image}{size}{read_only}", disk["disk"].as_u64().unwrap_or(0));
    }
    for reach in found["left_out"].as_array().into_iter().flatten() {
        let (what, path) = (reach["what"].as_str().unwrap_or_default(), reach["path"].as_str().unwrap_or_default());
        let _ = writeln!(text, "not allowed   {what} {path}");
    }
    text
}
