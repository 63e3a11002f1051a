//! Fuzz target: see `vhd_testkit::fuzz::repair_journal`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhd_testkit::fuzz::repair_journal(data));
