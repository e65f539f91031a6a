//! The entropy device (virtio 1.2, 5.4): the host's `getrandom` in the guest's buffers.

use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::chain::{Buffers, Chain};
use super::{Activation, DeviceEvent, DeviceState, GuestMemory, Health, Interrupt, VirtioDevice};
use crate::error::{Error, Result};
use crate::event_loop::Registrar;

/// Linux has one request under way at a time.
const QUEUE_SIZES: [u16; 1] = [16];

/// What one request is given at most, in bytes. The driver learns how much it got.
const MAX_REQUEST: usize = 64 << 10;

/// The guest gets at most so many bytes in each [`PERIOD`]: 2.5 MiB a second are far more than a pool needs and
/// under one percent of a host CPU.
const BUDGET: usize = 256 << 10;
const PERIOD: Duration = Duration::from_millis(100);

/// What a request costs at least, in bytes, however small it is.
const MIN_COST: usize = 64;

/// How much is in the VMM's own memory at a time, in bytes.
const CHUNK: usize = 4096;

/// The event loop's word for the end of a [`PERIOD`].
const PERIOD_ENDED: u32 = 0;

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    active: Option<Active>,
}

struct Active {
    queue: Queue,
    queue_event: EventFd,
    memory: GuestMemory,
    interrupt: Interrupt,
    health: Health,
    registrar: Registrar,
    /// Armed by the first request of a period.
    timer: TimerFd,
    armed: bool,
    /// What is left in this period, in bytes.
    budget: usize,
    paused: bool,
}

impl Rng {
    /// An entropy device.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, out: &mut [u8]) {
        out.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let mut queues = activation.queues.into_iter().zip(activation.queue_events);
        let Some((queue, queue_event)) = queues.next() else {
            return Ok(());
        };
        let timer = TimerFd::new().map_err(|error| timer_error("make a timer", error))?;
        let active = self.active.insert(Active {
            queue,
            queue_event,
            memory: activation.memory,
            interrupt: activation.interrupt,
            health: activation.health,
            registrar: activation.registrar,
            timer,
            armed: false,
            budget: BUDGET,
            paused: false,
        });
        active.registrar.watch_queue(0, &active.queue_event)?;
        active.registrar.watch(&active.timer, EventSet::IN, PERIOD_ENDED)
    }

    fn process(&mut self, event: DeviceEvent) -> Result<()> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if matches!(event, DeviceEvent::Backend { .. }) {
            active.start_period()?;
        }
        active.serve()
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            // Both fail only if `activate` did not get so far.
            let _ = active.registrar.forget(&active.queue_event);
            let _ = active.registrar.forget(&active.timer);
        }
    }

    fn pause(&mut self) {
        if let Some(active) = &mut self.active {
            active.paused = true;
        }
    }

    fn resume(&mut self) {
        if let Some(active) = &mut self.active {
            active.paused = false;
            if let Err(error) = active.serve() {
                active.health.fail(error);
            }
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.active.iter().map(|active| active.queue.state()).collect()
    }
}

impl Active {
    fn start_period(&mut self) -> Result<()> {
        // Also takes back the expiration. Reading it could block, if this event is from before a reset.
        self.timer.clear().map_err(|error| timer_error("stop its timer", error))?;
        self.armed = false;
        self.budget = BUDGET;
        Ok(())
    }

    /// Serves what is in the queue, as far as the budget goes.
    fn serve(&mut self) -> Result<()> {
        if self.paused {
            return Ok(());
        }
        let memory = self.memory.memory();
        let used = self.queue.next_used();
        loop {
            self.queue.disable_notification(&*memory).map_err(queue_error)?;
            while self.budget > 0
                && let Some(chain) = self.queue.iter(&*memory).map_err(queue_error)?.next()
            {
                let head = chain.head_index();
                let written = self.answer(&memory, chain)?;
                self.queue.add_used(&*memory, head, written).map_err(queue_error)?;
            }
            // With no budget left, the end of the period is what goes on, and no kick.
            if self.budget == 0 || !self.queue.enable_notification(&*memory).map_err(queue_error)? {
                break;
            }
        }
        if self.queue.next_used() != used && self.queue.needs_notification(&*memory).map_err(queue_error)? {
            self.interrupt.used_ring().map_err(Error::EventFd)?;
        }
        Ok(())
    }

    /// Fills one request; returns how many bytes it got.
    fn answer(&mut self, memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> Result<u32> {
        let wanted = Chain::walk(memory, chain, self.queue.size())
            .filter(|chain| chain.readable.is_empty() && !chain.writable.is_empty())
            .and_then(|mut chain| {
                let length = chain.writable.len().min(MAX_REQUEST);
                chain.writable.split_front(length)
            });
        let length = wanted.as_ref().map_or(0, Buffers::len);
        self.spend(length.max(MIN_COST))?;
        match wanted {
            Some(buffers) => fill(buffers)?,
            None => self.health.count_error(),
        }
        Ok(u32::try_from(length).unwrap_or(0))
    }

    fn spend(&mut self, bytes: usize) -> Result<()> {
        self.budget = self.budget.saturating_sub(bytes);
        if !self.armed {
            self.timer.reset(PERIOD, None).map_err(|error| timer_error("start its timer", error))?;
            self.armed = true;
        }
        Ok(())
    }
}

fn fill(mut buffers: Buffers<'_>) -> Result<()> {
    let mut random = [0; CHUNK];
    while let Some(chunk) = buffers.split_front(buffers.len().min(CHUNK))
        && !chunk.is_empty()
    {
        let random = &mut random[..chunk.len()];
        getrandom::fill(random).map_err(|error| Error::Device {
            device: "rng",
            operation: "get entropy",
            source: error.into(),
        })?;
        chunk.copy_from(random);
    }
    Ok(())
}

fn queue_error(source: virtio_queue::Error) -> Error {
    Error::Queue { device: "rng", queue: 0, source }
}

fn timer_error(operation: &'static str, error: vmm_sys_util::errno::Error) -> Error {
    Error::Device { device: "rng", operation, source: error.into() }
}
