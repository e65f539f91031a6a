//! A file or block device of the host, by sectors.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;

use super::device_error;
use crate::devices::virtio::chain::Buffers;
use crate::error::Result;

/// The unit of capacities and positions, in bytes, whatever the block size (virtio 1.2, 5.2.5).
pub(super) const SECTOR: u64 = 512;

/// The most buffers that `preadv` takes at once (`IOV_MAX`, Linux's `include/uapi/linux/uio.h`).
const MAX_BUFFERS: usize = 1024;

/// Where blocks come from. Reads and writes have their position in the call: the descriptor's own one may be shared
/// with another process.
pub(super) struct Backend {
    file: File,
    read_only: bool,
    capacity: u64,
}

impl Backend {
    pub(super) fn new(mut file: File, read_only: bool) -> Result<Self> {
        // The end of a block device, too, where metadata says zero.
        let size = file
            .seek(SeekFrom::End(0))
            .map_err(|source| device_error("find the size of the backing file", source))?;
        Ok(Self { file, read_only, capacity: size / SECTOR })
    }

    /// In sectors.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Where a request starts, in bytes, if it is of whole sectors and all of them exist.
    pub(super) fn position(&self, sector: u64, length: usize) -> Option<u64> {
        let length = u64::try_from(length).ok()?;
        let end = sector.checked_add(length / SECTOR)?;
        if !length.is_multiple_of(SECTOR) || end > self.capacity {
            return None;
        }
        sector.checked_mul(SECTOR)
    }

    /// Fills the buffers from `position` on.
    pub(super) fn read(&mut self, position: u64, buffers: Buffers<'_>) -> io::Result<()> {
        transfer(buffers, position, |slices, position| self.file.read_vectored_at_volatile(slices, position))
    }

    /// Writes the buffers at `position`.
    pub(super) fn write(&mut self, position: u64, buffers: Buffers<'_>) -> io::Result<()> {
        transfer(buffers, position, |slices, position| self.file.write_vectored_at_volatile(slices, position))
    }

    /// Makes everything written so far last.
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }
}

/// Calls `step` until all of the buffers are done.
fn transfer(
    mut buffers: Buffers<'_>,
    mut position: u64,
    mut step: impl FnMut(&[FileVolatileSlice<'_>], u64) -> io::Result<usize>,
) -> io::Result<()> {
    while !buffers.is_empty() {
        let slices: Vec<_> =
            buffers.slices().take(MAX_BUFFERS).map(FileVolatileSlice::from_volatile_slice).collect();
        let done = match step(&slices, position) {
            // The file became shorter, or the host's disk is full.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => done,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        position += u64::try_from(done).map_err(io::Error::other)?;
        if buffers.split_front(done).is_none() {
            break;
        }
    }
    Ok(())
}
