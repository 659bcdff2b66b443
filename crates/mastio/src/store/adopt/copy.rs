//! The copy that is put aside before the first change, and its way back.
//!
//! The copy holds every private key that the predecessor kept in clear, so it is sealed like them: in chunks, each
//! bound to this copy and to its place in it, the last one marked, so that chunks can be neither exchanged nor cut
//! off. Layout: [`MAGIC`], the length of the header (u32, big endian), the header as JSON, then for each chunk its
//! length (u32) and its bytes. The header names the salt of a passphrase, because a copy is for the day on which
//! the database, where the salt lies otherwise, is lost.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{Context, SHA256};
use zeroize::Zeroizing;

use super::AdoptError;
use crate::entropy::Entropy;
use crate::pki::keys::SealingKey;
use crate::pki::store::hex;

const MAGIC: &[u8] = b"mastio-copy/1\n";
/// Clear bytes in a chunk; the last one may be shorter.
const CHUNK_BYTES: usize = 1024 * 1024;
/// A chunk as sealed: nonce and tag come on top.
const SEALED_CHUNK_BYTES_MAX: usize = CHUNK_BYTES + 64;
const HEADER_BYTES_MAX: usize = 4096;
/// What stands between the database's name and the time in a copy's.
pub(super) const COPY_INFIX: &str = ".before-mastio-";
/// What a copy's name ends with.
pub(super) const COPY_SUFFIX: &str = ".sealed";

/// What stands in clear at the front of a copy.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CopyHeader {
    /// Makes the places of this copy's chunks its own.
    pub copy_id: String,
    /// Where the sealing key comes from: `passphrase` or `file`.
    pub sealing_source: String,
    /// The passphrase's salt, base64; absent where the source is `file`.
    pub sealing_salt: Option<String>,
}

impl CopyHeader {
    fn place(&self, chunk: u64, last: bool) -> String {
        format!("copy/{}/{chunk}/{}", self.copy_id, if last { "last" } else { "more" })
    }
}

/// A file in clear, mode 0600, deleted when dropped.
pub(super) struct ClearCopy(PathBuf);

impl ClearCopy {
    /// Makes an empty file at `path`. What a stopped adoption left there is deleted.
    pub fn create(path: PathBuf) -> Result<Self, AdoptError> {
        remove_stale(&path)?;
        // Made here rather than by SQLite, which would let the umask decide who may read the keys.
        private_file(&path).map_err(|source| AdoptError::copy(&path, source))?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Deletes the file and says so when it cannot.
    pub fn delete(self) -> Result<(), AdoptError> {
        remove_stale(&self.0)
    }
}

impl Drop for ClearCopy {
    fn drop(&mut self) {
        // The error path; [`ClearCopy::delete`] has been here otherwise.
        let _gone = std::fs::remove_file(&self.0);
    }
}

fn private_file(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Deletes a file that may be there.
pub(super) fn remove_stale(path: &Path) -> Result<(), AdoptError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(AdoptError::copy(path, source)),
        _ => Ok(()),
    }
}

/// Seals `clear` into `target` by way of `part`, durable when this returns. Tells the SHA-256 of `target`, lowercase hex.
pub(super) fn seal(
    clear: &Path,
    part: &Path,
    target: &Path,
    sealing: &SealingKey,
    source: (String, Option<String>),
    entropy: &Entropy,
) -> Result<String, AdoptError> {
    // Under another name until it is whole: a file of the final name is a copy that can be relied on.
    let written = |source| AdoptError::copy(part, source);
    let mut reader = File::open(clear).map_err(|source| AdoptError::copy(clear, source))?;
    let (header, mut writer) = Hashing::begin(part, source, entropy)?;
    let read = |reader: &mut File| -> Result<Zeroizing<Vec<u8>>, AdoptError> {
        let mut chunk = Zeroizing::new(Vec::with_capacity(CHUNK_BYTES));
        let limit = u64::try_from(CHUNK_BYTES).unwrap_or(u64::MAX);
        reader.take(limit).read_to_end(&mut chunk).map_err(|source| AdoptError::copy(clear, source))?;
        Ok(chunk)
    };
    let (mut chunk, mut index) = (read(&mut reader)?, 0u64);
    loop {
        let next = read(&mut reader)?;
        let last = next.is_empty();
        let sealed = sealing.seal_bytes(&header.place(index, last), &chunk)?;
        writer.write_block(&sealed).map_err(written)?;
        if last {
            break;
        }
        (chunk, index) = (next, index + 1);
    }
    let sha256 = writer.finish().map_err(written)?;
    std::fs::rename(part, target)
        .and_then(|()| sync_folder(target))
        .map_err(|source| AdoptError::copy(target, source))?;
    Ok(sha256)
}

/// Seals a copy under another key into `target`, durable when this returns. Tells the SHA-256 of `target`, lowercase hex.
///
/// `source` is what the header says of the new key: where it comes from, and its salt. The clear text touches no disk.
/// Errors: those of [`open_copy`].
pub fn reseal_copy(
    copy: &Path,
    target: &Path,
    former: &SealingKey,
    new: &SealingKey,
    source: (String, Option<String>),
    entropy: &Entropy,
) -> Result<String, AdoptError> {
    let written = |source| AdoptError::copy(target, source);
    let mut opened = Opened::begin(copy)?;
    let (header, mut writer) = Hashing::begin(target, source, entropy)?;
    let mut block = opened.block(SEALED_CHUNK_BYTES_MAX)?.ok_or(opened.damaged("no chunk"))?;
    let mut index = 0u64;
    loop {
        let next = opened.block(SEALED_CHUNK_BYTES_MAX)?;
        let last = next.is_none();
        let clear = former.open_bytes(&opened.header.place(index, last), &block)?;
        writer.write_block(&new.seal_bytes(&header.place(index, last), &clear)?).map_err(written)?;
        let Some(next) = next else { break };
        (block, index) = (next, index + 1);
    }
    let sha256 = writer.finish().map_err(written)?;
    sync_folder(target).map_err(written)?;
    Ok(sha256)
}

/// Whether `key` is the one that a copy is sealed under, as its first chunk tells.
#[must_use]
pub fn copy_opens(copy: &Path, key: &SealingKey) -> bool {
    let opens = || -> Result<bool, AdoptError> {
        let mut opened = Opened::begin(copy)?;
        let block = opened.block(SEALED_CHUNK_BYTES_MAX)?.ok_or(opened.damaged("no chunk"))?;
        let last = opened.block(SEALED_CHUNK_BYTES_MAX)?.is_none();
        Ok(key.open_bytes(&opened.header.place(0, last), &block).is_ok())
    };
    opens().unwrap_or(false)
}

/// The sealed copies beside a database, the oldest first.
pub fn copies(database: &Path) -> Result<Vec<PathBuf>, AdoptError> {
    let folder = database.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let begin = format!("{}{COPY_INFIX}", database.file_name().unwrap_or_default().to_string_lossy());
    let unreadable = |source| AdoptError::copy(folder, source);
    let mut copies = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&begin) && name.ends_with(COPY_SUFFIX) {
            copies.push(entry.path());
        }
    }
    copies.sort();
    Ok(copies)
}

/// Makes a name in the folder of `path` durable.
pub(super) fn sync_folder(path: &Path) -> std::io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

struct Hashing {
    file: BufWriter<File>,
    hash: Context,
}

impl Hashing {
    /// Begins a copy at `path`, in place of what lies there, with a header of its own.
    fn begin(
        path: &Path,
        source: (String, Option<String>),
        entropy: &Entropy,
    ) -> Result<(CopyHeader, Self), AdoptError> {
        remove_stale(path)?;
        let written = |source| AdoptError::copy(path, source);
        let header =
            CopyHeader { copy_id: entropy.text::<16>(), sealing_source: source.0, sealing_salt: source.1 };
        let header_json = serde_json::to_vec(&header).map_err(|error| written(error.into()))?;
        let file = BufWriter::new(private_file(path).map_err(written)?);
        let mut writer = Self { file, hash: Context::new(&SHA256) };
        writer.write(MAGIC).and_then(|()| writer.write_block(&header_json)).map_err(written)?;
        Ok((header, writer))
    }

    /// Makes everything durable, and tells its SHA-256, lowercase hex.
    fn finish(self) -> std::io::Result<String> {
        let file = self.file.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        file.sync_all()?;
        Ok(hex(self.hash.finish().as_ref()))
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.hash.update(bytes);
        self.file.write_all(bytes)
    }

    fn write_block(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let length = u32::try_from(bytes.len()).map_err(std::io::Error::other)?;
        self.write(&length.to_be_bytes())?;
        self.write(bytes)
    }
}

/// Reads what stands at the front of a copy: which key opens it.
pub fn copy_header(copy: &Path) -> Result<CopyHeader, AdoptError> {
    Ok(Opened::begin(copy)?.header)
}

/// Restores a copy into a new file, mode 0600, durable when this returns.
///
/// Errors: [`AdoptError::CopyDamaged`] or a [`crate::pki::keys::KeyError`]; then there is no `target`. An existing
/// `target` is never overwritten.
pub async fn open_copy(copy: &Path, sealing: &SealingKey, target: &Path) -> Result<(), AdoptError> {
    let mut opened = Opened::begin(copy)?;
    let mut file = private_file(target).map_err(|source| AdoptError::copy(target, source))?;
    let restored = async {
        let mut index = 0u64;
        let mut block = opened.block(SEALED_CHUNK_BYTES_MAX)?.ok_or(opened.damaged("no chunk"))?;
        loop {
            let next = opened.block(SEALED_CHUNK_BYTES_MAX)?;
            let clear = sealing.open_bytes(&opened.header.place(index, next.is_none()), &block)?;
            file.write_all(&clear).map_err(|source| AdoptError::copy(target, source))?;
            let Some(next) = next else { break };
            (block, index) = (next, index + 1);
            // A chunk costs a millisecond or two; others may run in between.
            tokio::task::yield_now().await;
        }
        file.sync_all().and_then(|()| sync_folder(target)).map_err(|source| AdoptError::copy(target, source))
    }
    .await;
    if restored.is_err() {
        remove_stale(target)?;
    }
    restored
}

struct Opened {
    reader: BufReader<File>,
    header: CopyHeader,
    path: PathBuf,
}

impl Opened {
    fn begin(path: &Path) -> Result<Self, AdoptError> {
        let file = File::open(path).map_err(|source| AdoptError::copy(path, source))?;
        let header = CopyHeader { copy_id: String::new(), sealing_source: String::new(), sealing_salt: None };
        let mut opened = Self { reader: BufReader::new(file), header, path: path.to_owned() };
        let mut magic = [0u8; MAGIC.len()];
        let read = opened.reader.read_exact(&mut magic);
        if read.is_err() || magic != MAGIC {
            return Err(opened.damaged("it begins otherwise"));
        }
        let header = opened.block(HEADER_BYTES_MAX)?.ok_or(opened.damaged("no header"))?;
        opened.header =
            serde_json::from_slice(&header).map_err(|_| opened.damaged("its header is unreadable"))?;
        Ok(opened)
    }

    /// The next block; absent at the end of the file.
    fn block(&mut self, bytes_max: usize) -> Result<Option<Vec<u8>>, AdoptError> {
        let mut length = [0u8; 4];
        let mut filled = 0;
        while let Some(rest) = length.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.reader.read(rest).map_err(|source| AdoptError::copy(&self.path, source))? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(self.damaged("it is cut off")),
                read => filled += read,
            }
        }
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if length > bytes_max {
            return Err(self.damaged("a chunk is too long"));
        }
        let mut block = vec![0u8; length];
        self.reader.read_exact(&mut block).map_err(|_| self.damaged("it is cut off"))?;
        Ok(Some(block))
    }

    fn damaged(&self, why: &'static str) -> AdoptError {
        AdoptError::CopyDamaged { path: self.path.clone(), why }
    }
}
