//! Points at which a test kills the process, as a power cut would. Compiled to nothing without `crash-points`.

/// Dies here if the environment names this point in `MASTIO_CRASH_AT`.
#[cfg(feature = "crash-points")]
pub(super) fn crash_point(name: &str) {
    if std::env::var("MASTIO_CRASH_AT").is_ok_and(|at| at == name) {
        std::process::abort();
    }
}

/// The broken migration that the environment adds to the registry, for the test of the contract test.
#[cfg(feature = "crash-points")]
pub(super) fn broken_migration() -> Option<String> {
    std::env::var("MASTIO_BROKEN_MIGRATION").ok()
}

/// Nothing.
#[cfg(not(feature = "crash-points"))]
pub(super) fn crash_point(_name: &str) {}
