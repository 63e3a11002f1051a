//! Fuzz target: see `vhd_testkit::fuzz::disk_ops`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhd_testkit::fuzz::disk_ops(data));
