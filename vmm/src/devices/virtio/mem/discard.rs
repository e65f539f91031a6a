//! Guest memory that nobody uses any more, back to the host.

#![allow(unsafe_code)]

use std::io;

use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryMmap};

/// Gives back what lies behind this range, of whole pages, in bytes. It reads as zero afterwards.
///
/// # Errors
/// It is not all guest memory, or the kernel refuses.
pub(super) fn discard(memory: &GuestMemoryMmap, start: GuestAddress, length: usize) -> io::Result<()> {
    for slice in memory.get_slices(start, length) {
        let slice = slice.map_err(io::Error::other)?;
        let pages = slice.ptr_guard_mut();
        // SAFETY: the range lies in a live mapping of guest memory. That its content changes is what anybody who reads
        // guest memory has to expect; no Rust reference to it exists anywhere.
        if unsafe { libc::madvise(pages.as_ptr().cast(), slice.len(), libc::MADV_DONTNEED) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
