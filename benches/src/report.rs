//! The table, for people and for programs.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::chart;
use crate::measure::{Goal, MORE, Row, Unit, Verdict};
use crate::process::output;

/// Where the table begins in a document, and where it ends.
const BEGIN: &str = "<!-- figures: benches/run --publish docs -->";
const END: &str = "<!-- end of figures -->";

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
    /// Groups of cases that could not be measured, and why.
    pub missing: Vec<String>,
}

impl Report {
    pub fn new(memory: &Path, disk: &Path, rounds: usize) -> Self {
        let line = |program: &str, arguments: &[&str]| output(program, arguments).unwrap_or_default().trim().to_owned();
        let model = line("sh", &["-c", "grep -m1 'model name' /proc/cpuinfo | cut -d: -f2; nproc; grep MemTotal /proc/meminfo"]);
        let model = model.split_whitespace().collect::<Vec<_>>().join(" ");
        let file_system = |folder: &Path| line("findmnt", &["-n", "-f", "-o", "FSTYPE", "-T", &folder.to_string_lossy()]);
        Self {
            machine: format!("{model}, Linux {}", line("uname", &["-r"])),
            commit: line("git", &["describe", "--always", "--dirty", "--exclude", "*"]),
            places: format!("memory: {}; disk: {}", file_system(memory), file_system(disk)),
            rounds,
            rows: Vec::new(),
            missing: Vec::new(),
        }
    }

    /// Writes `results.json`, `results.md` and `results.svg`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        std::fs::write(folder.join("results.json"), serde_json::to_string_pretty(self)? + "\n")?;
        std::fs::write(folder.join("results.svg"), chart::draw(&self.rows))?;
        Ok(std::fs::write(folder.join("results.md"), self.to_markdown())?)
    }

    /// Puts the plot into a folder, and the table between the two marks of its `performance.md`.
    pub fn publish(&self, folder: &Path) -> Result<()> {
        let path = folder.join("performance.md");
        let old = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let (before, rest) = old.split_once(BEGIN).with_context(|| format!("{} has no {BEGIN}", path.display()))?;
        let (_, after) = rest.split_once(END).with_context(|| format!("{} has no {END}", path.display()))?;
        std::fs::write(&path, format!("{before}{BEGIN}\n{}{END}{after}", self.to_markdown()))?;
        Ok(std::fs::write(folder.join("performance.svg"), chart::draw(&self.rows))?)
    }

    pub fn to_markdown(&self) -> String {
        let mut text = format!(
            "Machine: {}. Commit: {}. Places: {}. Medians of {} rounds in turn, and where these can't tell whether a goal is met, of \
             more, up to {} (but peers that are only shown); `x` is the ratio to the case's first line in the \
             same round, with the interval in which its median lies with a probability of 95 in a hundred; `cpu x` is that of the \
             processor time (of the server, a request, for NBD and FUSE); lines in *italics* are \
             the same work with nothing of ours in it.\n\n",
            self.machine,
            self.commit,
            self.places,
            self.rounds,
            self.rounds * MORE,
        );
        text.push_str(
            "| case | who | value | x [interval] | rounds | goal | cpu x | memory |\n|---|---|---|---|---|---|---|---|\n",
        );
        for row in &self.rows {
            let goals: Vec<String> = row.goals.iter().map(|(goal, verdict)| show_goal(*goal, *verdict, row.unit)).collect();
            let cpu = row.cpu.filter(|cpu| !cpu[1].is_nan()).map_or(String::new(), |cpu| format!("{:.2}", cpu[1]));
            let memory = row.memory.map_or(String::new(), show_memory);
            let [ratio, low, high] = row.ratio;
            let who = if row.is_floor { format!("*{}*", row.subject) } else { row.subject.clone() };
            let _ = writeln!(
                text,
                "| {} | {who} | {} | {ratio:.2} [{low:.2}, {high:.2}] | {} | {} | {cpu} | {memory} |",
                row.case,
                value(row.value[0], row.unit),
                row.rounds,
                goals.join("; ")
            );
        }
        for missing in &self.missing {
            let _ = write!(text, "\nNot measured: {}\n", missing.trim());
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

fn show_memory(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn show_goal(goal: Goal, verdict: Verdict, unit: Unit) -> String {
    let sign = if unit == Unit::Seconds { "≤" } else { "≥" };
    let wanted = match goal {
        Goal::Ratio(ratio) => format!("{sign} {ratio:.2}"),
        Goal::Cpu(ratio) => format!("cpu ≤ {ratio:.2}"),
        Goal::Value(wanted) => format!("{sign} {}", value(wanted, unit)),
        Goal::Memory(most) => format!("≤ {}", show_memory(most)),
    };
    match verdict {
        Verdict::Met => format!("{wanted} met"),
        Verdict::Missed => format!("{wanted} **missed**"),
        Verdict::Limit(floor) => format!("{wanted} out of reach: floor {floor:.2}"),
    }
}
