//! `vhd unmount`

use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use vhd_core::chain::{Chain, UndoSession};
use vhd_core::ops::undo;
use vhd_core::{Error, ErrorKind};
use vhd_fuse::{Server, Told};
use vhd_service::control;

use super::{ChainArgs, mount};
use crate::output::{Answer, Context, ShownPath};

/// A server that says nothing for so long has stopped, or its host has.
const ANSWER: Duration = Duration::from_secs(10);

/// How often it is looked whether the server is stopped.
const LOOK: Duration = Duration::from_millis(250);

/// What the worker's line about the server begins with.
const SERVER: &str = "server ";

/// Arguments of `vhd unmount`.
#[derive(Debug, Args)]
pub struct UnmountArgs {
    /// The folder or file that was given to vhd mount
    target: PathBuf,
    /// Then move what was written with --undo into the image
    #[arg(long, conflicts_with = "discard")]
    commit: bool,
    /// Then throw away what was written with --undo
    #[arg(long)]
    discard: bool,
    /// Do not ask the process that serves it: what that has not written is lost
    #[arg(long)]
    force: bool,
    /// Be the process that unmounts, which another one watches
    #[arg(long, hide = true)]
    worker: bool,
    #[command(flatten)]
    open: ChainArgs,
}

impl UnmountArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        if self.worker {
            return self.work(context);
        }
        let image = vhd_fuse::image_at(&self.target)?;
        let ends_session = self.commit || self.discard;
        if ends_session && image.extension().is_none_or(|extension| extension != "vud") {
            let message = "was not mounted with --undo, so there is nothing to commit or discard";
            return Err(Error::new(ErrorKind::InvalidInput, message).at(&self.target));
        }
        if self.force {
            vhd_fuse::unmount(&self.target, true, &mut |_| {})?;
        } else {
            self.watch_worker(&image)?;
        }
        // A server that was killed leaves its socket in the runtime folder; to list those that live removes it.
        let _ = control::sockets();
        if ends_session {
            self.end_session(&image, context)?;
        }
        context.print("", &serde_json::json!({ "target": ShownPath(&self.target), "image": ShownPath(&image) }))?;
        Ok(Answer::Yes)
    }

    /// Unmounts, and says who the server is as soon as that is known.
    fn work(&self, context: &Context) -> Result<Answer, Error> {
        vhd_fuse::unmount(&self.target, false, &mut |told| match told {
            // Nobody listens when the other process is gone, which is no reason to stop.
            Told::Server(identity) => drop(writeln!(io::stdout(), "{SERVER}{identity}")),
            Told::Note(note) => context.note(note),
        })?;
        Ok(Answer::Yes)
    }

    /// Lets this command, run once more, unmount, and gives it up when the server is stopped: a process that waits for
    /// a stopped server can't even be killed, so that must not be this one.
    fn watch_worker(&self, image: &Path) -> Result<(), Error> {
        let failed = |error: io::Error| Error::io(error, "can't start the process that unmounts it").at(&self.target);
        let mut command = mount::same_command("--worker").map_err(failed)?;
        // What it says goes through this process, for whoever waits for the end of a pipe must not wait for the worker.
        let mut worker = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(failed)?;
        let stderr = worker.stderr.take();
        let said = thread::spawn(move || stderr.map(|mut stderr| io::copy(&mut stderr, &mut io::stderr())));
        let rest = match self.watch(&mut worker, image) {
            Ok(rest) => rest,
            Err(error) => {
                let _ = worker.kill();
                return Err(error);
            }
        };
        let status = worker.wait().map_err(failed)?;
        let _ = said.join();
        if status.success() {
            return Ok(());
        }
        io::stdout().write_all(rest.as_bytes()).map_err(failed)?;
        // It has said why.
        std::process::exit(status.code().unwrap_or(2))
    }

    /// Waits until the worker has ended, for as long as its server runs. Returns what else it wrote to its stdout.
    fn watch(&self, worker: &mut Child, image: &Path) -> Result<String, Error> {
        let (tell, told) = mpsc::channel();
        let stdout = worker.stdout.take();
        thread::spawn(move || {
            let lines = stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines().map_while(Result::ok));
            // An error is that nobody wants to know any more.
            let _ = lines.map(|line| tell.send(line)).take_while(Result::is_ok).count();
        });
        let mut rest = String::new();
        let began = Instant::now();
        let mut has_answered = false;
        let mut server = None;
        loop {
            match told.recv_timeout(LOOK) {
                Ok(line) => match line.strip_prefix(SERVER) {
                    Some(identity) => (server, has_answered) = (Server::find(identity), true),
                    None => rest.extend([line.as_str(), "\n"]),
                },
                Err(RecvTimeoutError::Disconnected) => return Ok(rest),
                Err(RecvTimeoutError::Timeout) if has_answered => {
                    let runs = server.as_ref().map_or(Ok(()), Server::check_runs);
                    runs.map_err(|error| error.at(&self.target))?;
                }
                Err(RecvTimeoutError::Timeout) if began.elapsed() < ANSWER => {
                    vhd_fuse::check_servers_run(image).map_err(|error| error.at(&self.target))?;
                }
                Err(RecvTimeoutError::Timeout) => {
                    let message = format!(
                        "its server did not answer within {} s: let it go on (kill -CONT) if it is stopped, or give up what it \
                         has not written with vhd unmount --force",
                        ANSWER.as_secs()
                    );
                    return Err(Error::new(ErrorKind::Refused, message).at(&self.target));
                }
            }
        }
    }

    fn end_session(&self, undo_disk: &Path, context: &Context) -> Result<(), Error> {
        let chain = self.open.options(false, false);
        let session = UndoSession::of(&*Chain::open_image(undo_disk, &chain)?)?;
        let Some(session) = session else {
            return Err(Error::new(ErrorKind::InvalidInput, "is no undo disk: it names no session").at(undo_disk));
        };
        let images: Vec<_> = session.members.iter().map(|member| member.image.clone()).collect();
        let dir = undo_disk.parent();
        if self.discard {
            undo::discard(&images, dir, false, &chain)?;
            return Ok(());
        }
        context.with_progress("undo commit", |progress| undo::commit(&images, dir, false, &chain, progress))
    }
}
