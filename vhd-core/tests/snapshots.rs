//! Goal: a power cut around snapshots of disks in use loses nothing that was answered, and a frozen image stays what it was.
//!
//! Method: two disks are written, flushed and given new leaves together, then one alone; all files, names and folders are
//! recorded, with what the client was told. In each state that a power cut may leave, the last leaf that is there reads what
//! promises P1 and P2 permit; an image that was frozen reads what it held at that instant, and is whole for other tools; a
//! leaf that the client was told of is there. Then the leaf is opened for writing and gets a snapshot.
//! It would fail if a leaf got its name before the old one was durable, or were written before its name was.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod support;

use std::path::Path;
use std::sync::Arc;

use vhd_core::Disk;
use vhd_core::chain::{Chain, ChainOptions, create_child};
use vhd_core::format::Footer;
use vhd_core::live::{LiveDisk, NewLeaf, snapshot_all};
use vhd_testkit::crash::{CrashState, Effort};
use vhd_testkit::fixture::{BlockFill, FixtureSpec, Kind, Layout};
use vhd_testkit::folder::RecordingHost;
use vhd_testkit::history::History;
use vhd_testkit::record::Journal;
use vhd_testkit::tagged::Tag;

use self::support::sabotage::Barriers;
use self::support::{child_options, open, options, read_all};

const SECTORS: u64 = 96;
/// The leaves that each disk gets, the first together.
const LEAVES: [&[&str]; 2] = [&["a.vhd", "a1.vhd", "a2.vhd"], &["b/b.vhd", "b/b1.vhd"]];

/// One disk of the test, and what it may read.
struct Client {
    live: LiveDisk,
    history: History,
    /// What each leaf but the last held when it was frozen, and from which event on that is certain.
    frozen: Vec<(usize, Vec<u8>)>,
}

impl Client {
    fn open(path: &Path, chain: &ChainOptions) -> Self {
        let live = LiveDisk::open(path, chain).unwrap();
        let history = History::of(&read_all(&live.disk()));
        Self { live, history, frozen: Vec::new() }
    }

    /// Writes two sectors over others and to absent ones, and one to a new block.
    fn write(&mut self, journal: &Journal, image: u32, write: u64) {
        let places = [(write, 2), (write * 11 % 60, 1)];
        let content = |lba| Tag { image, lba, write }.sector();
        let begun = journal.mark(1);
        for (lba, count) in places {
            let bytes: Vec<u8> = (lba..lba + count).flat_map(content).collect();
            self.live.disk().write_at(&bytes, lba * 512).unwrap();
        }
        let done = journal.mark(1);
        let written = places.into_iter().flat_map(|(lba, count)| lba..lba + count);
        written.for_each(|lba| self.history.wrote(lba, content(lba), begun, Some(done)));
    }

    fn flush(&mut self, journal: &Journal) {
        let begun = journal.mark(2);
        self.live.disk().flush().unwrap();
        self.history.flushed(begun, Some(journal.mark(2)));
    }
}

/// New leaves for these disks, at one instant. What was answered before is durable when they are there.
fn snapshot(clients: &mut [Client], folder: &Path, names: &[&str], journal: &Journal) {
    let begun = journal.mark(3);
    let new = clients.iter().zip(names).map(|(client, name)| NewLeaf {
        disk: &client.live,
        path: folder.join(name),
        options: child_options(),
    });
    snapshot_all(&new.collect::<Vec<_>>()).unwrap();
    let done = journal.mark(3);
    for client in clients {
        client.history.flushed(begun, Some(done));
        client.frozen.push((done, read_all(&client.live.disk())));
    }
}

/// Two disks in two folders. One is full, so that closing it cuts nothing, and has no identifier yet, so that it gets one.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    std::fs::create_dir(folder.path().join("b")).unwrap();
    for (name, uuid, blocks) in [("a.vhd", [7; 16], 2..3), ("b/b.vhd", [0; 16], 0..12)] {
        let spec = FixtureSpec::new(Kind::Dynamic, Layout::Windows8, SECTORS * 512);
        let spec = FixtureSpec { uuid, block_size: 4096, ..spec };
        let spec = blocks.fold(spec, |spec, block| spec.block(block, BlockFill::tags(1, 1)));
        spec.write_to(&folder.path().join(name)).unwrap();
    }
    folder
}

/// What the clients do, recorded.
fn record(folder: &Path, journal: &Journal) -> (Arc<RecordingHost>, Vec<Client>) {
    let host = Arc::new(RecordingHost::new(folder, journal));
    let chain = ChainOptions { host: Arc::clone(&host) as _, ..options(true) };
    let mut clients: Vec<_> = LEAVES.iter().map(|names| Client::open(&folder.join(names[0]), &chain)).collect();
    drop(chain);
    let each = |clients: &mut [Client], write: u64, flush: bool| {
        for (image, client) in (10..).zip(clients) {
            client.write(journal, image, write);
            if flush {
                client.flush(journal);
            }
        }
    };
    each(&mut clients, 1, true);
    each(&mut clients, 2, false);
    snapshot(&mut clients, folder, &["a1.vhd", "b/b1.vhd"], journal);
    each(&mut clients, 3, true);
    each(&mut clients[..1], 4, false);
    snapshot(&mut clients[..1], folder, &["a2.vhd"], journal);
    each(&mut clients[..1], 5, true);
    (host, clients)
}

/// What must hold of one disk after a power cut.
fn judge(client: &Client, names: &[&str], cut: usize, folder: &Path) -> Result<(), String> {
    let path = |leaf: usize| folder.join(names[leaf]);
    let read = |leaf: usize| -> Result<Vec<u8>, String> {
        let disk = Disk::open(&path(leaf), &options(false)).map_err(|error| error.to_string())?;
        let mut bytes = vec![0; disk.size() as usize];
        disk.read_at(&mut bytes, 0).map_err(|error| error.to_string())?;
        Ok(bytes)
    };
    let told = client.frozen.iter().filter(|(done, _)| *done < cut).count();
    for (leaf, (_, content)) in client.frozen[..told].iter().enumerate() {
        vhd_testkit::tagged::compare(&read(leaf)?, content, 0).map_err(|error| format!("frozen {}: {error}", names[leaf]))?;
        let image = std::fs::read(path(leaf)).map_err(|error| error.to_string())?;
        Footer::parse(image.last_chunk().ok_or("empty")?).map_err(|error| format!("frozen {}: {error}", names[leaf]))?;
    }
    let last = (0..names.len()).rev().find(|leaf| path(*leaf).exists()).ok_or("no image is left")?;
    if last < told {
        return Err(format!("{} was made and is gone", names[told]));
    }
    // One that was not told of shows the same as the one below.
    for (leaf, name) in names.iter().enumerate().take(last + 1).skip(told) {
        client.history.judge_disk(&read(leaf)?, cut).map_err(|error| format!("{name}: {error}"))?;
    }
    let before = read(last)?;
    Disk::open(&path(last), &options(true)).map_err(|error| format!("for writing: {error}"))?;
    let again = path(last).with_file_name("again.vhd");
    create_child(&again, &path(last), &child_options(), &options(false)).map_err(|error| format!("snapshot: {error}"))?;
    let after = read_all(&open(&again, false));
    let chain = Chain::open(&again, &options(false)).map_err(|error| error.to_string())?;
    if after == before && chain.layers().len() == last + 2 { Ok(()) } else { Err("its snapshot reads something else".into()) }
}

fn judge_all(host: &RecordingHost, clients: &[Client], effort: Effort) -> Result<usize, String> {
    let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
    host.crash_states(effort, &mut |state: &CrashState| {
        state.put_into(scratch.path());
        let mut disks = clients.iter().zip(LEAVES);
        disks.try_for_each(|(client, names)| judge(client, names, state.cut, scratch.path()))
    })
}

#[test]
fn a_power_cut_around_snapshots_of_two_disks_loses_nothing_that_was_answered() {
    let folder = folder();
    let journal = Journal::new();
    let (host, clients) = record(folder.path(), &journal);
    let states = judge_all(&host, &clients, Effort { exhaustive: 3, samples: 3, seed: 1 });
    println!("crash states, snapshots: {}", states.unwrap());
}

#[test]
fn every_barrier_is_needed() {
    let journal = Journal::naming_barriers();
    let whole = folder();
    let recorded = record(whole.path(), &journal);
    let places = journal.places();
    drop(recorded);
    let mut barriers = Barriers::default();
    barriers.note("two disks", places, &[], &mut |barrier| {
        let folder = folder();
        let (host, clients) = record(folder.path(), &Journal::without_barrier(barrier));
        judge_all(&host, &clients, Effort { exhaustive: 2, samples: 1, seed: 1 }).is_err()
    });
    barriers.assert("snapshots");
}
