//! Saves a running Linux guest, and has it go on in a second machine. Files come from the environment, as for
//! `boot_linux`.

#![allow(clippy::panic, clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::Seek as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver};
use std::time::Instant;

use mayu_vmm::builder::{self, FIRST_DEVICE, Parts, SHARE_TAG};
use mayu_vmm::devices::virtio::fs::Fs;
use mayu_vmm::event_loop::EventLoop;
use mayu_vmm::machine::Machine;
use mayu_vmm::seccomp::Confinement;
use mayu_vmm::snapshot::Snapshot;
use mayu_vmm_api::{Pages, VmConfig, WorkingSet};
use serde_json::Value;
use support::{config, guest_files, memory_file};

/// What is the same for both machines.
struct Host {
    kernel: File,
    image: File,
    share: tempfile::TempDir,
}

impl Host {
    fn new() -> Option<Self> {
        let (kernel, image) = guest_files()?;
        Some(Self { kernel, image, share: tempfile::tempdir().unwrap() })
    }

    /// The parts of a machine, and where streams that its guest connects arrive.
    fn parts(&self) -> (Parts, Receiver<OwnedFd>) {
        let (sender, accepted) = mpsc::channel();
        let parts = Parts {
            kvm: File::options().read(true).write(true).open("/dev/kvm").unwrap().into(),
            image: self.image.try_clone().unwrap(),
            console: File::options().write(true).open("/dev/null").unwrap().into(),
            fs: Fs::new(SHARE_TAG, self.share.path(), &Confinement::none()).unwrap(),
            on_accept: Box::new(move |_, stream| sender.send(stream).unwrap()),
            started: Instant::now(),
            confinement: Confinement::none(),
        };
        (parts, accepted)
    }
}

/// Lets the machine run until `done` answers.
fn run<T>(machine: &Machine, events: &mut EventLoop, mut done: impl FnMut() -> Option<T>) -> T {
    loop {
        for ready in events.wait().unwrap() {
            let device = usize::from(ready.owner - FIRST_DEVICE);
            if let Some((name, error)) = machine.process(device, ready.event) {
                panic!("{name}: {error}");
            }
        }
        if let Some(value) = done() {
            return value;
        }
    }
}

/// A machine's state without what goes on while it stands still, the host's clocks, and without what KVM computes anew from the rest when
/// it sets it or before it needs it: the local APIC's processor priority (Intel SDM, volume 3, 12.8.3.1).
fn lasting(snapshot: &Snapshot) -> Value {
    // The TSC, and a vCPU's run time and the machine's age as Hyper-V's guests read them (TLFS, HV_X64_MSR_VP_RUNTIME,
    // HV_X64_MSR_TIME_REF_COUNT).
    const CLOCKS: [u32; 3] = [0x10, 0x4000_0010, 0x4000_0020];
    const TIMER_COUNT: std::ops::Range<usize> = 0x390..0x394;
    const PROCESSOR_PRIORITY: std::ops::Range<usize> = 0xa0..0xa4;
    let is_clock = |msr: &Value| {
        let index = CLOCKS.map(|clock| clock.to_le_bytes().map(Value::from));
        index.iter().any(|index| msr.as_array().unwrap().starts_with(index))
    };
    let mut state = serde_json::to_value(&snapshot.machine).unwrap();
    state["vm"]["clock"].take();
    for vcpu in state["vcpus"].as_array_mut().unwrap() {
        vcpu["msrs"].as_array_mut().unwrap().retain(|msr| !is_clock(msr));
        for derived in [TIMER_COUNT, PROCESSOR_PRIORITY] {
            vcpu["lapic"].as_array_mut().unwrap()[derived].fill(Value::Null);
        }
    }
    state
}

#[test]
fn a_saved_guest_goes_on_in_another_machine() {
    let Some(host) = Host::new() else { return };
    let config = VmConfig { vcpus: 2, max_vcpus: 3, ..config() };

    let (parts, accepted) = host.parts();
    let mut events = EventLoop::new().unwrap();
    let memory = memory_file(&config);
    let kernel = host.kernel.try_clone().unwrap();
    let mut first = builder::build(&config, kernel, Some(&memory), parts, &events).unwrap();
    first.resume().unwrap();
    let _stream = run(&first, &mut events, || accepted.try_recv().ok());
    first.pause().unwrap();
    let state = tempfile::tempfile().unwrap();
    first.save().unwrap().write(state.try_clone().unwrap()).unwrap();
    drop(first);

    (&state).rewind().unwrap();
    let snapshot = Snapshot::read(state).unwrap();
    let pages = |first, count, written| Pages { first, count, written };
    let working_set = WorkingSet {
        answer: vec![pages(5000, 100, true), pages(u32::MAX, 1, true)],
        container: vec![pages(0, 2000, false), pages(u32::MAX, 1, true), pages(6000, 500, true)],
    };
    for working_set in [None, Some(working_set)] {
        goes_on(&host, &config, &snapshot, &memory, working_set);
    }
}

fn goes_on(host: &Host, config: &VmConfig, saved: &Snapshot, memory: &File, working_set: Option<WorkingSet>) {
    let (parts, _accepted) = host.parts();
    let mut events = EventLoop::new().unwrap();
    let mut second = builder::restore(config, saved, memory, working_set, parts, &events).unwrap();
    assert_eq!(lasting(&second.save().unwrap()), lasting(saved));
    second.resume().unwrap();
    second.prefetch().unwrap();
    // Nobody may listen there, but only a guest whose processors, interrupts and queues work can say so.
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let (sender, answer) = mpsc::channel();
    second.connect(theirs.into(), 1025, Box::new(move |outcome| sender.send(outcome).unwrap()));
    let outcome = run(&second, &mut events, || answer.try_recv().ok());
    println!("the restored guest answered {outcome:?}");
}
