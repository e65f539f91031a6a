//! The state of a vCPU and of what KVM emulates for the whole machine, as it is saved and restored.

#![allow(unsafe_code)]

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, Msrs,
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Everything that a vCPU is.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: CpuId,
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads a vCPU that is not running and has no access to a device half done. `msrs` are those that KVM lists.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(fd: &VcpuFd, msrs: &[u32]) -> Result<Self> {
        // The state of multiprocessing is read first: KVM brings pending INIT and SIPI into effect as it does so.
        let mp_state = fd.get_mp_state().map_err(Error::kvm("read a vCPU's run state"))?;
        Ok(Self {
            mp_state,
            cpuid: fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("read a vCPU's CPUID"))?,
            tsc_khz: fd.get_tsc_khz().map_err(Error::kvm("read a vCPU's TSC frequency"))?,
            regs: fd.get_regs().map_err(Error::kvm("read a vCPU's registers"))?,
            sregs: fd.get_sregs().map_err(Error::kvm("read a vCPU's special registers"))?,
            xsave: fd.get_xsave().map_err(Error::kvm("read a vCPU's extended state"))?,
            xcrs: fd.get_xcrs().map_err(Error::kvm("read a vCPU's XCRs"))?,
            debug_regs: fd.get_debug_regs().map_err(Error::kvm("read a vCPU's debug registers"))?,
            lapic: fd.get_lapic().map_err(Error::kvm("read a vCPU's local APIC"))?,
            msrs: read_msrs(fd, msrs)?,
            events: fd.get_vcpu_events().map_err(Error::kvm("read a vCPU's pending events"))?,
        })
    }

    /// Writes it to a new vCPU that has never run.
    ///
    /// # Errors
    /// KVM refuses, or does not have one of the saved MSRs.
    pub fn restore(&self, fd: &VcpuFd) -> Result<()> {
        // The order matters: CPUID says which registers there are, the special registers hold the APIC's base and
        // mode, the deadline timer's MSR needs the APIC, and the last of all puts events on top.
        fd.set_cpuid2(&self.cpuid).map_err(Error::kvm("set a vCPU's CPUID"))?;
        if fd.get_tsc_khz().ok() != Some(self.tsc_khz) {
            fd.set_tsc_khz(self.tsc_khz).map_err(Error::kvm("set a vCPU's TSC frequency"))?;
        }
        fd.set_mp_state(self.mp_state).map_err(Error::kvm("set a vCPU's run state"))?;
        fd.set_regs(&self.regs).map_err(Error::kvm("set a vCPU's registers"))?;
        fd.set_sregs(&self.sregs).map_err(Error::kvm("set a vCPU's special registers"))?;
        // SAFETY: no feature whose state exceeds 4 KiB is enabled: such features (AMX) need a permission that this
        // process never asks for, so KVM reads no further than the structure.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(Error::kvm("set a vCPU's extended state"))?;
        fd.set_xcrs(&self.xcrs).map_err(Error::kvm("set a vCPU's XCRs"))?;
        fd.set_debug_regs(&self.debug_regs).map_err(Error::kvm("set a vCPU's debug registers"))?;
        fd.set_lapic(&self.lapic).map_err(Error::kvm("set a vCPU's local APIC"))?;
        let msrs = Msrs::from_entries(&self.msrs).map_err(Error::too_many("MSRs"))?;
        set_msrs(fd, &msrs)?;
        fd.set_vcpu_events(&self.events).map_err(Error::kvm("set a vCPU's pending events"))
    }

    /// The general purpose registers.
    pub fn regs(&self) -> &kvm_regs {
        &self.regs
    }
}

/// Writes all of `msrs`.
///
/// # Errors
/// KVM refuses, or does not have one of them.
pub(super) fn set_msrs(fd: &VcpuFd, msrs: &Msrs) -> Result<()> {
    let written = fd.set_msrs(msrs).map_err(Error::kvm("set a vCPU's MSRs"))?;
    match msrs.as_slice().get(written) {
        None => Ok(()),
        Some(refused) => Err(Error::Msr { index: refused.index }),
    }
}

/// Reads those of `indexes` that this vCPU has: KVM lists some that depend on CPUID.
fn read_msrs(fd: &VcpuFd, indexes: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut wanted: Vec<_> =
        indexes.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut found = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let mut msrs = Msrs::from_entries(&wanted).map_err(Error::too_many("MSRs"))?;
        let count = fd.get_msrs(&mut msrs).map_err(Error::kvm("read a vCPU's MSRs"))?;
        found.extend_from_slice(&msrs.as_slice()[..count]);
        wanted.drain(..(count + 1).min(wanted.len()));
    }
    Ok(found)
}

/// What KVM emulates for all vCPUs together: both legacy interrupt controllers, the IOAPIC, and the paravirtual clock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    irqchips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

impl VmState {
    /// Reads it while no vCPU runs.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(fd: &VmFd) -> Result<Self> {
        let read = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            fd.get_irqchip(&mut chip).map_err(Error::kvm("read an interrupt controller"))?;
            Ok(chip)
        };
        Ok(Self {
            irqchips: [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
                .into_iter()
                .map(read)
                .collect::<Result<_>>()?,
            clock: fd.get_clock().map_err(Error::kvm("read the guest's clock"))?,
        })
    }

    /// Writes it to a new machine. The guest's clock goes on from where it stopped.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn restore(&self, fd: &VmFd) -> Result<()> {
        for chip in &self.irqchips {
            fd.set_irqchip(chip).map_err(Error::kvm("set an interrupt controller"))?;
        }
        // Without flags KVM takes the time as it is, and does not add what has passed since.
        let clock = kvm_clock_data { clock: self.clock.clock, ..Default::default() };
        fd.set_clock(&clock).map_err(Error::kvm("set the guest's clock"))
    }
}
