//! `vhd mount`

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;
use vhd_core::{Disk, Error};
use vhd_fuse::{DISK_FILE, MountOptions, StopSignals};

use super::ChainArgs;
use crate::output::{Answer, Context, ShownPath};

/// What the background process says on its stdout when the files are there. Anything else it says is an error's
/// document, with `--json`.
const READY: &str = "ready\n";

/// Arguments of `vhd mount`.
#[derive(Debug, Args)]
pub struct MountArgs {
    /// The image
    image: PathBuf,
    /// The folder where disk.raw appears
    target: PathBuf,
    /// Refuse all writes
    #[arg(long)]
    read_only: bool,
    /// Serve from this process and return when it is unmounted; SIGTERM, SIGINT and SIGHUP unmount it
    #[arg(long)]
    foreground: bool,
    /// Words with commas as for mount(8): ro, rw, allow_other, sync, uid=N, gid=N, umask=N
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// Write even if a saved state or a child relies on the image
    #[arg(long)]
    force: bool,
    /// Be the background process that another one started
    #[arg(long, hide = true)]
    daemon: bool,
    #[command(flatten)]
    open: ChainArgs,
}

impl MountArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        if !self.foreground && !self.daemon {
            // A word that is wrong is better found before there is a second process.
            self.mount_options()?;
            return self.start_daemon(context);
        }
        // First of all, so that no thread is left that a signal could end.
        let stop = StopSignals::block()?;
        let options = self.mount_options()?;
        let disk = Disk::open(&self.image, &self.open.options(!options.read_only, self.force))?;
        let mounted = vhd_fuse::mount(disk, &self.target, &options)?;
        if self.daemon {
            leave_terminal().map_err(|error| Error::io(error, "can't go to the background").at(&self.target))?;
        } else {
            report(context, mounted.target(), std::process::id())?;
        }
        mounted.wait(Some(&stop))?;
        Ok(Answer::Yes)
    }

    fn mount_options(&self) -> Result<MountOptions, Error> {
        let mut options = MountOptions::default();
        self.options.iter().try_for_each(|list| options.apply(list))?;
        // What is tolerated is not written to.
        options.read_only |= self.read_only || self.open.tolerant;
        Ok(options)
    }

    /// Runs this command again as a process of its own, and returns when it serves. (A fork would be less, but has no
    /// safe form.) What that process has to say before, it says on this one's stderr.
    fn start_daemon(&self, context: &Context) -> Result<Answer, Error> {
        let failed = |error: io::Error| Error::io(error, "can't start the background process").at(&self.target);
        let mut arguments: Vec<_> = std::env::args_os().collect();
        let options_end = arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len());
        arguments.insert(options_end, "--daemon".into());
        // By its name, for `ps`; but a file that was replaced meanwhile is not this program.
        let named = std::env::current_exe().ok().filter(|path| path.exists());
        let mut command = Command::new(named.as_deref().unwrap_or(Path::new("/proc/self/exe")));
        command.arg0(&arguments[0]).args(&arguments[1..]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut daemon = command.spawn().map_err(failed)?;

        // Its stdout ends when it is ready, or when it is gone.
        let mut said = Vec::new();
        if let Some(stdout) = &mut daemon.stdout {
            stdout.read_to_end(&mut said).map_err(failed)?;
        }
        if said == READY.as_bytes() {
            let target = self.target.canonicalize().unwrap_or_else(|_| self.target.clone());
            report(context, &target, daemon.id())?;
            return Ok(Answer::Yes);
        }
        let status = daemon.wait().map_err(failed)?;
        io::stdout().write_all(&said).map_err(failed)?;
        // It has said why.
        std::process::exit(status.code().unwrap_or(2))
    }
}

/// Nothing for people, to whom success is silent.
fn report(context: &Context, target: &Path, pid: u32) -> Result<(), Error> {
    let file = target.join(DISK_FILE);
    context.print("", &serde_json::json!({ "target": ShownPath(target), "file": ShownPath(&file), "pid": pid }))
}

/// Says that the mount is ready, and lets go of the terminal, its session and the current folder.
fn leave_terminal() -> io::Result<()> {
    nix::unistd::setsid()?;
    nix::unistd::chdir("/")?;
    io::stdout().write_all(READY.as_bytes())?;
    io::stdout().flush()?;
    let null = File::options().write(true).open("/dev/null")?;
    nix::unistd::dup2_stderr(&null)?;
    // Last, for this is what the other process waits for.
    nix::unistd::dup2_stdout(&null)?;
    Ok(())
}
