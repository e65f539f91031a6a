//! The device: its queues, and the packets in them.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::muxer::{Acceptor, FIRST_HOST_PORT, Muxer};
use super::packet::{Malformed, RxBuffer, TxPacket};
use super::{OnAccept, Requests, VsockHandle, VsockState};
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::{
    Activation, DeviceEvent, DeviceState, GuestMemory, Health, Interrupt, VirtioDevice, read_config_from,
};
use crate::error::{Error, Result};
use crate::event_loop::Registrar;

/// Packets to the guest, packets from the guest, and events (virtio 1.2, 5.10.2).
const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;

/// Linux fills the whole receive queue with buffers of 4 KiB; 128 of them hold more than one connection's credit.
/// It provides 8 event buffers.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];

/// Packets in one direction per wake-up, before other devices get their turn.
const BUDGET: usize = 32;

/// The token of the eventfd that announces requests to connect. The muxer's tokens start at 1.
const REQUESTS: u32 = 0;

/// `struct virtio_vsock_event` with the id `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, 0 (virtio 1.2, 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// The device's name in errors.
const NAME: &str = "vsock";

/// The socket device.
pub struct Vsock {
    guest_cid: u64,
    acceptor: Acceptor,
    requests: Arc<Requests>,
    next_host_port: u32,
    /// Restored with a driver that is ready: on activation it is told that all connections are gone.
    restored: bool,
    active: Option<Active>,
}

/// What the device has between its activation and its reset.
struct Active {
    memory: GuestMemory,
    rx: Queue,
    tx: Queue,
    event: Queue,
    queue_events: Vec<EventFd>,
    interrupt: Interrupt,
    registrar: Registrar,
    health: Health,
    muxer: Muxer,
    transport_reset: TransportReset,
    paused: bool,
}

/// How far a restored guest has been told that its connections are gone (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`).
/// Until it has heard, it would count a new connection among the old ones.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TransportReset {
    Unsent,
    /// Sent when the driver had provided buffers up to this index. It provides another one afterwards.
    Sent(Wrapping<u16>),
    Heard,
}

impl Vsock {
    /// A device whose guest has the context id `guest_cid` and may connect to the host's ports `host_ports`;
    /// `on_accept` gets the streams of those connections, which do not block.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub fn new(guest_cid: u32, host_ports: Vec<u32>, on_accept: OnAccept) -> Result<(Self, VsockHandle)> {
        let requests = Arc::new(Requests {
            queue: Default::default(),
            wake: EventFd::new(EFD_NONBLOCK).map_err(Error::EventFd)?,
        });
        let handle = VsockHandle { requests: Arc::clone(&requests) };
        let device = Self {
            guest_cid: u64::from(guest_cid),
            acceptor: Acceptor { ports: host_ports, on_accept },
            requests,
            next_host_port: FIRST_HOST_PORT,
            restored: false,
            active: None,
        };
        Ok((device, handle))
    }

    /// Takes up the host's requests, unless a restored guest is not ready for new connections yet.
    fn take_requests(&mut self) {
        if let Some(active) = &mut self.active
            && active.transport_reset == TransportReset::Heard
        {
            for request in self.requests.take() {
                active.muxer.connect(request.stream, request.guest_port, request.on_result);
            }
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, out: &mut [u8]) {
        // `struct virtio_vsock_config` is the guest's context id (virtio 1.2, 5.10.4).
        read_config_from(&self.guest_cid.to_le_bytes(), offset, out);
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let transport_reset = match std::mem::take(&mut self.restored) {
            true => TransportReset::Unsent,
            false => TransportReset::Heard,
        };
        let active = Active::new(activation, self.guest_cid, self.next_host_port, transport_reset)?;
        // Kept even if it cannot be watched: `reset` then ends what of it is.
        self.active.insert(active).watch(&self.requests.wake)
    }

    fn process(&mut self, event: DeviceEvent) -> Result<()> {
        let Some(active) = self.active.as_mut().filter(|active| !active.paused) else {
            return Ok(());
        };
        match event {
            DeviceEvent::Queue(RX) => {}
            DeviceEvent::Queue(TX) => active.receive_packets(&mut self.acceptor)?,
            DeviceEvent::Queue(EVENT) => {
                active.announce_transport_reset()?;
                self.take_requests();
            }
            DeviceEvent::Queue(_) => {}
            DeviceEvent::Backend { token: REQUESTS, .. } => {
                // Nonblocking; without a count there is nothing to clear.
                let _ = self.requests.wake.read();
                self.take_requests();
            }
            DeviceEvent::Backend { token, readable, .. } => active.muxer.on_ready(token, readable),
        }
        match &mut self.active {
            Some(active) => active.send_packets(),
            None => Ok(()),
        }
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            const REASON: &str = "the guest's socket driver was reset";
            active.unwatch(&self.requests.wake);
            self.next_host_port = active.muxer.next_host_port();
            active.muxer.close(REASON);
            for request in self.requests.take() {
                (request.on_result)(Err(REASON.to_owned()));
            }
        }
    }

    fn pause(&mut self) {
        if let Some(active) = &mut self.active {
            active.paused = true;
            active.muxer.pause();
            // A refusal means that it is not watched.
            let _ = active.registrar.forget(&self.requests.wake);
        }
    }

    fn resume(&mut self) {
        if let Some(active) = &mut self.active {
            active.paused = false;
            active.muxer.resume();
            if active.start_again(&self.requests.wake).is_err() {
                active.health.set_broken();
            }
        }
    }

    fn save(&self) -> Result<DeviceState> {
        Ok(DeviceState::Vsock(VsockState {
            driver_ready: self.active.is_some(),
            next_host_port: match &self.active {
                Some(active) => active.muxer.next_host_port(),
                None => self.next_host_port,
            },
        }))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<()> {
        let DeviceState::Vsock(state) = state else {
            return Err(Error::RestoreDevice {
                device_type: VIRTIO_ID_VSOCK,
                problem: "the state is another device's",
            });
        };
        self.restored = state.driver_ready;
        self.next_host_port = state.next_host_port;
        Ok(())
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.active
            .as_ref()
            .map_or_else(Vec::new, |active| [&active.rx, &active.tx, &active.event].map(Queue::state).into())
    }
}

impl Active {
    fn new(
        activation: Activation,
        guest_cid: u64,
        next_host_port: u32,
        transport_reset: TransportReset,
    ) -> Result<Self> {
        let Ok([rx, tx, event]) = <[Queue; 3]>::try_from(activation.queues) else {
            return Err(queue_error(EVENT, virtio_queue::Error::QueueNotReady));
        };
        let (registrar, health) = (activation.registrar, activation.health);
        Ok(Self {
            memory: activation.memory,
            rx,
            tx,
            event,
            queue_events: activation.queue_events,
            interrupt: activation.interrupt,
            muxer: Muxer::new(guest_cid, next_host_port, registrar.clone(), health.clone()),
            registrar,
            health,
            transport_reset,
            paused: false,
        })
    }

    fn watch(&self, requests: &EventFd) -> Result<()> {
        for (queue, event) in (0..).zip(&self.queue_events) {
            self.registrar.watch_queue(queue, event)?;
        }
        self.registrar.watch(requests, EventSet::IN, REQUESTS)
    }

    fn unwatch(&self, requests: &EventFd) {
        for event in self.queue_events.iter().chain([requests]) {
            // A refusal means that it is not watched.
            let _ = self.registrar.forget(event);
        }
    }

    /// After a pause or a restore: kicks may have been lost.
    fn start_again(&mut self, requests: &EventFd) -> Result<()> {
        self.registrar.watch(requests, EventSet::IN, REQUESTS)?;
        for event in &self.queue_events {
            event.write(1).map_err(Error::EventFd)?;
        }
        Ok(())
    }

    /// Takes the packets that the guest has sent.
    fn receive_packets(&mut self, acceptor: &mut Acceptor) -> Result<()> {
        let memory = self.memory.memory();
        let mut used = false;
        for _ in 0..BUDGET {
            let Some((head, chain)) = next_chain(&mut self.tx, TX, &memory)? else {
                return self.interrupt_if(used, TX);
            };
            match chain.ok_or(Malformed { header: None }).and_then(TxPacket::parse) {
                Ok(packet) => self.muxer.receive(packet, acceptor),
                Err(malformed) => self.muxer.receive_malformed(malformed.header.as_ref()),
            }
            self.tx.add_used(&*memory, head, 0).map_err(|e| queue_error(TX, e))?;
            used = true;
        }
        self.interrupt_if(used, TX)?;
        self.come_back(TX)
    }

    /// Sends the guest what there is to send, as far as it has provided buffers.
    fn send_packets(&mut self) -> Result<()> {
        let mut used = false;
        let mut budget = BUDGET;
        let memory = self.memory.memory();
        while self.muxer.has_output() {
            if budget == 0 {
                self.come_back(RX)?;
                break;
            }
            budget -= 1;
            let Some((head, chain)) = next_chain(&mut self.rx, RX, &memory)? else {
                // The driver kicks the queue when it provides more.
                break;
            };
            let len = match chain.and_then(RxBuffer::new) {
                Some(buffer) => match self.muxer.fill(&buffer) {
                    Some(header) => buffer.finish(header),
                    None => {
                        self.rx.go_to_previous_position();
                        break;
                    }
                },
                None => {
                    self.health.count_error();
                    0
                }
            };
            self.rx.add_used(&*memory, head, len).map_err(|e| queue_error(RX, e))?;
            used = true;
        }
        if self.muxer.update_interests() {
            self.come_back(RX)?;
        }
        self.interrupt_if(used, RX)
    }

    /// Tells a restored guest once that its connections are gone, and notices when it has heard.
    fn announce_transport_reset(&mut self) -> Result<()> {
        let memory = self.memory.memory();
        for _ in 0..BUDGET {
            let available = self.event.avail_idx(&*memory, Ordering::Acquire);
            let available = available.map_err(|e| queue_error(EVENT, e))?;
            match self.transport_reset {
                TransportReset::Unsent => {}
                TransportReset::Sent(before) if before != available => {
                    self.transport_reset = TransportReset::Heard;
                    break;
                }
                TransportReset::Sent(_) | TransportReset::Heard => break,
            }
            let Some((head, chain)) = next_chain(&mut self.event, EVENT, &memory)? else {
                break;
            };
            let mut len = 0;
            if let Some(chain) = chain.filter(|chain| chain.writable.len() >= TRANSPORT_RESET.len()) {
                chain.writable.copy_from(&TRANSPORT_RESET);
                len = TRANSPORT_RESET.len() as u32;
                self.transport_reset = TransportReset::Sent(available);
                self.notify_from(available, &memory)?;
            } else {
                self.health.count_error();
            }
            self.event.add_used(&*memory, head, len).map_err(|e| queue_error(EVENT, e))?;
            self.interrupt_if(true, EVENT)?;
        }
        Ok(())
    }

    /// Has the driver kick the event queue when it provides its next buffer. That is not the next one to be used,
    /// which virtio-queue would ask for: the driver has provided others already.
    fn notify_from(&mut self, available: Wrapping<u16>, memory: &GuestMemoryMmap) -> Result<()> {
        let position = self.event.next_avail();
        self.event.set_next_avail(available.0);
        let enabled = self.event.enable_notification(memory);
        self.event.set_next_avail(position);
        enabled.map(|_| ()).map_err(|e| queue_error(EVENT, e))
    }

    /// Has the event loop call again for this queue, once others had their turn.
    fn come_back(&self, queue: u16) -> Result<()> {
        match self.queue_events.get(usize::from(queue)) {
            Some(event) => event.write(1).map_err(Error::EventFd),
            None => Ok(()),
        }
    }

    /// One interrupt for all that was used, if the driver wants one.
    fn interrupt_if(&mut self, used: bool, number: u16) -> Result<()> {
        let queue = match number {
            RX => &mut self.rx,
            TX => &mut self.tx,
            _ => &mut self.event,
        };
        let memory = self.memory.memory();
        if used && queue.needs_notification(&*memory).map_err(|e| queue_error(number, e))? {
            self.interrupt.used_ring().map_err(Error::EventFd)?;
        }
        Ok(())
    }
}

/// The head and the buffers of the next chain, no buffers if it is broken; none if the driver has provided no more,
/// and then it kicks the queue when it does.
fn next_chain<'a>(
    queue: &mut Queue,
    number: u16,
    memory: &'a GuestMemoryMmap,
) -> Result<Option<(u16, Option<Chain<'a>>)>> {
    if !queue.ready() {
        return Ok(None);
    }
    loop {
        let next = queue.iter(memory).map_err(|e| queue_error(number, e))?.next();
        if let Some(descriptors) = next {
            let head = descriptors.head_index();
            return Ok(Some((head, Chain::walk(memory, descriptors, queue.size()))));
        }
        if !queue.enable_notification(memory).map_err(|e| queue_error(number, e))? {
            return Ok(None);
        }
    }
}

fn queue_error(queue: u16, source: virtio_queue::Error) -> Error {
    Error::Queue { device: NAME, queue, source }
}
