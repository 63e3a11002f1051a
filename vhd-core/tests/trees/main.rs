//! Goal: whatever is done, in whatever order, to images that are each other's parents, each disk reads what it should.
//!
//! Method: random sequences of everything that changes images (writes, zeroes, children, resizes, merges, compacts,
//! conversions, moved parents, undo sessions) on trees of dynamic, fixed and differencing images from one sector to 2040 GiB,
//! against a model that knows of each sector which write it holds. After each operation the images that it had to do with
//! and all above them open, pass a check, and read as the model says around every change, at block boundaries and at the
//! ends. An operation may be refused only where the model says why. (Every byte of one chain of small images: `tests/model.rs`.)
//! It would fail if any operation lost, misplaced or uncovered a sector of any image, left a file that is not sound, or
//! refused what it can do.
#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

mod changes;
mod joins;
mod model;
mod reading;
mod sectors;
mod subject;
#[path = "../support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use self::subject::{Scale, Subject};

/// Operations of one sequence.
const STEPS: usize = 40;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// `VHD_TREES_RUNS` sequences from `VHD_TREES_SEED` on, or as many as fit in `VHD_TREES_MINUTES`.
fn run(scale: Scale, usual: u64) {
    let first = number("VHD_TREES_SEED", 1);
    let minutes = number("VHD_TREES_MINUTES", 0);
    let runs = number("VHD_TREES_RUNS", if minutes == 0 { usual } else { u64::MAX - first });
    let deadline = Instant::now() + Duration::from_secs(60 * minutes);
    let mut counts = (0, 0, 0);
    for seed in (first..first + runs).take_while(|_| minutes == 0 || Instant::now() < deadline) {
        let mut subject = Subject::new(scale, seed);
        (0..STEPS).for_each(|_| subject.step());
        subject.finish();
        counts = (counts.0 + 1, counts.1 + subject.log.done, counts.2 + subject.log.refused);
    }
    println!("trees, {scale:?}: {} sequences, {} operations done, {} refused", counts.0, counts.1, counts.2);
}

#[test]
fn small_images_read_as_the_model_says() {
    run(Scale::Small, 500);
}

#[test]
fn images_of_all_sizes_read_as_the_model_says() {
    run(Scale::Any, 55);
}
