//! Fuzz target: see `vhd_testkit::fuzz::machine_files`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhd_testkit::fuzz::machine_files(data));
