//! Fuzz target: see `vhd_testkit::fuzz::chain_resolve`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhd_testkit::fuzz::chain_resolve(data));
