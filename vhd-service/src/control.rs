//! A socket that takes commands: one JSON document a line, one answer a line.
//!
//! A request is `{"command": "snapshot", "name": "disk", ...}`, an answer `{"ok": ...}` or `{"error": {"kind", "file",
//! "message"}}`. Only the user who made the socket (and root) may connect.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use vhd_core::{Error, ErrorKind, Result};

use crate::places::{Place, Places};
use crate::socket::{PrivateListener, is_served};

/// Bytes of a request at most, and of an answer.
const MAX_REQUEST: u64 = 256 << 10;
const MAX_ANSWER: u64 = 16 << 20;
/// Clients at once at most: people and scripts, not load. One that asks nothing makes room for one more.
pub const MAX_CLIENTS: usize = 32;
/// How long a client may say nothing.
const IDLE: Duration = Duration::from_secs(300);
/// The ending of sockets in the runtime folder.
pub const EXTENSION: &str = "ctl";

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// What to do.
    pub command: String,
    /// With what.
    #[serde(flatten)]
    pub arguments: Map<String, Value>,
}

impl Request {
    /// A request without arguments.
    #[must_use]
    pub fn new(command: &str) -> Self {
        Self { command: command.into(), arguments: Map::new() }
    }

    /// The same with an argument more.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.arguments.insert(name.into(), value.into());
        self
    }

    /// An argument that is text.
    ///
    /// # Errors
    /// `InvalidInput` when it is missing or something else.
    pub fn text(&self, name: &str) -> Result<&str> {
        self.optional_text(name)?.ok_or_else(|| self.wrong(name, "is missing"))
    }

    /// An argument that is text, where it is there.
    ///
    /// # Errors
    /// `InvalidInput` when it is something else.
    pub fn optional_text(&self, name: &str) -> Result<Option<&str>> {
        match self.arguments.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(name, "is no text")),
        }
    }

    /// An argument that is true or false; false when it is missing.
    ///
    /// # Errors
    /// `InvalidInput` when it is something else.
    pub fn flag(&self, name: &str) -> Result<bool> {
        match self.arguments.get(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(_) => Err(self.wrong(name, "is neither true nor false")),
        }
    }

    /// The answer to a command that nobody knows.
    #[must_use]
    pub fn unknown(&self, known: &[&str]) -> Error {
        let message = format!("command {:?} is not known here, expected one of: {}", self.command, known.join(" "));
        Error::new(ErrorKind::InvalidInput, message)
    }

    fn wrong(&self, name: &str, what: &str) -> Error {
        Error::new(ErrorKind::InvalidInput, format!("argument {name:?} of command {:?} {what}", self.command))
    }
}

/// What answers requests. Several may come at once.
pub trait Handler: Send + Sync {
    /// Does what is asked and says what came of it.
    ///
    /// # Errors
    /// As it fails; the client is told.
    fn handle(&self, request: &Request) -> Result<Value>;
}

impl<F: Fn(&Request) -> Result<Value> + Send + Sync> Handler for F {
    fn handle(&self, request: &Request) -> Result<Value> {
        self(request)
    }
}

/// How long the end waits for answers that are under way.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// A socket that is served until this is dropped.
#[derive(Debug)]
pub struct Control {
    listener: Arc<PrivateListener>,
    stop: Arc<AtomicBool>,
    places: Arc<Places<UnixStream>>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Serves commands at `path`. A socket that a dead process left there is replaced.
    ///
    /// # Errors
    /// `Exists` when someone serves it, or it is no socket; as the host fails.
    pub fn bind(path: &Path, handler: Arc<dyn Handler>) -> Result<Self> {
        let listener = Arc::new(PrivateListener::bind(path)?);
        let (stop, places) = (Arc::<AtomicBool>::default(), Places::new(MAX_CLIENTS));
        let accepting = Accepting { handler, stop: Arc::clone(&stop), places: Arc::clone(&places) };
        let listening = Arc::clone(&listener);
        let thread = thread::Builder::new().name("vhd-control".into()).spawn(move || accepting.run(&listening));
        let thread = thread.map_err(|error| Error::io(error, "can't be served").at(path))?;
        Ok(Self { listener, stop, places, thread: Some(thread) })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.listener.path()
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Who waits for clients is told that none will come.
        self.listener.end();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.places.end();
        // Whoever asked for the end is told that it came.
        self.places.wait(LAST_ANSWERS);
    }
}

struct Accepting {
    handler: Arc<dyn Handler>,
    stop: Arc<AtomicBool>,
    places: Arc<Places<UnixStream>>,
}

impl Accepting {
    fn run(&self, listener: &UnixListener) {
        for client in listener.incoming() {
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            match client {
                Ok(client) => self.start(client),
                // Out of descriptors: it will pass.
                Err(error) => {
                    tracing::warn!("control socket: {error}");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn start(&self, client: UnixStream) {
        let handler = Arc::clone(&self.handler);
        let served = move |place: &Place<UnixStream>| {
            if let Err(error) = serve(place, &*handler) {
                tracing::debug!("control client: {error}");
            }
        };
        if let Err(mut client) = self.places.serve("vhd-control-client", client, served) {
            let message = format!("{MAX_CLIENTS} requests are under way already; try again later");
            let _ = client.set_nonblocking(true);
            let _ = client.write_all(&line_of(&answer(Err(Error::new(ErrorKind::Refused, message)))));
        }
    }
}

fn serve(place: &Place<UnixStream>, handler: &dyn Handler) -> io::Result<()> {
    let client = place.stream();
    client.set_read_timeout(Some(IDLE))?;
    client.set_write_timeout(Some(IDLE))?;
    let mut reader = BufReader::new(client);
    while let Some(line) = read_line(&mut reader, MAX_REQUEST)? {
        let result = match serde_json::from_slice::<Request>(&line) {
            Ok(request) => place.at_work(|| handler.handle(&request)),
            Err(error) => Err(Error::new(ErrorKind::InvalidInput, format!("a request is not understood: {error}"))),
        };
        (&*client).write_all(&line_of(&answer(result)))?;
    }
    Ok(())
}

/// The next line; `None` at the end.
fn read_line(reader: &mut impl BufRead, most: u64) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    reader.take(most).read_until(b'\n', &mut line)?;
    match line.pop() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(line)),
        Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, format!("a line has no end within {most} bytes"))),
    }
}

fn answer(result: Result<Value>) -> Value {
    match result {
        Ok(value) => serde_json::json!({ "ok": value }),
        Err(error) => serde_json::json!({ "error": {
            "kind": error.kind().name(),
            "file": error.path().map(Path::to_string_lossy),
            "message": error.message(),
        } }),
    }
}

fn line_of(value: &Value) -> Vec<u8> {
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Asks the service at `path`, and waits for its answer.
///
/// # Errors
/// `NotFound` when nobody serves the socket; as the service says.
pub fn call(path: &Path, request: &Request) -> Result<Value> {
    let failed = |error: io::Error| Error::io(error, "the service can't be asked").at(path);
    let client = UnixStream::connect(path).map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            Error::new(ErrorKind::NotFound, "nobody serves this socket any more: its process is gone").at(path)
        }
        _ => Error::io(error, "can't be connected to").at(path),
    })?;
    let request = serde_json::to_value(request).map_err(|error| failed(error.into()))?;
    (&client).write_all(&line_of(&request)).map_err(failed)?;
    let line = read_line(&mut BufReader::new(&client), MAX_ANSWER).map_err(failed)?;
    let gone = || Error::new(ErrorKind::Io, "the service ended before it answered").at(path);
    let mut said: Value = serde_json::from_slice(&line.ok_or_else(gone)?).map_err(|error| failed(error.into()))?;
    if let Some(value) = said.get_mut("ok") {
        return Ok(value.take());
    }
    Err(failure(&said["error"], path))
}

/// An error as the service had it.
fn failure(error: &Value, socket: &Path) -> Error {
    let kind = error["kind"].as_str().and_then(ErrorKind::from_name).unwrap_or(ErrorKind::Io);
    let message = error["message"].as_str().unwrap_or("the service did not say why");
    let file = error["file"].as_str().map_or(socket, Path::new);
    Error::new(kind, message).at(file)
}

/// The sockets of this user's running services, by name. Those that dead processes left are removed.
///
/// # Errors
/// As the runtime folder can't be read.
pub fn sockets() -> Result<Vec<PathBuf>> {
    let folder = crate::runtime::folder()?;
    let entries = std::fs::read_dir(&folder).map_err(|error| Error::io(error, "can't be listed").at(&folder))?;
    let mut found = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_none_or(|extension| extension != EXTENSION) {
            continue;
        }
        match is_served(&path) {
            Ok(true) => found.push(path),
            Ok(false) => drop(std::fs::remove_file(&path)),
            Err(_) => {}
        }
    }
    found.sort();
    Ok(found)
}
