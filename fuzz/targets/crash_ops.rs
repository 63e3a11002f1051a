//! Fuzz target: see `vhd_testkit::fuzz::crash_ops`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhd_testkit::fuzz::crash_ops(data));
