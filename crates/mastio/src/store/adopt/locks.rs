//! The predecessor's lock files: one for each of its tasks, `<db>.<task>.lock`, held with flock while it lives.

use std::fs::{File, TryLockError};
use std::path::Path;

use super::AdoptError;

/// The predecessor's locks, held by us so that it cannot start in the middle. Dropping lets them go.
#[derive(Debug)]
pub(super) struct Held {
    _files: Vec<File>,
}

/// Takes every lock file that lies beside the database. None is made or deleted.
///
/// Errors: [`AdoptError::PythonRunning`] when one is held by somebody else.
pub(super) fn take(database: &Path) -> Result<Held, AdoptError> {
    let folder = match database.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let unknown = |lock: &Path| {
        let lock = lock.to_owned();
        move |source| AdoptError::Lock { lock, source }
    };
    let prefix = format!("{}.", database.file_name().unwrap_or_default().to_string_lossy());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unknown(folder))? {
        let path = entry.map_err(unknown(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.starts_with(&prefix) || !name.ends_with(".lock") {
            continue;
        }
        let file = File::open(&path).map_err(unknown(&path))?;
        match file.try_lock() {
            Ok(()) => files.push(file),
            Err(TryLockError::WouldBlock) => return Err(AdoptError::PythonRunning { lock: path }),
            Err(TryLockError::Error(source)) => return Err(unknown(&path)(source)),
        }
    }
    Ok(Held { _files: files })
}
