//! What the tests over real files share.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]
#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod sabotage;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use vhd_core::chain::{ChainOptions, ChildOptions, create_child};
use vhd_core::format::{Creator, Timestamp};
use vhd_core::image::{CreateOptions, NewKind, OpenOptions, create_file};
use vhd_core::{Disk, Error, ErrorKind};

/// Opens as the user's defaults are, but without a background flush: what a test does is all that happens.
pub fn options(writable: bool) -> ChainOptions {
    let image = OpenOptions { writable, background_flush: None, ..OpenOptions::default() };
    ChainOptions { image, ..ChainOptions::default() }
}

pub fn open(path: &Path, writable: bool) -> Disk {
    Disk::open(path, &options(writable)).unwrap()
}

pub fn new_image(path: &Path, kind: NewKind, size: u64, block_size: u32) {
    let uuid = uuid::Uuid::new_v4().into_bytes();
    let create = CreateOptions { kind, size, block_size, uuid, creator: Creator::WINDOWS_10, timestamp: Timestamp(0) };
    create_file(path, &create, false).unwrap();
}

pub fn child_options() -> ChildOptions {
    ChildOptions { timestamp: Timestamp(0), ..ChildOptions::new(uuid::Uuid::new_v4().into_bytes()) }
}

pub fn new_child(path: &Path, parent: &Path) {
    create_child(path, parent, &child_options(), &options(false)).unwrap();
}

pub fn read_all(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0xEE; usize::try_from(disk.size()).unwrap()];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// All regular files of a folder and below, with their content.
pub fn files_of(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            files.extend(files_of(&entry.path()));
        } else if kind.is_file() {
            files.insert(entry.path(), fs::read(entry.path()).unwrap());
        }
    }
    files
}

/// Fails unless opening is refused as it should be: with an error of this kind, one line that names its file and says
/// `says`, and no file of the folder changed.
#[track_caller]
pub fn assert_refused(path: &Path, options: &ChainOptions, kind: ErrorKind, says: &str) {
    let folder = path.parent().unwrap();
    let before = files_of(folder);
    let error = Disk::open(path, options).map(drop).expect_err("should be refused");
    assert_error(&error, kind, says);
    assert!(files_of(folder) == before, "a failed open changed a file");
}

#[track_caller]
pub fn assert_error(error: &Error, kind: ErrorKind, says: &str) {
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    let path = error.path().unwrap_or_else(|| panic!("names no file: {text}"));
    assert!(text.starts_with(&path.display().to_string()), "{text}");
    assert!(!text.chars().any(char::is_control), "{text:?} is not one line");
    assert!(text.contains(says), "{text:?} does not say {says:?}");
}
