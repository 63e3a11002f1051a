//! Goal: what a fuzzer once found stays found, and the fuzz target runs wherever the tests do.
//!
//! Method: every file of `fuzz/corpus/nbd_session`, and the same cut and with each of its bytes changed, is given to the
//! target (`vhd_nbd::fuzz`, with what it asserts).
//! It would fail if an input broke its target again, or the target had no corpus.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails here")]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

#[test]
fn nbd_session_holds_on_its_corpus() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/nbd_session");
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 5, "no corpus in {}", folder.display());
    for file in files {
        let bytes = fs::read(&file).unwrap();
        let mut inputs = vec![bytes.clone(), bytes[..bytes.len() * 2 / 3].to_vec()];
        for at in 0..bytes.len().min(400) {
            for bit in [0x01, 0x80] {
                let mut changed = bytes.clone();
                changed[at] ^= bit;
                inputs.push(changed);
            }
        }
        for input in inputs {
            let outcome = catch_unwind(AssertUnwindSafe(|| vhd_nbd::fuzz::nbd_session(&input)));
            assert!(outcome.is_ok(), "nbd_session fails on {}, changed: {input:?}", file.display());
        }
    }
}
