//! Points at which a test kills the process, as a power cut would, or holds a run to look at it. Compiled to nothing
//! without `crash-points`.

#[cfg(feature = "crash-points")]
use mastio_core::x509::Certificate;

use super::error::UpdateError;
use super::migration::FleetAfter;

/// Dies here if the environment names this point in `MASTIO_CRASH_AT`. Waits here, if it names it in `MASTIO_HOLD_AT`,
/// for as long as the file `MASTIO_HOLD_FILE` exists.
#[cfg(feature = "crash-points")]
pub(crate) fn crash_point(name: &str) {
    if std::env::var("MASTIO_CRASH_AT").is_ok_and(|at| at == name) {
        std::process::abort();
    }
    if std::env::var("MASTIO_HOLD_AT").is_ok_and(|at| at == name)
        && let Ok(file) = std::env::var("MASTIO_HOLD_FILE")
    {
        // The server goes on meanwhile: what waits on this worker is handed to another.
        tokio::task::block_in_place(|| {
            while std::path::Path::new(&file).exists() {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
    }
}

/// What the test has a migration make of an agent's leaf, in the file of the agent's name in `MASTIO_SUBSTITUTES`; what
/// it really made otherwise.
#[cfg(feature = "crash-points")]
pub(super) fn substituted(agent_id: &str, after: FleetAfter) -> Result<FleetAfter, UpdateError> {
    let Ok(folder) = std::env::var("MASTIO_SUBSTITUTES") else { return Ok(after) };
    let Ok(text) = std::fs::read_to_string(std::path::Path::new(&folder).join(agent_id)) else {
        return Ok(after);
    };
    Ok(FleetAfter { leaf: Some(Certificate::from_pem(&text)?), text })
}

/// The broken migration that the environment adds to the registry, for the test of the contract test.
#[cfg(feature = "crash-points")]
pub(super) fn broken_migration() -> Option<String> {
    std::env::var("MASTIO_BROKEN_MIGRATION").ok()
}

/// Nothing.
#[cfg(not(feature = "crash-points"))]
pub(crate) fn crash_point(_name: &str) {}

/// What the migration made.
#[cfg(not(feature = "crash-points"))]
#[expect(clippy::unnecessary_wraps, reason = "the same signature as with the feature")]
pub(super) fn substituted(_agent_id: &str, after: FleetAfter) -> Result<FleetAfter, UpdateError> {
    Ok(after)
}
