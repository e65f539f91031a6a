//! Runs a few hand-assembled instructions in a machine from the real builder. Unlike Linux, they run on any KVM.

#![allow(clippy::panic, clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::time::Instant;

use mayu_vmm::arch::state::VcpuState;
use mayu_vmm::builder::{self, Parts};
use mayu_vmm::devices::virtio::fs::Fs;
use mayu_vmm::event_loop::EventLoop;
use mayu_vmm::kvm::Vm;
use mayu_vmm::machine::Machine;
use mayu_vmm::seccomp::Confinement;
use mayu_vmm::snapshot::MachineState;
use mayu_vmm_api::{ExitReason, VmConfig};
use support::payload::{COUNT_FOREVER, RESET, elf, print};
use support::{config, no_kvm, skip};

/// `ud2`, without a handler for it nor for what follows.
const TRIPLE_FAULT: [u8; 2] = [0x0f, 0x0b];

fn open_kvm() -> OwnedFd {
    File::options().read(true).write(true).open("/dev/kvm").unwrap().into()
}

/// A machine, its event loop, and the read end of its console.
struct Guest {
    machine: Machine,
    events: EventLoop,
    console: File,
}

impl Guest {
    /// Builds a machine that will run `code`, or nothing where no machine can run.
    fn build(code: &[u8], config: &VmConfig) -> Option<Self> {
        if let Some(reason) = no_kvm() {
            skip(&reason);
            return None;
        }
        let (console, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let share = tempfile::tempdir().unwrap();
        let image = tempfile::tempfile().unwrap();
        image.set_len(4096).unwrap();
        let events = EventLoop::new().unwrap();
        let parts = Parts {
            kvm: open_kvm(),
            image,
            console: writer,
            fs: Fs::new("test", share.path(), &Confinement::none()).unwrap(),
            on_accept: Box::new(|_, _| {}),
            started: Instant::now(),
            confinement: Confinement::none(),
        };
        let machine = builder::build(config, elf(code), None, parts, &events).unwrap();
        machine.watch_exits(&events.registrar(1)).unwrap();
        Some(Self { machine, events, console: console.into() })
    }

    /// Lets the guest run to its end.
    fn run(&mut self) -> ExitReason {
        self.machine.resume().unwrap();
        self.events.wait().unwrap();
        self.machine.exit_reason().unwrap()
    }

    /// What the guest has printed, once it is gone.
    fn output(self) -> String {
        let Self { machine, mut console, .. } = self;
        assert_eq!(machine.finish_console(), 0);
        drop(machine);
        let mut output = String::new();
        console.read_to_string(&mut output).unwrap();
        output
    }
}

#[test]
fn a_guest_prints_and_resets() {
    let code = [print("hello\nworld"), RESET.to_vec()].concat();
    let Some(mut guest) = Guest::build(&code, &config()) else { return };
    assert_eq!(guest.machine.status().guest_entry_us, None);
    assert_eq!(guest.run(), ExitReason::GuestReset);
    assert!(guest.machine.status().guest_entry_us.is_some());
    assert_eq!(guest.output(), "hello\nworld");
}

#[test]
fn a_triple_fault_is_a_failure_of_a_vcpu() {
    let Some(mut guest) = Guest::build(&TRIPLE_FAULT, &config()) else { return };
    let reason = guest.run();
    assert_eq!(reason, ExitReason::Failed("vCPU 0: triple fault".into()));
}

#[test]
fn the_first_vcpu_s_end_is_enough_while_the_others_wait_for_it() {
    let Some(mut guest) = Guest::build(&RESET, &VmConfig { vcpus: 4, max_vcpus: 4, ..config() }) else {
        return;
    };
    assert_eq!(guest.run(), ExitReason::GuestReset);
}

#[test]
fn a_paused_machine_stands_still_and_goes_on() {
    let Some(Guest { mut machine, .. }) =
        Guest::build(&COUNT_FOREVER, &VmConfig { vcpus: 2, max_vcpus: 2, ..config() })
    else {
        return;
    };
    assert_eq!(machine.pause().unwrap_err().to_string(), "the vCPUs are not running");
    assert!(machine.save().is_ok());

    machine.resume().unwrap();
    assert_eq!(machine.resume().unwrap_err().to_string(), "the vCPUs are running");
    assert!(machine.save().is_err());
    let first = count_until_it_grows(&mut machine, 0);
    assert_eq!(count(&machine.save().unwrap().machine), first);
    machine.resume().unwrap();
    assert!(count_until_it_grows(&mut machine, first) > first);
}

/// Pauses and resumes until the guest has counted beyond `than`; leaves it paused. It may be paused before its first
/// instruction any number of times.
fn count_until_it_grows(machine: &mut Machine, than: u64) -> u64 {
    loop {
        machine.pause().unwrap();
        let count = count(&machine.save().unwrap().machine);
        if count > than {
            return count;
        }
        machine.resume().unwrap();
    }
}

fn count(state: &MachineState) -> u64 {
    state.vcpus[0].regs().rbx
}

#[test]
fn a_saved_vcpu_is_the_same_after_its_restoration() {
    let Some(Guest { mut machine, .. }) = Guest::build(&COUNT_FOREVER, &config()) else { return };
    machine.resume().unwrap();
    count_until_it_grows(&mut machine, 0);
    let saved = serde_json::to_string(&machine.save().unwrap().machine).unwrap();
    let saved: MachineState = serde_json::from_str(&saved).unwrap();

    let vm = Vm::new(open_kvm()).unwrap();
    let fd = vm.create_vcpu(0).unwrap();
    saved.vcpus[0].restore(&fd).unwrap();
    vm.restore(&saved.vm).unwrap();
    let restored = VcpuState::save(&fd, &vm.msrs_to_save().unwrap()).unwrap();

    let (saved, restored) = (without_time(&saved.vcpus[0]), without_time(&restored));
    for (part, value) in saved.as_object().unwrap() {
        assert_eq!(*value, restored[part], "{part}");
    }
}

/// The state as JSON, without what goes on while nobody runs: the time stamp counter and the clocks made of it.
fn without_time(state: &VcpuState) -> serde_json::Value {
    const TIME: [u32; 4] = [
        0x10,        // IA32_TSC
        0x3b,        // IA32_TSC_ADJUST
        0x4000_0010, // HV_X64_MSR_VP_RUNTIME
        0x4000_0020, // HV_X64_MSR_TIME_REF_COUNT
    ];
    let mut state = serde_json::to_value(state).unwrap();
    let msrs = state["msrs"].as_array_mut().unwrap();
    // An entry is its bytes, and the index comes first.
    msrs.retain(|msr| {
        let index: [u8; 4] = std::array::from_fn(|byte| msr[byte].as_u64().unwrap() as u8);
        !TIME.contains(&u32::from_le_bytes(index))
    });
    state
}
