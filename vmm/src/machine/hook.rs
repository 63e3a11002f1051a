//! A script that is run at each event of a machine.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use vhd_core::{Error, ErrorKind};
use vhd_service::events::Events;

/// The process that runs the script, its `$0`: three lines an event, one event after the other, until there are no more.
const RUNNER: &str = r#"
while IFS= read -r name && IFS= read -r event && IFS= read -r message; do
    "$0" "$name" "$event" "$message" </dev/null || echo "vhd: $0: ended with status $? at event $event" >&2
done
"#;

/// Runs `script NAME EVENT MESSAGE` for each event, one after the other, until `events` is gone. It is not waited for
/// by the machine, and what it says goes where this process says things.
///
/// Scripts have the rights that this process has now: a process of their own runs them, and a sandbox that comes later
/// is none for it.
///
/// # Errors
/// `NotFound` when there is no such file; as there can be no process or thread.
pub fn run_at_events(script: &Path, events: &Events) -> Result<JoinHandle<()>, Error> {
    let script: PathBuf = script.canonicalize().map_err(|error| Error::io(error, "can't be run at events").at(script))?;
    if !script.is_file() {
        return Err(Error::new(ErrorKind::InvalidInput, "is no file that can be run at events").at(&script));
    }
    let failed = |error| Error::io(error, "can't be run at events").at(&script);
    let mut runner = Command::new("/bin/sh");
    // What is typed to end the machine is no end of its scripts.
    runner.args(["-c", RUNNER]).arg(&script).stdin(Stdio::piped()).process_group(0);
    let mut runner = runner.spawn().map_err(failed)?;
    let mut told = runner.stdin.take().ok_or_else(|| failed(std::io::ErrorKind::BrokenPipe.into()))?;
    let received = events.subscribe();
    let thread = std::thread::Builder::new().name("event hook".into()).spawn(move || {
        let one_line = |text: &str| text.replace(['\n', '\0'], " ");
        for event in received {
            let lines = [&event.subject, event.kind, &event.message].map(one_line).join("\n");
            if let Err(error) = writeln!(told, "{lines}") {
                tracing::warn!("no script is run at event {}: {error}", event.kind);
            }
        }
        // With that it ends, after the scripts for what it was told.
        drop(told);
        let _ = runner.wait();
    });
    thread.map_err(|error| Error::io(error, "events can't be listened to"))
}
