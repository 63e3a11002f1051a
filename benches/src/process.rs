//! Other programs: run and accounted for, or served by.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use wait4::Wait4;

use crate::measure::Sample;

/// Runs a program to its end: wall seconds, processor seconds, memory.
pub fn run(command: &mut Command) -> Result<Sample> {
    let began = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().with_context(|| format!("{command:?}"))?;
    let ended = child.wait4()?;
    let value = began.elapsed().as_secs_f64();
    if !ended.status.success() {
        bail!("{command:?} failed: {}", ended.status);
    }
    let cpu = (ended.rusage.utime + ended.rusage.stime).as_secs_f64();
    Ok(Sample { value, cpu: Some(cpu), memory: Some(ended.rusage.maxrss) })
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
