//! Fuzz target: see `vhd_testkit::fuzz::guest_fs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhd_testkit::fuzz::guest_fs(data));
