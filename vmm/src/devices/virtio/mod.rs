//! virtio devices over the MMIO transport (virtio 1.2).
//!
//! [`transport::MmioTransport`] owns everything that all devices have in common: status, feature negotiation,
//! queue set-up and its freezing, interrupts, reset. A [`VirtioDevice`] is handed what it needs when the driver
//! is ready and implements only what it does.
//!
//! The driver is hostile. `queue` checks where it puts its rings, [`chain`] what it puts into a descriptor chain;
//! what remains to a device is the meaning of the bytes.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};
use crate::event_loop::Registrar;
use crate::seccomp::Confinement;

mod announcement;
pub mod balloon;
pub mod block;
pub mod chain;
mod discard;
pub mod fs;
pub mod mem;
pub mod net;
mod queue;
pub mod rate_limiter;
pub mod rng;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
pub mod transport;
mod used;
pub mod vsock;

/// Guest memory as every device sees it.
pub type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// `InterruptStatus` bit 0: a device has used a buffer (virtio 1.2, 4.2.2).
const INTERRUPT_USED_RING: u32 = 1;

/// `InterruptStatus` bit 1: the device's configuration has changed (virtio 1.2, 4.2.2).
const INTERRUPT_CONFIG: u32 = 2;

/// A device's way to its driver: the transport's interrupt status and an irqfd.
#[derive(Clone)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    line: Arc<EventFd>,
}

impl Interrupt {
    /// An interrupt that raises `line`, an eventfd that KVM knows as an irqfd.
    pub fn new(line: EventFd) -> Self {
        Self { status: Arc::default(), line: Arc::new(line) }
    }

    /// Tells the driver that buffers were used.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    pub fn used_ring(&self) -> std::io::Result<()> {
        self.raise(INTERRUPT_USED_RING)
    }

    /// Tells the driver that the configuration or the device's status has changed.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    pub fn config_changed(&self) -> std::io::Result<()> {
        self.raise(INTERRUPT_CONFIG)
    }

    /// The bits of `InterruptStatus`.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver has handled these bits.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The eventfd behind it, for KVM.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Takes up saved bits of `InterruptStatus`. Raises the line for them, since a driver that was told before the
    /// save may not have been interrupted yet; one that has been takes it for a spurious interrupt.
    fn restore(&self, bits: u32) -> std::io::Result<()> {
        match bits {
            0 => Ok(()),
            bits => self.raise(bits),
        }
    }

    fn raise(&self, bit: u32) -> std::io::Result<()> {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.line.write(1)
    }
}

/// What a device is handed when its driver sets DRIVER_OK.
pub struct Activation {
    /// All of guest memory.
    pub memory: GuestMemory,
    /// The device's queues, set up by the driver, checked, and frozen until reset. One that the driver left out
    /// is there too, but not `ready()`.
    pub queues: Vec<Queue>,
    /// One eventfd per queue, written by KVM when the driver kicks it.
    pub queue_events: Vec<EventFd>,
    /// The way to the driver.
    pub interrupt: Interrupt,
    /// The features that the driver accepted.
    pub features: u64,
    /// Registers descriptors with the event loop, which calls [`VirtioDevice::process`] when one is ready.
    pub registrar: Registrar,
    /// Set by a device that the driver has broken; the transport then sets DEVICE_NEEDS_RESET.
    pub health: Health,
    /// What the device's threads may do.
    pub confinement: Confinement,
}

/// Counts protocol violations and remembers that a device is beyond use until it is reset.
/// Shared by the transport, the device and its worker threads.
#[derive(Clone, Debug, Default)]
pub struct Health {
    errors: Arc<AtomicU64>,
    broken: Arc<AtomicBool>,
    failure: Arc<Mutex<Option<Error>>>,
}

impl Health {
    /// Counts a request that was refused because the driver broke the protocol.
    pub fn count_error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts an error after which the device can do nothing before it is reset. The transport looks after each
    /// event that it delivers and tells the driver; a worker thread calls [`Interrupt::config_changed`] itself.
    pub fn set_broken(&self) {
        self.count_error();
        self.broken.store(true, Ordering::SeqCst);
    }

    /// The same, with the reason.
    pub fn fail(&self, error: Error) {
        self.note(error);
        self.set_broken();
    }

    /// Remembers for the log what went wrong on the host's side. The device goes on as well as it can.
    pub fn note(&self, error: Error) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    /// What last went wrong, if that has not been asked before: for the log.
    pub fn take_failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether the device needs a reset.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// The driver has reset the device. The count stays.
    pub fn reset(&self) {
        self.broken.store(false, Ordering::SeqCst);
    }

    /// Refused requests since the machine was built.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }
}

/// Fills `out` with what lies at `offset` of a device's configuration; what lies beyond reads as zero.
fn read_config_from(config: &[u8], offset: u64, out: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    for (number, byte) in out.iter_mut().enumerate() {
        *byte = rest.get(number).copied().unwrap_or(0);
    }
}

/// Why the event loop calls a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// The driver kicked this queue. The eventfd has been read already.
    Queue(u16),
    /// A descriptor that the device registered under this token is ready.
    Backend {
        /// The device's own name for the descriptor.
        token: u32,
        /// Ready to be read, or closed by the other side.
        readable: bool,
        /// Ready to be written.
        writable: bool,
    },
}

/// What a device does, beyond what all of them have in common.
///
/// The transport calls `activate` once after each reset, `process` only between `activate` and `reset`, and
/// `read_config` at any time. A device whose work can block does it in a thread of its own, started by `activate`
/// and joined by `reset`.
pub trait VirtioDevice: Send {
    /// The device's id (virtio 1.2, 5).
    fn device_type(&self) -> u32;
    /// The features it offers, beyond `VIRTIO_F_VERSION_1`, which the transport adds.
    fn features(&self) -> u64;
    /// The largest size of each of its queues.
    fn queue_sizes(&self) -> &[u16];
    /// Fills `out` with its configuration from `offset` on; what lies beyond reads as zero.
    fn read_config(&self, offset: u64, out: &mut [u8]);
    /// Differs whenever `read_config` may answer differently (virtio 1.2, 4.2.2.1). Only a device whose
    /// configuration changes has to say something here.
    fn config_generation(&self) -> u32 {
        0
    }
    /// The driver is ready. The queues may already have positions, after a restore: the device waits for a kick,
    /// or for `resume`, before it looks into them.
    ///
    /// # Errors
    /// The device cannot work; the transport sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<()>;
    /// Something that it registered for has happened.
    ///
    /// # Errors
    /// Its own state is beyond repair; the transport sets DEVICE_NEEDS_RESET. A driver's mistake in one request is
    /// no such error: that request fails, and is counted in [`Health`].
    fn process(&mut self, event: DeviceEvent) -> Result<()>;
    /// Stops work, gives up memory and queues, and returns to the state before `activate`.
    fn reset(&mut self);
    /// Lets requests in flight finish and starts none, until `resume`. Queues keep their positions.
    fn pause(&mut self);
    /// Goes on after `pause`, also with what the driver queued meanwhile.
    fn resume(&mut self);
    /// Everything that a device built with the same resources needs to go on from here. Legal while paused.
    ///
    /// # Errors
    /// It cannot tell all that its driver relies on.
    fn save(&self) -> Result<DeviceState>;
    /// Takes up a saved state. Called at most once, before `activate`. A device that keeps nothing beside its
    /// queues has nothing to do.
    ///
    /// # Errors
    /// The state is another device's.
    fn restore(&mut self, _state: &DeviceState) -> Result<()> {
        Ok(())
    }
    /// Its queues' positions, for the transport to save. Legal while paused; empty before `activate`.
    fn queue_states(&self) -> Vec<virtio_queue::QueueState>;
}

/// The state of one device, without its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// The balloon keeps nothing.
    Balloon,
    /// See [`block::BlockState`].
    Block(block::BlockState),
    /// See [`fs::FsState`].
    Fs(fs::FsState),
    /// See [`mem::MemState`].
    Mem(mem::MemState),
    /// See [`net::NetState`].
    Net(net::NetState),
    /// The entropy device keeps nothing.
    Rng,
    /// See [`vsock::VsockState`].
    Vsock(vsock::VsockState),
}
