//! Goal: another type of the same disk, without a second copy of its data, whatever happens meanwhile.
//!
//! Method: disks of tagged sectors are converted every way; the operation is recorded, and in each state that a power cut
//! may leave the image opens with its content, or refuses with the command that goes on, which then works.
//! It would fail if a piece of the old file were given back before the new file and the record were durable.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vhd_core::chain::{Chain, ChainOptions};
use vhd_core::format::DiskType;
use vhd_core::image::NewKind;
use vhd_core::ops::in_place::{ConvertedInPlace, InPlaceOptions, convert_in_place};
use vhd_core::storage::{FileStorage, Host, LocalHost, Storage};
use vhd_core::{Disk, Error, ErrorKind, Progress};
use vhd_testkit::crash::Effort;
use vhd_testkit::tagged::Tag;
use vhd_testkit::tools::QemuImg;

use self::support::sabotage::{Barriers, Operation, Run};
use self::support::{assert_error, files_of, new_child, new_image, open, options, read_all};

const SIZE: u64 = 16 * 4096;

fn how(to: DiskType) -> InPlaceOptions {
    InPlaceOptions { block_size: 4096, piece: 6 * 4096, ..InPlaceOptions::new(to) }
}

fn run(path: &Path, how: &InPlaceOptions, chain: &ChainOptions) -> Result<ConvertedInPlace, Error> {
    convert_in_place(path, how, chain, &Progress::default())
}

fn fill(path: &Path) {
    let disk = open(path, true);
    for lba in (0..SIZE / 512).filter(|lba| lba / 8 % 3 != 1) {
        disk.write_at(&Tag { image: 1, lba, write: 1 }.sector(), lba * 512).unwrap();
    }
    disk.close().unwrap();
}

fn new(folder: &Path, from: &str) -> PathBuf {
    let path = folder.join("disk.vhd");
    match from {
        "dynamic" => new_image(&path, NewKind::Dynamic, SIZE, 4096),
        _ => new_image(&path, NewKind::Fixed { preallocate: false }, SIZE, 4096),
    }
    fill(&path);
    if from == "raw" {
        let content = read_all(&open(&path, false));
        std::fs::write(&path, content).unwrap();
    }
    path
}

fn ways() -> [(&'static str, DiskType); 4] {
    [("fixed", DiskType::Dynamic), ("dynamic", DiskType::Fixed), ("raw", DiskType::Fixed), ("raw", DiskType::Dynamic)]
}

fn content_of(path: &Path, from: &str) -> Vec<u8> {
    if from == "raw" { std::fs::read(path).unwrap() } else { read_all(&open(path, false)) }
}

#[test]
fn every_type_becomes_every_other_and_stays_the_same_image() {
    for (from, to) in ways() {
        let folder = tempfile::tempdir().unwrap();
        let path = new(folder.path(), from);
        let content = content_of(&path, from);
        let look = |path: &Path| Chain::open_image(path, &options(false)).unwrap().footer().clone();
        let uuid = (from != "raw").then(|| look(&path).uuid());
        let how = InPlaceOptions { from_raw: (from == "raw").then_some(true), ..how(to) };
        let before = files_of(folder.path());
        let planned = run(&path, &InPlaceOptions { dry_run: true, ..how.clone() }, &options(false)).unwrap();
        assert!(files_of(folder.path()) == before);
        assert_eq!(run(&path, &how, &options(false)).unwrap(), planned);
        assert_eq!(look(&path).disk_type(), to, "{from}");
        assert!(uuid.is_none_or(|uuid| look(&path).uuid() == uuid));
        assert!(read_all(&open(&path, false)) == content, "{from}");
        assert_eq!(files_of(folder.path()).len(), 1);
        if let Some(qemu) = QemuImg::find() {
            assert!(qemu.to_raw(&path).unwrap() == content, "{from}");
        }
    }
}

/// The host, and how much of it the files of a folder took at most.
#[derive(Debug)]
struct Watching {
    folder: PathBuf,
    most: AtomicU64,
}

impl Host for Watching {
    fn adopt(&self, file: Arc<FileStorage>) -> Arc<dyn Storage> {
        LocalHost.adopt(file)
    }

    fn create(&self, path: &Path) -> Result<Arc<dyn Storage>, Error> {
        LocalHost.create(path)
    }

    /// Each record is renamed: a piece is in both files then.
    fn rename(&self, from: &Path, to: &Path) -> Result<(), Error> {
        let files = std::fs::read_dir(&self.folder).unwrap();
        let used: u64 = files.map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum();
        self.most.fetch_max(used, Ordering::Relaxed);
        LocalHost.rename(from, to)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> Result<(), Error> {
        LocalHost.rename_new(from, to)
    }

    fn remove(&self, path: &Path) -> Result<(), Error> {
        LocalHost.remove(path)
    }

    fn sync_folder(&self, folder: &Path) -> Result<(), Error> {
        LocalHost.sync_folder(folder)
    }
}

#[test]
fn there_is_never_a_second_copy_of_the_data() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("disk.vhd");
    new_image(&path, NewKind::Fixed { preallocate: false }, 64 << 20, 2 << 20);
    let disk = open(&path, true);
    (0..64).for_each(|mib| disk.write_at(&vec![mib as u8 + 1; 1 << 20], mib << 20).unwrap());
    disk.close().unwrap();
    drop(disk);
    let host = Arc::new(Watching { folder: folder.path().to_owned(), most: AtomicU64::new(0) });
    let how = InPlaceOptions { piece: 8 << 20, ..InPlaceOptions::new(DiskType::Dynamic) };
    run(&path, &how, &ChainOptions { host: Arc::clone(&host) as _, ..options(false) }).unwrap();
    let most = host.most.load(Ordering::Relaxed);
    assert!((60 << 20..75 << 20).contains(&most), "{most} bytes were used");
    assert!(read_all(&open(&path, false)).chunks(1 << 20).zip(1..).all(|(mib, value)| mib.iter().all(|byte| *byte == value)));
}

#[test]
fn what_can_not_be_is_refused_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = new(folder.path(), "dynamic");
    let child = folder.path().join("child.vhd");
    new_child(&child, &path);
    let before = files_of(folder.path());
    assert_error(&run(&child, &how(DiskType::Fixed), &options(false)).unwrap_err(), ErrorKind::Unsupported, "has a parent");
    assert_error(&run(&path, &how(DiskType::Dynamic), &options(false)).unwrap_err(), ErrorKind::InvalidInput, "already");
    std::fs::hard_link(&path, folder.path().join("other.vhd")).unwrap();
    assert_error(&run(&path, &how(DiskType::Fixed), &options(false)).unwrap_err(), ErrorKind::Unsupported, "hard links");
    std::fs::remove_file(folder.path().join("other.vhd")).unwrap();
    assert!(files_of(folder.path()) == before);
    // A parent stays the parent.
    let content = read_all(&open(&child, false));
    run(&path, &how(DiskType::Fixed), &options(false)).unwrap();
    assert!(read_all(&open(&child, false)) == content);
}

/// What must hold after a power cut: the content is there, or the command that goes on is named and works.
fn judge(folder: &Path, from: &str, how: &InPlaceOptions, content: &[u8], done: bool) -> Result<(), String> {
    let path = folder.join("disk.vhd");
    let same =
        |what: &str, found: &[u8]| vhd_testkit::tagged::compare(found, content, 0).map_err(|error| format!("{what}: {error}"));
    let read = || -> Result<Vec<u8>, Error> {
        let disk = Disk::open(&path, &options(false))?;
        let mut found = vec![0; disk.size() as usize];
        disk.read_at(&mut found, 0).map(|()| found)
    };
    let is_new = || Chain::open_image(&path, &options(false)).is_ok_and(|image| image.footer().disk_type() == how.to);
    let finished = match read() {
        Ok(found) => {
            same("after the cut", &found)?;
            is_new()
        }
        Err(error) if error.to_string().contains("--in-place") => false,
        Err(error) if from == "raw" && error.kind() == ErrorKind::NotVhd => {
            same("raw", &std::fs::read(&path).map_err(|error| error.to_string())?)?;
            false
        }
        Err(error) => return Err(format!("after the cut: {error}")),
    };
    if done && !finished {
        return Err("answered, and not done".into());
    }
    if !finished {
        run(&path, how, &options(false)).map_err(|error| format!("again: {error}"))?;
    }
    same("converted again", &read().map_err(|error| format!("converted again: {error}"))?)?;
    match files_of(folder).len() {
        1 if is_new() => Ok(()),
        files => Err(format!("converted again: {files} files")),
    }
}

/// Calls `visit` with each way, and what finishes it.
fn operations(visit: &mut dyn FnMut(&Operation<'_>, &Run<'_>)) {
    for (from, to) in ways() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let content = content_of(&new(folder.path(), from), from);
        let how = InPlaceOptions { from_raw: (from == "raw").then_some(true), ..how(to) };
        let run = |folder: &Path, chain: &ChainOptions| {
            run(&folder.join("disk.vhd"), &how, chain).unwrap();
        };
        // Of what is done already it says so.
        let finish = |folder: &Path, chain: &ChainOptions| drop(self::run(&folder.join("disk.vhd"), &how, chain));
        let judge = |folder: &Path, done: bool| judge(folder, from, &how, &content, done);
        visit(&Operation::new(&format!("{from} to {} in place", to.name()), folder, &run, &judge), &finish);
    }
}

#[test]
fn a_power_cut_at_any_point_loses_nothing_and_the_conversion_goes_on() {
    operations(&mut |operation, _| {
        operation.enumerate(Effort { exhaustive: 4, samples: 4, seed: 1 });
    });
}

#[test]
fn every_barrier_is_needed() {
    let mut barriers = Barriers::default();
    operations(&mut |operation, finish| {
        operation.sabotage_with_finish(&mut barriers, Effort { exhaustive: 3, samples: 2, seed: 1 }, finish);
    });
    barriers.assert("in place");
}
