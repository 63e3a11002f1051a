//! Looking for everything that is wrong or odd in a VHD. Nothing is written, and nothing is taken on trust: each part
//! of the file is judged on its own, so that one fault does not hide the next.
//!
//! Time is linear in the metadata that is there, holes of the file left out (with `deep`, in the data), and memory does not grow with it.

mod batmap;
mod blocks;
mod code;
mod deep;
mod footer;
mod header;
mod parent;

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use code::{Code, Severity};

use crate::chain::{MAX_DEPTH, ParentPolicy};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Footers;
use crate::intent;
use crate::progress::Progress;
use crate::storage::{FileStorage, LockMode, Storage};

/// Findings of one code that are listed one by one; of the others only their number is told. A zeroed BAT has a
/// million wrong entries, and nobody reads that.
const MAX_LISTED: usize = 100;

/// One thing that is wrong or odd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is.
    pub code: Code,
    /// Where: `trailing footer`, `BAT entry 17`, `locator 2`.
    pub place: String,
    /// What was found, and what was expected: one line.
    pub message: String,
    /// True when a repair that can lose nothing mends it.
    pub repairable: bool,
}

/// All that was found about one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The file.
    pub path: PathBuf,
    /// In the order of the file's structures.
    pub findings: Vec<Finding>,
    /// The parent, where one was looked for and found.
    pub parent: Option<PathBuf>,
}

impl Report {
    /// True when there is no error among the findings.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.findings.iter().all(|finding| finding.severity != Severity::Error)
    }

    /// The worst of the findings.
    #[must_use]
    pub fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|finding| finding.severity).max()
    }
}

/// What a check looks at.
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckOptions<'a> {
    /// Sector bitmaps and data too, not just the structure.
    pub deep: bool,
    /// Looks for the parent too, where this policy allows.
    pub parents: Option<&'a ParentPolicy>,
    /// Counts the bytes that a deep check read, and may stop it.
    pub progress: Option<&'a Progress>,
}

/// Checks one file. `path` is for messages and for finding its parent. Locks are the caller's.
///
/// # Errors
/// `NotVhd`; as the host fails to read metadata; `Cancelled`.
pub fn check(storage: &dyn Storage, path: &Path, options: &CheckOptions<'_>) -> Result<Report> {
    let file_len = storage.len().map_err(|error| Error::io(error, "can't be examined").at(path))?;
    let mut check = Check { storage, path, options, file_len, findings: Findings::default(), parent: None, next_data: None };
    check.run().map_err(|error| intent::explain(path, error.at(path)))?;
    check.interruption()?;
    Ok(Report { path: path.to_owned(), findings: check.findings.into_list(), parent: check.parent })
}

/// Checks a file and, as far as they are found, all its parents; leaf first. Each is locked against writers meanwhile.
///
/// # Errors
/// As [`check`], of any of them; `Locked`.
pub fn check_chain(path: &Path, options: &CheckOptions<'_>) -> Result<Vec<Report>> {
    let mut reports: Vec<Report> = Vec::new();
    let mut seen = HashSet::new();
    let mut next = Some(path.to_owned());
    while let Some(path) = next {
        let storage = FileStorage::open(&path, false)?;
        if !seen.insert(storage.identity()?) || reports.len() == MAX_DEPTH {
            if let Some(child) = reports.last_mut() {
                let message = format!("leads to {}, where the chain was before, or is longer than {MAX_DEPTH}", path.display());
                child.findings.push(finding(Code::ChainLoop, "parent".into(), message));
            }
            break;
        }
        storage.lock(LockMode::Read)?;
        let report = check(&storage, &path, options)?;
        next = report.parent.clone();
        reports.push(report);
    }
    Ok(reports)
}

fn finding(code: Code, place: String, message: String) -> Finding {
    Finding { severity: code.severity(), code, place, message, repairable: code.repairable() }
}

/// What was found so far.
#[derive(Debug, Default)]
struct Findings {
    list: Vec<Finding>,
    counts: BTreeMap<Code, usize>,
}

impl Findings {
    fn add(&mut self, code: Code, place: impl Into<String>, message: impl Into<String>) {
        self.add_with(code, || (place.into(), message.into()));
    }

    /// As [`Self::add`], for what there may be millions of: the text is made only when it is listed.
    fn add_with(&mut self, code: Code, text: impl FnOnce() -> (String, String)) {
        let count = self.counts.entry(code).or_default();
        *count += 1;
        if *count <= MAX_LISTED {
            let (place, message) = text();
            self.list.push(finding(code, place, message));
        }
    }

    /// Counts again, so many times, what was found since the counts were these.
    fn repeat(&mut self, before: &BTreeMap<Code, usize>, times: u64) {
        for (code, count) in &mut self.counts {
            let new = *count - before.get(code).copied().unwrap_or(0);
            *count = count.saturating_add(new.saturating_mul(times as usize));
        }
    }

    /// All of them, with the number of those that are not listed behind the last one of their code.
    fn into_list(mut self) -> Vec<Finding> {
        for (&code, &count) in self.counts.iter().filter(|&(_, &count)| count > MAX_LISTED) {
            let last = self.list.iter().rposition(|finding| finding.code == code).map_or(0, |index| index + 1);
            let message = format!("and {} more of this kind", count - MAX_LISTED);
            self.list.insert(last, finding(code, "elsewhere".into(), message));
        }
        self.list
    }
}

/// One check under way.
struct Check<'a> {
    storage: &'a dyn Storage,
    path: &'a Path,
    options: &'a CheckOptions<'a>,
    file_len: u64,
    findings: Findings,
    parent: Option<PathBuf>,
    /// An offset, and the first range from there on that is no hole.
    next_data: Option<(u64, Range<u64>)>,
}

/// A range of the file that holds metadata.
#[derive(Clone, Debug)]
struct Region {
    range: Range<u64>,
    name: String,
    /// Where its room ends: further than its bytes for locators.
    reserved_end: u64,
}

impl Region {
    fn new(range: Range<u64>, name: impl Into<String>) -> Self {
        Self { reserved_end: range.end, range, name: name.into() }
    }

    fn overlaps(&self, other: &Range<u64>) -> bool {
        !self.range.is_empty() && self.range.start < other.end && other.start < self.range.end
    }
}

impl Check<'_> {
    fn add(&mut self, code: Code, place: impl Into<String>, message: impl Into<String>) {
        self.findings.add(code, place, message);
    }

    fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        self.storage.read_at(buf, at).map_err(|error| Error::io(error, format!("can't be read at {at:#x}")))
    }

    /// Tells of an intent record beside the file. What has the name of one and is none is an error, as it is for all who open the image.
    fn interruption(&mut self) -> Result<()> {
        let uuid =
            Footers::read(self.storage).ok().and_then(|footers| footers.authority(true).ok()).map(|(footer, _)| footer.uuid());
        let is_file = || intent::path_of(self.path).is_ok_and(|path| path.symlink_metadata().is_ok_and(|found| found.is_file()));
        match intent::refuse(self.path, uuid, &[]) {
            Err(error) if error.kind() == ErrorKind::Refused && is_file() => {
                self.add(Code::Interrupted, "intent record", error.message());
                Ok(())
            }
            // Of what is in memory alone there is no path.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            refused => refused,
        }
    }

    fn run(&mut self) -> Result<()> {
        let footers = Footers::read(self.storage).map_err(|error| Error::io(error, "can't be read"))?;
        if let Some((stage, footer)) = footers.stage() {
            // What is half made is neither sound nor damaged.
            self.add(Code::Interrupted, "footers", crate::image::refusal(self.path, stage, &footer).message());
            return Ok(());
        }
        let Some(basis) = self.footers()? else { return Ok(()) };
        let Some(header_at) = basis.header_at else {
            self.fixed(&basis);
            return if self.options.deep { self.deep_fixed(&basis) } else { Ok(()) };
        };
        let used_end = match self.header(&basis, header_at)? {
            Some(header) => self.sparse(&basis, &header)?,
            None => None,
        };
        self.trailing_missing(&basis, used_end)
    }

    /// Everything behind the dynamic header. Returns where the last structure ends, if all of them are known.
    fn sparse(&mut self, basis: &footer::Basis, header: &header::Header) -> Result<Option<u64>> {
        let mut regions = vec![
            Region::new(0..crate::format::SECTOR, "header copy"),
            Region::new(header.at..header.at + crate::format::HEADER_LEN as u64, "dynamic header"),
        ];
        self.locators(basis, header, &mut regions)?;
        let Some(table) = self.table(basis, header, &mut regions) else { return Ok(None) };
        let batmap = self.batmap(basis, header, &table, &mut regions)?;
        if basis.trailing_counts {
            regions.push(Region::new(basis.data_end..self.file_len, "trailing footer"));
        }
        self.metadata_overlaps(&regions);
        let blocks = self.blocks(&table, &regions, basis)?;
        if let Some(batmap) = &batmap {
            self.batmap_against_bat(batmap, &table)?;
        }
        let used_end = self.leaks(&table, &regions, &blocks, basis)?;
        if self.options.deep {
            self.deep_blocks(basis, &table, &blocks, batmap.as_ref())?;
        }
        Ok(used_end)
    }
}

/// Text of the file within quotes, fit for one line of a terminal.
fn quoted(text: &str) -> String {
    let visible = text.chars().map(|letter| if letter.is_control() { char::REPLACEMENT_CHARACTER } else { letter });
    format!("\"{}\"", visible.collect::<String>())
}

/// A big-endian number of the file. Out of bounds reads as zero; callers pass whole structures.
fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |chunk| u32::from_be_bytes(*chunk))
}

/// As [`be32`], of 64 bits.
fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |chunk| u64::from_be_bytes(*chunk))
}

/// One's complement of the sum of all bytes but the four at `field`: the checksum of footer and header.
fn checksum(bytes: &[u8], field: usize) -> u32 {
    let sum = |part: &[u8]| part.iter().fold(0_u32, |sum, &byte| sum.wrapping_add(u32::from(byte)));
    !(sum(bytes).wrapping_sub(sum(&bytes[field..field + 4])))
}
