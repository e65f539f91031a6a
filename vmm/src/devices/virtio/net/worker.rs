//! The thread that carries packets.
//!
//! It waits for kicks, for the TAP, for a limit's timer, and for orders; then it takes turns: some packets in, some out,
//! one interrupt for all of them, until neither side has more. A side that can go no further does not hold up the other one.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::GuestAddressSpace as _;
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::link::Link;
use super::receive::Receiver;
use super::transmit::Transmitter;
use super::wire::Wire;
use super::{RX, TX, device_error};
use crate::devices::virtio::{GuestMemory, Health, Interrupt};
use crate::error::{Error, Result};

/// The most packets in one direction in one turn. It bounds how long `pause` and `reset` wait, and how long one direction
/// waits for the other.
pub(super) const BATCH: usize = 64;

/// What wakes the thread: the token of its descriptor.
#[derive(Clone, Copy)]
pub(super) enum Source {
    /// The driver has kicked a queue.
    Kick,
    /// The TAP has a packet, or takes one again, or is gone.
    Tap,
    /// There are orders.
    Wake,
    /// More may go through than a moment ago.
    Refill,
}

/// What the device wants its thread to do.
pub(super) struct Orders {
    stop: AtomicBool,
    pause: AtomicBool,
    wake: EventFd,
}

impl Orders {
    pub(super) fn new() -> Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK).map_err(Error::EventFd)?;
        Ok(Self { stop: AtomicBool::default(), pause: AtomicBool::default(), wake })
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.raise();
    }

    pub(super) fn pause(&self) {
        self.pause.store(true, Ordering::SeqCst);
    }

    pub(super) fn resume(&self) {
        self.pause.store(false, Ordering::SeqCst);
        self.raise();
    }

    /// Written when there is an order to do something.
    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    fn raise(&self) {
        // An eventfd always takes a one.
        let _ = self.wake.write(1);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn paused(&self) -> bool {
        self.pause.load(Ordering::SeqCst)
    }
}

/// What one direction has done in its turn.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// It has stopped because it was enough for one turn.
    pub more: bool,
    /// The driver wants to be told of what was used.
    pub interrupt: bool,
}

/// The driver's side. Its owner keeps it locked for one turn only.
pub(super) struct Worker {
    pub receiver: Receiver,
    pub transmitter: Transmitter,
    pub memory: GuestMemory,
    pub interrupt: Interrupt,
    pub health: Health,
    pub link: Arc<Link>,
    /// Wakes the event loop, which looks into `health` then.
    pub notice: Arc<EventFd>,
}

/// The thread: takes turns whenever there is something to do, until it is stopped or a queue is beyond use.
pub(super) fn run(worker: &Mutex<Worker>, mut wire: Wire, epoll: &Epoll, orders: &Orders) {
    let lock = || worker.lock().unwrap_or_else(PoisonError::into_inner);
    let mut events = [EpollEvent::default(); 6];
    // The queues are not looked into before the driver's kick, or the order to go on after a restore.
    let mut begun = false;
    let mut more = false;
    while !orders.stopped() {
        // A signal wakes it up as well, and then there is nothing to be seen.
        let ready = epoll.wait(if more { 0 } else { -1 }, &mut events).unwrap_or(0);
        for event in &events[..ready] {
            match event.data() {
                tap if tap == Source::Tap as u64 => wire.stir(event.event_set()),
                // The limiter knows by itself.
                refill if refill == Source::Refill as u64 => {}
                _ => begun = true,
            }
        }
        let mut worker = lock();
        more = begun && !orders.paused() && !orders.stopped() && {
            worker.turn(&mut wire).unwrap_or_else(|error| {
                worker.give_up(error);
                orders.stop();
                false
            })
        };
        if let Some(error) = wire.take_reason() {
            worker.tell_cut(error);
        }
    }
}

impl Worker {
    /// Carries some packets, and says whether there are more to be carried at once.
    pub(super) fn turn(&mut self, wire: &mut Wire) -> Result<bool> {
        let memory = self.memory.memory();
        let queue_error = |queue| move |source| Error::Queue { device: "net", queue, source };
        let received = self.receiver.receive(&memory, wire, &self.health).map_err(queue_error(RX))?;
        let sent = self.transmitter.send(&memory, wire, &self.health).map_err(queue_error(TX))?;
        if received.interrupt || sent.interrupt {
            self.interrupt.used_ring().map_err(Error::EventFd)?;
        }
        Ok(received.more || sent.more)
    }

    /// The driver has broken a queue: nothing more is carried before it resets the device.
    fn give_up(&self, error: Error) {
        self.health.fail(error);
        // A driver that cannot be told finds it in the status.
        let _ = self.interrupt.config_changed();
        self.wake_event_loop();
    }

    /// The host has taken the interface away.
    fn tell_cut(&self, error: io::Error) {
        self.health.note(device_error("reach the host's network any more", error));
        let _ = self.link.set(false);
        self.wake_event_loop();
    }

    fn wake_event_loop(&self) {
        let _ = self.notice.write(1);
    }
}
