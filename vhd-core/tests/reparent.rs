//! Goal: an image leads to its old parent or to its new one at every point, whatever room its locators have.
//!
//! Method: children of this project and of the test kit, with locators of every size, are given a parent in another
//! folder; each state that a power cut may leave is opened. What others read of the locators is read back.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vhd_core::chain::{Chain, ChainOptions, ParentPolicy, read_locators};
use vhd_core::image::NewKind;
use vhd_core::ops::check::{CheckOptions, Finding, Severity, check};
use vhd_core::ops::reparent::{find_parent, reparent};
use vhd_core::storage::FileStorage;
use vhd_core::{Disk, ErrorKind};
use vhd_testkit::crash::Effort;
use vhd_testkit::fixture::{BlockFill, FixtureSpec, Kind, Layout, Locator, Parent};
use vhd_testkit::tools::VhdiMount;

use self::support::sabotage::{Barriers, Operation};
use self::support::{new_child, new_image, open, options, read_all};

const LONG: &str = "a folder with a name that is long enough for its path not to fit where the old one was, however it is encoded, \
                    which takes more than two hundred and fifty letters as UTF-16 has two bytes for each and a sector has 512 of \
                    them and now it is";

/// A folder with two parents of different content and a child of the first.
struct Folder {
    folder: TempDir,
    other: PathBuf,
}

impl Folder {
    fn new(spec: Option<&FixtureSpec>, other: &str) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = |name: &str| folder.path().join(name);
        let other = path(other);
        fs::create_dir_all(other.parent().unwrap()).unwrap();
        for (parent, byte) in [(&path("base.vhd"), 1), (&other, 2)] {
            match spec {
                None => new_image(parent, NewKind::Dynamic, 64 << 10, 4096),
                Some(_) => {
                    let uuid = if byte == 1 { *b"uuid-of-a-parent" } else { *b"uuid-of-a-second" };
                    let spec =
                        FixtureSpec { uuid, block_size: 4096, ..FixtureSpec::new(Kind::Dynamic, Layout::Classic, 64 << 10) };
                    spec.write_to(parent).unwrap();
                }
            }
            open(parent, true).write_at(&[byte; 4096], 0).unwrap();
        }
        match spec {
            None => new_child(&path("child.vhd"), &path("base.vhd")),
            Some(spec) => drop(spec.write_to(&path("child.vhd")).unwrap()),
        }
        open(&path("child.vhd"), true).write_at(&[3; 512], 4096).unwrap();
        Self { folder, other }
    }

    fn child(&self) -> PathBuf {
        self.folder.path().join("child.vhd")
    }
}

/// The first byte of the parent that the child shows.
fn shown(child: &Path) -> Result<u8, String> {
    let disk = Disk::open(child, &options(false)).map_err(|error| error.to_string())?;
    let bytes = read_all(&disk);
    if bytes[4096..4608] != [3; 512] {
        return Err("the child's own data is gone".into());
    }
    Ok(bytes[0])
}

fn specs() -> Vec<Option<FixtureSpec>> {
    let with = |locators: &[Locator], layout| {
        let mut parent = Parent::named(*b"uuid-of-a-parent", "base.vhd");
        parent.locators.extend_from_slice(locators);
        let spec = FixtureSpec::new(Kind::Differencing, layout, 64 << 10);
        Some(
            FixtureSpec { uuid: *b"uuid-of-the-leaf", parent: Some(parent), block_size: 4096, ..spec }
                .block(3, BlockFill::tags(2, 1)),
        )
    };
    vec![
        None,
        with(&[Locator::w2ru(".\\base.vhd"), Locator::w2ku("C:\\base.vhd")], Layout::WindowsDiff),
        with(&[Locator::macx("file://./base.vhd"), Locator::mac(&[7; 40])], Layout::Classic),
        with(&[], Layout::Classic),
    ]
}

/// What must hold after a power cut: the old parent or the new, and the new one once told so again.
fn judge(folder: &Path, other: &str, done: bool) -> Result<(), String> {
    let child = folder.join("child.vhd");
    match shown(&child)? {
        1 if !done => {}
        2 => {}
        found => return Err(format!("shows {found}")),
    }
    reparent(&child, &folder.join(other), true, false, &options(false)).map_err(|error| format!("again: {error}"))?;
    match shown(&child)? {
        2 => Ok(()),
        found => Err(format!("again, and it shows {found}")),
    }
}

/// Calls `visit` with locators of every size, in a folder near and far.
fn operations(visit: &mut dyn FnMut(&Operation<'_>)) {
    for other in ["other.vhd", &format!("{LONG}/other.vhd")] {
        for (number, spec) in specs().into_iter().enumerate() {
            let Folder { folder, .. } = Folder::new(spec.as_ref(), other);
            let run = |folder: &Path, chain: &ChainOptions| {
                drop(reparent(&folder.join("child.vhd"), &folder.join(other), true, false, chain).unwrap());
            };
            let judge = |folder: &Path, done: bool| judge(folder, other, done);
            let name = format!("reparent, child {number}, a path of {} letters", other.len());
            visit(&Operation::new(&name, folder, &run, &judge));
        }
    }
}

#[test]
fn a_power_cut_leads_to_the_old_or_the_new_parent() {
    operations(&mut |operation| {
        operation.enumerate(Effort::default());
    });
}

#[test]
fn every_barrier_is_needed() {
    let mut barriers = Barriers::default();
    operations(&mut |operation| {
        operation.sabotage(&mut barriers, Effort::default());
    });
    barriers.assert("reparent");
}

#[test]
fn all_locators_lead_to_the_new_parent_and_others_stay() {
    for spec in specs() {
        let it = Folder::new(spec.as_ref(), "sub/other ü.vhd");
        let before = fs::read(it.child()).unwrap();
        let told = reparent(&it.child(), &it.other, true, true, &options(false)).unwrap();
        assert!(fs::read(it.child()).unwrap() == before, "a dry run writes nothing");
        assert_eq!(reparent(&it.child(), &it.other, true, false, &options(false)).unwrap(), told);
        let image = Chain::open_image(&it.child(), &options(false)).unwrap();
        let paths: Vec<_> =
            read_locators(&**image.storage(), image.header().unwrap()).unwrap().into_iter().map(|locator| locator.path).collect();
        let absolute = it.other.canonicalize().unwrap().to_str().unwrap().replace('/', "\\");
        let expected = [absolute, ".\\sub\\other ü.vhd".into(), "file://./sub/other ü.vhd".into()].map(Some);
        assert_eq!(paths[..3], expected);
        assert!(told.locators.iter().map(|(_, path)| Some(path.clone())).eq(expected));
        let opaque = spec.is_some_and(|spec| spec.parent.unwrap().locators.iter().any(|locator| locator.code == *b"Mac "));
        assert_eq!(paths.len(), if opaque { 4 } else { 3 });
        let options = CheckOptions { parents: Some(&ParentPolicy::default()), ..CheckOptions::default() };
        let report = check(&FileStorage::open(&it.child(), false).unwrap(), &it.child(), &options).unwrap();
        // Locators that found no room where the old ones were leave those behind.
        let is_bad = |finding: &&Finding| finding.severity > Severity::Note && finding.code.name() != "leaked-space";
        assert_eq!(report.findings.iter().find(is_bad), None);
        assert_eq!(shown(&it.child()), Ok(2));
    }
}

#[test]
fn libvhdi_finds_the_new_parent() {
    let Some(libvhdi) = VhdiMount::find() else { return };
    let it = Folder::new(None, "other.vhd");
    reparent(&it.child(), &it.other, true, false, &options(false)).unwrap();
    assert!(libvhdi.to_raw(&it.child()).is_ok());
}

#[test]
fn what_can_not_be_a_parent_is_refused_and_the_child_is_as_it_was() {
    let it = Folder::new(None, "other.vhd");
    let before = support::files_of(it.folder.path());
    let grandchild = it.folder.path().join("grandchild.vhd");
    new_child(&grandchild, &it.child());
    let large = it.folder.path().join("large.vhd");
    new_image(&large, NewKind::Dynamic, 128 << 10, 4096);
    let refused = |parent: &Path, force: bool| reparent(&it.child(), parent, force, false, &options(false)).unwrap_err();
    let error = refused(&it.other, false);
    assert_eq!(error.kind(), ErrorKind::Parent);
    assert!(error.to_string().contains("UUID"), "{error}");
    assert!(refused(&it.child(), true).to_string().contains("the child itself"));
    assert!(refused(&grandchild, true).to_string().contains("loop") || refused(&grandchild, true).kind() == ErrorKind::Locked);
    assert_eq!(refused(&large, false).kind(), ErrorKind::InvalidInput);
    assert_eq!(refused(&it.folder.path().join("none.vhd"), true).kind(), ErrorKind::NotFound);
    let error = reparent(&it.other, &it.folder.path().join("base.vhd"), true, false, &options(false)).unwrap_err();
    assert!(error.to_string().contains("is a dynamic disk"), "{error}");
    let after = support::files_of(it.folder.path());
    assert!(before.iter().all(|(path, bytes)| after[path] == *bytes));
}

#[test]
fn the_same_parent_elsewhere_needs_no_force() {
    let it = Folder::new(None, "other.vhd");
    let moved = it.folder.path().join("moved");
    fs::create_dir(&moved).unwrap();
    fs::rename(it.folder.path().join("base.vhd"), moved.join("renamed.vhd")).unwrap();
    assert!(shown(&it.child()).is_err());
    let error = find_parent(&it.child(), &options(false)).unwrap_err();
    assert!(error.kind() == ErrorKind::Parent || error.kind() == ErrorKind::NotFound, "{error}");
    let mut chain = options(false);
    chain.parents.parent_dirs = vec![moved.clone()];
    assert_eq!(find_parent(&it.child(), &chain).unwrap(), moved.join("renamed.vhd"));
    reparent(&it.child(), &moved.join("renamed.vhd"), false, false, &options(false)).unwrap();
    assert_eq!(shown(&it.child()), Ok(1));
}
