//! Saves a running Linux guest, and has it go on in a second machine. Files come from the environment, as for
//! `boot_linux`.

#![allow(clippy::panic, clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver};
use std::time::Instant;

use mayu_vmm::builder::{self, FIRST_DEVICE, Parts, SHARE_TAG};
use mayu_vmm::devices::virtio::fs::Fs;
use mayu_vmm::event_loop::EventLoop;
use mayu_vmm::machine::Machine;
use mayu_vmm::memory;
use mayu_vmm::seccomp::Confinement;
use mayu_vmm::snapshot::MachineState;
use mayu_vmm_api::VmConfig;
use support::{config, guest_files};
use vm_memory::{
    Bytes as _, GuestAddressSpace as _, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion as _,
};

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

fn copy(from: &GuestMemoryMmap, mib: u32) -> GuestMemoryMmap {
    let to = memory::allocate(mib, mib).unwrap();
    for region in from.iter() {
        let mut bytes = vec![0; region.len() as usize];
        from.read_slice(&mut bytes, region.start_addr()).unwrap();
        to.write_slice(&bytes, region.start_addr()).unwrap();
    }
    to
}

#[test]
fn a_saved_guest_goes_on_in_another_machine() {
    let Some(host) = Host::new() else { return };
    let config = VmConfig { vcpus: 2, max_vcpus: 2, ..config() };

    let (parts, accepted) = host.parts();
    let mut events = EventLoop::new().unwrap();
    let mut first = builder::build(&config, host.kernel.try_clone().unwrap(), parts, &events).unwrap();
    first.resume().unwrap();
    let _stream = run(&first, &mut events, || accepted.try_recv().ok());
    first.pause().unwrap();
    let state = serde_json::to_string(&first.save().unwrap()).unwrap();
    let memory = copy(&first.memory().memory(), config.memory_mib);
    drop(first);

    let state: MachineState = serde_json::from_str(&state).unwrap();
    let (parts, _accepted) = host.parts();
    let mut events = EventLoop::new().unwrap();
    let mut second = builder::restore(&config, &state, memory, parts, &events).unwrap();
    second.resume().unwrap();
    // Nobody may listen there, but only a guest whose processors, interrupts and queues work can say so.
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let (sender, answer) = mpsc::channel();
    second.connect(theirs.into(), 1025, Box::new(move |outcome| sender.send(outcome).unwrap()));
    let outcome = run(&second, &mut events, || answer.try_recv().ok());
    println!("the restored guest answered {outcome:?}");
}
