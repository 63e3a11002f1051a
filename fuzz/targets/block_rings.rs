//! Fuzz target: see `vhd_testkit::fuzz::block_rings`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhd_testkit::fuzz::block_rings(data));
