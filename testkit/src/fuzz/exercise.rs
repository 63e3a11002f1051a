//! Everything that can be done with the bytes of a file that may be an image, with all that must hold then.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use vhd_core::block::ZeroMode;
use vhd_core::chain::{Chain, Layer};
use vhd_core::format::SECTOR;
use vhd_core::image::{Image, OpenOptions, SizePolicy};
use vhd_core::ops::check::{CheckOptions, Severity, check};
use vhd_core::ops::repair::{RepairMode, plan};
use vhd_core::storage::MemoryStorage;
use vhd_core::{Disk, Error, ErrorKind};

use super::{Bounded, NAME};
use crate::reference::ReferenceChain;

/// Runs of one image that are looked at.
const MAX_RUNS: usize = 4096;
/// Bytes of a disk whose content is compared before and after a change.
const WATCHED: u64 = 512 << 10;
/// Fails unless an error names its file and is one line.
///
/// # Panics
/// When it is not as it should be.
pub fn assert_well_formed(error: &Error, path: &Path) {
    let text = error.to_string();
    assert!(!text.chars().any(char::is_control), "more than one line, or control characters: {text:?}");
    assert!(error.path().is_some(), "names no file: {text}");
    assert!(text.starts_with(&path.display().to_string()), "names another file: {text}");
    assert!(text.len() > path.as_os_str().len() + 10 && text.len() < 1000, "says nothing, or too much: {text}");
}

/// Opens a file in every way, looks at what opens, and changes it.
///
/// # Panics
/// When an error is none that can be shown, a failed open or a reader changed the file, what is read is not what the
/// reference reads, a check finds nothing in what does not open, or a write changed something else.
pub fn exercise(bytes: &[u8]) {
    let reference = ReferenceChain::open(vec![Box::new(bytes.to_vec())]).ok();
    for (tolerant, size) in [(false, SizePolicy::Current), (true, SizePolicy::Current), (false, SizePolicy::Geometry)] {
        let options = OpenOptions { tolerant, size, ..OpenOptions::default() };
        let storage = Arc::new(Bounded::new(bytes.to_vec()));
        match Image::open(Arc::clone(&storage) as _, Path::new(NAME), &options) {
            Ok(image) => {
                let reference = reference.as_ref().filter(|_| !tolerant && size == SizePolicy::Current);
                look(&image, reference);
                let written = Disk::new(Chain::of(Layer::Image(image))).write_at(&[1], 0);
                assert_eq!(written.map_err(|error| error.kind()), Err(ErrorKind::ReadOnly));
            }
            Err(error) => assert_well_formed(&error, Path::new(NAME)),
        }
        assert!(storage.to_vec() == bytes, "a reader changed the file");
    }
    let mut worst = None;
    for deep in [false, true] {
        let storage = MemoryStorage::new(bytes.to_vec());
        match check(&storage, Path::new(NAME), &CheckOptions { deep, ..CheckOptions::default() }) {
            Ok(report) => {
                let lines = report.findings.iter().map(|finding| format!("{}: {}", finding.place, finding.message));
                lines.for_each(|line| assert!(!line.chars().any(char::is_control), "not fit for a terminal: {line:?}"));
                worst = report.worst();
            }
            Err(error) => {
                assert_well_formed(&error, Path::new(NAME));
                worst = Some(Severity::Error);
            }
        }
    }
    mend(bytes);
    let readable = Image::open(Arc::new(MemoryStorage::new(bytes.to_vec())), Path::new(NAME), &OpenOptions::default());
    if let Err(error) = &readable {
        assert!(worst == Some(Severity::Error), "check finds no error, but: {error}");
    }
    if let Err(error) = change(bytes)
        && !matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Refused)
    {
        assert!(worst >= Some(Severity::Warning), "check finds nothing, but: {error}");
    }
}

/// Repairs an image both ways. What checks clean then opens, and what can lose nothing changes nothing that was read.
fn mend(bytes: &[u8]) {
    for mode in [RepairMode::Safe, RepairMode::All] {
        let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
        let (repaired, repair) = match plan(Arc::clone(&storage) as _, Path::new(NAME), mode) {
            Ok(done) => done,
            Err(error) => {
                assert_well_formed(&error, Path::new(NAME));
                continue;
            }
        };
        assert!(storage.to_vec() == bytes, "a plan changed the file");
        let open = |storage| Image::open(storage, Path::new(NAME), &OpenOptions::default());
        let disk = |image| Disk::new(Chain::of(Layer::Image(image)));
        match open(repaired) {
            Err(error) => assert!(!repair.ok(), "a repair that checks clean, but: {error}"),
            Ok(image) => {
                let after = watched(&disk(image));
                if let Ok(before) = open(storage)
                    && mode == RepairMode::Safe
                {
                    let before = watched(&disk(before));
                    let lost = before.iter().zip(&after).find(|(before, after)| before.1.is_some() && before != after);
                    assert!(lost.is_none(), "a safe repair changed what is read at {}", lost.map_or(0, |(before, _)| before.0));
                }
            }
        }
        assert!(mode == RepairMode::All || repair.lost.is_empty(), "{:?}", repair.lost);
    }
}

/// Maps an image and reads a part of it.
fn look(image: &Arc<Image>, reference: Option<&ReferenceChain>) {
    let _ = (image.count_allocated(), image.warnings());
    let size = image.size();
    let (mut at, mut starts) = (0, Vec::new());
    let mapped = image.map(0..size, &mut |run| {
        assert!(run.range.start == at && run.range.end > at, "runs are not in order");
        at = run.range.end;
        starts.push(run.range.start);
        if starts.len() < MAX_RUNS { Ok(()) } else { Err(Error::new(ErrorKind::Cancelled, "enough")) }
    });
    match mapped {
        Ok(()) => assert_eq!(at, size, "the map ends early"),
        Err(error) if error.kind() == ErrorKind::Cancelled => {}
        Err(error) => assert_well_formed(&error, Path::new(NAME)),
    }
    let disk = Disk::new(Chain::of(Layer::Image(Arc::clone(image))));
    let _ = disk.extents_in(0..size.min(1 << 20));
    starts.truncate(16);
    starts.extend([size - SECTOR, size / 2, size.saturating_sub(4096), 1]);
    for start in starts {
        read_both(&disk, start..(start + 4096).min(size), reference);
    }
    let beyond = disk.read_at(&mut [0; 2], size - 1).unwrap_err();
    assert_well_formed(&beyond, Path::new(NAME));
    assert_eq!(beyond.kind(), ErrorKind::OutOfRange);
}

/// Reads a range here and by the reference, where both can.
fn read_both(disk: &Disk, range: Range<u64>, reference: Option<&ReferenceChain>) {
    let mut bytes = vec![0xEE; (range.end - range.start) as usize];
    match disk.read_at(&mut bytes, range.start) {
        Ok(()) => {
            // A differencing image is read without its parents here, and the reference does not do that.
            if let Some(Ok(wanted)) = reference.map(|chain| chain.read(range.clone())) {
                crate::tagged::compare(&bytes, &wanted, range.start).unwrap();
            }
        }
        Err(error) => assert_well_formed(&error, Path::new(NAME)),
    }
}

fn open_writable(storage: &Arc<Bounded>) -> vhd_core::Result<Disk> {
    let options = OpenOptions { writable: true, background_flush: None, ..OpenOptions::default() };
    let image = Image::open(Arc::clone(storage) as _, Path::new(NAME), &options)?;
    Ok(Disk::new(Chain::of(Layer::Image(image))))
}

/// The sectors that are watched for changes: the first ones, and the last. `None` for what can't be read.
fn watched(disk: &Disk) -> Vec<(u64, Option<Vec<u8>>)> {
    let size = disk.size();
    let head = 0..size.min(WATCHED);
    let tail = size.saturating_sub(8 * SECTOR).max(head.end)..size;
    let starts = head.step_by(SECTOR as usize).chain(tail.step_by(SECTOR as usize));
    let read = |at| {
        let mut sector = vec![0; SECTOR as usize];
        (at, disk.read_at(&mut sector, at).is_ok().then_some(sector))
    };
    starts.map(read).collect()
}

/// Opens a file for writing, writes and zeros a few sectors, and reads them back after a reopen.
///
/// Returns why it was not opened.
fn change(bytes: &[u8]) -> vhd_core::Result<()> {
    let storage = Arc::new(Bounded::new(bytes.to_vec()));
    let look = Image::open(Arc::clone(&storage) as _, Path::new(NAME), &OpenOptions::default());
    let before = look.ok().map(|image| watched(&Disk::new(Chain::of(Layer::Image(image)))));
    let disk = match open_writable(&storage) {
        Ok(disk) => disk,
        Err(error) => {
            assert_well_formed(&error, Path::new(NAME));
            if error.kind() != ErrorKind::NoSpace {
                assert!(storage.to_vec() == bytes, "a failed open changed the file: {error}");
            }
            return Err(error);
        }
    };
    let mut expected = before.expect("what opens for writing opens for reading");
    assert!(watched(&disk) == expected, "opening for writing changed the content");
    let count = expected.len();
    for (n, index) in [0, count / 3, count / 2, count - 1].into_iter().enumerate() {
        let (at, content) = &mut expected[index];
        let new = [0xA5 ^ n as u8; SECTOR as usize];
        let done = if n == 2 { disk.zero(*at..*at + SECTOR, ZeroMode::Keep) } else { disk.write_at(&new, *at) };
        match done {
            Ok(()) => *content = Some(if n == 2 { vec![0; SECTOR as usize] } else { new.to_vec() }),
            Err(error) => assert_no_space(&error),
        }
    }
    let closed = disk.flush().and_then(|()| disk.close());
    drop(disk);
    if let Err(error) = closed {
        assert_no_space(&error);
        return Ok(());
    }
    let again = open_writable(&storage).expect("an image that was closed opens again");
    for ((at, found), (_, wanted)) in watched(&again).iter().zip(&expected) {
        if let (Some(found), Some(wanted)) = (found, wanted) {
            crate::tagged::compare(found, wanted, *at).unwrap();
        } else {
            assert_eq!(found.is_some(), wanted.is_some(), "sector at {at} can be read no more");
        }
    }
    Ok(())
}

/// What opened for writing can be written, as far as there is room.
fn assert_no_space(error: &Error) {
    assert_well_formed(error, Path::new(NAME));
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
}
