//! The binary: everything is in the library beside it, which tests and benchmarks call too.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    mastio::cli::run()
}
