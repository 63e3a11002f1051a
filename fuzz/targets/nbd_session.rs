//! Fuzz target: see `vhd_nbd::fuzz::nbd_session`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhd_nbd::fuzz::nbd_session(data));
