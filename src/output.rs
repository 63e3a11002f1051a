//! What a run prints: text or JSON on stdout, progress, notes and errors on stderr; and how it ends.

use std::cell::OnceCell;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use vhd_core::{Error, ErrorKind, Progress};
use vhd_service::log;

/// How long the end of an operation waits until its progress is written.
const LAST_PROGRESS: Duration = Duration::from_secs(1);

/// Options of every command.
#[derive(Debug, Args)]
pub struct GlobalArgs {
    /// Print one JSON document on stdout and nothing else
    #[arg(long, global = true)]
    pub json: bool,
    /// Print less: no notes, no progress
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Print more; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,
    /// Print progress as lines even when stderr is not a terminal
    #[arg(long, global = true)]
    pub progress: bool,
}

/// How a command ended, when it could be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done; yes; clean.
    Yes,
    /// The answer is no.
    No,
}

impl From<Answer> for ExitCode {
    fn from(answer: Answer) -> Self {
        match answer {
            Answer::Yes => Self::SUCCESS,
            Answer::No => Self::from(1),
        }
    }
}

/// What all commands share.
#[derive(Debug)]
pub struct Context {
    /// JSON on stdout.
    pub json: bool,
    quiet: bool,
    force_progress: bool,
    interrupted: Arc<AtomicBool>,
    signals: Once,
    /// What was done before something could not be: it stands in JSON beside the error.
    done: OnceCell<serde_json::Value>,
}

impl Context {
    /// Sets up logging and signals.
    pub fn new(global: &GlobalArgs) -> Self {
        let level = match (global.quiet, global.verbose) {
            (true, _) => "error,fuser::reply=off",
            // fuser warns of whatever a program tries that a disk's files have not, such as poll(2), which io_uring tries, and of
            // answers that nobody waits for any more: those of an interrupted request, or of a mount that is gone.
            (_, 0) => "warn,fuser=error,fuser::reply=off",
            (_, 1) => "info",
            _ => "debug",
        };
        log::start(level);
        let (json, quiet, force_progress) = (global.json, global.quiet, global.progress);
        Self { json, quiet, force_progress, interrupted: Arc::default(), signals: Once::new(), done: OnceCell::new() }
    }

    /// As [`Context::print`], for a command that fails now, of what it had done until then. The failure counts for more than
    /// an output that can't be written.
    pub fn print_done(&self, text: &str, document: &impl serde::Serialize) {
        if self.json {
            let _ = serde_json::to_value(document).map(|document| self.done.set(document));
        } else {
            let _ = write_stdout(text.as_bytes());
        }
    }

    /// Prints text, or the document in its place with `--json`.
    pub fn print(&self, text: &str, document: &impl serde::Serialize) -> Result<(), Error> {
        if self.json {
            return write_json(document);
        }
        write_stdout(text.as_bytes())
    }

    /// Tells the user something that is not the answer.
    pub fn note(&self, note: &str) {
        if !self.quiet {
            log::say(&format!("vhd: note: {note}"));
        }
    }

    /// Set once SIGINT or SIGTERM came to an operation of [`Context::with_progress`].
    pub fn stop(&self) -> &Arc<AtomicBool> {
        &self.interrupted
    }

    /// Runs an operation with a progress bar; SIGINT and SIGTERM ask it to stop where it can. A second one ends the process there
    /// and then, as for one that hangs with its file system: what is cut short so goes on by the same command, as after a kill.
    pub fn with_progress<T>(&self, what: &str, operation: impl FnOnce(&Progress) -> Result<T, Error>) -> Result<T, Error> {
        self.signals.call_once(|| {
            for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
                // In this order, so that the first is no second.
                let _ = signal_hook::flag::register_conditional_default(signal, Arc::clone(&self.interrupted));
                let _ = signal_hook::flag::register(signal, Arc::clone(&self.interrupted));
            }
        });
        let progress = Arc::new(Progress::stopped_by(Arc::clone(&self.interrupted)));
        let ended = Arc::new(AtomicBool::new(false));
        let watcher = self.watch(what, &progress, &ended);
        let result = operation(&progress);
        ended.store(true, Ordering::SeqCst);
        watcher.thread().unpark();
        // It takes a moment, but where nobody takes what it writes.
        let began = Instant::now();
        while !watcher.is_finished() && began.elapsed() < LAST_PROGRESS {
            thread::sleep(Duration::from_millis(1));
        }
        result
    }

    /// The thread that draws the bar.
    fn watch(&self, what: &str, progress: &Arc<Progress>, ended: &Arc<AtomicBool>) -> JoinHandle<()> {
        let bar = (io::stderr().is_terminal() && !self.quiet).then(|| new_bar(what));
        let lines = self.force_progress && bar.is_none();
        let (what, progress, ended) = (what.to_owned(), Arc::clone(progress), Arc::clone(ended));
        thread::spawn(move || {
            let mut last = None;
            while !ended.load(Ordering::SeqCst) {
                thread::park_timeout(Duration::from_millis(100));
                let (done, total) = (progress.done(), progress.total());
                if let Some(bar) = &bar {
                    bar.set_length(total);
                    bar.set_position(done);
                }
                let percent = (done * 100).checked_div(total);
                if lines && percent != last {
                    eprintln!("vhd: {what}: {done} of {total} bytes ({} %)", percent.unwrap_or(0));
                    last = percent;
                }
            }
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
        })
    }
}

fn new_bar(what: &str) -> ProgressBar {
    let template = "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style).with_message(what.to_owned())
}

/// Says after an interruption that the same command goes on.
pub fn goes_on(error: Error, path: &Path) -> Error {
    match error.kind() {
        ErrorKind::Cancelled => Error::new(ErrorKind::Cancelled, "interrupted; the same command goes on").at(path),
        _ => error,
    }
}

/// A path as short as it is from the current folder.
pub fn from_here(path: &Path) -> std::path::Display<'_> {
    let here = std::env::current_dir().ok();
    here.and_then(|here| path.strip_prefix(here).ok()).unwrap_or(path).display()
}

/// A path in JSON, which holds text only: what is none of it becomes U+FFFD, as in messages.
#[derive(Debug)]
pub struct ShownPath<'a>(pub &'a Path);

impl serde::Serialize for ShownPath<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0.to_string_lossy())
    }
}

/// Prints a document as one JSON text.
pub fn write_json(document: &impl serde::Serialize) -> Result<(), Error> {
    let mut text = serde_json::to_string_pretty(document)
        .map_err(|error| Error::new(ErrorKind::InvalidInput, format!("can't be told as JSON: {error}")))?;
    text.push('\n');
    write_stdout(text.as_bytes())
}

/// Pieces of an answer that are kept in memory.
const MOST_KEPT: usize = 100_000;

/// What finds the pieces of an answer.
pub type Walk<'a, T> = &'a dyn Fn(&mut dyn FnMut(T) -> Result<(), Error>) -> Result<(), Error>;

/// An answer of which all pieces were found once, so that an error comes before the first of them is printed.
pub struct Found<'a, T> {
    walk: Walk<'a, T>,
    /// None where there are more than memory should hold: they are found once more.
    kept: Option<Vec<T>>,
}

impl<'a, T> Found<'a, T> {
    pub fn of(walk: Walk<'a, T>) -> Result<Self, Error> {
        let (mut kept, mut count) = (Vec::new(), 0);
        walk(&mut |piece| {
            count += 1;
            if count <= MOST_KEPT {
                kept.push(piece);
            }
            Ok(())
        })?;
        Ok(Self { walk, kept: (count <= MOST_KEPT).then_some(kept) })
    }

    /// Calls `visit` with each piece.
    pub fn each(self, visit: &mut dyn FnMut(T) -> Result<(), Error>) -> Result<(), Error> {
        match self.kept {
            Some(kept) => kept.into_iter().try_for_each(visit),
            None => (self.walk)(visit),
        }
    }
}

/// Writes an entry of a JSON array that is written piece by piece.
pub fn write_entry(out: &mut impl Write, entry: &impl serde::Serialize, first: bool) -> io::Result<()> {
    out.write_all(if first { b"\n  " } else { b",\n  " })?;
    serde_json::to_writer(out, entry).map_err(io::Error::from)
}

fn write_stdout(bytes: &[u8]) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(output_error)
}

/// A failure of stdout.
pub fn output_error(error: io::Error) -> Error {
    Error::io(error, "output can't be written")
}

/// Says why a command could not be done. A reader that closed the pipe had enough: that is success.
pub fn report_failure(context: &Context, failure: Error) -> ExitCode {
    if failure.raw_os_error() == Some(nix::libc::EPIPE) {
        return ExitCode::SUCCESS;
    }
    if context.json {
        let error = serde_json::json!({
            "kind": failure.kind().name(),
            "file": failure.path().map(ShownPath),
            "message": failure.message(),
        });
        let mut document = serde_json::json!({ "error": error });
        if let Some(done) = context.done.get() {
            document["done"] = done.clone();
        }
        let _ = write_json(&document);
    } else {
        let short = failure.path().map(|path| from_here(path).to_string()).filter(|short| !short.is_empty());
        let failure = match short {
            Some(short) => failure.about(Path::new(&short)),
            None => failure,
        };
        log::say(&format!("vhd: {failure}"));
    }
    ExitCode::from(2)
}
