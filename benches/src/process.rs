//! Other programs: run and accounted for, or served by.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use wait4::Wait4;

use crate::measure::Sample;

/// The first argument of this program when it is a [`launch`]er.
pub const LAUNCH: &str = "--launch";

/// Runs a program to its end: wall seconds, processor seconds, memory.
///
/// A process counts its parent's memory as its own until it has started its program, and this one's is large. So a second
/// process of this program, which has next to nothing, starts it and tells.
pub fn run(command: &mut Command) -> Result<Sample> {
    let mut launcher = Command::new(std::env::current_exe()?);
    launcher.arg(LAUNCH).arg(command.get_program()).args(command.get_args());
    let output = launcher.stdin(Stdio::null()).stderr(Stdio::inherit()).output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed");
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// What the second process does: runs a program and prints the sample.
pub fn launch(program: &OsStr, arguments: impl Iterator<Item = OsString>) -> Result<()> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
    let began = Instant::now();
    let ended = command.spawn()?.wait4()?;
    let value = began.elapsed().as_secs_f64();
    if !ended.status.success() {
        bail!("{}", ended.status);
    }
    let cpu = (ended.rusage.utime + ended.rusage.stime).as_secs_f64();
    println!("{}", serde_json::to_string(&Sample { value, cpu: Some(cpu), memory: Some(ended.rusage.maxrss) })?);
    Ok(())
}

/// Runs a line of a shell.
pub fn shell(line: &str) -> Result<Sample> {
    run(Command::new("sh").args(["-ec", line]))
}

/// What a program prints.
pub fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| program.to_owned())?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Whether a program is there.
pub fn exists(program: &str) -> bool {
    Command::new("sh").args(["-c", &format!("command -v {program}")]).stdout(Stdio::null()).status().is_ok_and(|s| s.success())
}

/// The command that is measured: built beside this program.
pub fn vhd() -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name("vhd");
    if !path.exists() {
        bail!("{} is not built: cargo build --release -p vhd", path.display());
    }
    Ok(path)
}

/// A server that runs until this is dropped.
pub struct Server(Child);

impl Server {
    /// Starts it, and waits until `ready` appears.
    pub fn start(command: &mut Command, ready: &Path) -> Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().with_context(|| format!("{command:?}"))?;
        let server = Self(child);
        let began = Instant::now();
        while !ready.exists() {
            if began.elapsed() > Duration::from_secs(20) {
                bail!("{command:?}: {} does not appear", ready.display());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// Processor seconds so far, of all its threads.
    pub fn cpu(&self) -> Result<f64> {
        cpu_of(self.0.id())
    }

    /// The most memory that it had so far.
    pub fn memory(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("/proc/PID/status")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
    }
}

/// Processor seconds of a process so far.
pub fn cpu_of(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name may hold anything; what follows it does not.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).context("/proc/PID/stat");
    // A hundred ticks a second on every Linux.
    Ok((ticks(11)? + ticks(12)?) / 100.0)
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(5) {
            if matches!(self.0.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
