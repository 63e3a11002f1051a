//! Fuzz target: see `vhd_testkit::fuzz::footer_roundtrip`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhd_testkit::fuzz::footer_roundtrip(data));
