//! The MMIO transport (virtio 1.2, 4.2.2), version 2.
//!
//! One [`MmioTransport`] stands between the driver and one device. It alone knows the device's status and holds
//! the driver to the order of virtio 1.2, 3.1.1: a register that is written out of turn keeps its value and the
//! attempt is counted. Queue registers are frozen from DRIVER_OK on, since the device uses them without a further
//! look.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{self, QueuePosition, QueueRegisters};
use super::{Activation, DeviceEvent, DeviceState, GuestMemory, Health, Interrupt, VirtioDevice};
use crate::error::{Error, Result};
use crate::event_loop::Registrar;
use crate::seccomp::Confinement;

/// `MagicValue`: "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;

/// `Version`: 1 is legacy, 2 is everything since virtio 1.0.
const VERSION: u32 = 2;

/// `VendorID`: no vendor is known to Linux; this one reads "mayu" in memory.
const VENDOR: u32 = u32::from_le_bytes(*b"mayu");

/// Where the device's own configuration starts.
const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;

/// The statuses of an initialisation in order (virtio 1.2, 3.1.1).
const ACKNOWLEDGED: u32 = ACKNOWLEDGE;
const DRIVER_FOUND: u32 = ACKNOWLEDGED | DRIVER;
const FEATURES_AGREED: u32 = DRIVER_FOUND | FEATURES_OK;

/// One device as its driver sees it.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    interrupt: Interrupt,
    queue_events: Vec<EventFd>,
    registrar: Registrar,
    health: Health,
    confinement: Confinement,
    registers: Registers,
    /// The device has been activated, and neither reset nor broken since.
    active: bool,
    paused: bool,
}

/// What the driver has written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    /// Without DEVICE_NEEDS_RESET, which follows from [`Health`].
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
}

/// A device and its transport between two instructions of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    registers: Registers,
    needs_reset: bool,
    interrupt_status: u32,
    positions: Vec<QueuePosition>,
    device: DeviceState,
}

impl MmioTransport {
    /// A transport for `device` after power-on. `queue_events` has one non-blocking eventfd per queue.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        interrupt: Interrupt,
        queue_events: Vec<EventFd>,
        registrar: Registrar,
        confinement: Confinement,
    ) -> Self {
        let registers = Registers::new(device.queue_sizes().len());
        Self {
            device,
            memory,
            interrupt,
            queue_events,
            registrar,
            health: Health::default(),
            confinement,
            registers,
            active: false,
            paused: false,
        }
    }

    /// The driver reads `data.len()` bytes at `offset`. What does not exist reads as zero.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.device.read_config(offset, data);
            return;
        }
        match (<&mut [u8; 4]>::try_from(data), self.read_register(offset)) {
            (Ok(data), Some(value)) => *data = value.to_le_bytes(),
            _ => self.health.count_error(),
        }
    }

    /// The driver writes `data` at `offset`. Anything but a legal write of a register is counted and ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let legal = match <[u8; 4]>::try_from(data) {
            Ok(value) => self.write_register(offset, u32::from_le_bytes(value)),
            Err(_) => false,
        };
        if !legal {
            self.health.count_error();
        }
    }

    /// Hands an event to the device, if it is there to take it.
    pub fn process(&mut self, event: DeviceEvent) {
        self.stop_if_broken();
        // `VirtioDevice::resume` looks at the queues anyway.
        if !self.active || (self.paused && matches!(event, DeviceEvent::Queue(_))) {
            return;
        }
        match self.device.process(event) {
            Err(error) => self.fail(error),
            Ok(()) if self.health.is_broken() => self.stop_and_tell(),
            Ok(()) => {}
        }
    }

    /// Stops work between two requests.
    pub fn pause(&mut self) {
        self.paused = true;
        if self.active {
            self.device.pause();
        }
    }

    /// Goes on after `pause` or `restore`.
    pub fn resume(&mut self) {
        self.paused = false;
        if self.active {
            self.device.resume();
            if self.health.is_broken() {
                self.stop_and_tell();
            }
        }
    }

    /// The whole state. Legal while paused.
    ///
    /// # Errors
    /// The device cannot tell its own.
    pub fn save(&self) -> Result<TransportState> {
        Ok(TransportState {
            registers: self.registers.clone(),
            needs_reset: self.health.is_broken(),
            interrupt_status: self.interrupt.status(),
            positions: self.device.queue_states().into_iter().map(QueuePosition::from).collect(),
            device: self.device.save()?,
        })
    }

    /// Takes up a saved state, in guest memory as it was then. Legal once, on a new transport, which it leaves paused.
    ///
    /// # Errors
    /// The state is not of a device like this one, or the device refuses it.
    pub fn restore(&mut self, state: &TransportState) -> Result<()> {
        if state.registers.queues.len() != self.registers.queues.len() {
            return Err(self.no_restore("the number of queues differs"));
        }
        if state.registers.driver_features & !self.offered_features() != 0 {
            return Err(self.no_restore("the driver uses a feature that this device does not have"));
        }
        self.device.restore(&state.device)?;
        self.registers = state.registers.clone();
        self.paused = true;
        if state.needs_reset {
            self.health.set_broken();
        } else if state.registers.status & DRIVER_OK != 0 {
            self.activate(&state.positions)?;
            self.device.pause();
        }
        self.interrupt.restore(state.interrupt_status).map_err(Error::EventFd)
    }

    /// The counters, whether the device needs a reset, and why.
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// The eventfd that KVM writes when the driver kicks this queue.
    pub fn queue_event(&self, queue: u16) -> Option<&EventFd> {
        self.queue_events.get(usize::from(queue))
    }

    /// Where KVM raises the device's interrupt.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    fn read_register(&mut self, offset: u64) -> Option<u32> {
        Some(match u32::try_from(offset).ok()? {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.device_type(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => {
                half(self.offered_features(), self.registers.device_features_select)
            }
            VIRTIO_MMIO_QUEUE_NUM_MAX => u32::from(self.selected_max_size()),
            VIRTIO_MMIO_QUEUE_READY => u32::from(self.registers.selected().is_some_and(|queue| queue.ready)),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS => self.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.device.config_generation(),
            // A shared memory region that does not exist has the length -1 (virtio 1.2, 4.2.2); none exists.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => return None,
        })
    }

    /// Whether the write was legal.
    fn write_register(&mut self, offset: u64, value: u32) -> bool {
        let Ok(register) = u32::try_from(offset) else {
            return false;
        };
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => return self.registers.write_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => return self.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => return self.write_status(value),
            VIRTIO_MMIO_SHM_SEL => {}
            _ => return self.registers.write_queue(register, value),
        }
        true
    }

    /// A kick that reached the VMM instead of KVM's ioeventfd.
    fn notify(&self, queue: u32) -> bool {
        let event = usize::try_from(queue).ok().and_then(|queue| self.queue_events.get(queue));
        match event {
            Some(event) if self.active => event.write(1).is_ok(),
            _ => false,
        }
    }

    fn status(&mut self) -> u32 {
        self.stop_if_broken();
        if self.health.is_broken() { self.registers.status | NEEDS_RESET } else { self.registers.status }
    }

    fn write_status(&mut self, value: u32) -> bool {
        if value == 0 {
            self.reset();
            return true;
        }
        let current = self.registers.status;
        // The device's own bit: a driver may write back what it has read.
        let value = value & !NEEDS_RESET;
        if value & current != current {
            return false;
        }
        match (current, value & !current) {
            (_, 0) => {}
            (_, FAILED) | (0, ACKNOWLEDGE) | (ACKNOWLEDGED, DRIVER) => self.registers.status = value,
            (DRIVER_FOUND, FEATURES_OK) => {
                if !self.features_acceptable() {
                    return false;
                }
                self.registers.status = value;
            }
            (FEATURES_AGREED, DRIVER_OK) => {
                self.registers.status = value;
                if let Err(error) = self.activate(&[]) {
                    self.fail(error);
                }
            }
            _ => return false,
        }
        true
    }

    fn features_acceptable(&self) -> bool {
        let accepted = self.registers.driver_features;
        accepted & !self.offered_features() == 0 && accepted & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1
    }

    fn selected_max_size(&self) -> u16 {
        let queue = usize::try_from(self.registers.queue_select).ok();
        queue.and_then(|queue| self.device.queue_sizes().get(queue).copied()).unwrap_or(0)
    }

    fn activate(&mut self, positions: &[QueuePosition]) -> Result<()> {
        let features = self.registers.driver_features;
        let queues = queue::build(
            &self.registers.queues,
            self.device.queue_sizes(),
            positions,
            features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
            &self.memory.memory(),
        )
        .map_err(|(queue, problem)| Error::QueueSetup {
            device_type: self.device.device_type(),
            queue,
            problem,
        })?;
        let queue_events = self
            .queue_events
            .iter()
            .map(EventFd::try_clone)
            .collect::<std::io::Result<_>>()
            .map_err(Error::EventFd)?;
        // From here on the device has to be reset, however it ends.
        self.active = true;
        self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            queue_events,
            interrupt: self.interrupt.clone(),
            features,
            registrar: self.registrar.clone(),
            health: self.health.clone(),
            confinement: self.confinement.clone(),
        })
    }

    /// The driver starts again.
    fn reset(&mut self) {
        self.stop();
        self.registers = Registers::new(self.registers.queues.len());
        self.interrupt.acknowledge(u32::MAX);
        self.health.reset();
    }

    fn fail(&mut self, error: Error) {
        self.health.fail(error);
        self.stop_and_tell();
    }

    /// A broken device does nothing more; and what it watches must not wake the event loop again and again.
    fn stop_and_tell(&mut self) {
        self.stop();
        // An eventfd that cannot be written leaves no other way to the driver, which then sees it in the status.
        let _ = self.interrupt.config_changed();
    }

    /// The same for a device that a worker thread found broken, and told the driver.
    fn stop_if_broken(&mut self) {
        if self.health.is_broken() {
            self.stop();
        }
    }

    fn stop(&mut self) {
        if self.active {
            self.active = false;
            self.device.reset();
        }
    }

    fn no_restore(&self, problem: &'static str) -> Error {
        Error::RestoreDevice { device_type: self.device.device_type(), problem }
    }
}

impl Registers {
    fn new(queues: usize) -> Self {
        Self { queues: vec![QueueRegisters::default(); queues], ..Self::default() }
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    fn write_driver_features(&mut self, value: u32) -> bool {
        let shift = match self.driver_features_select {
            0 => 0,
            1 => 32,
            // No feature is up there to be accepted.
            _ => return value == 0,
        };
        if self.status != DRIVER_FOUND {
            return false;
        }
        self.driver_features &= !(u64::from(u32::MAX) << shift);
        self.driver_features |= u64::from(value) << shift;
        true
    }

    /// Queues are set up between FEATURES_OK and DRIVER_OK, each until its QueueReady.
    fn write_queue(&mut self, register: u32, value: u32) -> bool {
        if self.status != FEATURES_AGREED {
            return false;
        }
        let selected = usize::try_from(self.queue_select).ok();
        let Some(queue) = selected.and_then(|selected| self.queues.get_mut(selected)) else {
            return false;
        };
        if register == VIRTIO_MMIO_QUEUE_READY && value <= 1 {
            queue.ready = value == 1;
            return true;
        }
        if queue.ready {
            return false;
        }
        match register {
            VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptor_table, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptor_table, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.avail_ring, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.avail_ring, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used_ring, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used_ring, value),
            _ => return false,
        }
        true
    }
}

/// The lower 32 bits of `value`, the upper ones, or nothing.
fn half(value: u64, select: u32) -> u32 {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([b0, b1, b2, b3]),
        1 => u32::from_le_bytes([b4, b5, b6, b7]),
        _ => 0,
    }
}

fn set_low(target: &mut u64, value: u32) {
    *target = *target & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(target: &mut u64, value: u32) {
    *target = *target & u64::from(u32::MAX) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests;
