//! The threads that serve the driver's requests, and the gate that holds them between two of them.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

use fuse_backend_rs::api::server::Server;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::identity::Identity;
use super::request::Request;
use super::share::Share;
use super::table::lock;
use crate::devices::virtio::{Activation, GuestMemory, Health, Interrupt};
use crate::error::{Error, Result};

/// The epoll token of the gate's stop event; a queue's token is its number.
const STOP: u64 = u64::MAX;

/// What virtio-queue says of a queue that the driver has broken.
type QueueResult<T> = std::result::Result<T, virtio_queue::Error>;

/// The queues and what else the driver has set up, from activation to reset.
struct Session {
    memory: GuestMemory,
    queues: Vec<KickedQueue>,
    /// Edge-triggered on the kicks: each wakes one idle worker, and nobody has to read them.
    epoll: Epoll,
    interrupt: Interrupt,
    health: Health,
}

impl Session {
    /// Prepares to serve the queues until `stop` is written.
    fn new(activation: Activation, stop: &EventFd) -> Result<Self> {
        let epoll = Epoll::new().map_err(Error::EventLoop)?;
        let watch = |event: &EventFd, interest, token| {
            let interest = EpollEvent::new(interest, token);
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest).map_err(Error::EventLoop)
        };
        watch(stop, EventSet::IN, STOP)?;
        for (token, kick) in (0..).zip(&activation.queue_events) {
            watch(kick, EventSet::IN | EventSet::EDGE_TRIGGERED, token)?;
        }
        let queues = activation.queues.into_iter().zip(activation.queue_events);
        Ok(Self {
            memory: activation.memory,
            queues: queues.map(KickedQueue::new).collect(),
            epoll,
            interrupt: activation.interrupt,
            health: activation.health,
        })
    }

    /// The driver has broken a queue: nothing more is served before it resets the device.
    fn give_up(&self) {
        self.health.set_broken();
        // See `Worker::drain` for why that is all.
        let _ = self.interrupt.config_changed();
    }
}

/// A queue and the eventfd by which the driver kicks it.
struct KickedQueue {
    queue: Mutex<Queue>,
    kick: EventFd,
}

/// A request that was taken from a queue, and whether there are more.
struct NextRequest<'a> {
    chain: DescriptorChain<&'a GuestMemoryMmap>,
    more: bool,
}

impl KickedQueue {
    fn new((queue, kick): (Queue, EventFd)) -> Self {
        Self { queue: Mutex::new(queue), kick }
    }

    fn next_request<'a>(&self, memory: &'a GuestMemoryMmap) -> QueueResult<Option<NextRequest<'a>>> {
        let mut queue = lock(&self.queue);
        if !queue.ready() {
            return Ok(None);
        }
        let Some(chain) = queue.iter(memory)?.next() else {
            return Ok(None);
        };
        let more = queue.avail_idx(memory, Ordering::Acquire)?.0 != queue.next_avail();
        Ok(Some(NextRequest { chain, more }))
    }

    /// Gives a chain back to the driver, and says whether it wants to be told.
    fn finish(&self, memory: &GuestMemoryMmap, head: u16, written: u32) -> QueueResult<bool> {
        let mut queue = lock(&self.queue);
        queue.add_used(memory, head, written)?;
        queue.needs_notification(memory)
    }
}

/// Lets the workers work, or not. The device holds one end, the workers the other.
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// Set while the workers are asked to stop; read between two requests.
    stopping: AtomicBool,
    /// Written meanwhile, for those who wait for a kick.
    stop: EventFd,
}

struct State {
    phase: Phase,
    /// Workers that use the session.
    busy: usize,
}

enum Phase {
    /// The driver has not set up the device.
    Idle,
    Running(Arc<Session>),
    Paused(Arc<Session>),
    /// The device is gone.
    Closed,
}

impl Gate {
    /// A closed gate for a device that is not set up.
    ///
    /// # Errors
    /// There is no eventfd to be had.
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            state: Mutex::new(State { phase: Phase::Idle, busy: 0 }),
            changed: Condvar::new(),
            stopping: AtomicBool::new(false),
            stop: EventFd::new(EFD_NONBLOCK).map_err(Error::EventFd)?,
        })
    }

    /// Hands the driver's queues to the workers, who look into them when they are kicked.
    ///
    /// # Errors
    /// The kicks cannot be waited for.
    pub(super) fn open(&self, activation: Activation) -> Result<()> {
        let session = Session::new(activation, &self.stop)?;
        self.enter(Phase::Running(Arc::new(session)));
        Ok(())
    }

    /// Holds the workers, and returns when each has finished its request.
    pub(super) fn pause(&self) {
        let mut state = lock(&self.state);
        let Phase::Running(session) = &state.phase else {
            return;
        };
        state.phase = Phase::Paused(Arc::clone(session));
        self.stopping.store(true, Ordering::SeqCst);
        // Writing and reading fail only for a counter that is full or empty, which this one is not.
        let _ = self.stop.write(1);
        while state.busy > 0 {
            state = self.wait_for_change(state);
        }
        let _ = self.stop.read();
        self.stopping.store(false, Ordering::SeqCst);
    }

    /// Goes on after [`Gate::pause`], also with what was queued meanwhile.
    pub(super) fn resume(&self) {
        let session = match &lock(&self.state).phase {
            Phase::Paused(session) => Arc::clone(session),
            _ => return,
        };
        for queue in &session.queues {
            // Fails only if the driver's kicks have filled the counter, and then it is ready anyway.
            let _ = queue.kick.write(1);
        }
        self.enter(Phase::Running(session));
    }

    /// Takes the queues away from the workers.
    pub(super) fn reset(&self) {
        self.pause();
        self.enter(Phase::Idle);
    }

    /// Ends the workers.
    pub(super) fn close(&self) {
        self.pause();
        self.enter(Phase::Closed);
    }

    /// The positions of the queues; none before the device is set up.
    pub(super) fn queue_states(&self) -> Vec<QueueState> {
        match &lock(&self.state).phase {
            Phase::Running(session) | Phase::Paused(session) => {
                let states = session.queues.iter().map(|queue| lock(&queue.queue).state());
                states.collect()
            }
            Phase::Idle | Phase::Closed => Vec::new(),
        }
    }

    fn enter(&self, phase: Phase) {
        lock(&self.state).phase = phase;
        self.changed.notify_all();
    }

    /// Waits until there is work; none when the device is gone. [`Gate::leave`] has to follow.
    fn wait(&self) -> Option<Arc<Session>> {
        let mut state = lock(&self.state);
        loop {
            match &state.phase {
                Phase::Running(session) if !session.health.is_broken() => {
                    let session = Arc::clone(session);
                    state.busy += 1;
                    return Some(session);
                }
                Phase::Closed => return None,
                _ => state = self.wait_for_change(state),
            }
        }
    }

    fn wait_for_change<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self, session: Arc<Session>) {
        drop(session);
        lock(&self.state).busy -= 1;
        self.changed.notify_all();
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}

/// One thread that serves requests.
struct Worker {
    gate: Arc<Gate>,
    server: Arc<Server<Arc<Share>>>,
    identity: Identity,
}

/// Starts a worker with the capabilities that the calling thread has now.
///
/// # Errors
/// There is no thread to be had, or it cannot act for others.
pub(super) fn spawn(gate: &Arc<Gate>, server: &Arc<Server<Arc<Share>>>) -> Result<JoinHandle<()>> {
    let (gate, server) = (Arc::clone(gate), Arc::clone(server));
    let (ready, started) = mpsc::channel();
    let run = move || match Identity::of_this_thread() {
        Ok(identity) => {
            let _ = ready.send(Ok(()));
            Worker { gate, server, identity }.run();
        }
        Err(error) => {
            let _ = ready.send(Err(error));
        }
    };
    let name = "virtio-fs";
    let thread_error = |source| Error::Thread { name, source };
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(thread_error)?;
    match started.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(thread_error(error)),
        Err(_) => Err(thread_error(io::ErrorKind::BrokenPipe.into())),
    }
}

impl Worker {
    fn run(mut self) {
        while let Some(session) = self.gate.wait() {
            self.serve(&session);
            self.gate.leave(session);
        }
    }

    /// Serves until the gate asks to stop, or the driver breaks a queue.
    fn serve(&mut self, session: &Session) {
        let mut events = [EpollEvent::default(); 4];
        while !self.gate.is_stopping() && !session.health.is_broken() {
            let ready = match session.epoll.wait(-1, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(_) => return session.give_up(),
            };
            for event in events.iter().take(ready) {
                let number = usize::try_from(event.data()).unwrap_or(usize::MAX);
                let Some(queue) = session.queues.get(number) else {
                    continue;
                };
                if self.drain(session, queue).is_err() {
                    session.give_up();
                }
            }
        }
    }

    /// Serves all that is in one queue.
    fn drain(&mut self, session: &Session, queue: &KickedQueue) -> QueueResult<()> {
        let memory = session.memory.memory();
        while !self.gate.is_stopping() && !session.health.is_broken() {
            let Some(next) = queue.next_request(&memory)? else {
                break;
            };
            if next.more {
                // This request may block; the next one should not have to wait for it. A full counter is ready too.
                let _ = queue.kick.write(1);
            }
            let head = next.chain.head_index();
            let written = self.answer(&session.health, &memory, next.chain);
            if queue.finish(&memory, head, written)? {
                // An eventfd that cannot be written is KVM's to notice; there is nobody else to tell.
                let _ = session.interrupt.used_ring();
            }
        }
        Ok(())
    }

    /// Answers one request, and says how many bytes were written.
    fn answer<'a>(
        &mut self,
        health: &Health,
        memory: &'a GuestMemoryMmap,
        chain: DescriptorChain<&'a GuestMemoryMmap>,
    ) -> u32 {
        let Some(request) = Request::parse(memory, chain) else {
            health.count_error();
            return 0;
        };
        self.identity.assume(request.uid(), request.gid());
        request.serve(&self.server).unwrap_or_else(|refused| {
            health.count_error();
            refused
        })
    }
}
