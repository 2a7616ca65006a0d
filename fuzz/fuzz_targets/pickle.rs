#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| supra_fuzz::pickle(data));
