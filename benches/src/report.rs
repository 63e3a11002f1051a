//! The table, for people and for programs.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::measure::{Row, Unit};
use crate::process::output;

/// What was measured, where and of what.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The machine: processor, kernel, memory.
    pub machine: String,
    /// The commit, and whether something was changed since.
    pub commit: String,
    /// Folders, and the file systems that they are on.
    pub places: String,
    /// Counted rounds of each case.
    pub rounds: usize,
    /// The lines.
    pub rows: Vec<Row>,
}

impl Report {
    pub fn new(memory: &Path, disk: &Path, rounds: usize) -> Self {
        let line = |program: &str, arguments: &[&str]| output(program, arguments).unwrap_or_default().trim().to_owned();
        let model = line("sh", &["-c", "grep -m1 'model name' /proc/cpuinfo | cut -d: -f2; nproc; grep MemTotal /proc/meminfo"]);
        let model = model.split_whitespace().collect::<Vec<_>>().join(" ");
        let file_system = |folder: &Path| line("stat", &["-f", "-c", "%T", &folder.to_string_lossy()]);
        Self {
            machine: format!("{model}, Linux {}", line("uname", &["-r"])),
            commit: line("git", &["describe", "--always", "--dirty", "--exclude", "*"]),
            places: format!("memory: {}; disk: {}", file_system(memory), file_system(disk)),
            rounds,
            rows: Vec::new(),
        }
    }

    /// Writes `results.json` and `results.md`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        std::fs::write(folder.join("results.json"), serde_json::to_string_pretty(self)? + "\n")?;
        Ok(std::fs::write(folder.join("results.md"), self.to_markdown())?)
    }

    pub fn to_markdown(&self) -> String {
        let mut text = format!(
            "Machine: {}. Commit: {}. Places: {}. Medians of {} rounds in turn; `x` is the ratio to the case's first line in the \
             same round, `cpu x` that of the processor time.\n\n",
            self.machine, self.commit, self.places, self.rounds
        );
        text.push_str("| case | who | value | x [least, most] | target | cpu x | memory |\n|---|---|---|---|---|---|---|\n");
        for row in &self.rows {
            let target = match (row.target, row.is_met()) {
                (Some(target), Some(met)) => format!("{target} {}", if met { "met" } else { "**missed**" }),
                _ => String::new(),
            };
            let cpu = row.cpu.filter(|cpu| !cpu[1].is_nan()).map_or(String::new(), |cpu| format!("{:.2}", cpu[1]));
            let memory = row.memory.map_or(String::new(), |bytes| format!("{} MiB", bytes >> 20));
            let [ratio, least, most] = row.ratio;
            let _ = writeln!(
                text,
                "| {} | {} | {} | {ratio:.2} [{least:.2}, {most:.2}] | {target} | {cpu} | {memory} |",
                row.case,
                row.subject,
                value(row.value[0], row.unit)
            );
        }
        text
    }
}

fn value(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Seconds if value < 1e-4 => format!("{:.2} µs", value * 1e6),
        Unit::Seconds if value < 0.1 => format!("{:.2} ms", value * 1e3),
        Unit::Seconds => format!("{value:.3} s"),
        Unit::PerSecond => format!("{:.1} k/s", value / 1e3),
    }
}
