//! The socket device (virtio 1.2, 5.10): streams between the host and the guest.
//!
//! Data goes straight between a host stream and the guest's buffers wherever both have room. Where one has none, the
//! other is slowed down: a host stream that takes no more makes a connection keep up to a fixed number of bytes and
//! grant the guest no further credit; a guest that has no receive buffer or grants no credit makes the device stop
//! reading the host stream.
//!
//! - [`Vsock`], in `device`, owns the queues and moves packets between them and the muxer.
//! - `muxer` knows all connections, whose turn it is, and what belongs to none of them.
//! - `connection` is one stream and its state; `credit` its flow control, `backlog` the bytes that it keeps.
//! - `packet` reads and writes packets in descriptor chains.
//!
//! Everything runs in the event loop, and what one call does is bounded.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

mod backlog;
mod connection;
mod credit;
mod device;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;

pub use device::Vsock;

/// Told whether the guest granted a connection, and if not, why.
pub type OnResult = Box<dyn FnOnce(Result<(), String>) + Send>;

/// Told the port that the guest connected to, and given the host's end of the stream.
pub type OnAccept = Box<dyn FnMut(u32, OwnedFd) + Send>;

/// What the socket device keeps beside its queues. Connections do not survive: a restored guest is told so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The driver had been ready, so that its guest may believe in connections.
    driver_ready: bool,
    /// Where the ports of new connections go on, so that none is taken for an old one.
    next_host_port: u32,
}

/// Asks the device for connections, from any thread.
#[derive(Clone)]
pub struct VsockHandle {
    requests: Arc<Requests>,
}

/// The host asks for a connection.
struct ConnectRequest {
    stream: OwnedFd,
    guest_port: u32,
    on_result: OnResult,
}

/// Requests that the device did not take up yet.
struct Requests {
    queue: Mutex<VecDeque<ConnectRequest>>,
    /// Wakes the device.
    wake: EventFd,
}

impl VsockHandle {
    /// Connects `stream` to `guest_port`. `on_result` is called in the event loop once the guest has granted or
    /// refused it, which it does when its driver is ready, if ever. Closing the other end of `stream` gives it up.
    ///
    /// `on_result` is also called, at once, when too many requests wait.
    pub fn connect(&self, stream: OwnedFd, guest_port: u32, on_result: OnResult) {
        let request = ConnectRequest { stream, guest_port, on_result };
        // Not called under the lock: it may ask for the next connection.
        if let Err((request, reason)) = self.requests.push(request) {
            (request.on_result)(Err(reason));
        }
    }
}

impl Requests {
    fn push(&self, request: ConnectRequest) -> Result<(), (ConnectRequest, String)> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() >= muxer::MAX_CONNECTIONS {
            return Err((request, "too many requests wait for the guest".to_owned()));
        }
        if let Err(error) = self.wake.write(1) {
            return Err((request, format!("cannot wake the socket device: {error}")));
        }
        queue.push_back(request);
        Ok(())
    }

    fn take(&self) -> VecDeque<ConnectRequest> {
        std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
