//! How a machine comes into being, in one go.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use kvm_ioctls::VcpuFd;
use mayu_vmm_api::{BLOCK_SLOTS, MAX_NET_SLOTS, MAX_VCPUS, RateLimit, VmConfig, WorkingSet};
use vm_memory::{GuestAddress, GuestAddressSpace as _, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::cpuid::{CpuidTemplate, processor};
use crate::arch::{self, layout};
use crate::boot;
use crate::bus::{Bus, SharedTransport, lock};
use crate::devices::serial::serial;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{Block, BlockSlot};
use crate::devices::virtio::fs::Fs;
use crate::devices::virtio::mem::{Mem, MemHandle};
use crate::devices::virtio::net::{Net, NetSlot};
use crate::devices::virtio::rate_limiter::RateLimiter;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::transport::MmioTransport;
use crate::devices::virtio::vsock::{OnAccept, Vsock, VsockHandle};
use crate::devices::virtio::{GuestMemory, Interrupt, VirtioDevice};
use crate::error::{Error, Result};
use crate::event_loop::EventLoop;
use crate::kvm::Vm;
use crate::machine::{Machine, Saving};
use crate::memory::{self, Backing};
use crate::prefetch;
use crate::seccomp::Confinement;
use crate::snapshot::Snapshot;
use crate::vcpu::{Shared, Vcpus, exit_channel};

/// The guest finds the pod's share under this name.
pub const SHARE_TAG: &str = "mayu";

/// The number that the first device has in the event loop. The others follow in the order of their addresses.
pub const FIRST_DEVICE: u16 = 2;

/// The virtio devices that every machine has: the image, the block slots, vsock, rng, balloon, fs. After them come the network
/// slots, and the memory device if the guest's memory can grow, so that none of them has its place by what a machine may
/// lack.
const COMMON_DEVICES: usize = 1 + BLOCK_SLOTS as usize + 4;

// Each device has an interrupt line of its own, and the memory device needs one, too.
const _: () = assert!(COMMON_DEVICES + (MAX_NET_SLOTS as usize) < layout::MAX_VIRTIO_DEVICES);

/// How many virtio devices a machine with this description has.
fn device_count(config: &VmConfig) -> usize {
    let memory_grows = config.memory_mib < config.max_memory_mib;
    COMMON_DEVICES + usize::from(config.net_slots) + usize::from(memory_grows)
}

/// What a machine is made from, besides its description and its kernel.
pub struct Parts {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The guest's root filesystem.
    pub image: File,
    /// The write end of the console's pipe.
    pub console: OwnedFd,
    /// The share, whose threads have been started already: they need capabilities that this process gives up.
    pub fs: Fs,
    /// Called when the guest connects to a host port.
    pub on_accept: OnAccept,
    /// When the process was started.
    pub started: Instant,
    /// What its threads may do.
    pub confinement: Confinement,
}

/// Refuses a description that no machine can be built from.
///
/// # Errors
/// It has too many vCPUs or network slots, or none, or a context id that is no guest's.
pub fn check(config: &VmConfig) -> Result<()> {
    match config {
        VmConfig { vcpus: 0, .. } => Err(Error::VcpuCount { vcpus: 0 }),
        VmConfig { max_vcpus: vcpus, .. } if *vcpus > MAX_VCPUS => Err(Error::VcpuCount { vcpus: *vcpus }),
        VmConfig { vcpus, max_vcpus, .. } if vcpus > max_vcpus => {
            Err(Error::BootVcpus { vcpus: *vcpus, max_vcpus: *max_vcpus })
        }
        VmConfig { net_slots: slots, .. } if !(1..=MAX_NET_SLOTS).contains(slots) => {
            Err(Error::NetSlots { slots: *slots })
        }
        // 0 to 2 are the hypervisor, the local host and the host, and the largest means any (vsock(7)).
        VmConfig { guest_cid: cid @ (..=2 | u32::MAX), .. } => Err(Error::GuestCid { cid: *cid }),
        _ => Ok(()),
    }
}

/// Builds a machine whose vCPUs are ready to enter the kernel, but do not run. Its memory is that of a file, if there is one.
///
/// # Errors
/// The host lacks something, the kernel is not one, the memory is too small or too large, ...
pub fn build(
    config: &VmConfig,
    kernel: File,
    memory: Option<&File>,
    parts: Parts,
    events: &EventLoop,
) -> Result<Machine> {
    check(config)?;
    let saving = if memory.is_some() { Saving::Once } else { Saving::Never };
    let backing = memory.map_or(Backing::Anonymous, Backing::File);
    let memory = memory::map(config.memory_mib, config.max_memory_mib, backing)?;
    let entry = boot::load_kernel(&memory, kernel)?;
    let command_line = boot::command_line(config, device_count(config), saving == Saving::Once)?;
    let command_line_size = boot::load_command_line(&memory, &command_line)?;
    arch::boot::write_parameters(
        &memory,
        u64::from(config.memory_mib) << 20,
        command_line_size,
        config.max_vcpus,
    )?;
    let machine = assemble(config, &Origin::Kernel { entry }, memory, parts, events)?;
    Ok(Machine { saving, ..machine })
}

/// Builds a machine that goes on from where another was saved, with a copy of that one's memory. It is paused. Memory that was
/// plugged in is not there: it has to be saved before there is any.
///
/// # Errors
/// As [`build`], or the state is not that of a machine with this description.
pub fn restore(
    config: &VmConfig,
    snapshot: &Snapshot,
    memory: &File,
    working_set: Option<WorkingSet>,
    parts: Parts,
    events: &EventLoop,
) -> Result<Machine> {
    check(config)?;
    snapshot.check(config)?;
    let state = &snapshot.machine;
    if state.vcpus.len() != usize::from(config.max_vcpus) || state.devices.len() != device_count(config) {
        return Err(Error::RestoreMachine { vcpus: state.vcpus.len(), devices: state.devices.len() });
    }
    let memory = memory::map(config.memory_mib, config.max_memory_mib, Backing::CopyOf(memory))?;
    if let Some(WorkingSet { answer, .. }) = &working_set {
        prefetch::copy(answer, &memory);
    }
    let mut machine = assemble(config, &Origin::Saved(snapshot), memory, parts, events)?;
    match working_set {
        Some(WorkingSet { container, .. }) => machine.prefetch = container,
        None => prefetch::page_by_page(&machine.memory.memory()),
    }
    Ok(machine)
}

/// Where the guest starts.
enum Origin<'a> {
    /// At the kernel's entry.
    Kernel { entry: GuestAddress },
    /// Where it was saved.
    Saved(&'a Snapshot),
}

fn assemble(
    config: &VmConfig,
    origin: &Origin<'_>,
    memory: GuestMemoryMmap,
    parts: Parts,
    events: &EventLoop,
) -> Result<Machine> {
    let vm = Vm::new(parts.kvm)?;
    if let Origin::Saved(snapshot) = origin {
        snapshot.check_processor(&processor(&vm.supported_cpuid()?))?;
    }
    vm.set_memory(&memory)?;
    let memory = GuestMemoryAtomic::new(memory);

    let mut devices = Devices::new(&vm, &memory, events, &parts.confinement);
    let block_slots = devices.add_blocks(parts.image, &config.block_limit)?;
    let vsock = devices.add_vsock(config, parts.on_accept)?;
    devices.add("rng", Box::new(Rng::new()))?;
    let (balloon, reports) = Balloon::new();
    devices.add("balloon", Box::new(balloon))?;
    let files = parts.fs.handle();
    devices.add("fs", Box::new(parts.fs))?;
    let net_slots = devices.add_nets(config)?;
    let growth = devices.add_memory(config)?;
    let Devices { names, transports, .. } = devices;

    let line = eventfd()?;
    vm.connect_interrupt(&line, layout::SERIAL_GSI)?;
    let serial = match origin {
        Origin::Kernel { .. } => serial(line, parts.console)?,
        Origin::Saved(saved) => saved.machine.serial.restore(line, parts.console)?,
    };
    let fds = create_vcpus(&vm, config.max_vcpus, origin)?;
    if let Origin::Saved(Snapshot { machine, .. }) = origin {
        vm.restore(&machine.vm)?;
        for (device, saved) in transports.iter().zip(&machine.devices) {
            lock(device).restore(saved)?;
        }
    }
    let (exit_sender, exits) = exit_channel()?;
    let bus = Arc::new(Bus::new(serial, transports));
    let entered = Arc::new(OnceLock::new());
    let shared = Shared {
        bus: bus.clone(),
        exits: exit_sender,
        entered: entered.clone(),
        confinement: parts.confinement,
    };
    let mut vcpus = Vcpus::new(fds, vm.run_size(), shared)?;
    vcpus.start(config.vcpus)?;
    Ok(Machine {
        vcpus,
        vm,
        bus,
        names,
        block_slots,
        net_slots,
        vsock,
        files,
        exits,
        entered,
        started: parts.started,
        running: false,
        saving: Saving::Never,
        memory,
        config: config.clone(),
        prefetch: Vec::new(),
        growth,
        reports,
    })
}

fn create_vcpus(vm: &Vm, count: u8, origin: &Origin<'_>) -> Result<Vec<VcpuFd>> {
    let fds: Vec<_> = (0..count).map(|id| vm.create_vcpu(id)).collect::<Result<_>>()?;
    match origin {
        Origin::Kernel { entry } => {
            let template = CpuidTemplate::new(&vm.supported_cpuid()?, vm.has_tsc_deadline_timer(), count);
            for (id, fd) in (0..).zip(&fds) {
                arch::boot::configure_vcpu(fd, id, &template, *entry)?;
            }
        }
        Origin::Saved(saved) => {
            for (saved, fd) in saved.machine.vcpus.iter().zip(&fds) {
                saved.restore(fd)?;
            }
        }
    }
    Ok(fds)
}

/// The virtio devices so far. Their order is the same in every machine.
struct Devices<'a> {
    vm: &'a Vm,
    memory: &'a GuestMemory,
    events: &'a EventLoop,
    confinement: &'a Confinement,
    names: Vec<String>,
    transports: Vec<SharedTransport>,
}

impl<'a> Devices<'a> {
    fn new(vm: &'a Vm, memory: &'a GuestMemory, events: &'a EventLoop, confinement: &'a Confinement) -> Self {
        Self { vm, memory, events, confinement, names: Vec::new(), transports: Vec::new() }
    }

    /// The image comes first, since the kernel is told that the first block device is its root.
    fn add_blocks(&mut self, image: File, limit: &RateLimit) -> Result<Vec<BlockSlot>> {
        let (image, _) = Block::new(Some((image, true)))?;
        self.add("image", Box::new(image.with_id("image")))?;
        let mut slots = Vec::new();
        for number in 0..BLOCK_SLOTS {
            let name = format!("slot{number}");
            let (block, slot) = Block::new(None)?;
            let block = block.with_id(&name).with_limiter(RateLimiter::new(limit)?);
            self.add(&name, Box::new(block))?;
            slots.push(slot);
        }
        Ok(slots)
    }

    fn add_vsock(&mut self, config: &VmConfig, on_accept: OnAccept) -> Result<VsockHandle> {
        let (vsock, handle) = Vsock::new(config.guest_cid, config.host_ports.clone(), on_accept)?;
        self.add("vsock", Box::new(vsock))?;
        Ok(handle)
    }

    fn add_nets(&mut self, config: &VmConfig) -> Result<Vec<NetSlot>> {
        let mut slots = Vec::new();
        for number in 0..config.net_slots {
            let (net, slot) = Net::new(number, &config.net_limit)?;
            self.add(&format!("net{number}"), Box::new(net))?;
            slots.push(slot);
        }
        Ok(slots)
    }

    fn add_memory(&mut self, config: &VmConfig) -> Result<Option<MemHandle>> {
        let Some(region) = memory::pluggable(config.memory_mib, config.max_memory_mib) else {
            return Ok(None);
        };
        let (device, handle) = Mem::new(region);
        self.add("memory", Box::new(device))?;
        Ok(Some(handle))
    }

    /// Gives a device its address, interrupt line, and doorbells.
    fn add(&mut self, name: &str, device: Box<dyn VirtioDevice>) -> Result<()> {
        let index = self.transports.len();
        let line = eventfd()?;
        self.vm.connect_interrupt(&line, layout::virtio_gsi(index))?;
        let mut queue_events = Vec::new();
        for queue in (0..).take(device.queue_sizes().len()) {
            let event = eventfd()?;
            self.vm.connect_queue(&event, index, queue)?;
            queue_events.push(event);
        }
        let registrar = self.events.registrar(FIRST_DEVICE + index as u16);
        let transport = MmioTransport::new(
            device,
            self.memory.clone(),
            Interrupt::new(line),
            queue_events,
            registrar,
            self.confinement.clone(),
        );
        self.names.push(name.into());
        self.transports.push(Arc::new(Mutex::new(transport)));
        Ok(())
    }
}

fn eventfd() -> Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::EventFd)
}
