//! A built machine: what can be done with it while it lives.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::thread::Builder;
use std::time::Instant;

use mayu_vmm_api::{ExitReason, Pages, Status, VmConfig};
use vm_memory::GuestAddressSpace as _;

use crate::arch::cpuid::processor;
use crate::bus::{Bus, SharedTransport, lock};
use crate::devices::serial::SerialState;
use crate::devices::virtio::balloon::BalloonHandle;
use crate::devices::virtio::block::BlockSlot;
use crate::devices::virtio::fs::FsHandle;
use crate::devices::virtio::mem::MemHandle;
use crate::devices::virtio::net::NetSlot;
use crate::devices::virtio::vsock::{OnResult, VsockHandle};
use crate::devices::virtio::{DeviceEvent, GuestMemory};
use crate::error::{Error, Result};
use crate::event_loop::Registrar;
use crate::kvm::Vm;
use crate::memory;
use crate::prefetch::Prefetch;
use crate::snapshot::{MachineState, Snapshot};
use crate::vcpu::{ExitReceiver, Vcpus};

/// Whether a machine can be saved with its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Saving {
    /// Its memory was never a file's.
    Never,
    /// Its memory is a file's.
    Once,
    /// Its memory was a file's.
    Done,
}

/// One virtual machine with its devices. Dropping it stops the vCPUs first.
pub struct Machine {
    pub(crate) vcpus: Vcpus,
    pub(crate) vm: Vm,
    pub(crate) bus: Arc<Bus>,
    pub(crate) names: Vec<String>,
    pub(crate) block_slots: Vec<BlockSlot>,
    pub(crate) net_slots: Vec<NetSlot>,
    pub(crate) vsock: VsockHandle,
    pub(crate) files: FsHandle,
    pub(crate) exits: ExitReceiver,
    pub(crate) entered: Arc<OnceLock<Instant>>,
    pub(crate) started: Instant,
    pub(crate) running: bool,
    /// Whether it can be saved with its memory.
    pub(crate) saving: Saving,
    /// Dropped after `vm`, which uses it.
    pub(crate) memory: GuestMemory,
    /// What it was built from.
    pub(crate) config: VmConfig,
    /// What its first container will touch.
    pub(crate) prefetch: Vec<Pages>,
    /// Where its memory grows, if it can.
    pub(crate) growth: Option<MemHandle>,
    /// How much memory the guest has said that it does not use.
    pub(crate) reports: BalloonHandle,
}

impl Machine {
    /// Lets devices and vCPUs run. In a restored machine, opens first what the guest had open.
    ///
    /// # Errors
    /// They run already, or something that the guest had open is not there.
    pub fn resume(&mut self) -> Result<()> {
        if self.running {
            return Err(Error::Running(true));
        }
        self.files.recover()?;
        for device in self.bus.virtio() {
            lock(device).resume();
        }
        self.vcpus.resume(0)?;
        self.running = true;
        Ok(())
    }

    /// Maps what the first container will touch, if that is known, in a thread of its own.
    ///
    /// # Errors
    /// The host has no thread for it.
    pub fn prefetch(&mut self) -> Result<()> {
        let pages = std::mem::take(&mut self.prefetch);
        if pages.is_empty() {
            return Ok(());
        }
        let prefetch = Prefetch::new(pages, self.vcpus.idle())?;
        let memory = self.memory.memory();
        // It inherits the event loop's filter, has to do with nothing that the guest says, and ends soon.
        Builder::new()
            .name("prefetch".into())
            .spawn(move || prefetch.run(&memory))
            .map_err(Error::PrefetchThread)?;
        Ok(())
    }

    /// Lets the guest bring up the first `count` vCPUs. It keeps those that it has had.
    ///
    /// # Errors
    /// The machine has fewer, or the host has no thread for one.
    pub fn start_vcpus(&mut self, count: u8) -> Result<()> {
        if count > self.config.max_vcpus {
            return Err(Error::StartVcpus { count, vcpus: self.config.max_vcpus });
        }
        let first = self.vcpus.started();
        self.vcpus.start(count)?;
        if self.running { self.vcpus.resume(first) } else { Ok(()) }
    }

    /// Stops the vCPUs between two instructions, and then the devices between two requests.
    ///
    /// # Errors
    /// They do not run, or a vCPU does not stop.
    pub fn pause(&mut self) -> Result<()> {
        if !self.running {
            return Err(Error::Running(false));
        }
        self.vcpus.pause()?;
        self.running = false;
        for device in self.bus.virtio() {
            lock(device).pause();
        }
        Ok(())
    }

    /// Writes everything that the machine is to an empty file, but its memory, which its own file has as it is now. When the machine
    /// goes on, it leaves that file alone. `memory` is that file, opened to be read.
    ///
    /// # Errors
    /// As [`Machine::save`]; its memory is no file's; or the state cannot be written. The machine can go on.
    pub fn save_with_memory(&mut self, state: File, memory: &File) -> Result<()> {
        match self.saving {
            Saving::Never => return Err(Error::NotATemplate),
            Saving::Done => return Err(Error::SavedAlready),
            Saving::Once => self.save()?.write(state)?,
        }
        // Also if it fails: then the file may have some of the memory, and lose it when the machine goes on.
        self.saving = Saving::Done;
        memory::part_from_file(&self.memory.memory(), memory)
    }

    /// Reads everything that the machine is, but its memory.
    ///
    /// # Errors
    /// It runs, it has something that would not be in its state, or KVM refuses.
    pub fn save(&mut self) -> Result<Snapshot> {
        if self.running {
            return Err(Error::Running(true));
        }
        self.check_savable()?;
        let devices = self.bus.virtio().iter().map(|device| lock(device).save());
        let state = MachineState {
            devices: devices.collect::<Result<_>>()?,
            vcpus: self.vcpus.save(self.vm.msrs_to_save()?)?,
            vm: self.vm.save()?,
            serial: SerialState::save(&self.bus.serial()),
        };
        Ok(Snapshot::new(self.config.clone(), processor(&self.vm.supported_cpuid()?), state))
    }

    /// Memory that was plugged in is not the file's, and what is behind a block slot is the shim's.
    fn check_savable(&self) -> Result<()> {
        if self.growth.as_ref().is_some_and(|growth| growth.plugged() > 0) {
            return Err(Error::NotNow { obstacle: "memory is plugged in".into() });
        }
        match self.block_slots.iter().position(BlockSlot::is_filled) {
            Some(slot) => Err(Error::NotNow { obstacle: format!("block slot {slot} is filled") }),
            None => Ok(()),
        }
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Connects a stream to a vsock port of the guest.
    pub fn connect(&self, stream: OwnedFd, port: u32, on_result: OnResult) {
        self.vsock.connect(stream, port, on_result);
    }

    /// Puts a file behind an empty block slot.
    ///
    /// # Errors
    /// There is no such slot, it is not empty, or the file is of no use.
    pub fn attach_block(&self, slot: u8, file: File, read_only: bool) -> Result<()> {
        find("block", &self.block_slots, slot)?.attach(file, read_only)
    }

    /// Takes the file of a block slot away.
    ///
    /// # Errors
    /// There is no such slot, or it is empty.
    pub fn detach_block(&self, slot: u8) -> Result<()> {
        find("block", &self.block_slots, slot)?.detach()
    }

    /// Puts a TAP device behind an empty network slot.
    ///
    /// # Errors
    /// There is no such slot, it is not empty, or the descriptor is of no use.
    pub fn attach_net(&self, slot: u8, tap: File) -> Result<()> {
        find("network", &self.net_slots, slot)?.attach(tap)
    }

    /// Asks the guest to have `mib` MiB of memory, those included with which it has booted. [`Machine::status`] tells how
    /// far it has come.
    ///
    /// # Errors
    /// The machine cannot have so much or so little, or the host has less in all.
    pub fn resize_memory(&self, mib: u32) -> Result<()> {
        let (least, most) = (self.config.memory_mib, self.config.max_memory_mib);
        if !(least..=most).contains(&mib) {
            return Err(Error::ResizeMemory { mib, least, most });
        }
        memory::check_host(mib)?;
        match &self.growth {
            Some(growth) => growth.resize(u64::from(mib - least) << 20),
            None => Ok(()),
        }
    }

    /// The machine's counters.
    pub fn status(&self) -> Status {
        let errors = |device: &SharedTransport| lock(device).health().errors();
        Status {
            running: self.running,
            guest_entry_us: self
                .entered
                .get()
                .map(|entered| entered.duration_since(self.started).as_micros() as u64),
            plugged_mib: self.growth.as_ref().map_or(0, |growth| growth.plugged() >> 20) as u32,
            reported_mib: self.reports.reported() >> 20,
            device_errors: self.names.iter().cloned().zip(self.bus.virtio().iter().map(errors)).collect(),
        }
    }

    /// Has the event loop wake up when a vCPU stops for good.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn watch_exits(&self, registrar: &Registrar) -> Result<()> {
        registrar.watch(self.exits.event(), vmm_sys_util::epoll::EventSet::IN, 0)
    }

    /// Why a vCPU has stopped for good, if one has.
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.exits.reason()
    }

    /// Hands an event to a device. Returns the device's name and what has just gone wrong with it, if anything has.
    pub fn process(&self, device: usize, event: DeviceEvent) -> Option<(&str, Error)> {
        let mut transport = lock(self.bus.virtio().get(device)?);
        if let DeviceEvent::Queue(queue) = event {
            // An eventfd that was read meanwhile says so, and the device finds an empty queue.
            let _ = transport.queue_event(queue)?.read();
        }
        transport.process(event);
        let failure = transport.health().take_failure()?;
        Some((self.names.get(device)?, failure))
    }

    /// Writes what the guest left of an unfinished line on its console, and returns how many bytes were dropped.
    pub fn finish_console(&self) -> u64 {
        let mut serial = self.bus.serial();
        serial.writer_mut().finish();
        serial.writer().dropped()
    }
}

fn find<'a, T>(kind: &'static str, slots: &'a [T], slot: u8) -> Result<&'a T> {
    slots.get(usize::from(slot)).ok_or(Error::NoSuchSlot { kind, slot, slots: slots.len() })
}
