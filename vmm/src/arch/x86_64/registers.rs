//! The registers that a vCPU starts with.

use kvm_bindings::{Msrs, kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_sregs};
use vm_memory::{Address as _, Bytes as _, GuestAddress, GuestMemoryMmap};

use super::{gdt, layout};

const CR0_PROTECTION: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_2_MIB: u64 = 1 << 7;

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

/// Local vector table entries of the local APIC and their delivery mode (Intel SDM 3A, 11.5.1).
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const APIC_MODE_NMI: u32 = 0x400;
const APIC_MODE_EXTERNAL: u32 = 0x700;

/// Where a Linux kernel is entered by the 64-bit boot protocol (Documentation/arch/x86/boot.rst):
/// `rsi` points to the zero page.
pub(super) fn general(entry: GuestAddress) -> kvm_regs {
    kvm_regs {
        rip: entry.raw_value(),
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: layout::ZERO_PAGE.raw_value(),
        // Bit 1 is always set.
        rflags: 2,
        ..Default::default()
    }
}

/// Long mode with the first GiB mapped to itself, on top of what KVM has set.
pub(super) fn special(mut sregs: kvm_sregs) -> kvm_sregs {
    let data = gdt::segment(gdt::DATA);
    sregs.cs = gdt::segment(gdt::CODE);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = gdt::segment(gdt::TASK);
    sregs.gdt = kvm_dtable {
        base: layout::BOOT_GDT.raw_value(),
        limit: size_of_val(&gdt::TABLE) as u16 - 1,
        ..Default::default()
    };
    sregs.idt = kvm_dtable {
        base: layout::BOOT_IDT.raw_value(),
        limit: size_of::<u64>() as u16 - 1,
        ..Default::default()
    };
    sregs.cr0 |= CR0_PROTECTION | CR0_PAGING;
    sregs.cr3 = layout::PML4.raw_value();
    sregs.cr4 |= CR4_PHYSICAL_ADDRESS_EXTENSION;
    sregs.efer |= EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
    sregs
}

/// Writes the tables that [`special`] points to.
pub(super) fn write_tables(memory: &GuestMemoryMmap) -> Result<(), vm_memory::GuestMemoryError> {
    memory.write_obj(gdt::TABLE, layout::BOOT_GDT)?;
    memory.write_obj(0u64, layout::BOOT_IDT)?;
    memory.write_obj(layout::PDPT.raw_value() | PAGE_PRESENT_WRITABLE, layout::PML4)?;
    memory.write_obj(layout::PAGE_DIRECTORY.raw_value() | PAGE_PRESENT_WRITABLE, layout::PDPT)?;
    let pages = (0..512u64).map(|page| page << 21 | PAGE_PRESENT_WRITABLE | PAGE_2_MIB);
    let directory: Vec<u8> = pages.flat_map(u64::to_le_bytes).collect();
    memory.write_slice(&directory, layout::PAGE_DIRECTORY)
}

/// The x87 and SSE state after reset, as the ABI expects it.
pub(super) fn floating_point() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

/// Model-specific registers that do not start as zero, and the time stamp counter.
pub(super) fn model_specific() -> Result<Msrs, vmm_sys_util::fam::Error> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[
        entry(MSR_IA32_TSC, 0),
        // Fast string operations.
        entry(MSR_IA32_MISC_ENABLE, 1),
        // Memory type range registers are on and say write-back everywhere.
        entry(MSR_IA32_MTRR_DEF_TYPE, 1 << 11 | 6),
    ])
}

/// Routes the legacy interrupt controller to LINT0 and NMI to LINT1, as the MP table says.
pub(super) fn set_local_interrupts(lapic: &mut kvm_lapic_state) {
    for (register, mode) in [(APIC_LVT_LINT0, APIC_MODE_EXTERNAL), (APIC_LVT_LINT1, APIC_MODE_NMI)] {
        for (byte, value) in lapic.regs[register..].iter_mut().zip(mode.to_le_bytes()) {
            *byte = value.cast_signed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_tables_map_the_first_gib_to_itself() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_tables(&memory).unwrap();

        // Walks the tables as the processor does, for the last byte of the first GiB.
        let address: u64 = (1 << 30) - 1;
        let pdpt: u64 = memory.read_obj(GuestAddress(special(kvm_sregs::default()).cr3)).unwrap();
        let directory: u64 = memory.read_obj(GuestAddress(pdpt & !0xfff)).unwrap();
        let page: u64 = memory.read_obj(GuestAddress((directory & !0xfff) + (address >> 21) * 8)).unwrap();

        assert_eq!(page & PAGE_2_MIB, PAGE_2_MIB);
        assert_eq!((page & !0x1f_ffff) | (address & 0x1f_ffff), address);
    }

    #[test]
    fn the_local_interrupts_are_external_and_nmi() {
        let mut lapic = kvm_lapic_state::default();
        set_local_interrupts(&mut lapic);
        assert_eq!((lapic.regs[APIC_LVT_LINT0 + 1], lapic.regs[APIC_LVT_LINT1 + 1]), (7, 4));
    }

    #[test]
    fn what_kvm_set_in_the_special_registers_stays() {
        let sregs = special(kvm_sregs { apic_base: 0xfee0_0900, cr0: 0x10, ..Default::default() });
        assert_eq!((sregs.apic_base, sregs.cr0), (0xfee0_0900, 0x8000_0011));
    }
}
