//! A guest of a few instructions that tells how this KVM runs guest *kernel* code.
//!
//! There are KVMs that run a guest's user mode on the processor and emulate its kernel mode instruction by
//! instruction. Everything about them looks right until a kernel boots a thousand times too slowly or meets an
//! instruction that the emulator lacks. So the probe runs a loop in ring 0 of long mode, compares its time
//! with the same loop's on the host, and then executes CMPXCHG16B, which every x86-64 kernel needs.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

/// What the probe found.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    /// Ring 0 runs on the processor.
    Native {
        /// The guest's time for the loop over the host's.
        slowdown: f64,
    },
    /// Ring 0 runs in an emulator.
    Emulated {
        /// The guest's time for the loop over the host's.
        slowdown: f64,
    },
    /// Ring 0 lacks an instruction.
    Incomplete {
        /// The instruction.
        instruction: &'static str,
        /// How KVM stopped.
        exit: String,
    },
}

/// The probe itself could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} for the probe guest: {source}")]
pub struct Error {
    operation: &'static str,
    source: std::io::Error,
}

/// Iterations of the first timed loop, of two instructions each. Later ones are longer.
const FIRST: u64 = 100_000;

/// Iterations of the longest loop, which takes a processor some tens of milliseconds.
const LONGEST: u64 = 100_000_000;

/// A loop of this length outweighs entering and leaving the guest.
const LONG_ENOUGH: Duration = Duration::from_millis(50);

/// A software processor runs a guest several times slower than itself; emulation costs a factor of thousands.
const EMULATED_ABOVE: f64 = 40.0;

const MEMORY_SIZE: usize = 0x10000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const CODE: u64 = 0x4000;
const OPERAND: u64 = 0x5000;

/// `1: dec rcx; jnz 1b; hlt`
const LOOP: &[u8] = &[0x48, 0xff, 0xc9, 0x75, 0xfb, 0xf4];

/// `lock cmpxchg16b [rbx]; hlt`
const CMPXCHG16B: &[u8] = &[0xf0, 0x48, 0x0f, 0xc7, 0x0b, 0xf4];

/// Runs the probe, which takes some tenths of a second.
pub fn run(kvm: &Kvm) -> Result<Verdict, Error> {
    let mut stopped = None;
    let guest = nanoseconds_per_iteration(|iterations| {
        let (elapsed, exit) = execute(kvm, LOOP, iterations)?;
        stopped = exit;
        Ok(elapsed)
    })?;
    if let Some(exit) = stopped {
        return Ok(Verdict::Incomplete { instruction: "a loop of DEC and JNZ", exit });
    }
    let slowdown = guest / nanoseconds_per_iteration(|iterations| Ok(host_time(iterations)))?;
    if slowdown > EMULATED_ABOVE {
        return Ok(Verdict::Emulated { slowdown });
    }
    match execute(kvm, CMPXCHG16B, 0)?.1 {
        Some(exit) => Ok(Verdict::Incomplete { instruction: "CMPXCHG16B", exit }),
        None => Ok(Verdict::Native { slowdown }),
    }
}

/// Makes the loop longer until what is measured is the loop.
fn nanoseconds_per_iteration(mut time: impl FnMut(u64) -> Result<Duration, Error>) -> Result<f64, Error> {
    let mut iterations = FIRST;
    loop {
        let elapsed = time(iterations)?;
        if elapsed >= LONG_ENOUGH || iterations >= LONGEST {
            return Ok(elapsed.as_secs_f64() * 1e9 / iterations as f64);
        }
        iterations *= 10;
    }
}

/// Runs `code` in ring 0 until it halts. Returns its time and, if it did not get there, how it stopped.
fn execute(kvm: &Kvm, code: &[u8], iterations: u64) -> Result<(Duration, Option<String>), Error> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)])
        .map_err(|error| failed("map memory", error))?;
    fill(&memory, code).map_err(|error| failed("write memory", error))?;
    let vm = kvm.create_vm().map_err(|error| failed("create a VM", error))?;
    let host = memory.get_host_address(GuestAddress(0)).map_err(|error| failed("find memory", error))?;
    set_memory(&vm, host as u64).map_err(|error| failed("set memory", error))?;
    let mut vcpu = vm.create_vcpu(0).map_err(|error| failed("create a vCPU", error))?;
    set_features(kvm, &vcpu).map_err(|error| failed("set processor features", error))?;
    set_registers(&vcpu, iterations).map_err(|error| failed("set registers", error))?;

    let start = Instant::now();
    let stopped = match vcpu.run() {
        Ok(VcpuExit::Hlt) => None,
        Ok(other) => Some(format!("KVM stopped with {other:?}")),
        Err(error) => Some(format!("KVM_RUN failed: {error}")),
    };
    Ok((start.elapsed(), stopped))
}

fn failed(operation: &'static str, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error { operation, source: std::io::Error::other(error) }
}

/// The code, and page tables that map the first GiB to itself.
fn fill(memory: &GuestMemoryMmap<()>, code: &[u8]) -> Result<(), vm_memory::GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0x3;
    const HUGE: u64 = 0x80;
    const PD: u64 = 0x3000;
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    memory.write_obj(PD | PRESENT_WRITABLE, GuestAddress(PDPT))?;
    memory.write_obj(PRESENT_WRITABLE | HUGE, GuestAddress(PD))?;
    memory.write_slice(code, GuestAddress(CODE))
}

#[allow(unsafe_code)]
fn set_memory(vm: &kvm_ioctls::VmFd, host: u64) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_SIZE as u64,
        userspace_addr: host,
    };
    // SAFETY: `host` is the start of a mapping of MEMORY_SIZE bytes, which `execute` keeps until the VM is gone.
    unsafe { vm.set_user_memory_region(region) }
}

/// Gives the vCPU all that KVM has. Without long mode among it, Linux 6.12.117 refuses registers of long mode, which 6.12.107 did not:
/// `kvm_is_valid_sregs` in arch/x86/kvm/regs.c.
fn set_features(kvm: &Kvm, vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)
}

/// 64-bit ring 0, interrupts off (Intel SDM volume 3, 10.8.5).
fn set_registers(vcpu: &VcpuFd, iterations: u64) -> Result<(), kvm_ioctls::Error> {
    const CR0_PE_ET_PG: u64 = 1 | 1 << 4 | 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
    let mut sregs: kvm_sregs = vcpu.get_sregs()?;
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        type_: 3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        selector: 16,
        ..Default::default()
    };
    sregs.cs = kvm_segment { type_: 11, l: 1, db: 0, selector: 8, ..data };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 = CR0_PE_ET_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME_LMA;
    vcpu.set_sregs(&sregs)?;
    // CMPXCHG16B compares RDX:RAX with the 16 bytes at RBX; both are zero, so it stores RCX:RBX.
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, rcx: iterations, rbx: OPERAND, ..Default::default() })
}

/// The same number of iterations of a loop of the same two instructions on this processor.
#[allow(unsafe_code)]
fn host_time(iterations: u64) -> Duration {
    let start = Instant::now();
    // SAFETY: counts a register down to zero and touches nothing else.
    unsafe {
        std::arch::asm!("2:", "dec {n}", "jnz 2b", n = inout(reg) iterations => _, options(nomem, nostack));
    }
    start.elapsed().max(Duration::from_nanos(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_reaches_a_verdict_where_there_is_a_kvm() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("SKIPPED: needs KVM: /dev/kvm cannot be opened");
            return;
        };
        match run(&kvm).unwrap() {
            Verdict::Native { slowdown } => assert!(slowdown <= EMULATED_ABOVE),
            Verdict::Emulated { slowdown } => assert!(slowdown > EMULATED_ABOVE),
            Verdict::Incomplete { exit, .. } => assert!(!exit.is_empty()),
        }
    }
}
