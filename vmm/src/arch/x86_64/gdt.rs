//! The flat segments that the 64-bit boot protocol asks for.

use kvm_bindings::kvm_segment;

/// The boot GDT: 64-bit code at the selector `__BOOT_CS` (0x10), flat data at `__BOOT_DS` (0x18), task state.
pub(super) const TABLE: [u64; 5] =
    [0, 0, descriptor(0xa09b, 0, 0xf_ffff), descriptor(0xc093, 0, 0xf_ffff), descriptor(0x808b, 0, 0xf_ffff)];

/// Code segment: present, accessed, execute and read, long mode.
pub(super) const CODE: u16 = 2;

/// Data segment: present, accessed, read and write.
pub(super) const DATA: u16 = 3;

/// Busy 64-bit task state segment.
pub(super) const TASK: u16 = 4;

/// A segment descriptor (Intel SDM 3A, 3.4.5) from its access and flag bits 40 to 55, base, and limit.
const fn descriptor(flags: u16, base: u32, limit: u32) -> u64 {
    ((base as u64 & 0xff00_0000) << 32)
        | ((base as u64 & 0x00ff_ffff) << 16)
        | (limit as u64 & 0x0000_ffff)
        | ((limit as u64 & 0x000f_0000) << 32)
        | ((flags as u64) << 40)
}

/// Entry `index` as KVM wants to see it in a segment register.
pub(super) fn segment(index: u16) -> kvm_segment {
    let entry = TABLE[usize::from(index)];
    let bit = |position: u32| (entry >> position & 1) as u8;
    let granularity = bit(55);
    let limit = (entry & 0xffff | entry >> 32 & 0xf_0000) as u32;
    kvm_segment {
        base: entry >> 16 & 0xff_ffff | entry >> 32 & 0xff00_0000,
        limit: if granularity == 1 { limit << 12 | 0xfff } else { limit },
        selector: index * 8,
        type_: (entry >> 40 & 0xf) as u8,
        present: bit(47),
        dpl: (entry >> 45 & 3) as u8,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: granularity,
        avl: bit(52),
        unusable: u8::from(entry == 0),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_segment_is_flat_long_mode_code() {
        let code = segment(CODE);
        assert_eq!((code.base, code.limit, code.selector), (0, 0xffff_ffff, 0x10));
        assert_eq!((code.l, code.db, code.s, code.present, code.type_), (1, 0, 1, 1, 0xb));
    }

    #[test]
    fn the_data_segment_is_flat_and_writable() {
        let data = segment(DATA);
        assert_eq!((data.base, data.limit, data.selector), (0, 0xffff_ffff, 0x18));
        assert_eq!((data.l, data.db, data.s, data.type_), (0, 1, 1, 3));
    }

    #[test]
    fn the_task_segment_is_a_busy_system_segment() {
        let task = segment(TASK);
        assert_eq!((task.s, task.type_, task.present), (0, 0xb, 1));
    }

    #[test]
    fn a_descriptor_keeps_every_bit_of_its_base() {
        assert_eq!(descriptor(0, 0xabcd_ef12, 0), 0xab00_00cd_ef12_0000);
    }
}
