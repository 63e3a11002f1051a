//! Goal: barriers are as few as promise P4 says, and other calls that cost much as few as they can be. Counted, not timed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vhd_core::Disk;
use vhd_core::block::ZeroMode;
use vhd_core::image::OpenOptions;
use vhd_testkit::fixture::{FixtureSpec, Kind, Layout};
use vhd_testkit::record::{Event, Journal, RecordingStorage};

use vhd_testkit::session::setups;
use vhd_testkit::session::{Setup, open, writable};

struct Counted {
    disk: Disk,
    journal: Journal,
}

impl Counted {
    fn new(name: &str, options: &OpenOptions) -> Self {
        let setup: Setup = setups().into_iter().find(|setup| setup.name == name).unwrap();
        let journal = Journal::new();
        let storage = Arc::new(RecordingStorage::new(setup.image.clone(), 0, &journal));
        Self { disk: open(storage, &setup, options).unwrap(), journal }
    }

    /// Barriers of what `action` does.
    fn count(&self, action: impl FnOnce(&Disk)) -> usize {
        let before = self.journal.syncs();
        action(&self.disk);
        self.journal.syncs() - before
    }

    fn flush(&self) -> usize {
        self.count(|disk| disk.flush().unwrap())
    }

    fn write(&self, lba: u64, count: usize) {
        let barriers = self.count(|disk| disk.write_at(&vec![7; count * 512], lba * 512).unwrap());
        assert_eq!(barriers, 0, "a write makes no barrier, and an allocation none either");
    }
}

#[test]
fn a_clean_flush_costs_nothing() {
    for name in ["dynamic", "differencing", "fixed"] {
        let counted = Counted::new(name, &writable());
        assert_eq!(counted.flush(), 0, "{name}");
        counted.write(0, 1);
        counted.flush();
        assert_eq!(counted.flush(), 0, "{name}");
    }
}

#[test]
fn an_overwrite_in_place_costs_one() {
    for name in ["dynamic", "differencing", "fixed"] {
        let counted = Counted::new(name, &writable());
        counted.write(0, 40);
        counted.flush();
        counted.write(3, 1);
        counted.write(30, 2);
        assert_eq!(counted.flush(), 1, "{name}");
    }
}

#[test]
fn new_blocks_cost_two_with_the_growth_and_one_without() {
    let counted = Counted::new("dynamic", &writable());
    counted.write(0, 1);
    assert_eq!(counted.flush(), 2, "the file grew");
    // Fresh space of a dynamic disk reads zero whether the data or the BAT entry arrives first.
    counted.write(40, 40);
    assert_eq!(counted.flush(), 1);
    let counted = Counted::new("differencing", &writable());
    counted.write(0, 1);
    assert_eq!(counted.flush(), 2, "growth, data and bits in two");
    counted.write(40, 40);
    assert_eq!(counted.flush(), 2);
}

/// Blocks of 2 MiB, so that the file grows again and again.
#[test]
fn each_batch_of_growth_costs_at_most_one_more() {
    let spec = FixtureSpec::new(Kind::Dynamic, Layout::Windows8, 80 << 20);
    let setup = Setup { name: "large", image: spec.to_bytes().0, parent: None };
    let journal = Journal::new();
    let storage = Arc::new(RecordingStorage::new(setup.image.clone(), 0, &journal));
    let counted = Counted { disk: open(storage, &setup, &writable()).unwrap(), journal };
    let lengths = || counted.journal.events().iter().filter(|event| matches!(event, Event::SetLen { .. })).count();
    let (mut grown, mut batches) = (lengths(), 0);
    for block in 0..40 {
        counted.write(block * 4096, 1);
        let grew = lengths() - grown;
        grown += grew;
        batches += grew;
        assert_eq!(counted.flush(), 1 + grew, "block {block}");
    }
    assert!((2..=6).contains(&batches), "{batches} batches");
}

#[test]
fn an_absent_range_costs_two() {
    let counted = Counted::new("differencing", &writable());
    counted.write(0, 1);
    counted.flush();
    counted.write(4, 1);
    assert_eq!(counted.flush(), 2);
}

#[test]
fn recycled_space_costs_two() {
    let counted = Counted::new("dynamic", &writable());
    counted.write(0, 80);
    counted.flush();
    counted.disk.zero(0..8 * 512, ZeroMode::Free).unwrap();
    assert_eq!(counted.flush(), 1, "a freed block");
    counted.write(90, 1);
    assert_eq!(counted.flush(), 2, "in its space");
}

#[test]
fn the_background_flush_costs_what_a_flush_costs_and_sleeps_otherwise() {
    let options = OpenOptions { background_flush: Some(Duration::from_millis(50)), ..writable() };
    let counted = Counted::new("differencing", &options);
    let opened = counted.journal.syncs();
    counted.write(0, 1);
    // Nothing but the thread flushes: wait until it did, then a while longer.
    let deadline = Instant::now() + Duration::from_secs(20);
    while counted.journal.syncs() < opened + 2 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(counted.journal.syncs(), opened + 2);
    assert_eq!(counted.flush(), 0, "it is durable already");
    // Overwrites defer no metadata: a killed process loses none of them, so the thread leaves them alone.
    counted.write(0, 1);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(counted.journal.syncs(), opened + 2);
}

#[test]
fn extents_ask_the_host_once_for_one_range_of_data() {
    let counted = Counted::new("dynamic", &writable());
    counted.write(0, 96);
    let before = counted.journal.searches();
    counted.disk.extents_in(0..counted.disk.size()).unwrap();
    assert_eq!(counted.journal.searches() - before, 1, "each search walks to the end of the range: twelve are quadratic");
}
