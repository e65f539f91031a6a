//! The network device (virtio 1.2, 5.1): a cable between the guest and a TAP device of the host.
//!
//! ```text
//!  driver ◀──receive queue── Receiver ◀──readv── TAP          one thread, from the time when both
//!  driver ───transmit queue─▶ Transmitter ─writev─▶ TAP        the driver and the TAP are there
//! ```
//!
//! Packets go straight between the guest's buffers and the kernel. The device looks at none: what is in a packet, and
//! in the header that says where its checksum goes and how it is to be cut, is between the driver and the kernel, which
//! checks it. The device filters nothing either; who may send what is the host's to decide, behind the TAP. How much may go
//! each way in a second is bounded here, where a pod has such a limit.
//!
//! - [`NetSlot`], in `slot`, brings the TAP and the driver together, whichever comes first; `session` is both of them.
//! - `link` is what the driver is told of it.
//! - `worker` is the thread; `receive` and `transmit` are what it does with the two queues; `wire` and `tap` are the other
//!   side.

use mayu_vmm_api::RateLimit;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueState;

use self::wire::Limiters;
use super::rate_limiter::RateLimiter;
use super::{Activation, DeviceEvent, DeviceState, VirtioDevice, read_config_from};
use crate::error::{Error, Result};

mod link;
mod receive;
mod session;
mod slot;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
mod wire;
mod worker;

pub use self::slot::NetSlot;

/// The receive queue and the transmit queue (virtio 1.2, 5.1.2). One pair: a pod's packets come from one TAP.
const RX: u16 = 0;
const TX: u16 = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// `struct virtio_net_hdr` before each packet, in bytes, with `num_buffers` as its last field (virtio 1.2, 5.1.6).
const HEADER_SIZE: usize = 12;

/// The longest packet with its header, in bytes: what a driver provides for one that it segments or reassembles
/// (virtio 1.2, 5.1.6.3.1).
const MAX_PACKET: usize = 65562;

/// Packets of 64 KiB with partial checksums, both ways, received into as many buffers as it takes. Left out: UDP
/// fragmentation, which Linux gave up in 4.14, and UDP segmentation, which a host before Linux 6.2 does not take; the
/// guest's kernel does it itself.
const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What the network device keeps beside its queues: what its driver believes of the link. The TAP is not part of it: a
/// restored device has none until it is given one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    up: bool,
    generation: u32,
}

/// A network device.
pub struct Net {
    address: [u8; 6],
    slot: NetSlot,
}

impl Net {
    /// The device for network slot `number`, and the handle that gives it its TAP. Until then the link is down. So much as
    /// `limit` says may go each way.
    ///
    /// # Errors
    /// No eventfd or timer can be made.
    pub fn new(number: u8, limit: &RateLimit) -> Result<(Self, NetSlot)> {
        let limiters = Limiters { receive: RateLimiter::new(limit)?, transmit: RateLimiter::new(limit)? };
        let slot = NetSlot::new(number, limiters)?;
        Ok((Self { address: mayu_vmm_api::net_slot_address(number), slot: slot.clone() }, slot))
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, out: &mut [u8]) {
        // `struct virtio_net_config` up to `status` (virtio 1.2, 5.1.4).
        let status = if self.slot.link().state().up { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        let config = [&self.address[..], &status.to_le_bytes()].concat();
        read_config_from(&config, offset, out);
    }

    fn config_generation(&self) -> u32 {
        self.slot.link().state().generation
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        self.slot.activate(activation)
    }

    fn process(&mut self, _event: DeviceEvent) -> Result<()> {
        // The thread waits for kicks itself; this is about the thread.
        self.slot.process()
    }

    fn reset(&mut self) {
        self.slot.deactivate();
    }

    fn pause(&mut self) {
        self.slot.pause();
    }

    fn resume(&mut self) {
        self.slot.resume();
    }

    fn save(&self) -> Result<DeviceState> {
        Ok(DeviceState::Net(self.slot.link().state()))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<()> {
        let DeviceState::Net(state) = state else {
            return Err(Error::RestoreDevice {
                device_type: VIRTIO_ID_NET,
                problem: "the state is another device's",
            });
        };
        self.slot.link().restore(state);
        Ok(())
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.slot.queue_states()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}

fn device_error(operation: &'static str, source: std::io::Error) -> Error {
    Error::Device { device: "net", operation, source }
}
