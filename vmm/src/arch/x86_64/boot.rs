//! What the 64-bit boot protocol wants to find in guest memory and registers (Documentation/arch/x86/boot.rst).

use kvm_ioctls::VcpuFd;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Address as _, Bytes as _, GuestAddress, GuestMemoryMmap};

use super::cpuid::CpuidTemplate;
use super::{layout, mptable, registers, state};
use crate::error::{Error, Result};

/// `e820` entry types.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Writes what the kernel reads before and during its start: the zero page, the MP table, the boot vCPU's tables.
/// The command line is at [`layout::COMMAND_LINE`] already, `command_line_size` bytes with its final zero. The guest boots
/// with `ram` bytes of memory.
///
/// # Errors
/// Guest memory is smaller than the least that is allowed.
pub fn write_parameters(
    memory: &GuestMemoryMmap,
    ram: u64,
    command_line_size: usize,
    vcpus: u8,
) -> Result<()> {
    let parameters = boot_parameters(ram, command_line_size);
    memory
        .write_obj(parameters, layout::ZERO_PAGE)
        .and_then(|()| mptable::write(memory, vcpus))
        .and_then(|()| registers::write_tables(memory))
        .map_err(Error::WriteGuest)
}

/// Sets up a new vCPU: the first enters the kernel, the others wait for it to wake them.
///
/// # Errors
/// KVM refuses.
pub fn configure_vcpu(fd: &VcpuFd, id: u8, template: &CpuidTemplate, entry: GuestAddress) -> Result<()> {
    let cpuid = template.for_vcpu(id).map_err(Error::too_many("CPUID entries"))?;
    fd.set_cpuid2(&cpuid).map_err(Error::kvm("set a vCPU's CPUID"))?;
    let msrs = registers::model_specific().map_err(Error::too_many("MSRs"))?;
    state::set_msrs(fd, &msrs)?;
    fd.set_fpu(&registers::floating_point()).map_err(Error::kvm("set a vCPU's floating point registers"))?;
    let mut lapic = fd.get_lapic().map_err(Error::kvm("read a vCPU's local APIC"))?;
    registers::set_local_interrupts(&mut lapic);
    fd.set_lapic(&lapic).map_err(Error::kvm("set a vCPU's local APIC"))?;
    if id != 0 {
        return Ok(());
    }
    let sregs = fd.get_sregs().map_err(Error::kvm("read a vCPU's special registers"))?;
    fd.set_sregs(&registers::special(sregs)).map_err(Error::kvm("set a vCPU's special registers"))?;
    fd.set_regs(&registers::general(entry)).map_err(Error::kvm("set a vCPU's registers"))
}

fn boot_parameters(ram: u64, command_line_size: usize) -> boot_params {
    /// "HdrS" and the boot sector's signature, which the kernel checks.
    const HEADER: u32 = 0x5372_6448;
    const BOOT_FLAG: u16 = 0xaa55;
    /// A boot loader without a number of its own.
    const LOADER_OTHER: u8 = 0xff;

    let mut parameters = boot_params::default();
    parameters.hdr.header = HEADER;
    parameters.hdr.boot_flag = BOOT_FLAG;
    parameters.hdr.type_of_loader = LOADER_OTHER;
    parameters.hdr.cmd_line_ptr = layout::COMMAND_LINE.raw_value() as u32;
    parameters.hdr.cmdline_size = command_line_size as u32;
    let map = e820(ram);
    parameters.e820_entries = map.len() as u8;
    parameters.e820_table[..map.len()].copy_from_slice(&map);
    parameters
}

/// The map of RAM: all of it but the MP table's page and the legacy BIOS hole. What is plugged in later is no part of it.
fn e820(ram: u64) -> Vec<boot_e820_entry> {
    let entry = |from: GuestAddress, to: GuestAddress, type_| boot_e820_entry {
        addr: from.raw_value(),
        size: to.raw_value() - from.raw_value(),
        type_,
    };
    let mut map = vec![
        entry(GuestAddress(0), layout::MP_TABLE, E820_RAM),
        entry(layout::MP_TABLE, layout::HIGH_RAM, E820_RESERVED),
    ];
    for (start, length) in layout::ram_ranges(ram) {
        map.push(entry(start.max(layout::HIGH_RAM), start.unchecked_add(length), E820_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_e820_map_covers_ram_on_both_sides_of_the_gap_and_nothing_else() {
        let map: Vec<_> = e820(layout::GAP_START + (1 << 20))
            .iter()
            .map(|entry| ({ entry.addr }, { entry.size }, { entry.type_ }))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, E820_RAM),
                (0x9_fc00, 0x6_0400, E820_RESERVED),
                (0x10_0000, 0xbff0_0000, E820_RAM),
                (0x1_0000_0000, 1 << 20, E820_RAM),
            ]
        );
    }

    #[test]
    fn the_zero_page_says_where_the_command_line_is() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        write_parameters(&memory, 64 << 20, 42, 1).unwrap();
        let parameters: boot_params = memory.read_obj(layout::ZERO_PAGE).unwrap();
        assert_eq!({ parameters.hdr.cmd_line_ptr }, 0x2_0000);
        assert_eq!({ parameters.hdr.cmdline_size }, 42);
        assert_eq!({ parameters.hdr.boot_flag }, 0xaa55);
        assert_eq!({ parameters.e820_entries }, 3);
    }
}
