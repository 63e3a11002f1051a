//! A snapshot under load is a moment: the parent that it freezes has all that was answered before, nothing that was asked
//! for after, and of each connection's writes a beginning of their sequence.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vhd_core::Disk;

use super::server::{Server, folder_with_disk};
use super::support::{done, json, wait_until};
use super::wire::*;

/// Pages that each connection writes to, again and again, in several blocks of the disk.
const PAGES: u64 = 40;
const WRITERS: usize = 3;
const PAGE: u64 = 4096;

/// How far the connections are.
#[derive(Default)]
struct Progress {
    asked: [AtomicU64; WRITERS],
    answered: [AtomicU64; WRITERS],
}

fn all(counters: &[AtomicU64; WRITERS]) -> [u64; WRITERS] {
    [0, 1, 2].map(|writer| counters[writer].load(Ordering::SeqCst))
}

fn place(writer: usize, number: u64) -> u64 {
    let page = number % PAGES;
    // Neighbours in time are in different blocks.
    (page % 4 * 4 + writer as u64) * (2 << 20) + page / 4 * PAGE
}

/// A page says which write it is, and what of the other connections was answered when it was asked for.
fn page(writer: usize, number: u64, seen: [u64; WRITERS]) -> Vec<u8> {
    let head = [writer as u64, number].into_iter().chain(seen).flat_map(u64::to_be_bytes).collect::<Vec<u8>>();
    head.iter().copied().cycle().take(PAGE as usize).collect()
}

fn write(server: &Server, writer: usize, progress: &Progress, stop: &AtomicBool) {
    let style = [Style::Simple, Style::Structured, Style::Extended][writer];
    let mut wire = Wire::open(&server.socket(), "", style);
    for number in 1.. {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let data = page(writer, number, all(&progress.answered));
        progress.asked[writer].store(number, Ordering::SeqCst);
        let flags = if number % 5 == 0 { FUA } else { 0 };
        assert_eq!(wire.write_error(flags, place(writer, number), &data), 0);
        progress.answered[writer].store(number, Ordering::SeqCst);
        if number % 7 == 0 {
            assert_eq!(wire.error_of(0, FLUSH, 0, 0), 0);
        }
    }
}

/// What an image by itself says: how many writes of each connection it has. They must be the first ones, all of them.
fn judge(image: &Path, least: [u64; WRITERS], most: [u64; WRITERS]) -> [u64; WRITERS] {
    let disk = Disk::open(image, &Default::default()).unwrap();
    let read = |writer: usize, number: u64| {
        let mut found = vec![0; PAGE as usize];
        disk.read_at(&mut found, place(writer, number)).unwrap();
        found
    };
    let has = [0, 1, 2].map(|writer| (0..PAGES).map(|number| be64(&read(writer, number), 8)).max().unwrap());
    for writer in 0..WRITERS {
        let has_some = has[writer];
        let range = least[writer]..=most[writer];
        assert!(range.contains(&has_some), "connection {writer}: {has_some} writes, {range:?} are possible");
        // Of each page the last write up to there, and whole.
        for number in (1..=has_some).rev().take(PAGES as usize) {
            let found = read(writer, number);
            let seen = [0, 1, 2].map(|other| be64(&found, 16 + 8 * other));
            assert_eq!(found, page(writer, number, seen), "connection {writer}, write {number} of {has_some}");
            // What was answered before this was asked for is there too.
            assert!((0..WRITERS).all(|other| seen[other] <= has[other]), "write {number} saw {seen:?}, there is {has:?}");
        }
    }
    has
}

#[test]
fn a_snapshot_freezes_exactly_what_was_answered() {
    let folder = folder_with_disk("64M");
    let path = folder.path();
    let server = Server::start(path, "disk.vhd");
    let (progress, stop) = (Progress::default(), AtomicBool::new(false));
    let mut frozen = vec![];
    std::thread::scope(|scope| {
        (0..WRITERS).for_each(|writer| {
            let (server, progress, stop) = (&server, &progress, &stop);
            scope.spawn(move || write(server, writer, progress, stop));
        });
        // When anything fails here, they end.
        let _end = StopAtEnd(&stop);
        let mut parent = "disk.vhd".to_owned();
        for number in 1..=6 {
            let before = all(&progress.answered);
            wait_until("writing goes on", || {
                (0..WRITERS).all(|writer| progress.answered[writer].load(Ordering::SeqCst) > before[writer] + 30)
            });
            let least = all(&progress.answered);
            done(path, &format!("ctl ./c snapshot disk s{number}.vhd"));
            let most = all(&progress.asked);
            let has = judge(&path.join(&parent), least, most);
            let report = json(path, &format!("check {parent} --deep"), 0);
            assert_eq!(report["findings"].as_array().unwrap().len(), 0, "{report}");
            frozen.push((parent, has));
            parent = format!("s{number}.vhd");
        }
    });
    let at_the_end = all(&progress.answered);
    server.stop();
    judge(&path.join("s6.vhd"), at_the_end, at_the_end);
    for (parent, has) in frozen {
        assert_eq!(judge(&path.join(&parent), has, has), has, "{parent} changed later");
    }
    done(path, "check s6.vhd --chain --deep");
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
