//! Fuzz target: see `vhd_testkit::fuzz::open_image`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhd_testkit::fuzz::open_image(data));
