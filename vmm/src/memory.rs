//! Guest memory.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use libc::{MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE};
use mayu_vmm_api::{MAX_MEMORY_MIB, MIN_MEMORY_MIB};
use vm_memory::mmap::{FromRangesError, MmapRegion};
use vm_memory::{FileOffset, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestRegionMmap};

use crate::arch::layout;
use crate::error::{Error, Result};

/// The unit in which memory is plugged in and out, in bytes: what the page tables of guest and host map at once.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// A range of guest physical addresses in which memory is plugged in and out while the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pluggable {
    /// Its first address.
    pub start: GuestAddress,
    /// Its length in bytes, of whole pieces of [`layout::HOTPLUG_ALIGNMENT`].
    pub size: u64,
    /// How much of it may be plugged at a time, in bytes.
    pub limit: u64,
}

/// Where a machine that boots with `mib` MiB of memory gets more from, if it may have up to `max_mib` MiB.
pub fn pluggable(mib: u32, max_mib: u32) -> Option<Pluggable> {
    let growth = u64::from(max_mib.checked_sub(mib).filter(|growth| *growth > 0)?) << 20;
    Some(Pluggable {
        start: layout::hotplug_start(u64::from(mib) << 20),
        size: growth.next_multiple_of(layout::HOTPLUG_ALIGNMENT),
        limit: growth.next_multiple_of(BLOCK_SIZE),
    })
}

/// Where the memory that a guest boots with comes from.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// It starts as zero.
    Anonymous,
    /// It is that of a file, which has the guest's memory when the guest is gone.
    File(&'a File),
    /// It starts as a file is, which stays as it is: a page is copied when the guest writes to it, and shared until then.
    CopyOf(&'a File),
}

/// Maps `mib` MiB of memory, and what may be plugged in later, up to `max_mib` in all. That is anonymous, whatever the other is. The
/// host reserves none of it (`MAP_NORESERVE`): a page costs something only once the guest has touched it.
///
/// # Errors
/// The sizes are not ones that a machine may have, a file has another, the host has less memory in all than `mib`, or no address
/// space is left.
pub fn map(mib: u32, max_mib: u32, backing: Backing<'_>) -> Result<GuestMemoryMmap> {
    if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&mib) {
        return Err(Error::MemorySize { mib });
    }
    if !(mib..=MAX_MEMORY_MIB).contains(&max_mib) {
        return Err(Error::MaxMemory { mib, max_mib });
    }
    check_host(mib)?;
    let size = u64::from(mib) << 20;
    let (file, sharing) = match backing {
        Backing::Anonymous => (None, MAP_PRIVATE | MAP_ANONYMOUS),
        Backing::File(file) => (Some(file), MAP_SHARED),
        Backing::CopyOf(file) => (Some(file), MAP_PRIVATE),
    };
    if let Some(file) = file {
        let found = file.metadata().map_err(Error::MemoryFile)?.len();
        if found != size {
            return Err(Error::MemoryFileSize { found, expected: size });
        }
    }
    let part = |offset| {
        let file = file.map(File::try_clone).transpose()?;
        Ok(file.map(|file| FileOffset::new(file, offset)))
    };
    let mut offset = 0;
    let mut parts = Vec::new();
    for (start, size) in layout::ram_ranges(size) {
        parts.push((start, size, part(offset).map_err(Error::MemoryFile)?, sharing));
        offset += size;
    }
    let plugged_later = pluggable(mib, max_mib);
    parts.extend(plugged_later.map(|region| (region.start, region.size, None, MAP_PRIVATE | MAP_ANONYMOUS)));
    map_all(parts).map_err(|source| Error::MapMemory { mib: max_mib, source })
}

/// Maps parts of guest memory: where they are, their size in bytes, their file, and mmap's flags.
fn map_all(
    parts: Vec<(GuestAddress, u64, Option<FileOffset>, i32)>,
) -> std::result::Result<GuestMemoryMmap, FromRangesError> {
    let mut regions = Vec::with_capacity(parts.len());
    for (start, size, file, flags) in parts {
        let mapping = MmapRegion::build(file, size as usize, PROT_READ | PROT_WRITE, MAP_NORESERVE | flags)?;
        regions.push(GuestRegionMmap::new(mapping, start).ok_or(FromRangesError::InvalidGuestRegion)?);
    }
    Ok(GuestMemoryMmap::from_regions(regions)?)
}

/// Parts memory from its file: what the guest has written so far stays in the file, and what it writes from now on does not reach it. Memory
/// stays at its addresses, where KVM finds it: what KVM has mapped of it is taken from it first (the kernel's MMU notifiers). `read_only` is
/// the same file, opened to be read: no descriptor is left by which this process could change it. Legal while nobody uses the memory.
///
/// # Errors
/// The kernel refuses. Then some of the memory may still be the file's.
pub fn part_from_file(memory: &GuestMemoryMmap, read_only: &File) -> Result<()> {
    let failed = || Error::PartMemory(io::Error::last_os_error());
    let of_a_file = memory.iter().filter_map(|region| Some((region, region.file_offset()?)));
    for (region, file) in of_a_file {
        let offset = libc::off_t::try_from(file.start())
            .map_err(|error| Error::PartMemory(io::Error::other(error)))?;
        // SAFETY: address and length are those of a whole mapping, which lives as long as `region`, is its alone, and is of this
        // part of this file, with the same protection. So the new one takes exactly its place, has the same bytes, and is unmapped by
        // the same owner. No Rust reference to guest memory exists anywhere.
        let mapped = unsafe {
            libc::mmap(
                region.as_ptr().cast(),
                region.size(),
                PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED,
                read_only.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(failed());
        }
        // SAFETY: both are open, and the second stays its owner's: it is the same file, by a descriptor that can do less.
        if unsafe { libc::dup3(read_only.as_raw_fd(), file.file().as_raw_fd(), libc::O_CLOEXEC) } < 0 {
            return Err(failed());
        }
    }
    Ok(())
}

/// Refuses more memory than the host has in all.
///
/// # Errors
/// It is more, or the host would not say.
pub fn check_host(mib: u32) -> Result<()> {
    match host_memory_mib()? {
        host_mib if u64::from(mib) > host_mib => Err(Error::MemoryBeyondHost { mib, host_mib }),
        _ => Ok(()),
    }
}

fn host_memory_mib() -> Result<u64> {
    let info = nix::sys::sysinfo::sysinfo().map_err(|errno| Error::HostMemory(errno.into()))?;
    Ok(info.ram_total() >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;

    use vm_memory::{Bytes as _, GuestMemoryRegion as _};

    fn allocate(mib: u32, max_mib: u32) -> Result<GuestMemoryMmap> {
        map(mib, max_mib, Backing::Anonymous)
    }

    #[test]
    fn memory_below_the_minimum_or_above_the_maximum_is_refused() {
        for mib in [0, MIN_MEMORY_MIB - 1, MAX_MEMORY_MIB + 1] {
            assert!(matches!(allocate(mib, MAX_MEMORY_MIB), Err(Error::MemorySize { .. })), "{mib}");
        }
    }

    #[test]
    fn memory_above_the_host_s_is_refused_with_both_sizes() {
        let host = host_memory_mib().unwrap();
        let Ok(mib) = u32::try_from(host + 1) else { return };
        if mib <= MAX_MEMORY_MIB {
            let message = allocate(mib, mib).unwrap_err().to_string();
            assert!(message.contains(&format!("{mib} MiB")), "{message}");
            assert!(message.contains(&format!("{host} MiB")), "{message}");
        }
    }

    #[test]
    fn the_least_memory_is_one_region_that_starts_as_zero() {
        let memory = allocate(MIN_MEMORY_MIB, MIN_MEMORY_MIB).unwrap();
        let sizes: Vec<_> = memory.iter().map(|region| region.len()).collect();
        assert_eq!(sizes, [u64::from(MIN_MEMORY_MIB) << 20]);
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x10_0000)).unwrap(), 0);
    }

    #[test]
    fn memory_beyond_3_gib_leaves_the_gap_free() {
        if host_memory_mib().unwrap() < 4096 {
            eprintln!("SKIPPED: needs a host with 4 GiB of memory");
            return;
        }
        let memory = allocate(4096, 4096).unwrap();
        assert!(memory.address_in_range(GuestAddress(layout::GAP_START - 1)));
        assert!(!memory.address_in_range(GuestAddress(layout::GAP_START)));
        assert!(!memory.address_in_range(GuestAddress(layout::GAP_END - 1)));
        assert!(memory.address_in_range(GuestAddress(layout::GAP_END + (1 << 30) - 1)));
        assert!(!memory.address_in_range(GuestAddress(layout::GAP_END + (1 << 30))));
    }

    #[test]
    fn a_machine_cannot_end_up_with_less_than_it_boots_with_nor_with_more_than_any_may_have() {
        for max_mib in [0, 99, MAX_MEMORY_MIB + 1] {
            assert!(matches!(allocate(100, max_mib), Err(Error::MaxMemory { .. })), "{max_mib}");
        }
    }

    #[test]
    fn what_is_plugged_in_later_is_mapped_from_the_start_even_beyond_the_host_s_memory() {
        let memory = allocate(MIN_MEMORY_MIB, MAX_MEMORY_MIB).unwrap();
        let region = pluggable(MIN_MEMORY_MIB, MAX_MEMORY_MIB).unwrap();
        assert_eq!(region.start, GuestAddress(layout::GAP_END));
        assert_eq!(region.limit, u64::from(MAX_MEMORY_MIB - MIN_MEMORY_MIB) << 20);
        assert!(memory.check_range(region.start, region.size as usize));
        assert_eq!(memory.num_regions(), 2);
        assert!(!memory.address_in_range(GuestAddress(u64::from(MIN_MEMORY_MIB) << 20)));
    }

    #[test]
    fn a_region_has_whole_pieces_and_a_limit_of_whole_blocks() {
        assert_eq!(pluggable(256, 256), None);
        let mib = |mib: u64| mib << 20;
        for (boot, max, size, limit) in
            [(256, 257, 128, 2), (256, 384, 128, 128), (256, 385, 256, 130), (300, 1024, 768, 724)]
        {
            let region = pluggable(boot, max).unwrap();
            assert_eq!((region.size, region.limit), (mib(size), mib(limit)), "{boot} to {max}");
        }
    }

    #[test]
    fn memory_that_is_parted_from_its_file_is_as_it_was_and_the_file_stays_so() {
        // Some below the gap, some above it, and some that no file has.
        let (mib, max_mib) = (3073, 3200);
        if host_memory_mib().unwrap() < mib.into() {
            eprintln!("SKIPPED: needs a host with more than 3 GiB of memory");
            return;
        }
        let named = tempfile::NamedTempFile::new().unwrap();
        let file = named.as_file();
        file.set_len(u64::from(mib) << 20).unwrap();
        let memory = map(mib, max_mib, Backing::File(file)).unwrap();
        let above = pluggable(mib, max_mib).unwrap().start;
        let places =
            [GuestAddress(0x1000), GuestAddress(layout::GAP_START - 8), GuestAddress(layout::GAP_END)];
        let in_the_file = [0x1000, layout::GAP_START - 8, layout::GAP_START];
        for (number, place) in (1..).zip(places) {
            memory.write_obj::<u64>(number, place).unwrap();
        }
        memory.write_obj::<u64>(4, above).unwrap();
        let addresses: Vec<_> = memory.iter().map(|region| region.as_ptr()).collect();

        part_from_file(&memory, &File::open(named.path()).unwrap()).unwrap();

        for region in memory.iter().filter_map(|region| region.file_offset()) {
            assert!(region.file().write_at(&[1], 0).is_err(), "it can still be written");
        }
        assert_eq!(memory.iter().map(|region| region.as_ptr()).collect::<Vec<_>>(), addresses);
        assert_eq!(memory.read_obj::<u64>(above).unwrap(), 4);
        for ((number, place), offset) in (1..).zip(places).zip(in_the_file) {
            assert_eq!(memory.read_obj::<u64>(place).unwrap(), number);
            memory.write_obj::<u64>(99, place).unwrap();
            let mut kept = [0; 8];
            file.read_exact_at(&mut kept, offset).unwrap();
            assert_eq!(u64::from_le_bytes(kept), number);
        }
    }
}
