//! The virtual machine as KVM knows it: memory, interrupt controllers, irqfds and ioeventfds.

#![allow(unsafe_code)]

use std::os::fd::{FromRawFd as _, IntoRawFd as _, OwnedFd};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_PMU_CAPABILITY, KVM_MAX_CPUID_ENTRIES, KVM_PMU_CAP_DISABLE,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Address as _, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion as _};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout;
use crate::arch::state::VmState;
use crate::error::{Error, Result};

/// What KVM has to have, and what it is called in the KVM API documentation.
const NEEDED: [(Cap, &str); 11] = [
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
];

/// `QueueNotify` of a virtio-mmio device (virtio 1.2, 4.2.2).
const QUEUE_NOTIFY: u64 = 0x50;

/// One virtual machine.
pub struct Vm {
    kvm: Kvm,
    fd: VmFd,
}

impl Vm {
    /// Makes an empty machine with KVM's interrupt controllers, from an open `/dev/kvm`.
    ///
    /// # Errors
    /// The descriptor is not `/dev/kvm`, KVM lacks something, or refuses.
    pub fn new(kvm: OwnedFd) -> Result<Self> {
        // SAFETY: the descriptor is open and its ownership passes on. One that is not /dev/kvm fails the first ioctl.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(Error::KvmVersion { version });
        }
        if let Some((_, name)) = NEEDED.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
            return Err(Error::KvmCapability { name });
        }
        let fd = kvm.create_vm().map_err(Error::kvm("create a virtual machine"))?;
        if fd.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into()) > 0 {
            let without_counters = kvm_enable_cap {
                cap: KVM_CAP_PMU_CAPABILITY,
                args: [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0],
                ..Default::default()
            };
            fd.enable_cap(&without_counters).map_err(Error::kvm("switch performance counters off"))?;
        }
        fd.set_tss_address(layout::KVM_TSS).map_err(Error::kvm("place its task state segment"))?;
        fd.create_irq_chip().map_err(Error::kvm("create the interrupt controllers"))?;
        Ok(Self { kvm, fd })
    }

    /// Gives `memory` to the guest.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_memory(&self, memory: &GuestMemoryMmap) -> Result<()> {
        for (slot, region) in (0..).zip(memory.iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the address and size are those of a live mapping. The machine's owner keeps the memory for
            // longer than the machine, and nobody else maps anything there.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(Error::kvm("give memory to the guest"))?;
        }
        Ok(())
    }

    /// Makes a vCPU. Its index is its APIC id.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn create_vcpu(&self, id: u8) -> Result<VcpuFd> {
        self.fd.create_vcpu(id.into()).map_err(Error::kvm("create a vCPU"))
    }

    /// Writing to `event` raises the interrupt line once.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn connect_interrupt(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.fd.register_irqfd(event, gsi).map_err(Error::kvm("connect an interrupt line"))
    }

    /// Has KVM write to `event` when the driver of virtio-mmio device number `index` kicks `queue`.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn connect_queue(&self, event: &EventFd, index: usize, queue: u16) -> Result<()> {
        let address = IoEventAddress::Mmio(layout::virtio_address(index) + QUEUE_NOTIFY);
        self.fd
            .register_ioevent(event, &address, u32::from(queue))
            .map_err(Error::kvm("connect a queue's doorbell"))
    }

    /// The length of the memory that KVM shares with a vCPU's thread, in bytes.
    pub fn run_size(&self) -> usize {
        self.fd.run_size()
    }

    /// The CPUID that KVM supports on this host.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn supported_cpuid(&self) -> Result<CpuId> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("ask for the supported CPUID"))
    }

    /// Whether KVM emulates the local APIC's TSC-deadline timer.
    pub fn has_tsc_deadline_timer(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// The MSRs that a vCPU's state consists of.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn msrs_to_save(&self) -> Result<Vec<u32>> {
        let list = self.kvm.get_msr_index_list().map_err(Error::kvm("ask for the list of MSRs"))?;
        Ok(list.as_slice().to_vec())
    }

    /// What all vCPUs have in common. Legal while none runs.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(&self) -> Result<VmState> {
        VmState::save(&self.fd)
    }

    /// Takes up a saved state. Legal while no vCPU runs.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn restore(&self, state: &VmState) -> Result<()> {
        state.restore(&self.fd)
    }
}
