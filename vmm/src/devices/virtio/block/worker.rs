//! The thread that serves a block device's requests.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::{BlockSlot, Id, SEG_MAX, SIZE_MAX};
use crate::devices::virtio::chain::{Buffers, Chain};
use crate::devices::virtio::rate_limiter::RateLimiter;
use crate::devices::virtio::{GuestMemory, Health, Interrupt};
use crate::error::{Error, Result};

/// Type, priority or reserved, sector (virtio 1.2, 5.2.6).
const HEADER_SIZE: usize = 16;

/// The most data in one request, in bytes: what `seg_max` and `size_max` allow. It bounds how long `pause`, `reset`
/// and `detach` wait.
pub(super) const MAX_TRANSFER: usize = SEG_MAX as usize * SIZE_MAX as usize;

/// What the device wants its thread to do.
#[derive(Default)]
pub(super) struct Orders {
    stop: AtomicBool,
    pause: AtomicBool,
}

impl Orders {
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    pub(super) fn pause(&self) {
        self.pause.store(true, Ordering::SeqCst);
    }

    pub(super) fn resume(&self) {
        self.pause.store(false, Ordering::SeqCst);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Whether the next request may be served.
    fn go_on(&self) -> bool {
        !self.stopped() && !self.pause.load(Ordering::SeqCst)
    }
}

/// All that it takes to serve the queue. Its owner keeps it locked only from one look at the orders to the next.
pub(super) struct Worker {
    pub queue: Queue,
    pub queue_event: EventFd,
    pub memory: GuestMemory,
    pub interrupt: Interrupt,
    pub health: Health,
    /// The driver does not flush, so every write has to last (virtio 1.2, 5.2.6.2).
    pub write_through: bool,
    pub slot: BlockSlot,
    pub id: Id,
    pub limiter: RateLimiter,
}

/// A request that has where to answer.
struct Request<'a> {
    chain: Chain<'a>,
    status: Buffers<'a>,
}

/// The thread: serves the queue now, whenever it is kicked, and when a limit lets it go on, until it is stopped or the queue
/// is beyond use.
pub(super) fn run(worker: &Mutex<Worker>, queue_event: &EventFd, orders: &Orders) {
    if let Err(error) = serve_until_stopped(worker, queue_event, orders) {
        let worker = worker.lock().unwrap_or_else(PoisonError::into_inner);
        worker.health.fail(error);
        // A driver that cannot be told finds it in the status.
        let _ = worker.interrupt.config_changed();
    }
}

fn serve_until_stopped(worker: &Mutex<Worker>, queue_event: &EventFd, orders: &Orders) -> Result<()> {
    let kicks = Epoll::new().map_err(Error::EventFd)?;
    let interest = EpollEvent::new(EventSet::IN, 0);
    kicks.ctl(ControlOperation::Add, queue_event.as_raw_fd(), interest).map_err(Error::EventFd)?;
    let lock = || worker.lock().unwrap_or_else(PoisonError::into_inner);
    lock().limiter.watch(&kicks, 1)?;
    while !orders.stopped() {
        lock().serve(orders)?;
        // A signal or the timer wakes it up as well, and then there is nothing to read. Neither does harm.
        let _ = kicks.wait(-1, &mut [EpollEvent::default()]);
        let _ = queue_event.read();
    }
    Ok(())
}

/// Why a request fails.
enum Failure {
    /// The driver broke the protocol.
    Protocol,
    /// The device does not know this type of request.
    Unsupported,
    /// The backend cannot do it, or is not there.
    Io,
}

impl Worker {
    /// Asks for a kick, if there is something in the queue.
    pub(super) fn wake_if_pending(&mut self) -> Result<()> {
        let memory = self.memory.memory();
        if self.queue.enable_notification(&*memory).map_err(queue_error)? {
            self.queue_event.write(1).map_err(Error::EventFd)?;
        }
        Ok(())
    }

    pub(super) fn queue_state(&self) -> QueueState {
        self.queue.state()
    }

    /// Serves requests as long as there are any and the orders and the limit allow it.
    pub(super) fn serve(&mut self, orders: &Orders) -> Result<()> {
        let memory = self.memory.memory();
        while orders.go_on() && !self.limiter.is_waiting() {
            self.queue.disable_notification(&*memory).map_err(queue_error)?;
            while orders.go_on()
                && let Some(chain) = self.queue.iter(&*memory).map_err(queue_error)?.next()
            {
                let head = chain.head_index();
                let request = request(&memory, chain, self.queue.size());
                if !self.limiter.admit(request.as_ref().map_or(0, Request::length)) {
                    // Its turn comes when the timer says so; until then no kick is news.
                    self.queue.go_to_previous_position();
                    return Ok(());
                }
                let written = self.answer(request);
                self.queue.add_used(&*memory, head, written).map_err(queue_error)?;
                if self.queue.needs_notification(&*memory).map_err(queue_error)? {
                    self.interrupt.used_ring().map_err(Error::EventFd)?;
                }
            }
            if !self.queue.enable_notification(&*memory).map_err(queue_error)? {
                break;
            }
        }
        Ok(())
    }

    /// Serves one request, and says how many bytes of its buffers were written.
    fn answer(&self, request: Option<Request<'_>>) -> u32 {
        let Some(Request { chain, status }) = request else {
            // Nowhere to say what is wrong.
            self.health.count_error();
            return 0;
        };
        let (code, written) = match self.perform(chain) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Failure::Io) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Protocol) => {
                self.health.count_error();
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        status.copy_from(&code.to_le_bytes()[..1]);
        u32::try_from(written + 1).unwrap_or(1)
    }

    /// Does what the request asks for; returns the length of the data that went to the guest.
    fn perform(&self, mut chain: Chain<'_>) -> std::result::Result<usize, Failure> {
        let (request_type, sector) = read_header(&mut chain.readable).ok_or(Failure::Protocol)?;
        match request_type {
            VIRTIO_BLK_T_IN => self.read(sector, chain.writable),
            VIRTIO_BLK_T_OUT => self.write(sector, chain.readable),
            VIRTIO_BLK_T_FLUSH => self.flush(),
            VIRTIO_BLK_T_GET_ID => {
                chain.writable.copy_from(&self.id);
                Ok(self.id.len().min(chain.writable.len()))
            }
            _ => Err(Failure::Unsupported),
        }
    }

    fn read(&self, sector: u64, buffers: Buffers<'_>) -> std::result::Result<usize, Failure> {
        let mut backend = self.slot.backend();
        let backend = backend.as_mut().ok_or(Failure::Io)?;
        let length = buffers.len();
        let position =
            backend.position(sector, length).filter(|_| length <= MAX_TRANSFER).ok_or(Failure::Protocol)?;
        backend.read(position, buffers).map_err(|_| Failure::Io)?;
        Ok(length)
    }

    fn write(&self, sector: u64, buffers: Buffers<'_>) -> std::result::Result<usize, Failure> {
        let mut backend = self.slot.backend();
        let backend = backend.as_mut().ok_or(Failure::Io)?;
        if backend.read_only() {
            return Err(Failure::Io);
        }
        let length = buffers.len();
        let position =
            backend.position(sector, length).filter(|_| length <= MAX_TRANSFER).ok_or(Failure::Protocol)?;
        backend.write(position, buffers).map_err(|_| Failure::Io)?;
        if self.write_through {
            backend.flush().map_err(|_| Failure::Io)?;
        }
        Ok(0)
    }

    fn flush(&self) -> std::result::Result<usize, Failure> {
        let backend = self.slot.backend();
        let backend = backend.as_ref().ok_or(Failure::Io)?;
        backend.flush().map_err(|_| Failure::Io)?;
        Ok(0)
    }
}

/// The request in a chain, if it is one.
fn request<'a>(
    memory: &'a GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    limit: u16,
) -> Option<Request<'a>> {
    let mut chain = Chain::walk(memory, chain, limit)?;
    let status = chain.writable.split_back(1)?;
    Some(Request { chain, status })
}

impl Request<'_> {
    /// How much data goes with it, in bytes, if it is one that can be.
    fn length(&self) -> usize {
        let readable = self.chain.readable.len().saturating_sub(HEADER_SIZE);
        (readable + self.chain.writable.len()).min(MAX_TRANSFER)
    }
}

/// The request's type and first sector, from the front of what the driver wrote.
fn read_header(readable: &mut Buffers<'_>) -> Option<(u32, u64)> {
    let mut header = [0; HEADER_SIZE];
    readable.split_front(HEADER_SIZE)?.copy_to(&mut header);
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    Some((u32::from_le_bytes([t0, t1, t2, t3]), u64::from_le_bytes(sector)))
}

fn queue_error(source: virtio_queue::Error) -> Error {
    Error::Queue { device: "block", queue: 0, source }
}
