//! Goal: an undo journal of a repair, whoever wrote it, changes nothing of an image but what a repair of it did.
//!
//! Method: journals of real repairs are taken apart, changed and put together again with right checksums, in the form of this version
//! and of the one before; beside each that is refused stands the same one unchanged, which is taken. Things that are no files get the
//! name of one.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

#[path = "support/damages.rs"]
mod damages;
mod support;

use std::fs::Permissions;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};
use vhd_core::intent::{self, InPlace, Intent, Work};
use vhd_core::ops::check::Code;
use vhd_core::ops::compact::{CompactOptions, compact};
use vhd_core::ops::repair::{Repair, RepairMode, repair, undo_repair};
use vhd_core::storage::{FileStorage, LocalHost, Storage};
use vhd_core::{Error, ErrorKind, Progress};
use vhd_testkit::fixture::Layout as FixtureLayout;
use vhd_testkit::volume::Volume;

use self::damages::{Case, cases};
use self::support::{assert_error, files_of, options};

const JOURNAL: &str = "disk.vhd.vhd-repair-undo";
const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);

fn case_named(name: &str) -> Case {
    cases().into_iter().find(|case| case.name == name).unwrap_or_else(|| panic!("{name}"))
}

fn mend(path: &Path) -> Result<Repair, Error> {
    repair(path, RepairMode::All, false, &options(false), &Progress::default())
}

fn undo(path: &Path, force: bool) -> Result<Vec<String>, Error> {
    undo_repair(path, force, &options(false), &Progress::default())
}

/// An image that was damaged and repaired, in a folder of its own.
struct Repaired {
    folder: tempfile::TempDir,
    case: Case,
    image: Vec<u8>,
    parts: Parts,
}

impl Repaired {
    fn of(name: &str) -> Self {
        let case = case_named(name);
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        std::fs::write(folder.path().join("disk.vhd"), &case.bytes).unwrap();
        mend(&folder.path().join("disk.vhd")).unwrap();
        let image = std::fs::read(folder.path().join("disk.vhd")).unwrap();
        let parts = Parts::of(&std::fs::read(folder.path().join(JOURNAL)).unwrap());
        Self { folder, case, image, parts }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("disk.vhd")
    }

    /// The image as repaired, with this journal.
    fn reset(&self, journal: &[u8]) {
        std::fs::write(self.path(), &self.image).unwrap();
        std::fs::write(self.folder.path().join(JOURNAL), journal).unwrap();
    }

    /// Fails unless a journal is refused in one line, by force too, and nothing is changed.
    fn assert_refused(&self, what: &str, journal: &[u8]) {
        for force in [false, true] {
            self.reset(journal);
            let before = files_of(self.folder.path());
            let error = undo(&self.path(), force).expect_err(what);
            assert!([ErrorKind::Corrupt, ErrorKind::Refused].contains(&error.kind()), "{what}: {error}");
            assert!(!error.to_string().contains('\n'), "{what}: {error}");
            assert!(files_of(self.folder.path()) == before, "{what}, force {force}: something was changed");
        }
    }

    fn assert_taken(&self, what: &str, journal: &[u8]) {
        self.reset(journal);
        undo(&self.path(), false).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(std::fs::read(self.path()).unwrap() == self.case.bytes, "{what}: undone otherwise");
        assert_eq!(files_of(self.folder.path()).len(), 1, "{what}");
    }
}

/// What is in a journal.
#[derive(Clone)]
struct Parts {
    head: Value,
    kept: Vec<Range<u64>>,
    written: Vec<Range<u64>>,
    sums: Vec<u8>,
    bytes: Vec<u8>,
}

fn ranges_of(bytes: &[u8]) -> Vec<Range<u64>> {
    let number = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().unwrap());
    bytes.chunks(16).map(|entry| number(&entry[..8])..number(&entry[..8]) + number(&entry[8..])).collect()
}

impl Parts {
    fn of(journal: &[u8]) -> Self {
        let end = journal.iter().position(|byte| *byte == b'\n').unwrap();
        let line = std::str::from_utf8(&journal[..end]).unwrap();
        let fields: Vec<_> = line.split(' ').collect();
        assert_eq!(&fields[..2], ["vhd-repair-undo", "3"]);
        let len = usize::from_str_radix(fields[3], 16).unwrap();
        let head: Value = serde_json::from_slice(&journal[end + 1..][..len]).unwrap();
        let count = |index: usize| head["ranges"][index].as_u64().unwrap() as usize * 16;
        let body = &journal[end + 1 + len..];
        let (kept, body) = body.split_at(count(0));
        let (written, body) = body.split_at(count(1));
        let (kept, written) = (ranges_of(kept), ranges_of(written));
        let sectors: u64 = written.iter().map(|range| (range.end - range.start).div_ceil(512)).sum();
        let (sums, bytes) = body.split_at(sectors as usize * 4);
        Self { head, kept, written, sums: sums.to_vec(), bytes: bytes.to_vec() }
    }

    /// A journal of this version, with right checksums.
    fn encode(&self) -> Vec<u8> {
        let mut head = self.head.clone();
        // What a forger wrote there stays.
        if head["ranges"].is_array() {
            head["ranges"] = json!([self.kept.len(), self.written.len()]);
        } else {
            head["ranges"] = head["ranges"]["forged"].clone();
        }
        let head = serde_json::to_vec(&head).unwrap();
        let mut body = Vec::new();
        for range in self.kept.iter().chain(&self.written) {
            body.extend(range.start.to_be_bytes());
            body.extend(range.end.wrapping_sub(range.start).to_be_bytes());
        }
        body.extend(&self.sums);
        body.extend(&self.bytes);
        let line = format!("vhd-repair-undo 3 {:08x} {:x} {:08x}\n", CRC.checksum(&head), head.len(), CRC.checksum(&body));
        [line.as_bytes(), &head, &body].concat()
    }

    /// The same in the form of the last release, for an image that holds what the repair left.
    fn encode_old(&self, image: &[u8]) -> Vec<u8> {
        let pairs = |ranges: &[Range<u64>]| -> Vec<_> {
            ranges.iter().map(|range| (range.start, range.end.wrapping_sub(range.start))).collect()
        };
        let crc = |range: &Range<u64>| image.get(range.start as usize..range.end as usize).map_or(0, |bytes| CRC.checksum(bytes));
        let written: Vec<_> = pairs(&self.written).into_iter().zip(self.written.iter().map(crc)).collect();
        let head = json!({
            "len": self.head["len"],
            "ranges": pairs(&self.kept),
            "crc": CRC.checksum(&self.bytes),
            "written": written.iter().map(|((at, len), crc)| json!([at, len, crc])).collect::<Vec<_>>(),
            "changes": self.head["changes"],
            "lost": [],
        });
        let head = serde_json::to_vec_pretty(&head).unwrap();
        let line = format!("vhd-repair-undo 2 {:08x} {:x}\n", CRC.checksum(&head), head.len());
        [line.as_bytes(), &head, &self.bytes].concat()
    }
}

/// A way to forge a journal: its name, and what is done to one.
type Forgery = (&'static str, fn(&mut Parts, &[u8]));

/// Claims that the repair wrote a range, whose bytes the image has.
fn claim(parts: &mut Parts, image: &[u8], range: Range<u64>) {
    for sector in image[range.start as usize..range.end as usize].chunks(512) {
        parts.sums.extend(CRC.checksum(sector).to_be_bytes());
    }
    parts.written.push(range);
}

fn forgeries() -> Vec<Forgery> {
    vec![
        ("a kept range beyond the end", |parts, _| {
            let last = parts.kept.last_mut().unwrap();
            *last = last.start + (1 << 40)..last.end + (1 << 40);
        }),
        ("a written range beyond the end", |parts, _| {
            let last = parts.written.last_mut().unwrap();
            *last = last.start + (1 << 40)..last.end + (1 << 40);
        }),
        ("a range that has no end", |parts, _| {
            let last = parts.kept.last_mut().unwrap();
            *last = Range { start: u64::MAX - 511, end: 1 };
        }),
        ("the same range twice", |parts, _| {
            let (first, len) = (parts.kept[0].clone(), parts.kept[0].end - parts.kept[0].start);
            parts.kept.insert(0, first);
            let bytes = parts.bytes[..len as usize].to_vec();
            parts.bytes.splice(0..0, bytes);
        }),
        ("a range of nothing", |parts, _| {
            let first = parts.kept[0].start;
            parts.kept.insert(0, first..first);
        }),
        ("bytes for where the repair wrote nothing", |parts, image| {
            let free = (0..image.len() as u64 / 512).map(|sector| sector * 512..sector * 512 + 512);
            let mut all = parts.written.clone();
            all.extend(parts.kept.iter().cloned());
            let free = free.into_iter().find(|free| all.iter().all(|range| range.end <= free.start || free.end <= range.start));
            parts.kept.push(free.unwrap());
            parts.kept.sort_by_key(|range| range.start);
            parts.bytes.extend([0x66; 512]);
        }),
        ("no bytes for where the repair wrote", |parts, _| {
            let first = parts.kept.remove(0);
            parts.bytes.drain(..(first.end - first.start) as usize);
        }),
        ("a file that was empty", |parts, _| parts.head["len"][0] = json!(0)),
        ("a file that was larger than any", |parts, _| parts.head["len"][0] = json!(1_u64 << 60)),
        ("a file that was much longer, with nothing there", |parts, _| parts.head["len"][0] = json!(1_u64 << 40)),
        ("a file that was shorter", |parts, _| parts.head["len"][0] = json!(1024)),
        ("a shorter file, and the image claimed as written", |parts, image| {
            let len = image.len() as u64;
            (parts.kept, parts.written, parts.sums, parts.bytes) = (vec![], vec![], vec![], vec![]);
            parts.head["len"] = json!([4096, len]);
            claim(parts, image, 4096..len);
        }),
        ("another length after the repair", |parts, image| parts.head["len"][1] = json!(image.len() + 4096)),
    ]
}

#[test]
fn a_forged_journal_is_refused_and_changes_nothing() {
    for name in ["duplicate", "no header", "leaked tail", "one sector too near"] {
        let repaired = Repaired::of(name);
        for (what, forge) in forgeries() {
            let mut parts = repaired.parts.clone();
            forge(&mut parts, &repaired.image);
            // What is written since may go by force; whose claim it is that it was, nobody knows.
            let by_force = [
                "another length after the repair",
                "a file that was shorter",
                "a shorter file, and the image claimed as written",
            ];
            if by_force.contains(&what) {
                repaired.reset(&parts.encode());
                // Where no length is borne out but the old one, the repair may have been cut before it grew the file.
                let is_undone = undo(&repaired.path(), false).is_ok();
                let expected = if is_undone { &repaired.case.bytes } else { &repaired.image };
                assert!(std::fs::read(repaired.path()).unwrap() == *expected, "{name}: {what}");
                assert!(!is_undone || what == "another length after the repair", "{name}: {what}");
                continue;
            }
            repaired.assert_refused(&format!("{name}: {what}"), &parts.encode());
            repaired.assert_refused(&format!("{name}, old: {what}"), &parts.encode_old(&repaired.image));
        }
        repaired.assert_taken(name, &repaired.parts.encode());
        repaired.assert_taken(&format!("{name}, old"), &repaired.parts.encode_old(&repaired.image));
    }
}

#[test]
fn what_a_journal_says_of_itself_is_bounded() {
    let repaired = Repaired::of("cut");
    let good = repaired.parts.encode();
    for counts in [[u64::MAX, 0], [0, u64::MAX], [1 << 61, 1 << 61], [1 << 30, 1], [0, 0]] {
        let mut parts = repaired.parts.clone();
        parts.head["ranges"] = json!({ "forged": counts });
        repaired.assert_refused(&format!("{counts:?} ranges"), &parts.encode());
    }
    let head =
        |fields: &str| [fields.as_bytes(), b"\n", &good[good.iter().position(|byte| *byte == b'\n').unwrap() + 1..]].concat();
    for line in [
        "vhd-repair-undo 3 0 ffffffffffffffff 0",
        "vhd-repair-undo 2 0 ffffffffffffffff",
        "vhd-repair-undo 3 0 0 0",
        "vhd-repair-undo 3",
        "vhd-repair-undo 3 x y z",
        "vhd-repair-undo 4 0 0 0",
        "vhd-repair-undo",
        "",
    ] {
        repaired.assert_refused(&format!("{line:?}"), &head(line));
    }
    for len in (0..good.len()).step_by(good.len() / 50) {
        repaired.assert_refused(&format!("cut to {len}"), &good[..len]);
    }
    // Of 3 GiB nothing but the beginning is read.
    repaired.reset(&good);
    std::fs::File::options().write(true).open(repaired.folder.path().join(JOURNAL)).unwrap().set_len(3 << 30).unwrap();
    let begun = std::time::Instant::now();
    assert_error(&undo(&repaired.path(), true).unwrap_err(), ErrorKind::Corrupt, "the file 3221225472");
    assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
    repaired.assert_taken("as it was", &good);
}

#[test]
fn a_journal_is_for_the_image_that_was_repaired_alone() {
    let repaired = Repaired::of("cut");
    let mut parts = repaired.parts.clone();
    parts.head["uuids"] = json!(["00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000001"]);
    repaired.assert_refused("another UUID", &parts.encode());
    // Taken for granted by force alone: no byte that is not as the repair left it.
    let mut other = repaired.image.clone();
    let at = repaired.parts.written.last().unwrap().start as usize;
    other[at] ^= 1;
    repaired.reset(&repaired.parts.encode());
    std::fs::write(repaired.path(), &other).unwrap();
    assert_error(&undo(&repaired.path(), false).unwrap_err(), ErrorKind::Refused, "written since");
    assert!(std::fs::read(repaired.path()).unwrap() == other);
    repaired.assert_taken("of its own image", &repaired.parts.encode());
}

#[test]
fn what_is_no_regular_file_is_no_journal() {
    let repaired = Repaired::of("cut");
    let good = repaired.parts.encode();
    let path = repaired.folder.path().join(JOURNAL);
    type Make = fn(&Path, &Path);
    let things: [(&str, Make); 6] = [
        ("FIFO", |path, _| mkfifo(path, Mode::S_IRWXU).unwrap()),
        ("socket", |path, _| drop(UnixListener::bind(path).unwrap())),
        ("folder", |path, _| std::fs::create_dir(path).unwrap()),
        ("device", |path, _| symlink("/dev/zero", path).unwrap()),
        ("link to a journal", |path, real| symlink(real, path).unwrap()),
        ("link to nowhere", |path, _| symlink("nowhere", path).unwrap()),
    ];
    for (what, make) in things {
        for image in [&repaired.case.bytes, &repaired.image] {
            repaired.reset(&good);
            std::fs::rename(&path, repaired.folder.path().join("real")).unwrap();
            std::fs::write(repaired.path(), image).unwrap();
            make(&path, Path::new("real"));
            let refused = |error: Error| {
                assert_eq!(error.kind(), ErrorKind::Refused, "{what}: {error}");
                assert!(error.to_string().contains("move it away"), "{what}: {error}");
                assert!(std::fs::read(repaired.path()).unwrap() == *image, "{what}");
            };
            refused(undo(&repaired.path(), false).unwrap_err());
            refused(undo(&repaired.path(), true).unwrap_err());
            refused(mend(&repaired.path()).unwrap_err());
            refused(repair(&repaired.path(), RepairMode::All, true, &options(false), &Progress::default()).unwrap_err());
            if path.symlink_metadata().unwrap().is_dir() {
                std::fs::remove_dir(&path).unwrap();
            } else {
                std::fs::remove_file(&path).unwrap();
            }
            std::fs::remove_file(repaired.folder.path().join("real")).unwrap();
        }
    }
    repaired.assert_taken("a file", &good);
}

#[test]
fn a_record_names_a_journal_of_its_own_image_alone() {
    let repaired = Repaired::of("cut");
    let good = repaired.parts.encode();
    let record = |name: &str| Intent::InPlace(InPlace { uuid: None, work: Work::Repair(name.into()) });
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    std::fs::write(elsewhere.path().join(JOURNAL), &good).unwrap();
    let absolute = elsewhere.path().join(JOURNAL).display().to_string();
    let climbing = format!("../{}/{JOURNAL}", elsewhere.path().file_name().unwrap().to_str().unwrap());
    for name in [&*absolute, &climbing, "other.vhd.vhd-repair-undo", "disk.vhd", "", ".", "disk.vhd.vhd-repair-undo.101"] {
        repaired.reset(&good);
        std::fs::write(repaired.folder.path().join("other.vhd.vhd-repair-undo"), &good).unwrap();
        intent::put(&LocalHost, &repaired.path(), &record(name)).unwrap();
        let before = files_of(repaired.folder.path());
        for result in
            [undo(&repaired.path(), false).map(drop), undo(&repaired.path(), true).map(drop), mend(&repaired.path()).map(drop)]
        {
            assert_error(&result.unwrap_err(), ErrorKind::Refused, "none of this image");
        }
        assert!(files_of(repaired.folder.path()) == before, "{name}");
        std::fs::remove_file(repaired.folder.path().join("other.vhd.vhd-repair-undo")).unwrap();
        intent::remove(&LocalHost, &repaired.path()).unwrap();
    }
    assert!(elsewhere.path().join(JOURNAL).exists());
    repaired.reset(&good);
    intent::put(&LocalHost, &repaired.path(), &record(JOURNAL)).unwrap();
    undo(&repaired.path(), false).unwrap();
    assert!(std::fs::read(repaired.path()).unwrap() == repaired.case.bytes);
}

/// However far a repair came, sector by sector, it is put back; but not over what is neither old nor new.
#[test]
fn an_interrupted_repair_is_put_back_sector_by_sector_and_over_nothing_else() {
    for name in ["cut", "duplicate", "no header", "BAT of zeros", "a file that grew without its footer"] {
        let repaired = Repaired::of(name);
        let good = repaired.parts.encode();
        let before = &repaired.case.bytes;
        let record = Intent::InPlace(InPlace { uuid: None, work: Work::Repair(JOURNAL.into()) });
        let changed: Vec<_> = (0..repaired.image.len())
            .step_by(512)
            .filter(|at| before.get(*at..at + 512) != repaired.image.get(*at..at + 512))
            .collect();
        for step in 2..6 {
            let mut mixed = repaired.image.clone();
            for at in changed.iter().step_by(step) {
                let old: Vec<u8> = (*at..at + 512).map(|at| before.get(at).copied().unwrap_or(0)).collect();
                mixed.get_mut(*at..at + 512).unwrap().copy_from_slice(&old);
            }
            repaired.reset(&good);
            std::fs::write(repaired.path(), &mixed).unwrap();
            intent::put(&LocalHost, &repaired.path(), &record).unwrap();
            undo(&repaired.path(), false).unwrap_or_else(|error| panic!("{name}, {step}: {error}"));
            assert!(std::fs::read(repaired.path()).unwrap() == *before, "{name}, {step}");
            // Another's byte in one of them.
            let at = changed[changed.len() / 2] + 100;
            mixed[at] = (0..=255).find(|byte| before.get(at) != Some(byte) && *byte != repaired.image[at]).unwrap();
            repaired.reset(&good);
            std::fs::write(repaired.path(), &mixed).unwrap();
            intent::put(&LocalHost, &repaired.path(), &record).unwrap();
            for error in [undo(&repaired.path(), false).unwrap_err(), mend(&repaired.path()).unwrap_err()] {
                assert_error(&error, ErrorKind::Refused, "written since");
                assert!(error.to_string().contains("--force"), "{error}");
                assert!(std::fs::read(repaired.path()).unwrap() == mixed, "{name}, {step}");
            }
            undo(&repaired.path(), true).unwrap();
            assert!(std::fs::read(repaired.path()).unwrap() == *before, "{name}, {step}");
        }
    }
}

#[test]
fn a_journal_is_as_closed_as_its_image() {
    let case = case_named("cut");
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let umask = status.lines().find_map(|line| line.strip_prefix("Umask:")).unwrap();
    let umask = u32::from_str_radix(umask.trim(), 8).unwrap();
    for (mode, expected) in [(0o600, 0o600), (0o640, 0o640), (0o644, 0o644), (0o660, 0o660), (0o777, 0o666), (0o444, 0o644)] {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("disk.vhd");
        std::fs::write(&path, &case.bytes).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let journal = match mend(&path) {
            Ok(done) => done.journal.unwrap(),
            // But for root.
            Err(error) if error.kind() == ErrorKind::ReadOnly => continue,
            Err(error) => panic!("{error}"),
        };
        let (found, image) = (journal.metadata().unwrap(), path.metadata().unwrap());
        assert_eq!(found.mode() & 0o777, expected & !umask | 0o600, "image of mode {mode:o}");
        assert_eq!((found.gid(), image.mode() & 0o777), (image.gid(), mode));
    }
}

/// What a killed repair left under the passing name goes; what is somebody else's stays.
#[test]
fn what_is_in_the_way_of_a_journal_is_removed_only_where_a_repair_left_it() {
    let case = case_named("cut");
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let (path, passing) = (folder.path().join("disk.vhd"), folder.path().join(format!("{JOURNAL}.new")));
    for (left, is_ours) in [(&b""[..], true), (b"vhd-repair-undo 3 half a line", true), (&[0; 4096], true), (b"my notes", false)]
    {
        std::fs::write(&path, &case.bytes).unwrap();
        std::fs::write(&passing, left).unwrap();
        match mend(&path) {
            Ok(_) => assert!(is_ours && !passing.exists(), "{left:?}"),
            Err(error) => {
                assert_error(&error, ErrorKind::Exists, "in the way");
                assert!(!is_ours && std::fs::read(&passing).unwrap() == left && std::fs::read(&path).unwrap() == case.bytes);
            }
        }
        drop(std::fs::remove_file(folder.path().join(JOURNAL)));
    }
}

/// An image on a full volume, with a tail that no entry names, and where that begins.
fn on_a_full_volume(tail: &dyn Fn(&FileStorage, Range<u64>)) -> Option<(Volume, PathBuf, u64)> {
    let volume = Volume::new("24M")?;
    let path = volume.path().join("disk.vhd");
    let (bytes, placed) = damages::full(FixtureLayout::Windows8).to_bytes();
    std::fs::write(&path, &bytes).unwrap();
    let file = FileStorage::open(&path, true).unwrap();
    let end = bytes.len() as u64 + (16 << 20);
    file.set_len(end).unwrap();
    tail(&file, placed.footer + 512..end - 512);
    file.write_at(&bytes[placed.footer as usize..], end - 512).unwrap();
    file.write_at(&[0; 512], placed.footer).unwrap();
    let mut filler = std::fs::File::create(volume.path().join("filler")).unwrap();
    while filler.write_all(&[1; 4096]).is_ok() {}
    assert!(std::fs::write(volume.path().join("more"), [1; 4096]).is_err(), "the volume is not full");
    drop(std::fs::remove_file(volume.path().join("more")));
    Some((volume, path, placed.footer))
}

fn content(path: &Path) -> Vec<u8> {
    support::read_all(&support::open(path, false))
}

/// What a killed process had reserved: zeros, for which the host keeps room.
#[test]
fn space_on_a_full_volume_is_given_back_without_room_for_that() {
    let Some((_volume, path, end)) = on_a_full_volume(&|file, tail| file.allocate(tail).unwrap()) else { return };
    let before = content(&path);
    let done = repair(&path, RepairMode::Safe, false, &options(false), &Progress::default()).unwrap();
    assert!(done.ok() && done.before.iter().any(|finding| finding.code == Code::LeakedSpace), "{done:?}");
    assert!(path.metadata().unwrap().len() < end + (1 << 20), "{done:?}");
    assert!(content(&path) == before);
    // There is room now, and it can be taken back.
    undo(&path, false).unwrap();
    assert!(path.metadata().unwrap().len() > end + (8 << 20) && content(&path) == before);
}

/// What can't be kept is not cut off; and the error says what does it.
#[test]
fn without_room_to_keep_what_it_cuts_off_a_repair_says_so() {
    let fill = |file: &FileStorage, tail: Range<u64>| {
        (tail.start..tail.end)
            .step_by(1 << 20)
            .for_each(|at| file.write_at(&vec![9; (tail.end - at).min(1 << 20) as usize], at).unwrap());
    };
    let Some((_volume, path, end)) = on_a_full_volume(&fill) else { return };
    let (before, bytes) = (content(&path), std::fs::read(&path).unwrap());
    let error = repair(&path, RepairMode::Safe, false, &options(false), &Progress::default()).unwrap_err();
    assert_error(&error, ErrorKind::NoSpace, "vhd compact gives space back");
    assert!(std::fs::read(&path).unwrap() == bytes && std::fs::read_dir(path.parent().unwrap()).unwrap().count() == 2);
    compact(&path, &CompactOptions::default(), &mut |_| Ok(Vec::new()), &options(false), &Progress::default()).unwrap();
    assert!(path.metadata().unwrap().len() < end + (1 << 20) && content(&path) == before);
}
