//! Is there a KVM, may we use it, and does it run a guest kernel natively?

use std::io::ErrorKind;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

use super::Fact;
use super::probe::{self, Verdict};

const DEVICE: &str = "/dev/kvm";

/// The only KVM API version there has been since Linux 2.6.22 (kernel: Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;

/// What the VMM builds its machine from, and why.
const CAPABILITIES: &[(Cap, &str)] = &[
    (Cap::Irqchip, "in-kernel interrupt controller"),
    (Cap::Irqfd, "interrupts from devices"),
    (Cap::Ioeventfd, "kicks from drivers"),
    (Cap::UserMemory, "guest memory"),
    (Cap::SetTssAddr, "task state segment"),
    (Cap::ExtCpuid, "CPU features"),
    (Cap::ImmediateExit, "pausing vCPUs"),
    (Cap::TscDeadlineTimer, "a timer that needs no calibration"),
    (Cap::MpState, "states of several vCPUs"),
];

/// The facts about KVM. Later ones are left out where an earlier one makes them moot.
pub fn facts() -> Vec<Fact> {
    let kvm = match open() {
        Ok(kvm) => kvm,
        Err(fact) => return vec![fact],
    };
    let mut facts = vec![Fact::good("kvm", format!("{DEVICE} can be opened"))];
    facts.push(interface(&kvm));
    if facts.iter().all(|fact| fact.ok) {
        facts.push(execution(&kvm));
    }
    facts
}

fn open() -> Result<Kvm, Fact> {
    if !Path::new(DEVICE).exists() {
        return Err(Fact::bad(
            "kvm",
            format!("{DEVICE} is absent"),
            "load kvm_intel or kvm_amd; in a virtual machine, have nested virtualisation enabled on its host",
        ));
    }
    Kvm::new().map_err(|error| {
        let error = std::io::Error::from(error);
        let remedy = match error.kind() {
            ErrorKind::PermissionDenied => "run as root, or as a member of the group that owns the device",
            _ => "see the kernel's log for why KVM refuses",
        };
        Fact::bad("kvm", format!("{DEVICE} cannot be opened: {error}"), remedy)
    })
}

fn interface(kvm: &Kvm) -> Fact {
    let version = kvm.get_api_version();
    if version != API_VERSION {
        let found = format!("API version {version} instead of {API_VERSION}");
        return Fact::bad("kvm-interface", found, "use a Linux kernel of 5.10 or later");
    }
    let missing: Vec<_> = CAPABILITIES
        .iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap))
        .map(|(_, purpose)| *purpose)
        .collect();
    if missing.is_empty() {
        Fact::good("kvm-interface", format!("API version {version}, all {} capabilities", CAPABILITIES.len()))
    } else {
        let found = format!("no support for: {}", missing.join(", "));
        Fact::bad("kvm-interface", found, "use a Linux kernel of 5.10 or later with an ordinary KVM")
    }
}

fn execution(kvm: &Kvm) -> Fact {
    const NAME: &str = "kvm-execution";
    const REMEDY: &str =
        "use a host whose KVM runs guest kernels on the processor: bare metal, or real nested virtualisation";
    match probe::run(kvm) {
        Ok(Verdict::Native { slowdown }) => Fact::good(
            NAME,
            format!("guest kernel code runs natively ({slowdown:.1} times the host's own time)"),
        ),
        Ok(Verdict::Emulated { slowdown }) => Fact::bad(
            NAME,
            format!(
                "guest kernel code is emulated, {slowdown:.0} times slower than on the host; no stock kernel boots"
            ),
            REMEDY,
        ),
        Ok(Verdict::Incomplete { instruction, exit }) => {
            Fact::bad(NAME, format!("a guest kernel cannot execute {instruction}: {exit}"), REMEDY)
        }
        Err(error) => Fact::bad(NAME, error.to_string(), "see the kernel's log for why KVM refuses"),
    }
}
