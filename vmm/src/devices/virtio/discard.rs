//! Guest memory that nobody uses any more, back to the host.

#![allow(unsafe_code)]

use std::io;

use vm_memory::{GuestMemory as _, GuestMemoryMmap, VolatileSlice};

/// The unit in which the host has memory, in bytes.
pub(super) const PAGE_SIZE: usize = 4096;

/// Whether there is nothing but whole pages in these bytes of guest memory.
pub(super) fn is_of_whole_pages(bytes: &VolatileSlice<'_>) -> bool {
    // Guest memory is mapped by whole pages, so those of the guest are those of the host.
    let start = bytes.ptr_guard().as_ptr() as usize;
    start.is_multiple_of(PAGE_SIZE) && bytes.len().is_multiple_of(PAGE_SIZE)
}

/// Gives back what lies behind these pages of guest memory. They read afterwards as zero, or where memory is a file's, as that file
/// does: the template from which the machine has gone on.
///
/// # Errors
/// They are no whole pages, are not all in one region of `memory`, or the kernel refuses.
pub(super) fn discard(memory: &GuestMemoryMmap, pages: &VolatileSlice<'_>) -> io::Result<()> {
    let guard = pages.ptr_guard_mut();
    let start = guard.as_ptr() as usize;
    let is_inside = memory.iter().any(|region| {
        let offset = start.checked_sub(region.as_ptr() as usize);
        offset.is_some_and(|offset| offset <= region.size() && pages.len() <= region.size() - offset)
    });
    if !is_inside || !is_of_whole_pages(pages) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the range has whole pages of a live mapping of guest memory. That its content changes is what anybody who reads
    // guest memory has to expect; no Rust reference to it exists anywhere.
    match unsafe { libc::madvise(guard.as_ptr().cast(), pages.len(), libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
