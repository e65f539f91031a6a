//! What the fs device cannot say without `unsafe`: file I/O straight from and to guest memory, and two types of
//! fuse-backend-rs that have no safe constructor.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use fuse_backend_rs::api::filesystem::OpenOptions;
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;

/// FOPEN_NOFLUSH of `include/uapi/linux/fuse.h`, which fuse-backend-rs does not name.
const FOPEN_NOFLUSH: u32 = 1 << 5;

/// Tells the driver to send no FLUSH when this file is closed.
pub(super) fn no_flush() -> OpenOptions {
    // SAFETY: the type is a plain u32 of which only the bits are read, to be sent to the driver; the function is
    // unsafe merely because it does not check that the bit has a name.
    unsafe { OpenOptions::from_bits_unchecked(FOPEN_NOFLUSH) }
}

/// `fstatvfs`, which also takes a descriptor that was opened with `O_PATH`.
pub(super) fn statvfs(file: BorrowedFd<'_>) -> io::Result<libc::statvfs64> {
    let mut out = MaybeUninit::uninit();
    // SAFETY: the descriptor is open while it is borrowed, and `out` has room for the struct.
    match unsafe { libc::fstatvfs64(file.as_raw_fd(), out.as_mut_ptr()) } {
        // SAFETY: the kernel has filled the struct.
        0 => Ok(unsafe { out.assume_init() }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A file as source or target of data in guest memory, which changes under the reader's eyes and so is never
/// borrowed as a slice: the kernel copies.
pub(super) struct GuestIo<'a> {
    file: BorrowedFd<'a>,
    flags: libc::c_int,
}

impl<'a> GuestIo<'a> {
    /// Reads and writes at the offset that is asked for.
    pub(super) fn new(file: &'a impl AsFd) -> Self {
        Self { file: file.as_fd(), flags: 0 }
    }

    /// Writes at the end of the file, wherever that is by now, if `append`.
    pub(super) fn appending(self, append: bool) -> Self {
        let flags = if append { libc::RWF_APPEND } else { 0 };
        Self { flags, ..self }
    }

    /// What `preadv2` and `pwritev2` take: buffers, how many, and an offset that is not -1, which would mean the
    /// file's own position.
    fn arguments(buffers: &[FileVolatileSlice<'_>], offset: u64) -> io::Result<(Vec<libc::iovec>, i32, i64)> {
        let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
        let vectors: Vec<_> = buffers
            .iter()
            .map(|buffer| libc::iovec { iov_base: buffer.as_ptr().cast(), iov_len: buffer.len() })
            .collect();
        let count = i32::try_from(vectors.len()).map_err(invalid)?;
        Ok((vectors, count, i64::try_from(offset).map_err(invalid)?))
    }
}

impl FileReadWriteVolatile for GuestIo<'_> {
    fn read_volatile(&mut self, _slice: FileVolatileSlice<'_>) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_volatile(&mut self, _slice: FileVolatileSlice<'_>) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_at_volatile(&mut self, slice: FileVolatileSlice<'_>, offset: u64) -> io::Result<usize> {
        self.read_vectored_at_volatile(&[slice], offset)
    }

    fn write_at_volatile(&mut self, slice: FileVolatileSlice<'_>, offset: u64) -> io::Result<usize> {
        self.write_vectored_at_volatile(&[slice], offset)
    }

    fn read_vectored_at_volatile(
        &mut self,
        slices: &[FileVolatileSlice<'_>],
        offset: u64,
    ) -> io::Result<usize> {
        let (vectors, count, offset) = Self::arguments(slices, offset)?;
        // SAFETY: every vector is a slice of guest memory that stays mapped while `slices` is borrowed, and guest
        // memory is written by others at any time, so that nobody relies on what it holds.
        let read = unsafe { libc::preadv2(self.file.as_raw_fd(), vectors.as_ptr(), count, offset, 0) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    fn write_vectored_at_volatile(
        &mut self,
        slices: &[FileVolatileSlice<'_>],
        offset: u64,
    ) -> io::Result<usize> {
        let (vectors, count, offset) = Self::arguments(slices, offset)?;
        // SAFETY: every vector is a slice of guest memory that stays mapped while `slices` is borrowed; the kernel
        // only reads it.
        let written =
            unsafe { libc::pwritev2(self.file.as_raw_fd(), vectors.as_ptr(), count, offset, self.flags) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }
}
