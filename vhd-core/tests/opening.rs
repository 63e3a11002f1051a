//! Goal: opening for writing mends what others need, and a power cut meanwhile leaves what was read.
//!
//! Method: images with each thing that opening mends, and with two at once, are opened in a recorded folder; in each state
//! that a power cut may leave the image reads as before, and once it was answered both footers are there, equal and durable.
//! It would fail if one footer were touched while nothing else led to the content, or if what was mended were not durable.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::path::Path;

use vhd_core::Disk;
use vhd_core::chain::ChainOptions;
use vhd_core::format::Footer;
use vhd_testkit::crash::Effort;
use vhd_testkit::fixture::{BlockFill, FixtureSpec, Kind, Layout, Trailing};

use self::support::sabotage::{Barriers, Operation};
use self::support::{open, options, read_all};

const SIZE: u64 = 20 * 4096;

fn spec(kind: Kind, layout: Layout) -> FixtureSpec {
    let spec = FixtureSpec { block_size: 4096, ..FixtureSpec::new(kind, layout, SIZE) };
    if kind == Kind::Fixed { spec } else { spec.block(3, BlockFill::tags(1, 1)).block(7, BlockFill::tags(1, 1)) }
}

/// An image for each thing that is mended.
fn cases() -> Vec<(&'static str, Vec<u8>)> {
    let dynamic = || spec(Kind::Dynamic, Layout::Classic).to_bytes().0;
    let with = |mut image: Vec<u8>, change: &dyn Fn(&mut Vec<u8>)| {
        change(&mut image);
        image
    };
    let short = |kind| FixtureSpec { trailing: Trailing::Short511, ..spec(kind, Layout::Classic) }.to_bytes().0;
    let no_trailing = |image: &mut Vec<u8>| {
        let len = image.len();
        image[len - 512..].fill(0);
    };
    let no_copy = |image: &mut Vec<u8>| image[..8].fill(0);
    // Old tapdisks leave the byte that hides a disk out of the checksum.
    let hidden = |kind| FixtureSpec { hidden: 1, hidden_unsummed: true, ..spec(kind, Layout::Classic) }.to_bytes().0;
    vec![
        ("no trailing footer", with(dynamic(), &no_trailing)),
        ("a damaged copy", with(dynamic(), &no_copy)),
        ("tapdisk's batmap", spec(Kind::Dynamic, Layout::Tapdisk).to_bytes().0),
        ("a hidden disk", hidden(Kind::Dynamic)),
        ("a hidden disk with a damaged copy", with(hidden(Kind::Dynamic), &no_copy)),
        ("a short footer", short(Kind::Dynamic)),
        ("a short footer and a damaged copy", with(short(Kind::Dynamic), &no_copy)),
        ("a fixed disk with a short footer", short(Kind::Fixed)),
        ("a hidden fixed disk", hidden(Kind::Fixed)),
    ]
}

/// What must hold after a power cut, and of the image once it was opened again.
fn judge(folder: &Path, content: &[u8], done: bool) -> Result<(), String> {
    let path = folder.join("disk.vhd");
    let read = |what: &str, writable: bool| {
        let disk = Disk::open(&path, &options(writable)).map_err(|error| format!("{what}: {error}"))?;
        let mut found = vec![0; disk.size() as usize];
        disk.read_at(&mut found, 0).map_err(|error| format!("{what}: {error}"))?;
        if found == content { Ok(()) } else { Err(format!("{what}: reads something else")) }
    };
    let is_mended = || {
        let image = std::fs::read(&path).unwrap();
        let footer = Footer::parse(image.last_chunk().unwrap());
        footer.is_ok_and(|footer| footer.header_offset().is_none() || image[..512] == image[image.len() - 512..])
    };
    if done && !is_mended() {
        return Err("answered, and not mended".into());
    }
    read("after the cut", false)?;
    read("opened for writing", true)?;
    if is_mended() { Ok(()) } else { Err("opened for writing, and not mended".into()) }
}

/// Calls `visit` with each case.
fn operations(visit: &mut dyn FnMut(&Operation<'_>)) {
    for (name, image) in cases() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("disk.vhd");
        std::fs::write(&path, image).unwrap();
        let content = read_all(&open(&path, false));
        let run = |folder: &Path, chain: &ChainOptions| {
            let mut writable = options(true);
            writable.host = std::sync::Arc::clone(&chain.host);
            drop(Disk::open(&folder.join("disk.vhd"), &writable).unwrap());
        };
        let judge = |folder: &Path, done: bool| judge(folder, &content, done);
        visit(&Operation::new(name, folder, &run, &judge));
    }
}

#[test]
fn a_power_cut_while_an_image_is_mended_leaves_what_was_read() {
    operations(&mut |operation| {
        operation.enumerate(Effort { exhaustive: 8, samples: 20, seed: 1 });
    });
}

#[test]
fn every_barrier_is_needed() {
    let mut barriers = Barriers::default();
    operations(&mut |operation| {
        operation.sabotage(&mut barriers, Effort { exhaustive: 8, samples: 20, seed: 1 });
    });
    barriers.assert("opening");
}
