//! `vhd ctl`

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::Value;
use vhd_core::{Error, ErrorKind};
use vhd_service::control::{self, Request};

use crate::output::{Answer, Context, from_here};
use crate::sizes;

/// Arguments of `vhd ctl`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = false, subcommand_precedence_over_arg = true, arg_required_else_help = true)]
#[command(override_usage = "vhd ctl [OPTIONS] [SOCKET] <COMMAND>")]
pub struct CtlArgs {
    /// The service's control socket; not needed where only one runs
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<CtlCommand>,
}

/// What a service is asked for.
#[derive(Debug, Subcommand)]
enum CtlCommand {
    /// What is served, and to whom
    List,
    /// Serve one more image
    Add {
        /// The image
        image: PathBuf,
        /// Its name, where its file name won't do
        #[arg(long)]
        name: Option<String>,
        /// Refuse all writes
        #[arg(long)]
        read_only: bool,
    },
    /// Serve an image no more, and close it
    Remove {
        /// Its name
        name: String,
        /// End the sessions of its clients
        #[arg(long)]
        force: bool,
    },
    /// Put a new leaf over a disk: what was written so far stays in the image that it was written to
    Snapshot {
        /// The disk's name
        name: String,
        /// The new image
        path: PathBuf,
    },
    /// Look at a disk's files again, for its size and their names; clients that connect from then on have it
    Refresh {
        /// The disk's name
        name: String,
        /// Make the disk so large first
        #[arg(long, value_parser = sizes::parse)]
        size: Option<u64>,
    },
    /// Counters, as Prometheus reads them
    Metrics,
    /// What is none of these.
    #[command(external_subcommand)]
    Other(Vec<OsString>),
}

impl CtlArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        if let Some(socket) = &self.socket {
            self.look_at(socket)?;
        }
        let Some(command) = &self.command else {
            return Err(Error::new(ErrorKind::InvalidInput, format!("the command is missing; {}", commands())));
        };
        let request = command.request()?;
        let socket = self.socket.clone().map_or_else(only_socket, Ok)?;
        let answer = control::call(&socket, &request)?;
        context.print(&command.text(&answer), &answer)?;
        Ok(Answer::Yes)
    }

    /// Refuses what can't be a socket: a command that is not known stands in its place.
    fn look_at(&self, socket: &Path) -> Result<(), Error> {
        let (kind, message) = match std::fs::metadata(socket) {
            Ok(found) if !found.file_type().is_socket() => (ErrorKind::InvalidInput, "is no socket".to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => match &self.command {
                None | Some(CtlCommand::Other(_)) => {
                    (ErrorKind::InvalidInput, format!("is neither a command nor a socket; {}", commands()))
                }
                Some(_) => (ErrorKind::NotFound, "no such socket; leave it out where only one service runs".to_owned()),
            },
            _ => return Ok(()),
        };
        Err(Error::new(kind, message).at(socket))
    }
}

/// The commands that there are, for who gave none of them.
fn commands() -> String {
    let command = CtlCommand::augment_subcommands(clap::Command::new("ctl"));
    let names: Vec<_> = command.get_subcommands().map(clap::Command::get_name).collect();
    format!("commands are {}", names.join(", "))
}

fn only_socket() -> Result<PathBuf, Error> {
    let mut sockets = control::sockets()?;
    match sockets.len() {
        0 => Err(Error::new(ErrorKind::NotFound, "nothing is served or mounted by this user")),
        1 => Ok(sockets.remove(0)),
        count => {
            let names: Vec<_> = sockets.iter().map(|socket| socket.display().to_string()).collect();
            let message = format!("{count} services run: name the socket of one of them, {}", names.join(" "));
            Err(Error::new(ErrorKind::InvalidInput, message))
        }
    }
}

/// A path that means the same to the service, which has a folder of its own.
fn absolute(path: &Path) -> Result<String, Error> {
    let path = std::path::absolute(path).map_err(|error| Error::io(error, "has no absolute path").at(path))?;
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "is no UTF-8, which a service can't be told").at(&path))
}

impl CtlCommand {
    fn request(&self) -> Result<Request, Error> {
        Ok(match self {
            Self::List => Request::new("list"),
            Self::Add { image, name, read_only } => {
                let request = Request::new("add").with("image", absolute(image)?).with("read_only", *read_only);
                request.with("name", name.clone().map_or(Value::Null, Value::from))
            }
            Self::Remove { name, force } => Request::new("remove").with("name", name.as_str()).with("force", *force),
            Self::Snapshot { name, path } => Request::new("snapshot").with("name", name.as_str()).with("path", absolute(path)?),
            Self::Refresh { name, size } => {
                Request::new("refresh").with("name", name.as_str()).with("size", size.map_or(Value::Null, Value::from))
            }
            Self::Metrics => Request::new("metrics"),
            Self::Other(words) => {
                let word = words.first().map(|word| word.to_string_lossy()).unwrap_or_default();
                return Err(Error::new(ErrorKind::InvalidInput, format!("{word} is no command; {}", commands())));
            }
        })
    }

    fn text(&self, answer: &Value) -> String {
        match self {
            Self::List => list(answer),
            Self::Metrics => answer.as_str().unwrap_or_default().to_owned(),
            // To people, success is silent.
            _ => String::new(),
        }
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("-")
}

fn list(answer: &Value) -> String {
    let mut out = String::new();
    for export in answer["exports"].as_array().into_iter().flatten() {
        let access = if export["read_only"] == true { "read-only" } else { "read-write" };
        let clients = match export["clients"].as_u64() {
            Some(1) => "1 client".to_owned(),
            count => format!("{} clients", count.unwrap_or(0)),
        };
        let size = sizes::show(export["size"].as_u64().unwrap_or(0));
        let image = from_here(Path::new(text(export, "image"))).to_string();
        out.push_str(&format!("{}  {image}  {size}  {access}  {clients}\n", text(export, "name")));
    }
    for client in answer["clients"].as_array().into_iter().flatten() {
        let (peer, export) = (text(client, "peer"), text(client, "export"));
        out.push_str(&format!("client {}  {peer}  {export}  {} requests\n", client["id"], client["requests"]));
    }
    for event in answer["events"].as_array().into_iter().flatten() {
        let (kind, subject) = (text(event, "kind"), from_here(Path::new(text(event, "subject"))));
        out.push_str(&format!("{kind}  {subject}  {}\n", text(event, "message")));
    }
    out
}
