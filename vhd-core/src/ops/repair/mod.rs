//! Putting an image right: first what can lose nothing, and where it is told to, the rest.
//!
//! The repair is done to the image with changes laid over it in memory, and checked there. Then the original bytes of all
//! that changes go to an undo journal beside the image, an intent record says that a repair is under way, and the changes
//! are written. Interrupted, the same command puts the original back and begins again.

mod footers;
mod journal;
mod lost;
mod standing;
mod table;
mod undo;
mod which;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::lost::Lost;
use super::check::{CheckOptions, Code, Finding, Report, check};
use crate::chain::ChainOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Blocks, Footers, Image, OpenOptions};
use crate::intent::{self, InPlace, Intent, Work};
use crate::progress::Progress;
use crate::storage::{FileStorage, LockMode, Overlay, Storage};

pub use journal::Journal;
pub use standing::Standing;
pub use undo::undo_repair;

/// Bytes that blocks which fill gaps may have together; beyond that compacting does it.
const MAX_MOVED: u64 = 64 << 20;

/// What a repair may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum RepairMode {
    /// What can lose nothing.
    #[default]
    Safe,
    /// All that can be done, though something must be given up.
    All,
}

/// What a repair does, or did.
#[derive(Clone, Debug)]
pub struct Repair {
    /// What changes, one sentence each.
    pub changes: Vec<String>,
    /// What is given up or guessed, one sentence each.
    pub lost: Vec<String>,
    /// What a check found before.
    pub before: Vec<Finding>,
    /// What a check finds afterwards.
    pub after: Vec<Finding>,
    /// Bytes of the file that are written, or cut off.
    pub bytes: u64,
    /// Where the original bytes are, once it was done.
    pub journal: Option<PathBuf>,
}

impl Repair {
    /// True when no errors are left.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.after.iter().all(|finding| finding.severity < super::check::Severity::Error)
    }
}

/// Times that a repair looks again at what it has put right.
const MAX_PASSES: usize = 6;

/// Repairs the image at `path`; with `dry_run` only says what would be done. One that is sound is left alone.
///
/// # Errors
/// `NotVhd` when nothing of a VHD is there; `Refused` for an image that another operation has in hand; `Locked`; as the host
/// fails; `Cancelled`, when the image is what it was, or the same call begins again.
pub fn repair(path: &Path, mode: RepairMode, dry_run: bool, chain: &ChainOptions, progress: &Progress) -> Result<Repair> {
    chain.refuse_ignoring(path)?;
    let file = Arc::new(FileStorage::open(path, !dry_run)?);
    file.lock(if dry_run { LockMode::Read } else { LockMode::Write })?;
    let storage: Arc<dyn Storage> = if dry_run { file } else { chain.host.adopt(file) };
    undo::refuse_irregular(path)?;
    match intent::find(path)? {
        Some(Intent::InPlace(InPlace { work: Work::Repair(name), .. })) if !dry_run => {
            // Nothing but this makes an image of it again, so it is done to its end.
            undo::put_back(&*storage, path, &name)?;
            intent::remove(&*chain.host, path)?;
        }
        Some(_) => {
            return Err(intent::explain(path, Error::new(ErrorKind::Refused, "is in the hands of another operation").at(path)));
        }
        None => {}
    }
    let (overlay, mut repair) = plan_over(storage, path, mode).map_err(|error| error.at(path))?;
    progress.advance(0)?;
    if !dry_run {
        repair.journal = undo::execute(&overlay, path, &repair, &*chain.host, progress)?;
    }
    Ok(repair)
}

/// Plans a repair of the image in `storage`; what is returned beside it is the image as it will be.
///
/// # Errors
/// As [`repair`].
pub fn plan(storage: Arc<dyn Storage>, path: &Path, mode: RepairMode) -> Result<(Arc<impl Storage + use<>>, Repair)> {
    let (overlay, repair) = plan_over(storage, path, mode).map_err(|error| error.at(path))?;
    Ok((overlay, repair))
}

fn plan_over(storage: Arc<dyn Storage>, path: &Path, mode: RepairMode) -> Result<(Arc<Overlay>, Repair)> {
    if let Some((stage, footer)) = Footers::read(&*storage).ok().and_then(|footers| footers.stage()) {
        return Err(crate::image::refusal(path, stage, &footer));
    }
    let overlay = Arc::new(Overlay::new(storage).map_err(|error| Error::io(error, "can't be examined"))?);
    let before = look(&*overlay, path)?.findings;
    let (mut changes, mut lost, mut after) = (Vec::new(), Lost::default(), before.clone());
    // What is put right may bring to light what else is wrong.
    for _ in 0..MAX_PASSES {
        let mut repairer =
            Repairer { overlay: &overlay, path, mode, findings: after, changes: Vec::new(), lost, is_table_lost: false };
        repairer.structures()?;
        repairer.leaks()?;
        let new: Vec<_> = repairer.changes.into_iter().filter(|change| !changes.contains(change)).collect();
        lost = repairer.lost;
        after = look(&*overlay, path)?.findings;
        if new.is_empty() {
            break;
        }
        changes.extend(new);
    }
    let failed = |error| Error::io(error, "can't be examined");
    let written: u64 = overlay.changes().map_err(failed)?.iter().map(|range| range.end - range.start).sum();
    let cut = overlay.base().len().map_err(failed)?.saturating_sub(overlay.len().map_err(failed)?);
    Ok((Arc::clone(&overlay), Repair { changes, lost: lost.into_list(), before, after, bytes: written + cut, journal: None }))
}

fn look(storage: &dyn Storage, path: &Path) -> Result<Report> {
    let mut report = check(storage, path, &CheckOptions::default())?;
    // The repair's own record goes with it.
    report.findings.retain(|finding| finding.code != Code::Interrupted);
    Ok(report)
}

/// One repair under way.
struct Repairer<'a> {
    overlay: &'a Arc<Overlay>,
    path: &'a Path,
    mode: RepairMode,
    /// What a check finds, as far as the repair has come.
    findings: Vec<Finding>,
    changes: Vec<String>,
    lost: Lost,
    /// Nothing is left of the BAT: the file is searched for blocks.
    is_table_lost: bool,
}

impl Repairer<'_> {
    fn look_again(&mut self) -> Result<()> {
        self.findings = look(&**self.overlay, self.path)?.findings;
        Ok(())
    }

    fn found(&self, code: Code) -> bool {
        self.findings.iter().any(|finding| finding.code == code)
    }

    fn may_lose(&self) -> bool {
        self.mode == RepairMode::All
    }

    fn change(&mut self, what: impl Into<String>) {
        let what = what.into();
        if !self.changes.contains(&what) {
            self.changes.push(what);
        }
    }

    /// Notes what is given up.
    fn lose(&mut self, what: String) {
        self.lost.note(what);
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.overlay.read_at(bytes, at).map_err(|error| Error::io(error, format!("can't be read at {at:#x}")))
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.overlay.write_at(bytes, at).map_err(|error| Error::io(error, format!("can't be repaired at {at:#x}")))
    }

    /// Writes one byte all over a range.
    fn fill(&self, byte: u8, range: Range<u64>) -> Result<()> {
        let bytes = [byte; 64 << 10];
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(bytes.len() as u64);
            self.write(&bytes[..len as usize], at)?;
            at += len;
        }
        Ok(())
    }

    /// Gives back space that nothing names: only in an image that is sound otherwise, as it may hold what a table lost.
    fn leaks(&mut self) -> Result<()> {
        let path = self.path;
        let now = look(&**self.overlay, path)?;
        if !now.ok() || !self.lost.is_empty() || !now.findings.iter().any(|finding| finding.code == Code::LeakedSpace) {
            return Ok(());
        }
        let storage = Arc::clone(self.overlay) as Arc<dyn Storage>;
        let open = OpenOptions { force: true, background_flush: None, ..OpenOptions::default() };
        let image = Image::open_changed(Arc::clone(&storage), path, &open)?;
        let before = self.len()?;
        let mut planned = Blocks::of(&image, true)?;
        let mut moved = 0;
        planned.fill_gaps(false, &mut |bytes| {
            moved += bytes;
            Ok(())
        })?;
        planned.cut()?;
        let cut = before.saturating_sub(planned.file_len());
        // What is cut off and what is overwritten is kept in the journal.
        if moved > MAX_MOVED / 2 || self.data_behind(planned.file_len(), MAX_MOVED)? > MAX_MOVED || (moved == 0 && cut == 0) {
            return Ok(());
        }
        drop((image, planned));
        let image = Image::open_changed(storage, path, &OpenOptions { writable: true, ..open })?;
        let mut blocks = Blocks::of(&image, false)?;
        blocks.fill_gaps(false, &mut |_| Ok(()))?;
        blocks.cut()?;
        self.change(format!("{cut} bytes given back that nothing named"));
        Ok(())
    }

    /// Bytes of the file behind `from` that are no zeros; counted no further than `most`.
    fn data_behind(&self, from: u64, most: u64) -> Result<u64> {
        journal::data_in(&**self.overlay.base(), from..self.len()?, most)
    }
}
