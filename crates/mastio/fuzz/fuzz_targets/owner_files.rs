#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    mastio::fuzz::run("owner_files", data);
});
