//! The device from activation to reset.

use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_queue::QueueState;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::link::Link;
use super::receive::Receiver;
use super::tap::Tap;
use super::transmit::Transmitter;
use super::wire::{Limiters, Wire};
use super::worker::{self, Orders, Source, Worker};
use crate::devices::virtio::Activation;
use crate::error::{Error, Result};
use crate::event_loop::Registrar;
use crate::seccomp::{Confinement, Kind};
use crate::thread;

/// The event loop's word for a notice.
const NOTICE: u32 = 0;

/// A driver that is ready, and the thread that serves it once there is a TAP.
pub(super) struct Session {
    features: u64,
    queue_events: Vec<EventFd>,
    registrar: Registrar,
    notice: Arc<EventFd>,
    worker: Arc<Mutex<Worker>>,
    orders: Arc<Orders>,
    confinement: Confinement,
    thread: Option<JoinHandle<()>>,
}

impl Session {
    /// Takes up the driver's queues.
    ///
    /// # Errors
    /// There are not two of them, or no eventfd can be made.
    pub(super) fn new(activation: Activation, link: Arc<Link>, notice: Arc<EventFd>) -> Result<Self> {
        let features = activation.features;
        let [rx, tx] = <[_; 2]>::try_from(activation.queues).map_err(|queues| Error::QueueSetup {
            device_type: VIRTIO_ID_NET,
            queue: queues.len(),
            problem: "there are two queues",
        })?;
        let worker = Worker {
            receiver: Receiver::new(rx, features),
            transmitter: Transmitter::new(tx),
            memory: activation.memory,
            interrupt: activation.interrupt,
            health: activation.health,
            link,
            notice: Arc::clone(&notice),
        };
        Ok(Self {
            features,
            queue_events: activation.queue_events,
            registrar: activation.registrar,
            notice,
            worker: Arc::new(Mutex::new(worker)),
            orders: Arc::new(Orders::new()?),
            confinement: activation.confinement,
            thread: None,
        })
    }

    /// Has the event loop take notice of what the thread has to say.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn watch_notice(&self) -> Result<()> {
        self.registrar.watch(&*self.notice, EventSet::IN, NOTICE)
    }

    /// Starts the thread, named `name`, between the driver and `tap`, which is told what the driver can take. The limits are
    /// those of the sessions before.
    ///
    /// # Errors
    /// The interface is gone, or there is no thread to be had.
    pub(super) fn start(&mut self, tap: &Tap, limiters: Limiters, name: String) -> Result<()> {
        tap.set_offloads(self.features)?;
        self.serve(tap.try_clone()?, limiters, name)
    }

    /// Whether there is a thread.
    pub(super) fn has_started(&self) -> bool {
        self.thread.is_some()
    }

    /// Leaves a word for the log that is no fault of the driver's.
    pub(super) fn note(&self, error: Error) {
        self.worker().health.note(error);
    }

    fn serve(&mut self, tap: Tap, limiters: Limiters, name: String) -> Result<()> {
        let epoll = Epoll::new().map_err(Error::EventFd)?;
        let sources = [
            (Source::Wake, self.orders.wake().as_raw_fd(), EventSet::IN),
            (Source::Tap, tap.as_raw_fd(), EventSet::IN | EventSet::OUT),
        ];
        let kicks = self.queue_events.iter().map(|event| (Source::Kick, event.as_raw_fd(), EventSet::IN));
        for (source, fd, interest) in sources.into_iter().chain(kicks) {
            // Edge-triggered: the thread tries each side until it has no more, and no eventfd has to be read.
            let event = EpollEvent::new(interest | EventSet::EDGE_TRIGGERED, source as u64);
            epoll.ctl(ControlOperation::Add, fd, event).map_err(Error::EventFd)?;
        }
        for limiter in [&limiters.receive, &limiters.transmit] {
            limiter.watch(&epoll, Source::Refill as u64)?;
        }
        let (worker, orders) = (Arc::clone(&self.worker), Arc::clone(&self.orders));
        let run = move |()| worker::run(&worker, Wire::new(tap, limiters), &epoll, &orders);
        self.thread = Some(thread::spawn(name, Kind::Net, &self.confinement, || Ok(()), run)?);
        Ok(())
    }

    /// Returns when the thread stands between two packets.
    pub(super) fn pause(&self) {
        self.orders.pause();
        // Whoever has the worker sees the order before its next turn.
        drop(self.worker());
    }

    pub(super) fn resume(&self) {
        self.orders.resume();
    }

    /// Ends the thread.
    pub(super) fn stop(self) {
        // Fails only if `activate` did not get so far.
        let _ = self.registrar.forget(&*self.notice);
        self.orders.stop();
        if let Some(thread) = self.thread {
            // A thread that panicked has stopped as well.
            let _ = thread.join();
        }
    }

    /// The positions of the queues.
    pub(super) fn queue_states(&self) -> Vec<QueueState> {
        let worker = self.worker();
        vec![worker.receiver.queue_state(), worker.transmitter.queue_state()]
    }

    fn worker(&self) -> MutexGuard<'_, Worker> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
