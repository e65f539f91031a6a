//! Memory of a restored guest, mapped before the guest touches it: a page that is not costs an exit of the vCPU, and one that is
//! read first and written later costs three.
//!
//! All of it is for speed. Where the kernel cannot do a part (`MADV_POPULATE_WRITE` since Linux 5.14, `KVM_PRE_FAULT_MEMORY` since 6.12),
//! the guest's own touch does it.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
use kvm_ioctls::VcpuFd;
use libc::{MADV_POPULATE_WRITE, MADV_RANDOM, c_int};
use mayu_vmm_api::Pages;
use vm_memory::{Address as _, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion as _, GuestRegionMmap};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use crate::error::{Error, Result};

/// In bytes.
const PAGE: u64 = 4096;

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

/// Pages that the guest is about to touch, and what maps them.
pub struct Prefetch {
    pages: Vec<Pages>,
    vcpu: Option<File>,
}

impl Prefetch {
    /// What one vCPU has mapped, all of them have; it must not run at the same time. Without one, only the pages that the guest writes to
    /// are mapped, and those for the VMM only.
    ///
    /// # Errors
    /// The process has too many descriptors.
    pub fn new(pages: Vec<Pages>, vcpu: Option<&VcpuFd>) -> Result<Self> {
        let duplicate = |vcpu: &VcpuFd| {
            // SAFETY: the descriptor is open for as long as it is borrowed.
            let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
            fd.try_clone_to_owned().map(File::from).map_err(Error::DuplicateVcpu)
        };
        Ok(Self { pages, vcpu: vcpu.map(duplicate).transpose()? })
    }

    /// Maps all of them. Pages that are not there in this machine are left out.
    pub fn run(mut self, memory: &GuestMemoryMmap) {
        for pages in &self.pages {
            let Some(range) = Range::of(pages, memory) else { continue };
            // KVM has the VMM's mapping made where there is none, but never one that can be written to.
            if pages.written && range.advise(MADV_POPULATE_WRITE).is_err() {
                return;
            }
            if let Some(vcpu) = &self.vcpu
                && range.map(vcpu).is_err()
            {
                self.vcpu = None;
            }
        }
    }
}

/// Gives the VMM copies of its own of those pages that the guest is about to write to. To be called before KVM knows the memory, which
/// would be told of each copy.
pub fn copy(pages: &[Pages], memory: &GuestMemoryMmap) {
    let written = pages.iter().filter(|pages| pages.written);
    for range in written.filter_map(|pages| Range::of(pages, memory)) {
        if range.advise(MADV_POPULATE_WRITE).is_err() {
            return;
        }
    }
}

/// Has the kernel read each page of the guest's memory for itself, none ahead: what is in the page cache then is what was touched.
pub fn page_by_page(memory: &GuestMemoryMmap) {
    for region in memory.iter().filter(|region| region.file_offset().is_some()) {
        let range = Range { region, offset: 0, length: region.len() };
        // One that was read ahead is taken for one that was touched, and no more.
        let _ = range.advise(MADV_RANDOM);
    }
}

/// A part of one region of guest memory, in bytes.
struct Range<'a> {
    region: &'a GuestRegionMmap,
    offset: u64,
    length: u64,
}

impl<'a> Range<'a> {
    /// None where they are not all in one region that has a file.
    fn of(pages: &Pages, memory: &'a GuestMemoryMmap) -> Option<Self> {
        let (start, length) = (u64::from(pages.first) * PAGE, u64::from(pages.count) * PAGE);
        memory.iter().find_map(|region| {
            let offset = start.checked_sub(region.file_offset()?.start())?;
            (length > 0 && offset + length <= region.len()).then_some(Self { region, offset, length })
        })
    }

    fn advise(&self, advice: c_int) -> std::io::Result<()> {
        let start = self.region.as_ptr().wrapping_add(self.offset as usize);
        // SAFETY: the range lies in a live mapping of guest memory. None of these kinds of advice changes what is there.
        match unsafe { libc::madvise(start.cast(), self.length as usize, advice) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    fn map(&self, vcpu: &File) -> std::io::Result<()> {
        let mut range = kvm_pre_fault_memory {
            gpa: self.region.start_addr().raw_value() + self.offset,
            size: self.length,
            ..Default::default()
        };
        // SAFETY: the descriptor is a vCPU's, and KVM reads and writes no more than this struct.
        match unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut range) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, map};
    use mayu_vmm_api::MIN_MEMORY_MIB;
    use std::os::unix::fs::FileExt as _;
    use vm_memory::{Bytes as _, GuestAddress};

    const NUMBER: u32 = (MIN_MEMORY_MIB << 20) / 4096;

    fn memory() -> (File, GuestMemoryMmap) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(u64::from(NUMBER) * PAGE).unwrap();
        let memory = map(MIN_MEMORY_MIB, 2 * MIN_MEMORY_MIB, Backing::CopyOf(&file)).unwrap();
        (file, memory)
    }

    fn pages(first: u32, count: u32, written: bool) -> Pages {
        Pages { first, count, written }
    }

    #[test]
    fn a_page_that_is_written_becomes_the_guest_s_own_and_others_stay_the_file_s() {
        let (file, memory) = memory();
        Prefetch::new(vec![pages(3, 2, true), pages(8, 1, false)], None).unwrap().run(&memory);
        file.write_all_at(&[7; 9 * PAGE as usize], 0).unwrap();
        let byte = |page: u64| memory.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap();
        assert_eq!([2, 3, 4, 5, 8].map(byte), [7, 0, 0, 7, 7]);
    }

    #[test]
    fn a_page_that_is_copied_stays_as_it_was_when_its_file_is_written() {
        let (file, memory) = memory();
        copy(&[pages(3, 1, true), pages(5, 1, false), pages(NUMBER, 1, true)], &memory);
        file.write_all_at(&[7; 9 * PAGE as usize], 0).unwrap();
        let byte = |page: u64| memory.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap();
        assert_eq!([2, 3, 4, 5].map(byte), [7, 0, 7, 7]);
    }

    #[test]
    fn what_is_not_in_the_memory_that_was_saved_is_left_out() {
        let (_file, memory) = memory();
        for outside in [
            pages(NUMBER, 1, true),
            pages(NUMBER - 1, 2, true),
            pages(0, 0, true),
            pages(u32::MAX, u32::MAX, true),
        ] {
            assert!(Range::of(&outside, &memory).is_none(), "{outside:?}");
        }
        assert!(Range::of(&pages(NUMBER - 1, 1, false), &memory).is_some());
    }
}
