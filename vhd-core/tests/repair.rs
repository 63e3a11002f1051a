//! Goal: a repair leaves an image that checks clean, loses only what it said, and can be taken back.
//!
//! Method: every kind of damage that check knows, repaired in both modes and compared sector by sector with the image before
//! it was damaged; docs/repair.md is the table of what came of it. On real files: the undo journal, other tools, and every
//! state that a power cut may leave. `REPAIR_UPDATE=1` writes the table anew.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

#[path = "support/damages.rs"]
mod damages;
mod support;

use std::collections::BTreeSet;
use std::fmt::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhd_core::chain::{Chain, ChainOptions, Layer};
use vhd_core::image::{Image, OpenOptions};
use vhd_core::intent::{self, InPlace, Intent, Work};
use vhd_core::ops::check::{Code, Finding, Severity};
use vhd_core::ops::repair::{Repair, RepairMode, plan, repair, undo_repair};
use vhd_core::storage::{LocalHost, MemoryStorage, Storage};
use vhd_core::{Disk, Error, ErrorKind, Progress};
use vhd_testkit::crash::Effort;
use vhd_testkit::tools::QemuImg;

use proptest::prelude::*;
use vhd_testkit::fixture::{Layout, Placed, refresh_checksums};

use self::damages::{Case, cases};
use self::support::sabotage::{Barriers, Operation, Run};
use self::support::{assert_error, files_of, options};

const PATH: &str = "test.vhd";

fn copy_of(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// What the leaf itself holds; a child's parent is nothing here.
fn content(bytes: &[u8], writable: bool) -> Result<Vec<u8>, Error> {
    let open = OpenOptions { writable, background_flush: None, ..OpenOptions::default() };
    let image = Image::open(Arc::new(MemoryStorage::new(bytes.to_vec())), Path::new(PATH), &open)?;
    let disk = Disk::new(Chain::of(Layer::Image(image)));
    // A size that can't be right is not read to its end.
    let mut content = vec![0; disk.size().min(64 << 20) as usize];
    disk.read_at(&mut content, 0).map(|()| content)
}

fn planned(bytes: &[u8], mode: RepairMode) -> (Repair, Vec<u8>) {
    let (repaired, repair) = plan(Arc::new(MemoryStorage::new(bytes.to_vec())), Path::new(PATH), mode).unwrap();
    (repair, copy_of(&*repaired))
}

fn bad(findings: &[Finding]) -> BTreeSet<&'static str> {
    findings.iter().filter(|finding| finding.severity > Severity::Note).map(|finding| finding.code.name()).collect()
}

/// Fails unless what the repair gives is what it says.
fn judge(case: &Case, mode: RepairMode) -> Repair {
    let (repair, repaired) = judge_form(case, mode);
    let name = format!("{}, {mode:?}", case.name);
    let mut known = bad(&repair.before);
    // What copied blocks leave is given back by the next repair, not in one go with what was lost.
    known.extend((!repair.lost.is_empty()).then_some(Code::LeakedSpace.name()));
    assert!(bad(&repair.after).is_subset(&known), "{name}: {:?}", repair.after);
    // Some never were sound.
    let before = content(&case.sound, false).unwrap_or_default();
    match content(&repaired, false) {
        // What opened before reads the same, but for what was said.
        Ok(found) if repair.lost.is_empty() => {
            let expected = content(&case.bytes, false).unwrap_or(before);
            assert!(found == expected || expected.is_empty(), "{name}: reads something else");
        }
        Ok(found) => {
            let same = found.chunks(512).zip(before.chunks(512)).filter(|(a, b)| a == b).count();
            assert!(same > 0 || before.is_empty(), "{name}: nothing is left");
        }
        Err(_) => assert!(!repair.ok(), "{name}: a clean check of what does not open"),
    }
    repair
}

/// Fails unless a repair is done at once, and what it calls sound opens.
fn judge_form(case: &Case, mode: RepairMode) -> (Repair, Vec<u8>) {
    let (repair, repaired) = planned(&case.bytes, mode);
    let name = format!("{}, {mode:?}", case.name);
    assert!(mode == RepairMode::All || repair.lost.is_empty(), "{name}: {:?}", repair.lost);
    // Space is not given back in one go with what was lost: it may hold that.
    let (again, twice) = planned(&repaired, mode);
    let is_leak = again.changes.iter().all(|change| change.contains("given back")) && !repair.lost.is_empty();
    assert!(is_leak || (twice == repaired && again.changes.is_empty()), "{name}: not all at once: {:?}", again.changes);
    if repair.ok() && mode == RepairMode::All {
        let opened = content(&repaired, true);
        let may_be = |error: &Error| error.kind() == ErrorKind::Refused;
        assert!(opened.as_ref().map_or_else(may_be, |_| true), "{name}: {:?}", opened.err());
    }
    (repair, repaired)
}

/// What came of one mode, in words.
fn outcome(repair: &Repair) -> String {
    let (before, after) = (bad(&repair.before), bad(&repair.after));
    if before.is_empty() && repair.changes.is_empty() {
        return "-".into();
    }
    if after.is_empty() {
        return "yes".into();
    }
    format!("left: {}", after.into_iter().collect::<Vec<_>>().join(", "))
}

fn table() -> String {
    let mut table =
        String::from("| damage | found as | `--repair` | `--repair=all` | given up or guessed |\n|---|---|---|---|---|\n");
    for case in cases() {
        let (safe, all) = (judge(&case, RepairMode::Safe), judge(&case, RepairMode::All));
        let codes: Vec<_> = case.expected.iter().map(|code| code.name()).collect();
        let (of_safe, of_all) = if case.deep { ("no".into(), "no".into()) } else { (outcome(&safe), outcome(&all)) };
        let lost: Vec<_> = all.lost.iter().map(|lost| lost.split(' ').map(masked).collect::<Vec<_>>().join(" ")).collect();
        let _ = writeln!(
            table,
            "| {} | {} | {} | {} | {} |",
            case.name,
            codes.join(", "),
            of_safe,
            of_all,
            if lost.is_empty() { "-".into() } else { lost.join("; ") }
        );
    }
    table
}

/// A word, where it is the same each time.
fn masked(word: &str) -> &str {
    if word.len() >= 36 && word.matches('-').count() >= 4 { "a new one," } else { word }
}

#[test]
fn every_damage_is_repaired_or_the_table_says_why_not() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/repair.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let (head, rest) = page.split_once("<!-- table -->\n").unwrap();
    let (_, tail) = rest.split_once("<!-- end -->\n").unwrap();
    assert!(cases().len() >= 40);
    let new = format!("{head}<!-- table -->\n{}<!-- end -->\n{tail}", table());
    if std::env::var_os("REPAIR_UPDATE").is_some() {
        std::fs::write(&path, &new).unwrap();
    }
    let page = std::fs::read_to_string(&path).unwrap();
    for (found, expected) in page.lines().zip(new.lines()) {
        assert_eq!(found, expected, "docs/repair.md is not what repairs do; REPAIR_UPDATE=1 writes it anew");
    }
}

/// An image of a layout, where its parts are, and the ranges of its structures; sector bitmaps aside, which no repair judges.
fn sound(kind: u8) -> (Vec<u8>, Placed, Vec<Range<u64>>) {
    let spec = match kind {
        0 => damages::fixed(),
        1 => damages::dynamic(Layout::Classic),
        2 => damages::dynamic(Layout::Windows8),
        3 => damages::dynamic(Layout::Tapdisk),
        _ => damages::child(damages::parent()),
    };
    let (bytes, placed) = spec.to_bytes();
    let footer = placed.footer..placed.footer + 90;
    let mut structures = vec![footer];
    if kind > 0 {
        structures.extend([0..90, placed.header..placed.header + 64, placed.header + 576..placed.header + 650]);
        structures.push(placed.bat..placed.bat + u64::from(placed.bat_entries) * 4);
        structures.extend(placed.batmap.map(|at| at..at + 80));
    }
    (bytes, placed, structures)
}

/// Fails unless each block that nothing was said of reads as before. Not judged are those whose BAT entry was damaged, and
/// which were cut.
fn judge_blocks(case: &Case, placed: &Placed, repair: &Repair, repaired: &[u8]) -> Result<(), TestCaseError> {
    let guesses = ["the BAT is lost", "block size were found", "is taken", "made anew"];
    let Ok(found) = content(repaired, false) else {
        prop_assert!(!repair.ok(), "a clean check of what does not open");
        return Ok(());
    };
    if repair.lost.iter().any(|lost| guesses.iter().any(|guess| lost.contains(guess))) {
        return Ok(());
    }
    let named: Vec<u64> = repair.lost.iter().filter(|lost| lost.starts_with("block")).flat_map(|lost| numbers(lost)).collect();
    let before = content(&case.sound, false).unwrap();
    let is_sparse = placed.bat_entries > 0;
    for (block, (found, before)) in
        (0_u64..).zip(found.chunks(damages::BLOCK as usize).zip(before.chunks(damages::BLOCK as usize)))
    {
        let entry = (placed.bat + block * 4) as usize;
        let is_damaged = is_sparse && case.bytes.get(entry..entry + 4) != case.sound.get(entry..entry + 4);
        let end = match is_sparse {
            true => placed.blocks.get(&(block as u32)).map_or(0, |at| at + placed.bitmap_len + u64::from(damages::BLOCK)),
            false => (block + 1) * u64::from(damages::BLOCK),
        };
        if named.contains(&block) || is_damaged || end > case.bytes.len() as u64 {
            continue;
        }
        let len = found.len().min(before.len());
        prop_assert!(found[..len] == before[..len], "block {} reads something else: {:?}", block, repair);
    }
    Ok(())
}

/// The numbers in a text.
fn numbers(text: &str) -> Vec<u64> {
    text.split(|letter: char| !letter.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect()
}

/// One edit: which structure and where in it, what is written, and whether to many bytes.
type Edit = (u32, u32, u8, bool);

fn edit(bytes: &mut [u8], structures: &[Range<u64>], (place, at, value, wipe): Edit) {
    let place = &structures[place as usize % structures.len()];
    let at = (place.start + u64::from(at) % (place.end - place.start)) as usize;
    let end = if wipe { (at + 32).min(place.end as usize) } else { at + 1 };
    bytes[at..end].fill(value);
}

/// Bytes cut off: none, a few, or up to some blocks.
fn cuts() -> impl Strategy<Value = usize> {
    prop_oneof![4 => Just(0_usize), 2 => 1..2000_usize, 1 => 1..2_000_000_usize]
}

/// Fails unless a repair of the image with these edits gives a clean check and loses only what the plan said.
fn judge_mutated(kind: u8, edits: &[Edit], summed: bool, cut: usize) -> Result<(), TestCaseError> {
    let (sound, placed, structures) = sound(kind);
    let mut bytes = sound.clone();
    edits.iter().for_each(|one| edit(&mut bytes, &structures, *one));
    if summed {
        refresh_checksums(&mut bytes);
    }
    bytes.truncate(bytes.len().saturating_sub(cut));
    // Wrong values under right checksums are what the image says, unless they can't be.
    let is_said = summed && (bytes.get(..1536) != sound.get(..1536) || bytes.last_chunk::<512>() != sound.last_chunk());
    let case = Case { name: "mutated", expected: &[], deep: false, bytes, sound };
    for mode in [RepairMode::Safe, RepairMode::All] {
        let storage = Arc::new(MemoryStorage::new(case.bytes.clone()));
        match plan(storage, Path::new(PATH), mode) {
            // Nothing of a VHD is left: that is said, and nothing is done.
            Err(error) => prop_assert_eq!(error.kind(), ErrorKind::NotVhd, "{}", error),
            Ok(_) => {
                let (repair, repaired) = judge_form(&case, mode);
                if !is_said {
                    judge_blocks(&case, &placed, &repair, &repaired)?;
                }
                prop_assert!(mode == RepairMode::Safe || repair.ok() || is_hopeless(&case.bytes, &repair), "{:?}", repair);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_mutated_image_is_repaired_and_loses_only_what_was_said(
        kind in 0..5_u8,
        edits in prop::collection::vec(any::<Edit>(), 0..6),
        summed in any::<bool>(),
        cut in cuts(),
    ) {
        judge_mutated(kind, &edits, summed, cut)?;
    }
}

#[test]
fn what_a_repair_writes_beyond_the_end_of_the_file_is_no_error() {
    judge_mutated(3, &[(2_883_860_296, 1_201_415_555, 15, false)], false, 0).unwrap();
}

/// What no repair can know, and docs/repair.md says why: what a disk was whose footers are both none, and how large one whose
/// footers say 0; and of a file that is a footer alone nothing is left.
fn is_hopeless(bytes: &[u8], repair: &Repair) -> bool {
    let is_footer = |from: usize| bytes.get(from..).is_some_and(|rest| rest.starts_with(b"conectix"));
    // A first sector that says neither what the disk is nor where its header is may be a guest's.
    let leads = bytes.get(16..24) == Some(&512_u64.to_be_bytes()) || matches!(bytes.get(60..64), Some([0, 0, 0, 3 | 4]));
    let has_footer =
        (is_footer(0) && leads) || [bytes.len().saturating_sub(512), bytes.len().saturating_sub(511)].into_iter().any(is_footer);
    (!has_footer && repair.changes.is_empty())
        || bytes.len() < 1024
        || repair.after.iter().any(|finding| finding.code == Code::SizeZero)
}

/// Found by the property above: rounded down, such a size had a geometry that bore it out.
#[test]
fn a_size_that_was_damaged_does_not_make_the_file_grow() {
    let (mut bytes, placed, _) = sound(0);
    let len = bytes.len();
    bytes[placed.footer as usize + 51..][..5].fill(0x66);
    refresh_checksums(&mut bytes);
    let (repair, repaired) = planned(&bytes, RepairMode::All);
    assert!(repair.ok() && repaired.len() == len, "{repair:?}, {} bytes", repaired.len());
}

/// Found by the property above: the header and the trailing footer are none, and the copy has lost its type and where it leads.
#[test]
fn a_footer_copy_that_may_be_a_guests_is_not_taken_for_one() {
    let edits = [
        (1_347_404_777, 1_283_935_552, 0, false),
        (1_332_768_316, 3_086_510_699, 1, true),
        (4_131_054_091, 1_664_215_388, 0, true),
    ];
    judge_mutated(1, &edits, false, 2).unwrap();
}

fn case_named(name: &str) -> Case {
    cases().into_iter().find(|case| case.name == name).unwrap_or_else(|| panic!("{name}"))
}

fn file_of(case: &Case) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("disk.vhd");
    std::fs::write(&path, &case.bytes).unwrap();
    (folder, path)
}

#[test]
fn a_repair_can_be_taken_back_byte_for_byte() {
    for case in cases() {
        let (folder, path) = file_of(&case);
        let before = files_of(folder.path());
        let dry = repair(&path, RepairMode::All, true, &options(false), &Progress::default());
        assert!(files_of(folder.path()) == before, "{}", case.name);
        let Ok(done) = repair(&path, RepairMode::All, false, &options(false), &Progress::default()) else {
            assert!(dry.is_err());
            continue;
        };
        let Some(journal) = &done.journal else {
            assert!(files_of(folder.path()) == before, "{}", case.name);
            continue;
        };
        assert!(journal.exists() && std::fs::read(&path).unwrap() != case.bytes, "{}", case.name);
        let kept = std::fs::read(journal).unwrap();
        assert_eq!(undo_repair(&path, false, &options(false), &Progress::default()).unwrap(), done.changes);
        assert!(files_of(folder.path()) == before, "{}", case.name);
        // A kill may leave the journal when all is done.
        std::fs::write(journal, kept).unwrap();
        assert_eq!(undo_repair(&path, false, &options(false), &Progress::default()).unwrap(), done.changes);
        assert!(files_of(folder.path()) == before, "{}", case.name);
    }
}

/// A byte written since the repair, wherever it is, is still there after an undo, or that is refused.
#[test]
fn an_undo_of_a_repair_loses_no_byte_that_was_written_since() {
    let (mut refused, mut kept) = (0, 0);
    for case in cases() {
        let (_folder, path) = file_of(&case);
        let done = repair(&path, RepairMode::All, false, &options(false), &Progress::default());
        let Some(journal) = done.ok().and_then(|done| done.journal) else { continue };
        let (repaired, undo) = (std::fs::read(&path).unwrap(), std::fs::read(&journal).unwrap());
        let is_changed = |at: &usize| case.bytes.get(*at) != repaired.get(*at);
        let changed: Vec<_> = (0..repaired.len()).filter(is_changed).collect();
        let ends = [changed.first(), changed.get(changed.len() / 2), changed.last()].into_iter().flatten().copied();
        let anywhere = (1..8).map(|part| repaired.len() * part / 8 + 77);
        for at in ends.chain(anywhere).filter(|at| *at < repaired.len()) {
            let mut written = repaired.clone();
            written[at] ^= 0x55;
            std::fs::write(&path, &written).unwrap();
            std::fs::write(&journal, &undo).unwrap();
            match undo_repair(&path, false, &options(false), &Progress::default()) {
                Ok(_) => {
                    let mut expected = case.bytes.clone();
                    assert!(expected.get(at) == Some(&repaired[at]), "{}: byte {at:#x} is lost", case.name);
                    expected[at] ^= 0x55;
                    assert!(std::fs::read(&path).unwrap() == expected, "{}: byte {at:#x}", case.name);
                    kept += 1;
                }
                Err(error) => {
                    assert_error(&error, ErrorKind::Refused, "written since");
                    assert!(std::fs::read(&path).unwrap() == written, "{}: byte {at:#x}", case.name);
                    refused += 1;
                }
            }
        }
    }
    println!("{refused} refused, {kept} kept");
    assert!(refused > 100 && kept > 100, "{refused} refused, {kept} kept");
}

#[test]
fn what_was_repaired_and_written_since_is_not_taken_back_unasked() {
    let (folder, path) = file_of(&case_named("no trailing footer"));
    assert_error(
        &undo_repair(&path, false, &options(false), &Progress::default()).unwrap_err(),
        ErrorKind::InvalidInput,
        "no undo journal",
    );
    repair(&path, RepairMode::Safe, false, &options(false), &Progress::default()).unwrap();
    support::open(&path, true).write_at(&[1; 512], 3 << 20).unwrap();
    assert_error(
        &undo_repair(&path, false, &options(false), &Progress::default()).unwrap_err(),
        ErrorKind::Refused,
        "written since",
    );
    // A journal of an older version.
    let journal = folder.path().join("disk.vhd.vhd-repair-undo");
    let now = std::fs::read(&journal).unwrap();
    std::fs::write(&journal, [b"vhd-repair-undo 1", &now[17..]].concat()).unwrap();
    assert_error(
        &undo_repair(&path, true, &options(false), &Progress::default()).unwrap_err(),
        ErrorKind::Corrupt,
        "it is of version 1, this program reads 2 and 3",
    );
    std::fs::write(&journal, now).unwrap();
    // A journal of which a byte is wrong puts nothing back.
    let mut bytes = std::fs::read(&journal).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&journal, bytes).unwrap();
    assert_error(
        &undo_repair(&path, true, &options(false), &Progress::default()).unwrap_err(),
        ErrorKind::Corrupt,
        "is no undo journal",
    );
}

/// A repair that was killed is taken back from the journal that its record names, whatever older ones there are; one whose
/// taking back was killed after its record was gone, by the same call.
#[test]
fn a_repair_that_was_killed_is_taken_back_from_its_own_journal() {
    let case = case_named("cut");
    let (folder, path) = file_of(&case);
    repair(&path, RepairMode::All, false, &options(false), &Progress::default()).unwrap();
    let journal = folder.path().join(JOURNAL);
    let kept = std::fs::read(&journal).unwrap();
    let intent = InPlace { uuid: None, work: Work::Repair(JOURNAL.into()) };
    intent::put(&LocalHost, &path, &Intent::InPlace(intent)).unwrap();
    // An older one with a higher number, of another content.
    let older = folder.path().join(format!("{JOURNAL}.3"));
    std::fs::write(&older, b"not this one").unwrap();
    undo_repair(&path, false, &options(false), &Progress::default()).unwrap();
    assert!(std::fs::read(&path).unwrap() == case.bytes);
    assert_eq!(files_of(folder.path()).into_keys().collect::<Vec<_>>(), [path.clone(), older.clone()]);
    std::fs::remove_file(older).unwrap();
    std::fs::write(&journal, kept).unwrap();
    undo_repair(&path, false, &options(false), &Progress::default()).unwrap();
    assert!(std::fs::read(&path).unwrap() == case.bytes);
    assert_eq!(files_of(folder.path()).len(), 1);
}

#[test]
fn qemu_reads_what_was_repaired() {
    let Some(qemu) = QemuImg::find() else { return };
    for name in ["no trailing footer", "both checksums", "header checksum", "duplicate", "cut", "no footers, a header"] {
        let case = case_named(name);
        let (_folder, path) = file_of(&case);
        assert!(repair(&path, RepairMode::All, false, &options(false), &Progress::default()).unwrap().ok(), "{name}");
        let expected = content(&std::fs::read(&path).unwrap(), false).unwrap();
        assert!(qemu.to_raw(&path).unwrap() == expected, "{name}");
    }
}

const JOURNAL: &str = "disk.vhd.vhd-repair-undo";

/// What must hold after a power cut in a repair, or in the one that takes it back: the original or the repaired image, or a
/// refusal that names the command; then the repair can be done, and taken back.
fn judge_cut(folder: &Path, case: &Case, repaired: &[u8], expected: Option<&[u8]>) -> Result<(), String> {
    let path = folder.join("disk.vhd");
    let read = || std::fs::read(&path).map_err(|error| error.to_string());
    let found = read()?;
    let refused = Disk::open(&path, &options(false)).is_err_and(|error| error.to_string().contains("--repair"));
    if expected.is_some_and(|expected| refused || found != expected) {
        return Err("answered, and not done".into());
    }
    if found != case.bytes && found != repaired && !refused {
        return Err("half repaired, and it opens".into());
    }
    if expected != Some(&case.bytes) {
        if found != repaired || refused {
            repair(&path, RepairMode::All, false, &options(false), &Progress::default())
                .map_err(|error| format!("again: {error}"))?;
        }
        if read()? != repaired {
            return Err("repaired otherwise".into());
        }
        undo_repair(&path, false, &options(false), &Progress::default()).map_err(|error| format!("undo: {error}"))?;
    }
    if read()? != case.bytes {
        return Err("the original is lost".into());
    }
    let left: Vec<_> = files_of(folder).into_keys().filter(|left| *left != path).collect();
    if left.is_empty() { Ok(()) } else { Err(format!("left: {left:?}")) }
}

/// What must hold after a power cut while a repair is taken back.
fn judge_cut_of_undo(folder: &Path, case: &Case, repaired: &[u8], done: bool) -> Result<(), String> {
    let path = folder.join("disk.vhd");
    if !done && folder.join(JOURNAL).exists() {
        let copy = files_of(folder);
        undo_repair(&path, false, &options(false), &Progress::default()).map_err(|error| format!("undo again: {error}"))?;
        if std::fs::read(&path).map_err(|error| error.to_string())? != case.bytes || files_of(folder).len() != 1 {
            return Err("undone otherwise".into());
        }
        copy.into_iter().for_each(|(path, bytes)| std::fs::write(path, bytes).unwrap());
    }
    judge_cut(folder, case, repaired, done.then_some(&case.bytes))
}

/// What must hold after a power cut while a repair is taken back although its image was written since: the same call goes on. What
/// lies beside the image can't say that the user allowed it: without force it is refused as before, as long as something of what
/// was written is left.
fn judge_cut_of_forced_undo(folder: &Path, case: &Case, written: &[u8], done: bool) -> Result<(), String> {
    let path = folder.join("disk.vhd");
    let read = || std::fs::read(&path).unwrap();
    if !done && read() != case.bytes {
        let (has_begun, now) = (intent::find(&path).map_err(|error| error.to_string())?.is_some(), read());
        match undo_repair(&path, false, &options(false), &Progress::default()) {
            Err(error) if error.kind() != ErrorKind::Refused || !error.to_string().contains("--force") => {
                return Err(format!("not refused as it should be: {error}"));
            }
            Err(_) if read() != now || (!has_begun && now != written) => return Err("refused, and changed".into()),
            Err(_) => {}
            Ok(_) if !has_begun => return Err("not begun, and done".into()),
            Ok(_) => {}
        }
    }
    if !done && folder.join(JOURNAL).exists() {
        undo_repair(&path, true, &options(false), &Progress::default()).map_err(|error| format!("again: {error}"))?;
    }
    if read() == case.bytes && files_of(folder).len() == 1 { Ok(()) } else { Err("not taken back".into()) }
}

/// A repaired image is written before the repair is taken back.
fn forced_undo(visit: &mut dyn FnMut(&Operation<'_>, &Run<'_>)) {
    let case = case_named("BAT of zeros");
    let (folder, path) = file_of(&case);
    repair(&path, RepairMode::All, false, &options(false), &Progress::default()).unwrap();
    support::open(&path, true).write_at(&[1; 512], 3 << 20).unwrap();
    let written = std::fs::read(&path).unwrap();
    let back = |folder: &Path, chain: &ChainOptions| {
        drop(undo_repair(&folder.join("disk.vhd"), true, chain, &Progress::default()).unwrap())
    };
    let finish =
        |folder: &Path, chain: &ChainOptions| drop(undo_repair(&folder.join("disk.vhd"), true, chain, &Progress::default()));
    let judge = |folder: &Path, done: bool| judge_cut_of_forced_undo(folder, &case, &written, done);
    visit(&Operation::new("undo of a repair, written since", folder, &back, &judge), &finish);
}

/// Calls `visit` with each case, repaired and taken back, and what finishes it.
fn operations(visit: &mut dyn FnMut(&Operation<'_>, &Run<'_>)) {
    for name in ["cut", "BAT of zeros", "no header"] {
        let case = case_named(name);
        let (repaired_folder, path) = file_of(&case);
        let forth = |folder: &Path, chain: &ChainOptions| {
            drop(repair(&folder.join("disk.vhd"), RepairMode::All, false, chain, &Progress::default()).unwrap());
        };
        forth(repaired_folder.path(), &options(false));
        let repaired = std::fs::read(&path).unwrap();
        let judge = |folder: &Path, done: bool| judge_cut(folder, &case, &repaired, done.then_some(&repaired));
        visit(&Operation::new(&format!("repair, {name}"), file_of(&case).0, &forth, &judge), &forth);
        let back = |folder: &Path, chain: &ChainOptions| {
            drop(undo_repair(&folder.join("disk.vhd"), false, chain, &Progress::default()).unwrap())
        };
        // Of what is done already it says so.
        let finish =
            |folder: &Path, chain: &ChainOptions| drop(undo_repair(&folder.join("disk.vhd"), false, chain, &Progress::default()));
        let judge = |folder: &Path, done: bool| judge_cut_of_undo(folder, &case, &repaired, done);
        visit(&Operation::new(&format!("undo of a repair, {name}"), repaired_folder, &back, &judge), &finish);
    }
    forced_undo(visit);
}

#[test]
fn a_power_cut_at_any_point_leaves_the_original_or_the_repaired_image() {
    operations(&mut |operation, _| {
        operation.enumerate(Effort { exhaustive: 4, samples: 4, seed: 1 });
    });
}

#[test]
fn every_barrier_is_needed() {
    let mut barriers = Barriers::default();
    operations(&mut |operation, finish| {
        operation.sabotage_with_finish(&mut barriers, Effort { exhaustive: 4, samples: 4, seed: 1 }, finish);
    });
    barriers.assert("repair");
}
