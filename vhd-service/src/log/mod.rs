//! The log of a process: lines on stderr.
//!
//! A command that does one thing writes them as they come. One that serves others must not wait for who reads its stderr, and
//! must not write as much as its clients like. So after [`serve`] lines go into a queue with an end (`Queue`), which a
//! thread of its own empties, and of lines that are alike few are kept in a time (`limits`).

mod limits;
mod queue;

use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;

use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use vhd_core::{Error, Result};

use self::limits::{Kind, Limits};
use self::queue::Queue;

/// The queue of this process, once it serves.
static QUEUE: OnceLock<Queue> = OnceLock::new();

/// Has the process log what the filter lets through, which the environment (`VHD_LOG`) may replace.
pub fn start(filter: &str) {
    let filter = EnvFilter::try_from_env("VHD_LOG").unwrap_or_else(|_| filter.into());
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(Stderr)
        .with_ansi(io::stderr().is_terminal())
        .without_time()
        .with_target(false);
    // A log that can't be written, as on a full volume, is no reason to fail.
    let _ = log.log_internal_errors(false).try_init();
}

/// From now on others are served: nothing that is logged or said waits for who reads stderr.
///
/// # Errors
/// When there can be no thread.
pub fn serve() -> Result<()> {
    if QUEUE.get().is_some() {
        return Ok(());
    }
    let queue = Queue::new(Limits::default());
    queue.start(io::stderr()).map_err(|error| Error::io(error, "the log can't be written"))?;
    // Another who did the same meanwhile has its queue kept.
    drop(QUEUE.set(queue));
    Ok(())
}

/// Says one line on stderr, which no limit holds back.
pub fn say(line: &str) {
    match QUEUE.get() {
        Some(queue) => queue.push(format!("{line}\n").into_bytes()),
        // Who reads it or not is no reason to fail.
        None => drop(writeln!(io::stderr(), "{line}")),
    }
}

/// Waits until what was said and logged is written, for as long as someone takes it.
pub fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush();
    }
}

/// Where the subscriber writes.
struct Stderr;

/// One line of the log.
struct Line(Option<Kind>);

impl MakeWriter<'_> for Stderr {
    type Writer = Line;

    fn make_writer(&self) -> Line {
        Line(None)
    }

    fn make_writer_for(&self, metadata: &Metadata<'_>) -> Line {
        Line(Some(Kind { level: *metadata.level(), place: metadata.callsite() }))
    }
}

impl Write for Line {
    /// The subscriber gives a line as a whole.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match (QUEUE.get(), &self.0) {
            (None, _) => io::stderr().write_all(line)?,
            (Some(queue), None) => queue.push(line.to_vec()),
            (Some(queue), Some(kind)) => queue.log(kind, line),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A line as the subscriber writes those of this level.
fn line_of(level: Level, text: &str) -> Vec<u8> {
    format!("{level:>5} {text}\n").into_bytes()
}
