//! `vhd check`

use std::fmt::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;
use vhd_core::intent;
use vhd_core::ops::check::{CheckOptions, Finding, Report, check, check_chain};
use vhd_core::ops::repair::{RepairMode, repair, undo_repair};
use vhd_core::storage::{FileStorage, LocalHost, LockMode};
use vhd_core::{Error, ErrorKind};

use super::ChainArgs;
use crate::output::{Answer, Context, ShownPath, from_here, goes_on};
use crate::sizes;

/// Arguments of `vhd check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The image
    image: PathBuf,
    /// All parents too
    #[arg(long)]
    chain: bool,
    /// Read sector bitmaps and data too
    #[arg(long)]
    deep: bool,
    /// Put right what can lose nothing; with =all the rest too, and list what is given up
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "safe", conflicts_with = "chain")]
    repair: Option<RepairHow>,
    /// With --repair or --clear-record: say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Show the record of an interrupted operation beside the image, and remove it: the operation is given up
    #[arg(long, conflicts_with_all = ["repair", "chain", "deep", "undo_repair"])]
    clear_record: bool,
    /// Take the last repair back: the original bytes are in a file beside the image
    #[arg(long, conflicts_with_all = ["repair", "chain", "deep"])]
    undo_repair: bool,
    /// With --undo-repair: although the image was written since
    #[arg(long, requires = "undo_repair")]
    force: bool,
    #[command(flatten)]
    open: ChainArgs,
}

/// How much a repair may do.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum RepairHow {
    /// What can lose nothing
    Safe,
    /// All that can be done
    All,
}

/// The JSON of a repair.
#[derive(Serialize)]
struct RepairDocument<'a> {
    path: ShownPath<'a>,
    ok: bool,
    changes: &'a [String],
    /// What was given up or guessed.
    lost: &'a [String],
    /// Bytes of the file that are written or cut off.
    bytes: u64,
    /// What a check finds now.
    findings: Vec<FindingDocument>,
    /// Where the original bytes are.
    undo: Option<ShownPath<'a>>,
    done: bool,
}

/// The JSON of `vhd check --clear-record`.
#[derive(Serialize)]
struct RecordDocument<'a> {
    path: ShownPath<'a>,
    record: ShownPath<'a>,
    operation: &'a str,
    /// The files that it names.
    files: Vec<ShownPath<'a>>,
    /// The command that goes on with the operation.
    command: Option<&'a str>,
    done: bool,
}

/// The JSON of `vhd check`: a contract.
#[derive(Serialize)]
struct Document<'a> {
    path: ShownPath<'a>,
    ok: bool,
    findings: Vec<FindingDocument>,
}

#[derive(Serialize)]
struct FindingDocument {
    severity: &'static str,
    code: &'static str,
    #[serde(rename = "where")]
    place: String,
    message: String,
    repairable: bool,
}

impl CheckArgs {
    pub fn run(&self, context: &Context) -> Result<Answer, Error> {
        if self.dry_run && self.repair.is_none() && !self.clear_record {
            let message = "--dry-run goes with --repair or --clear-record; a check writes nothing anyway";
            return Err(Error::new(ErrorKind::InvalidInput, message).at(&self.image));
        }
        if self.clear_record {
            return self.clear_record(context);
        }
        let chain = self.open.options(false, false);
        if self.undo_repair {
            let undone = context.with_progress("undo repair", |progress| undo_repair(&self.image, self.force, &chain, progress));
            let undone = undone.map_err(|error| goes_on(error, &self.image))?;
            let text: String = undone.iter().map(|change| format!("undone: {change}\n")).collect();
            context.print(&text, &undone)?;
            return Ok(Answer::Yes);
        }
        if let Some(how) = self.repair {
            return self.repair(how, context);
        }
        let reports = context.with_progress("check", |progress| {
            let options = CheckOptions { deep: self.deep, parents: Some(&chain.parents), progress: Some(progress) };
            if self.chain {
                return check_chain(&self.image, &options);
            }
            let storage = FileStorage::open(&self.image, false)?;
            storage.lock(LockMode::Read)?;
            Ok(vec![check(&storage, &self.image, &options)?])
        })?;
        let text: String = reports.iter().map(text).collect();
        let ok = reports.iter().all(Report::ok);
        let mut documents: Vec<_> = reports.iter().map(document).collect();
        match self.chain {
            true => context.print(&text, &documents)?,
            false => context.print(&text, &documents.swap_remove(0))?,
        }
        Ok(if ok { Answer::Yes } else { Answer::No })
    }

    fn clear_record(&self, context: &Context) -> Result<Answer, Error> {
        let Some(found) = intent::recorded(&self.image)? else {
            return Err(Error::new(ErrorKind::NotFound, "has no record of an interrupted operation beside it").at(&self.image));
        };
        if !self.dry_run {
            intent::clear(&LocalHost, &self.image)?;
        }
        let mut text = format!("{}: {}\n", from_here(&found.path), found.operation);
        for file in &found.files {
            let _ = writeln!(text, "  names {}", from_here(file));
        }
        if let Some(command) = &found.command {
            let _ = writeln!(text, "  goes on with: {command}");
        }
        text.push_str(if self.dry_run { "would be removed\n" } else { "removed\n" });
        let document = RecordDocument {
            path: ShownPath(&self.image),
            record: ShownPath(&found.path),
            operation: &found.operation,
            files: found.files.iter().map(|file| ShownPath(file)).collect(),
            command: found.command.as_deref(),
            done: !self.dry_run,
        };
        context.print(&text, &document)?;
        Ok(Answer::Yes)
    }

    fn repair(&self, how: RepairHow, context: &Context) -> Result<Answer, Error> {
        let mode = match how {
            RepairHow::Safe => RepairMode::Safe,
            RepairHow::All => RepairMode::All,
        };
        let chain = self.open.options(false, false);
        let repaired = context.with_progress("repair", |progress| repair(&self.image, mode, self.dry_run, &chain, progress));
        let repaired = repaired.map_err(|error| goes_on(error, &self.image))?;
        let mut text = String::new();
        let would = if self.dry_run { "would change" } else { "changed" };
        repaired.changes.iter().for_each(|change| text.push_str(&format!("{would}: {change}\n")));
        repaired.lost.iter().for_each(|lost| text.push_str(&format!("given up: {lost}\n")));
        if self.dry_run && repaired.bytes > 0 {
            let _ = writeln!(text, "{} of the file would be written or cut off, and kept beside it", sizes::show(repaired.bytes));
        }
        repaired.after.iter().for_each(|finding| text.push_str(&line(finding)));
        if let Some(journal) = &repaired.journal {
            let name = from_here(journal);
            let _ = writeln!(text, "the original bytes are in {name}: vhd check --undo-repair puts them back");
        }
        let summary = if repaired.ok() { "no errors" } else { "damaged" };
        let _ = writeln!(text, "{}: {summary}", self.image.display());
        let document = RepairDocument {
            path: ShownPath(&self.image),
            ok: repaired.ok(),
            changes: &repaired.changes,
            lost: &repaired.lost,
            bytes: repaired.bytes,
            findings: repaired.after.iter().map(finding_document).collect(),
            undo: repaired.journal.as_deref().map(ShownPath),
            done: !self.dry_run,
        };
        context.print(&text, &document)?;
        Ok(if repaired.ok() { Answer::Yes } else { Answer::No })
    }
}

fn document(report: &Report) -> Document<'_> {
    let findings = report.findings.iter().map(finding_document).collect();
    Document { path: ShownPath(&report.path), ok: report.ok(), findings }
}

fn finding_document(finding: &Finding) -> FindingDocument {
    FindingDocument {
        severity: finding.severity.name(),
        code: finding.code.name(),
        place: finding.place.clone(),
        message: finding.message.clone(),
        repairable: finding.repairable,
    }
}

fn line(finding: &Finding) -> String {
    let repairable = if finding.repairable { " (repairable)" } else { "" };
    let (severity, code) = (finding.severity.name(), finding.code.name());
    format!("{severity}: {}: {} [{code}]{repairable}\n", finding.place, finding.message)
}

fn text(report: &Report) -> String {
    let mut text: String = report.findings.iter().map(line).collect();
    let summary = match (report.ok(), report.findings.is_empty()) {
        (true, true) => "clean",
        (true, false) => "no errors",
        (false, _) => "damaged",
    };
    let _ = writeln!(text, "{}: {summary}", report.path.display());
    text
}
