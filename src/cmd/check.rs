//! `vhd check`

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use vhd_core::Error;
use vhd_core::ops::check::{CheckOptions, Report, check, check_chain};
use vhd_core::storage::{FileStorage, LockMode};

use super::ChainArgs;
use crate::output::{Answer, Context, ShownPath};

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
    #[command(flatten)]
    open: ChainArgs,
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
        let chain = self.open.options(false, false);
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
}

fn document(report: &Report) -> Document<'_> {
    let ok = report.ok();
    let findings = report.findings.iter().map(|finding| FindingDocument {
        severity: finding.severity.name(),
        code: finding.code.name(),
        place: finding.place.clone(),
        message: finding.message.clone(),
        repairable: finding.repairable,
    });
    Document { path: ShownPath(&report.path), ok, findings: findings.collect() }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let repairable = if finding.repairable { " (repairable)" } else { "" };
        let (severity, code) = (finding.severity.name(), finding.code.name());
        let _ = writeln!(text, "{severity}: {}: {} [{code}]{repairable}", finding.place, finding.message);
    }
    let summary = match (report.ok(), report.findings.is_empty()) {
        (true, true) => "clean",
        (true, false) => "no errors",
        (false, _) => "damaged",
    };
    let _ = writeln!(text, "{}: {summary}", report.path.display());
    text
}
