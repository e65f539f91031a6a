//! The MP table, which tells a kernel without ACPI about processors and interrupt lines.
//!
//! Layout and numbers are those of the Intel MultiProcessor Specification 1.4, chapter 4.

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::layout;

/// Version 1.4 of the specification, as the floating pointer and the table's header say it.
const SPECIFICATION: u8 = 4;

/// The version of the local APIC and of the IOAPIC that KVM emulates.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;

const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;

/// The floating pointer's length, in bytes.
const POINTER_LENGTH: u64 = 16;

/// Writes the floating pointer and the table behind it to [`layout::MP_TABLE`].
///
/// # Errors
/// Guest memory ends before it, which memory of the least size does not.
pub(super) fn write(memory: &GuestMemoryMmap, vcpus: u8) -> Result<(), vm_memory::GuestMemoryError> {
    let table = GuestAddress(layout::MP_TABLE.0 + POINTER_LENGTH);
    memory.write_slice(&floating_pointer(table.0 as u32), layout::MP_TABLE)?;
    memory.write_slice(&configuration_table(vcpus), table)
}

/// 4.1: where the table is.
fn floating_pointer(table: u32) -> Vec<u8> {
    let mut pointer = b"_MP_".to_vec();
    pointer.extend(table.to_le_bytes());
    pointer.extend([1, SPECIFICATION, 0]);
    pointer.extend([0; 5]);
    set_checksum(&mut pointer, 10);
    pointer
}

/// 4.2 and 4.3: the table with its entries. All interrupt lines are those of an ISA bus, hence edge-triggered,
/// and lead to the pin of the same number.
fn configuration_table(vcpus: u8) -> Vec<u8> {
    let ioapic = vcpus;
    let mut entries = Vec::new();
    for vcpu in 0..vcpus {
        let flags = if vcpu == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
        entries.push(processor(vcpu, flags));
    }
    entries.push([&[ENTRY_BUS, 0][..], b"ISA   "].concat());
    let address = layout::IOAPIC.to_le_bytes();
    entries.push([&[ENTRY_IOAPIC, ioapic, IOAPIC_VERSION, ENABLED][..], &address].concat());
    for line in 0..=layout::LAST_GSI as u8 {
        entries.push(vec![ENTRY_IO_INTERRUPT, INTERRUPT_VECTORED, 0, 0, 0, line, ioapic, line]);
    }
    // The first to pin 0 of the boot processor's APIC, the second to pin 1 of all.
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTERNAL, 0, 0, 0, 0, 0, 0]);
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, 0, 0, 0xff, 1]);
    with_header(&entries)
}

fn processor(id: u8, flags: u8) -> Vec<u8> {
    /// Family 6, as every processor that KVM runs on, and an APIC; the kernel asks CPUID for the rest.
    const SIGNATURE: u32 = 0x600;
    const FEATURES: u32 = 0x200 | 0x001;
    let mut entry = vec![ENTRY_PROCESSOR, id, LOCAL_APIC_VERSION, flags];
    entry.extend(SIGNATURE.to_le_bytes());
    entry.extend(FEATURES.to_le_bytes());
    entry.extend([0; 8]);
    entry
}

fn with_header(entries: &[Vec<u8>]) -> Vec<u8> {
    const HEADER_LENGTH: usize = 44;
    let length = HEADER_LENGTH + entries.iter().map(Vec::len).sum::<usize>();
    let mut table = b"PCMP".to_vec();
    table.extend((length as u16).to_le_bytes());
    table.extend([SPECIFICATION, 0]);
    table.extend(b"MAYU    ");
    table.extend(b"microVM     ");
    table.extend([0; 6]);
    table.extend((entries.len() as u16).to_le_bytes());
    table.extend(layout::LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries.iter().flatten());
    set_checksum(&mut table, 7);
    table
}

/// Makes all bytes add up to zero.
fn set_checksum(bytes: &mut [u8], position: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[position] = sum.wrapping_neg();
}

#[cfg(test)]
mod tests {
    use super::*;
    use mayu_vmm_api::MAX_VCPUS;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table's entries, found the way the kernel finds them: by each type's length.
    fn entries(table: &[u8]) -> Vec<&[u8]> {
        let mut rest = &table[44..];
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let (entry, next) = rest.split_at(if rest[0] == ENTRY_PROCESSOR { 20 } else { 8 });
            entries.push(entry);
            rest = next;
        }
        entries
    }

    #[test]
    fn checksums_and_lengths_hold_for_every_number_of_vcpus() {
        for vcpus in 1..=MAX_VCPUS {
            let table = configuration_table(vcpus);
            assert_eq!(sum(&table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(usize::from(u16::from_le_bytes([table[34], table[35]])), entries(&table).len());
        }
        let pointer = floating_pointer(0x9_fc10);
        assert_eq!((sum(&pointer), pointer.len() as u64), (0, POINTER_LENGTH));
    }

    #[test]
    fn the_largest_table_fits_below_640_kib() {
        let end = layout::MP_TABLE.0 + POINTER_LENGTH + configuration_table(MAX_VCPUS).len() as u64;
        assert!(end <= layout::MP_TABLE_END.0);
    }

    #[test]
    fn one_processor_boots_and_ids_are_distinct() {
        let table = configuration_table(4);
        let processors: Vec<_> = entries(&table)
            .into_iter()
            .filter(|entry| entry[0] == ENTRY_PROCESSOR)
            .map(|entry| (entry[1], entry[3]))
            .collect();
        assert_eq!(processors, [(0, 3), (1, 1), (2, 1), (3, 1)]);
    }

    #[test]
    fn every_line_leads_to_the_pin_of_its_number() {
        let table = configuration_table(2);
        let lines: Vec<_> = entries(&table)
            .into_iter()
            .filter(|entry| entry[0] == ENTRY_IO_INTERRUPT)
            .map(|entry| (entry[5], entry[6], entry[7]))
            .collect();
        assert_eq!(lines, (0..=23).map(|line| (line, 2, line)).collect::<Vec<_>>());
    }

    #[test]
    fn the_pointer_leads_to_the_table_in_guest_memory() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write(&memory, 1).unwrap();
        let mut signature = [0; 4];
        let address: u32 = memory.read_obj(GuestAddress(layout::MP_TABLE.0 + 4)).unwrap();
        memory.read_slice(&mut signature, GuestAddress(u64::from(address))).unwrap();
        assert_eq!(&signature, b"PCMP");
    }
}
