//! A saved machine on the disk: a directory with its files, which is what its description says as long as there is one.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::SystemTime;

use crate::Result;
use crate::error::file;

/// The name of the description, which is written last and goes first.
pub(crate) const DESCRIPTION: &str = "description.json";

/// What memory is compared and counted in, in bytes.
pub(crate) const PAGE: usize = 4096;

/// The name of what pods touch of the memory, if that is known.
pub(crate) const WORKING_SET: &str = "working-set";

/// Its files, opened to be read.
#[derive(Debug)]
pub struct Saved {
    /// What the VMM has saved.
    pub state: File,
    /// The guest's memory.
    pub memory: File,
    /// What pods touch of it.
    pub working_set: Option<File>,
}

impl Saved {
    /// Opens those of a directory.
    ///
    /// # Errors
    /// [`crate::Error::File`].
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        let open = |name| {
            let path = directory.join(name);
            File::open(&path).map_err(file("open", path))
        };
        Ok(Self { state: open("state")?, memory: open("memory")?, working_set: open(WORKING_SET).ok() })
    }
}

/// How much of its memory is not empty, in bytes on disk.
pub(crate) fn size(directory: &Path) -> u64 {
    fs::metadata(directory.join("memory")).map_or(0, |metadata| metadata.blocks() * 512)
}

/// Takes one away. Machines that have gone on from it hold its files.
///
/// # Errors
/// [`crate::Error::File`].
pub(crate) fn delete(directory: &Path) -> Result<()> {
    // It is none any more from here on, whatever is left of it.
    match fs::remove_file(directory.join(DESCRIPTION)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file("remove", directory)(error)),
        _ => remove(directory),
    }
}

/// Takes away what somebody who was killed has left, if anything.
///
/// # Errors
/// [`crate::Error::File`].
pub(crate) fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file("remove", directory)(error)),
        _ => Ok(()),
    }
}

/// Writes a description, once everything else is there, and has it on the disk.
///
/// # Errors
/// [`crate::Error::File`].
pub(crate) fn describe(directory: &Path, description: &impl serde::Serialize) -> Result<()> {
    let path = directory.join(DESCRIPTION);
    let text = serde_json::to_vec_pretty(description).map_err(io::Error::from);
    text.and_then(|text| fs::write(&path, text)).map_err(file("write", &path))?;
    sync(&path)?;
    sync(directory)
}

/// Has a file or a directory on the disk before anything that comes after.
///
/// # Errors
/// [`crate::Error::File`].
pub(crate) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|opened| opened.sync_all()).map_err(file("write back", path))
}

/// In seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}
