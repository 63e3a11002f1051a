//! A script that is run at each event of a machine.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use vhd_core::{Error, ErrorKind};
use vhd_service::events::Events;

/// Runs `script NAME EVENT MESSAGE` for each event, one after the other, until `events` is gone. It is not waited for
/// by the machine, and what it says goes where this process says things.
///
/// # Errors
/// `NotFound` when there is no such file; as there can be no thread.
pub fn run_at_events(script: &Path, events: &Events) -> Result<JoinHandle<()>, Error> {
    let script: PathBuf = script.canonicalize().map_err(|error| Error::io(error, "can't be run at events").at(script))?;
    if !script.is_file() {
        return Err(Error::new(ErrorKind::InvalidInput, "is no file that can be run at events").at(&script));
    }
    let received = events.subscribe();
    let thread = std::thread::Builder::new().name("event hook".into()).spawn(move || {
        for event in received {
            let mut command = Command::new(&script);
            command.args([&event.subject, event.kind, &event.message]).stdin(Stdio::null());
            match command.status() {
                Ok(status) if status.success() => {}
                Ok(status) => tracing::warn!("{}: ended with {status} at event {}", script.display(), event.kind),
                Err(error) => tracing::warn!("{}: can't be run at event {}: {error}", script.display(), event.kind),
            }
        }
    });
    thread.map_err(|error| Error::io(error, "events can't be listened to"))
}
