//! Where things are in the guest's physical address space, and which interrupt line is whose.
//!
//! ```text
//! 0x0000_0500  GDT and IDT for the boot vCPU        0x0010_0000  RAM: the kernel, then free
//! 0x0000_7000  boot_params, the "zero page"         0xc000_0000  end of low RAM; the 32-bit gap
//! 0x0000_9000  page tables for the boot vCPU        0xd000_0000  virtio-mmio devices, one page each
//! 0x0002_0000  kernel command line                  0xfec0_0000  IOAPIC; 0xfee0_0000 local APICs
//! 0x0009_fc00  MP table, until 0x000a_0000          0x1_0000_0000  RAM beyond the gap, and after it
//!                                                                  what is plugged in later
//! ```

use vm_memory::GuestAddress;

/// The boot vCPU's global descriptor table.
pub const BOOT_GDT: GuestAddress = GuestAddress(0x500);

/// The boot vCPU's empty interrupt descriptor table.
pub const BOOT_IDT: GuestAddress = GuestAddress(0x600);

/// `boot_params` (Documentation/arch/x86/zero-page.rst).
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);

/// The boot vCPU's stack grows down from here.
pub const BOOT_STACK: u64 = 0x8ff0;

/// Top of the page tables that map the first GiB to itself.
pub const PML4: GuestAddress = GuestAddress(0x9000);

/// The one page-directory-pointer table.
pub const PDPT: GuestAddress = GuestAddress(0xa000);

/// The one page directory.
pub const PAGE_DIRECTORY: GuestAddress = GuestAddress(0xb000);

/// The kernel command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);

/// The longest command line with its final zero byte: `COMMAND_LINE_SIZE` of x86.
pub const COMMAND_LINE_SIZE: usize = 2048;

/// The MP table: the last KiB of base memory is one of the places where the kernel looks for it
/// (MultiProcessor Specification 1.4, 4). Reserved in the e820 map.
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);

/// The MP table must end here, at 640 KiB.
pub const MP_TABLE_END: GuestAddress = GuestAddress(0xa_0000);

/// Where RAM goes on after the hole of the legacy BIOS.
pub const HIGH_RAM: GuestAddress = GuestAddress(0x10_0000);

/// Low RAM ends here at the latest, at 3 GiB; devices have the rest of the 32-bit space.
pub const GAP_START: u64 = 0xc000_0000;

/// RAM that does not fit below the gap goes on here.
pub const GAP_END: u64 = 0x1_0000_0000;

/// The first virtio-mmio device.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;

/// Each virtio-mmio device has a page of its own, in bytes.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;

/// Three pages that KVM needs on Intel processors (`KVM_SET_TSS_ADDR`), inside the gap.
pub const KVM_TSS: usize = 0xfffb_d000;

/// The IOAPIC's registers (`IO_APIC_DEFAULT_PHYS_BASE`).
pub const IOAPIC: u32 = 0xfec0_0000;

/// The local APICs' registers (`APIC_DEFAULT_PHYS_BASE`).
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// The last line of the IOAPIC that KVM emulates.
pub const LAST_GSI: u32 = 23;

/// The serial port's line, as on any PC.
pub const SERIAL_GSI: u32 = 4;

/// The first virtio-mmio device's line.
pub const FIRST_VIRTIO_GSI: u32 = 5;

/// The most virtio-mmio devices: each has an interrupt line of its own.
pub const MAX_VIRTIO_DEVICES: usize = (LAST_GSI - FIRST_VIRTIO_GSI + 1) as usize;

/// Memory that is plugged in later begins at a multiple of this, in bytes: Linux adds whole memory blocks, which have this
/// size (`MIN_MEMORY_BLOCK_SIZE`) unless the guest boots with 63 GiB or more (`probe_memory_block_size` in
/// arch/x86/mm/init_64.c).
pub const HOTPLUG_ALIGNMENT: u64 = 128 << 20;

/// The registers of virtio-mmio device number `index`, guest physical.
pub const fn virtio_address(index: usize) -> u64 {
    VIRTIO_MMIO + index as u64 * VIRTIO_MMIO_SIZE
}

/// The interrupt line of virtio-mmio device number `index`, below [`MAX_VIRTIO_DEVICES`].
pub const fn virtio_gsi(index: usize) -> u32 {
    FIRST_VIRTIO_GSI + index as u32
}

/// How `size` bytes of RAM lie in the address space: up to the gap, and the rest beyond it.
pub fn ram_ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    if size <= GAP_START {
        vec![(GuestAddress(0), size)]
    } else {
        vec![(GuestAddress(0), GAP_START), (GuestAddress(GAP_END), size - GAP_START)]
    }
}

/// Where memory can be plugged in later, if the guest boots with `size` bytes of RAM: after the gap and after that RAM.
pub fn hotplug_start(size: u64) -> GuestAddress {
    let end = ram_ranges(size).last().map_or(0, |(start, length)| start.0 + length);
    GuestAddress(end.max(GAP_END).next_multiple_of(HOTPLUG_ALIGNMENT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_plugged_in_after_the_gap_and_after_what_the_guest_boots_with() {
        let gib = 1 << 30;
        for (size, start) in [
            (64 << 20, GAP_END),
            (GAP_START, GAP_END),
            (GAP_START + (1 << 20), GAP_END + HOTPLUG_ALIGNMENT),
            (4 * gib, GAP_END + gib),
            (64 * gib, 65 * gib),
        ] {
            assert_eq!(hotplug_start(size), GuestAddress(start), "{size:#x}");
        }
    }

    #[test]
    fn ram_that_fits_below_the_gap_is_one_range() {
        assert_eq!(ram_ranges(GAP_START), [(GuestAddress(0), GAP_START)]);
    }

    #[test]
    fn ram_goes_on_beyond_the_gap() {
        let ranges = ram_ranges(GAP_START + 4096);
        assert_eq!(ranges, [(GuestAddress(0), GAP_START), (GuestAddress(GAP_END), 4096)]);
    }

    #[test]
    fn devices_lie_in_the_gap_and_share_no_line() {
        let last = MAX_VIRTIO_DEVICES - 1;
        assert!(virtio_address(0) >= GAP_START);
        assert!(virtio_address(last) + VIRTIO_MMIO_SIZE <= u64::from(IOAPIC));
        assert_eq!(virtio_gsi(last), LAST_GSI);
        assert_ne!(virtio_gsi(0), SERIAL_GSI);
    }
}
