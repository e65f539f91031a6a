//! What the guest sees of its processors.
//!
//! The base is what KVM supports on this host. On top of it comes what makes a guest boot without measuring
//! anything (TSC-deadline timer, a constant APIC timer, a hypervisor's signature), the topology: one package,
//! a core for each vCPU, no threads; and away goes what this machine does not have.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf numbers (Intel SDM 2A, CPUID; AMD APM 3, appendix E).
mod leaf {
    pub const BASIC: u32 = 0x0;
    pub const FEATURES: u32 = 0x1;
    pub const CACHES: u32 = 0x4;
    pub const MONITOR: u32 = 0x5;
    pub const POWER: u32 = 0x6;
    pub const STRUCTURED_FEATURES: u32 = 0x7;
    pub const PERFORMANCE: u32 = 0xa;
    pub const TOPOLOGY: u32 = 0xb;
    pub const EXTENDED_STATE: u32 = 0xd;
    pub const SGX: u32 = 0x12;
    pub const PROCESSOR_TRACE: u32 = 0x14;
    pub const TOPOLOGY_V2: u32 = 0x1f;
    pub const EXTENDED_FEATURES: u32 = 0x8000_0001;
    pub const NAME: u32 = 0x8000_0002;
    pub const NAME_END: u32 = 0x8000_0004;
    pub const EXTENDED_SIZES: u32 = 0x8000_0008;
    pub const SVM: u32 = 0x8000_000a;
    pub const AMD_CACHES: u32 = 0x8000_001d;
    pub const AMD_TOPOLOGY: u32 = 0x8000_001e;
    pub const AMD_PERFORMANCE: u32 = 0x8000_0022;
}

/// Leaf 1 ECX: 64-bit debug store, MONITOR, CPL-qualified store, VMX, SMX, SpeedStep, thermal monitor 2,
/// perfmon capabilities. The machine has no performance counters, no power management and no nested virtualisation.
const HIDDEN_FEATURES: u32 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 15;
const FEATURE_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_HYPERVISOR: u32 = 1 << 31;

/// Leaf 1 EDX: the package has more than one logical processor.
const FEATURE_HYPER_THREADING: u32 = 1 << 28;

/// Leaf 6 EAX: the APIC timer runs in every power state.
const POWER_CONSTANT_APIC_TIMER: u32 = 1 << 2;

/// Leaf 7 EBX: SGX and processor trace. ECX: SGX launch control. Enclaves would need memory of their own, and traces
/// are the host's.
const HIDDEN_STRUCTURED_EBX: u32 = 1 << 2 | 1 << 25;
const HIDDEN_STRUCTURED_ECX: u32 = 1 << 30;

/// Leaf 0x8000_0001 ECX: SVM, lightweight profiling, core performance counters, northbridge and L3 counters.
const HIDDEN_EXTENDED_FEATURES: u32 = 1 << 2 | 1 << 15 | 1 << 23 | 1 << 24 | 1 << 28;

/// Leaf 0xb ECX: level types.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// Leaf 4 EAX holds "how many share it, minus one" in bits 14 to 25 and the cores in bits 26 to 31.
const CACHE_LEVEL_3: u32 = 3;

/// A processor's name, and what tells it from others of that name: family, model and stepping, and a checksum of the features
/// that KVM supports on it. A guest that was saved with other features would be surprised.
pub fn processor(supported: &CpuId) -> String {
    let mut name = Vec::new();
    let mut signature = 0;
    let mut features = Vec::new();
    for entry in supported.as_slice() {
        let kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, .. } = *entry;
        match function {
            leaf::NAME..=leaf::NAME_END => name.extend([eax, ebx, ecx, edx].map(u32::to_le_bytes).concat()),
            leaf::FEATURES => {
                signature = eax;
                // EBX differs from core to core.
                features.extend([ecx, edx]);
            }
            leaf::STRUCTURED_FEATURES | leaf::EXTENDED_STATE | leaf::EXTENDED_FEATURES => {
                features.extend([function, index, eax, ebx, ecx, edx]);
            }
            _ => {}
        }
    }
    let name = String::from_utf8_lossy(&name);
    let features: Vec<_> = features.into_iter().flat_map(u32::to_le_bytes).collect();
    format!("{} ({signature:#x}, features {:#x})", name.trim_matches(['\0', ' ']), crc32fast::hash(&features))
}

/// The CPUID of every vCPU of a machine.
pub struct CpuidTemplate {
    entries: Vec<kvm_cpuid_entry2>,
    vcpus: u32,
}

impl CpuidTemplate {
    /// From what KVM supports (`KVM_GET_SUPPORTED_CPUID`) and whether it emulates the TSC-deadline timer, which is
    /// a capability of its own.
    pub fn new(supported: &CpuId, tsc_deadline: bool, vcpus: u8) -> Self {
        let mut entries: Vec<_> = supported
            .as_slice()
            .iter()
            .filter(|entry| !matches!(entry.function, leaf::TOPOLOGY | leaf::TOPOLOGY_V2))
            .copied()
            .collect();
        let vcpus = u32::from(vcpus);
        for entry in &mut entries {
            match entry.function {
                leaf::BASIC => entry.eax = entry.eax.max(leaf::TOPOLOGY),
                leaf::FEATURES => {
                    entry.ecx = entry.ecx & !(HIDDEN_FEATURES | FEATURE_TSC_DEADLINE) | FEATURE_HYPERVISOR;
                    if tsc_deadline {
                        entry.ecx |= FEATURE_TSC_DEADLINE;
                    }
                    if vcpus > 1 {
                        entry.edx |= FEATURE_HYPER_THREADING;
                    }
                }
                leaf::CACHES => share_cache(entry, vcpus, vcpus.min(64) - 1),
                leaf::STRUCTURED_FEATURES if entry.index == 0 => {
                    entry.ebx &= !HIDDEN_STRUCTURED_EBX;
                    entry.ecx &= !HIDDEN_STRUCTURED_ECX;
                }
                leaf::MONITOR
                | leaf::PERFORMANCE
                | leaf::SGX
                | leaf::PROCESSOR_TRACE
                | leaf::SVM
                | leaf::AMD_PERFORMANCE => clear(entry),
                leaf::POWER => {
                    clear(entry);
                    entry.eax = POWER_CONSTANT_APIC_TIMER;
                }
                leaf::EXTENDED_FEATURES => entry.ecx &= !HIDDEN_EXTENDED_FEATURES,
                leaf::EXTENDED_SIZES => entry.ecx = id_bits(vcpus) << 12 | (vcpus - 1),
                leaf::AMD_CACHES => share_cache(entry, vcpus, 0),
                _ => {}
            }
        }
        Self { entries, vcpus }
    }

    /// The entries for the vCPU with this index, which is its APIC id.
    ///
    /// # Errors
    /// There are more entries than KVM takes.
    pub fn for_vcpu(&self, id: u8) -> Result<CpuId, vmm_sys_util::fam::Error> {
        let id = u32::from(id);
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                leaf::FEATURES => {
                    entry.ebx = entry.ebx & 0xffff | self.vcpus << 16 | id << 24;
                }
                leaf::AMD_TOPOLOGY => {
                    (entry.eax, entry.ebx, entry.ecx) = (id, id, 0);
                }
                _ => {}
            }
        }
        let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
            function: leaf::TOPOLOGY,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx: kind | index,
            edx: id,
            ..Default::default()
        };
        entries.push(level(0, 0, 1, LEVEL_THREAD));
        entries.push(level(1, id_bits(self.vcpus), self.vcpus, LEVEL_CORE));
        entries.push(level(2, 0, 0, 0));
        CpuId::from_entries(&entries)
    }
}

/// Bits of the APIC id that tell the vCPUs apart.
const fn id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// All vCPUs share the last cache, none of the others is shared. `cores` goes to where only Intel has it.
fn share_cache(entry: &mut kvm_cpuid_entry2, vcpus: u32, cores: u32) {
    let (kind, level) = (entry.eax & 0x1f, entry.eax >> 5 & 7);
    if kind == 0 {
        return;
    }
    let sharing = if level == CACHE_LEVEL_3 { vcpus - 1 } else { 0 };
    entry.eax = entry.eax & 0x3fff | sharing << 14 | cores << 26;
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn template(entries: &[kvm_cpuid_entry2], vcpus: u8) -> CpuidTemplate {
        CpuidTemplate::new(&CpuId::from_entries(entries).unwrap(), true, vcpus)
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|entry| entry.function == function && entry.index == index).unwrap()
    }

    #[test]
    fn the_guest_sees_a_hypervisor_and_a_deadline_timer_and_no_vmx_or_monitor() {
        let cpuid = template(&[entry(1, [0, 0, !(1 << 31), 0])], 1).for_vcpu(0).unwrap();
        let ecx = find(&cpuid, 1, 0).ecx;
        assert_eq!(ecx & HIDDEN_FEATURES, 0);
        assert_eq!(ecx & FEATURE_HYPERVISOR, FEATURE_HYPERVISOR);
        assert_eq!(ecx & FEATURE_TSC_DEADLINE, FEATURE_TSC_DEADLINE);
    }

    #[test]
    fn a_deadline_timer_that_kvm_lacks_is_not_promised() {
        let supported = CpuId::from_entries(&[entry(1, [0, 0, u32::MAX, 0])]).unwrap();
        let cpuid = CpuidTemplate::new(&supported, false, 1).for_vcpu(0).unwrap();
        assert_eq!(find(&cpuid, 1, 0).ecx & FEATURE_TSC_DEADLINE, 0);
    }

    #[test]
    fn what_the_machine_does_not_have_is_hidden() {
        let all = [u32::MAX; 4];
        let hidden = [
            leaf::PERFORMANCE,
            leaf::MONITOR,
            leaf::SGX,
            leaf::PROCESSOR_TRACE,
            leaf::SVM,
            leaf::AMD_PERFORMANCE,
        ];
        let supported: Vec<_> = hidden.iter().map(|function| entry(*function, all)).collect();
        let cpuid = template(&supported, 1).for_vcpu(0).unwrap();
        for function in hidden {
            assert_eq!(find(&cpuid, function, 0), entry(function, [0; 4]));
        }
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        let supported = [
            entry(0, [4, 0, 0, 0]),
            entry(1, [0, 0xff00_1234, 0, 0]),
            entry(leaf::AMD_TOPOLOGY, [9, 9, 9, 9]),
        ];
        let cpuid = template(&supported, 3).for_vcpu(2).unwrap();
        assert_eq!(find(&cpuid, 0, 0).eax, leaf::TOPOLOGY);
        assert_eq!(find(&cpuid, 1, 0).ebx, 0x0203_1234);
        assert_eq!(find(&cpuid, leaf::AMD_TOPOLOGY, 0).eax, 2);
        assert_eq!(find(&cpuid, leaf::TOPOLOGY, 0).edx, 2);
        let cores = find(&cpuid, leaf::TOPOLOGY, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 3, 0x201, 2));
    }

    #[test]
    fn the_host_s_own_topology_does_not_show() {
        let cpuid =
            template(&[entry(leaf::TOPOLOGY, [5, 5, 5, 5]), entry(leaf::TOPOLOGY_V2, [5, 5, 5, 5])], 1)
                .for_vcpu(0)
                .unwrap();
        let levels =
            cpuid.as_slice().iter().filter(|entry| entry.eax == 5 || entry.function == leaf::TOPOLOGY_V2);
        assert_eq!(levels.count(), 0);
    }

    #[test]
    fn only_the_last_cache_is_shared() {
        let cache = |level: u32| kvm_cpuid_entry2 {
            index: level,
            ..entry(leaf::CACHES, [1 | level << 5 | 0xfff << 14, 0, 0, 0])
        };
        let cpuid = template(&[cache(1), cache(3)], 4).for_vcpu(0).unwrap();
        assert_eq!(find(&cpuid, leaf::CACHES, 1).eax >> 14, 3 << 12);
        assert_eq!(find(&cpuid, leaf::CACHES, 3).eax >> 14, 3 << 12 | 3);
    }
}
