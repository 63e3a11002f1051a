//! Goal: no failing call of the host loses what was flushed (promise P7), whichever call it is.
//!
//! Method: the k-th call fails, once or for ever, for k = 1, 2, … until a run meets no fault. After each run the
//! file is judged twice: as the next process finds it, and as a power cut leaves it.

use std::path::Path;
use std::sync::Arc;

use vhd_core::block::ZeroMode;
use vhd_core::image::OpenOptions;
use vhd_core::ops::check::{CheckOptions, Severity, check};
use vhd_core::storage::MemoryStorage;
use vhd_core::{Disk, Error, ErrorKind};
use vhd_testkit::fault::{Fault, FaultStorage, Plan};
use vhd_testkit::history::History;
use vhd_testkit::tagged::Tag;

use vhd_testkit::session::setups;
use vhd_testkit::session::{SECTOR, Setup, open, read_all, writable};

/// Calls of the client, in order: each of writes, flushes and discards at least once where it allocates, fills and frees.
const CALLS: [Call; 9] = [
    Call::Write(0, 12),
    Call::Flush,
    Call::Write(4, 2),
    Call::Write(40, 20),
    Call::Flush,
    Call::Discard(0, 16),
    Call::Write(80, 5),
    Call::Flush,
    Call::Write(2, 3),
];

#[derive(Clone, Copy, Debug)]
enum Call {
    Write(u64, u64),
    Discard(u64, u64),
    Flush,
}

struct Client {
    history: History,
    /// A clock in place of journal positions.
    now: usize,
    errors: Vec<Error>,
}

impl Client {
    fn call(&mut self, disk: &Disk, number: u64, call: Call) -> bool {
        let begun = self.now;
        self.now += 2;
        let content = |lba| match call {
            Call::Write(..) => Tag { image: 1, lba, write: number }.sector(),
            _ => [0; SECTOR],
        };
        let (lbas, result) = match call {
            Call::Write(lba, count) => {
                let bytes: Vec<u8> = (lba..lba + count).flat_map(content).collect();
                (lba..lba + count, disk.write_at(&bytes, lba * SECTOR as u64))
            }
            Call::Discard(lba, count) => {
                let range = lba * SECTOR as u64..(lba + count) * SECTOR as u64;
                (lba..lba + count, disk.zero(range, ZeroMode::Free))
            }
            Call::Flush => (0..0, disk.flush()),
        };
        let done = result.is_ok().then_some(begun + 1);
        if matches!(call, Call::Flush) {
            self.history.flushed(begun, done);
        }
        lbas.for_each(|lba| self.history.wrote(lba, content(lba), begun, done));
        self.errors.extend(result.err());
        done.is_some()
    }

    fn judge(&self, setup: &Setup, bytes: Vec<u8>, what: &str) {
        let storage = Arc::new(MemoryStorage::new(bytes));
        let disk = open(Arc::clone(&storage) as _, setup, &OpenOptions::default()).unwrap();
        let found = read_all(&disk).unwrap();
        self.history.judge_disk(&found, usize::MAX).unwrap_or_else(|error| panic!("{what}: {error}"));
        let report = check(&*storage, Path::new("leaf.vhd"), &CheckOptions::default()).unwrap();
        assert!(report.findings.iter().all(|finding| finding.severity < Severity::Error), "{what}: {:?}", report.findings);
        drop(open(storage, setup, &writable()).unwrap());
    }
}

fn start(setup: &Setup, storage: &Arc<FaultStorage>) -> (Result<Disk, Error>, Client) {
    let before = open(Arc::new(MemoryStorage::new(setup.image.clone())), setup, &OpenOptions::default()).unwrap();
    let client = Client { history: History::of(&read_all(&before).unwrap()), now: 0, errors: Vec::new() };
    (open(Arc::clone(storage) as _, setup, &writable()), client)
}

/// Runs with one plan; true when it met a fault.
fn run_with(setup: &Setup, plan: Plan) -> bool {
    let what = format!("{} {plan:?}", setup.name);
    let storage = Arc::new(FaultStorage::new(setup.image.clone(), Some(plan)));
    let (disk, mut client) = start(setup, &storage);
    if let Ok(disk) = disk {
        for (number, call) in CALLS.into_iter().enumerate() {
            // A failed read of metadata changed nothing; a failed write or sync latches.
            let is_read = |error: &Error| error.message().contains("can't be read");
            let latched = client.errors.iter().any(|error| error.kind() == ErrorKind::Io && !is_read(error));
            let done = client.call(&disk, number as u64, call);
            assert!(!(latched && done), "{what}: writes go on after {:?}", client.errors);
        }
        if plan.fault != Fault::Eio {
            // Reads go on whatever happened to writes.
            read_all(&disk).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        let closed = disk.close();
        let begun = client.now;
        client.history.flushed(begun, closed.is_ok().then_some(begun + 1));
        drop(disk);
    }
    for error in &client.errors {
        assert!(error.path().is_some() && !error.message().contains('\n'), "{what}: {error}");
    }
    client.judge(setup, storage.live(), &format!("{what}, the next process"));
    client.judge(setup, storage.durable(), &format!("{what}, after a power cut"));
    storage.failed() > 0
}

fn every_position(fault: Fault) {
    let mut positions = 0;
    for setup in setups() {
        for for_ever in [false, true] {
            for at in 1.. {
                if !run_with(&setup, Plan { fault, at, for_ever }) {
                    break;
                }
                positions += 1;
            }
        }
    }
    println!("fault positions, one image, {fault:?}: {positions}");
}

#[test]
fn an_io_error_anywhere_loses_nothing_flushed() {
    every_position(Fault::Eio);
}

#[test]
fn a_full_disk_anywhere_loses_nothing_flushed() {
    every_position(Fault::Enospc);
    every_position(Fault::EnospcAnywhere);
}

#[test]
fn a_failed_sync_that_drops_writes_loses_nothing_flushed() {
    every_position(Fault::SyncDrops);
}

/// ENOSPC is the writer's: it is not latched, and when there is room again everything works, with nothing lost.
#[test]
fn writing_goes_on_when_space_is_back() {
    for setup in setups() {
        for fault in [Fault::Enospc, Fault::EnospcAnywhere] {
            (1..).take_while(|at| goes_on(&setup, Plan { fault, at: *at, for_ever: true })).for_each(drop);
        }
    }
}

/// Runs into a full disk, makes room, runs again. False when no call failed.
fn goes_on(setup: &Setup, plan: Plan) -> bool {
    let storage = Arc::new(FaultStorage::new(setup.image.clone(), Some(plan)));
    let (disk, mut client) = start(setup, &storage);
    let Ok(disk) = disk else {
        // Opening may write, too: then it says so, and works later.
        storage.heal();
        open(storage, setup, &writable()).unwrap();
        return true;
    };
    CALLS.into_iter().enumerate().for_each(|(number, call)| {
        client.call(&disk, number as u64, call);
    });
    assert!(client.errors.iter().all(|error| error.kind() == ErrorKind::NoSpace), "{:?}", client.errors);
    storage.heal();
    CALLS.into_iter().enumerate().for_each(|(number, call)| {
        assert!(client.call(&disk, 100 + number as u64, call), "{} {plan:?}: {:?}", setup.name, client.errors.last());
    });
    disk.close().unwrap();
    let begun = client.now;
    client.history.flushed(begun, Some(begun + 1));
    drop(disk);
    client.judge(setup, storage.live(), &format!("{} {plan:?}", setup.name));
    client.judge(setup, storage.durable(), &format!("{} {plan:?} after a power cut", setup.name));
    storage.failed() > 0
}
