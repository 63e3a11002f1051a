//! Fuzz target: see `vhd_testkit::fuzz::partition_table`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhd_testkit::fuzz::partition_table(data));
