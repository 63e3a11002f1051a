//! Fuzz target: see `vhd_testkit::fuzz::bat_edits`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhd_testkit::fuzz::bat_edits(data));
