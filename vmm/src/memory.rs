//! Guest memory.

use mayu_vmm_api::{MAX_MEMORY_MIB, MIN_MEMORY_MIB};
use vm_memory::GuestMemoryMmap;

use crate::arch::layout;
use crate::error::{Error, Result};

/// Maps `mib` MiB of anonymous private memory. The host reserves none of it (`MAP_NORESERVE`): a page costs something
/// only once the guest has touched it.
///
/// # Errors
/// The size is not one that a machine may have, the host has less memory than that in all, or no address space is left.
pub fn allocate(mib: u32) -> Result<GuestMemoryMmap> {
    if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&mib) {
        return Err(Error::MemorySize { mib });
    }
    let host_mib = host_memory_mib()?;
    if u64::from(mib) > host_mib {
        return Err(Error::MemoryBeyondHost { mib, host_mib });
    }
    let ranges: Vec<_> = layout::ram_ranges(u64::from(mib) << 20)
        .into_iter()
        .map(|(start, size)| (start, size as usize))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).map_err(|source| Error::MapMemory { mib, source })
}

fn host_memory_mib() -> Result<u64> {
    let info = nix::sys::sysinfo::sysinfo().map_err(|errno| Error::HostMemory(errno.into()))?;
    Ok(info.ram_total() >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryRegion as _};

    #[test]
    fn memory_below_the_minimum_or_above_the_maximum_is_refused() {
        for mib in [0, MIN_MEMORY_MIB - 1, MAX_MEMORY_MIB + 1] {
            assert!(matches!(allocate(mib), Err(Error::MemorySize { .. })), "{mib}");
        }
    }

    #[test]
    fn memory_above_the_host_s_is_refused_with_both_sizes() {
        let host = host_memory_mib().unwrap();
        let Ok(mib) = u32::try_from(host + 1) else { return };
        if mib <= MAX_MEMORY_MIB {
            let message = allocate(mib).unwrap_err().to_string();
            assert!(message.contains(&format!("{mib} MiB")), "{message}");
            assert!(message.contains(&format!("{host} MiB")), "{message}");
        }
    }

    #[test]
    fn the_least_memory_is_one_region_that_starts_as_zero() {
        let memory = allocate(MIN_MEMORY_MIB).unwrap();
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
        let memory = allocate(4096).unwrap();
        assert!(memory.address_in_range(GuestAddress(layout::GAP_START - 1)));
        assert!(!memory.address_in_range(GuestAddress(layout::GAP_START)));
        assert!(!memory.address_in_range(GuestAddress(layout::GAP_END - 1)));
        assert!(memory.address_in_range(GuestAddress(layout::GAP_END + (1 << 30) - 1)));
        assert!(!memory.address_in_range(GuestAddress(layout::GAP_END + (1 << 30))));
    }
}
