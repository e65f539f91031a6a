//! The entropy device (virtio 1.2, 5.4): the host's `getrandom` in the guest's buffers.

use std::time::Duration;

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
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
    /// Kept from one driver for the next: a reset is no way to more.
    allowance: Option<Allowance>,
}

struct Active {
    queue: Queue,
    queue_event: EventFd,
    memory: GuestMemory,
    interrupt: Interrupt,
    health: Health,
    registrar: Registrar,
    allowance: Allowance,
    paused: bool,
}

/// What the guest may still have.
struct Allowance {
    /// Armed by the first request of a period.
    timer: TimerFd,
    armed: bool,
    /// What is left in this period, in bytes.
    left: usize,
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
        let allowance = match self.allowance.take() {
            Some(allowance) => allowance,
            None => Allowance::new()?,
        };
        let active = self.active.insert(Active {
            queue,
            queue_event,
            memory: activation.memory,
            interrupt: activation.interrupt,
            health: activation.health,
            registrar: activation.registrar,
            allowance,
            paused: false,
        });
        active.registrar.watch_queue(0, &active.queue_event)?;
        active.registrar.watch(&active.allowance.timer, EventSet::IN, PERIOD_ENDED)
    }

    fn process(&mut self, event: DeviceEvent) -> Result<()> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if matches!(event, DeviceEvent::Backend { .. }) {
            active.allowance.renew()?;
        }
        active.serve()
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            // Both fail only if `activate` did not get so far.
            let _ = active.registrar.forget(&active.queue_event);
            let _ = active.registrar.forget(&active.allowance.timer);
            self.allowance = Some(active.allowance);
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

    fn save(&self) -> Result<DeviceState> {
        Ok(DeviceState::Rng)
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.active.iter().map(|active| active.queue.state()).collect()
    }
}

impl Active {
    /// Serves what is in the queue, as far as the budget goes.
    fn serve(&mut self) -> Result<()> {
        if self.paused {
            return Ok(());
        }
        let memory = self.memory.memory();
        let used = self.queue.next_used();
        loop {
            self.queue.disable_notification(&*memory).map_err(queue_error)?;
            while self.allowance.left > 0
                && let Some(chain) = self.queue.iter(&*memory).map_err(queue_error)?.next()
            {
                let head = chain.head_index();
                let written = self.answer(&memory, chain)?;
                self.queue.add_used(&*memory, head, written).map_err(queue_error)?;
            }
            // With nothing left, the end of the period is what goes on, and no kick.
            if self.allowance.left == 0 || !self.queue.enable_notification(&*memory).map_err(queue_error)? {
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
        self.allowance.spend(length.max(MIN_COST))?;
        match wanted {
            Some(buffers) => fill(buffers)?,
            None => self.health.count_error(),
        }
        Ok(u32::try_from(length).unwrap_or(0))
    }
}

impl Allowance {
    fn new() -> Result<Self> {
        let timer = TimerFd::new().map_err(|error| timer_error("make a timer", error))?;
        Ok(Self { timer, armed: false, left: BUDGET })
    }

    /// A period has ended.
    fn renew(&mut self) -> Result<()> {
        // Also takes back the expiration.
        self.timer.clear().map_err(|error| timer_error("stop its timer", error))?;
        self.armed = false;
        self.left = BUDGET;
        Ok(())
    }

    fn spend(&mut self, bytes: usize) -> Result<()> {
        self.left = self.left.saturating_sub(bytes);
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
        get_random(random).map_err(|error| Error::Device {
            device: "rng",
            operation: "get entropy",
            source: error.into(),
        })?;
        chunk.copy_from(random);
    }
    Ok(())
}

/// A signal may end a call early, or before it has any (getrandom(2)).
fn get_random(mut buffer: &mut [u8]) -> rustix::io::Result<()> {
    while !buffer.is_empty() {
        match getrandom(&mut *buffer, GetRandomFlags::empty()) {
            Ok(filled) => buffer = &mut buffer[filled..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn queue_error(source: virtio_queue::Error) -> Error {
    Error::Queue { device: "rng", queue: 0, source }
}

fn timer_error(operation: &'static str, error: vmm_sys_util::errno::Error) -> Error {
    Error::Device { device: "rng", operation, source: error.into() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, prop_assert_eq, proptest};
    use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

    use super::*;
    use crate::devices::virtio::testing::{Descriptor, Driver, NEEDS_RESET, NEXT, RUNNING, Used};

    const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

    fn new_driver() -> Driver {
        let mut driver = Driver::new(Box::new(Rng::new()));
        driver.start(0);
        driver
    }

    /// Adds a request for `length` bytes; returns where they shall go.
    fn add(driver: &mut Driver, length: usize) -> u64 {
        let address = driver.alloc(length);
        driver.queues[0].add(&[Descriptor::writable(address, u32::try_from(length).unwrap())]);
        address
    }

    fn assert_works(driver: &mut Driver) {
        let address = add(driver, 64);
        let used = driver.exchange(0, 1);
        assert_eq!(used.last().unwrap().length, 64);
        assert_ne!(driver.read(address, 64), [0; 64]);
    }

    #[test]
    fn each_request_gets_other_bytes() {
        let mut driver = new_driver();
        let (first, second) = (add(&mut driver, 32), add(&mut driver, 32));
        let used = driver.exchange(0, 2);
        assert_eq!(used.iter().map(|used| used.length).collect::<Vec<_>>(), [32, 32]);
        assert_ne!(driver.read(first, 32), [0; 32]);
        assert_ne!(driver.read(first, 32), driver.read(second, 32));
    }

    #[test]
    fn only_the_buffers_are_written_and_all_of_them() {
        let mut driver = new_driver();
        let address = driver.alloc(3 * CHUNK);
        let piece = u32::try_from(CHUNK).unwrap() + 100;
        let chain = [
            Descriptor::writable(address + 64, 64),
            Descriptor::writable(address, 0),
            Descriptor::writable(address + 256, piece),
        ];
        driver.queues[0].add(&chain);
        assert_eq!(driver.exchange(0, 1)[0].length, piece + 64);
        assert_eq!(driver.read(address, 64), [0; 64]);
        assert_eq!(driver.read(address + 128, 128), [0; 128]);
        assert_ne!(driver.read(address + 64, 64), [0; 64]);
        assert_ne!(driver.read(address + 256 + u64::from(piece) - 32, 32), [0; 32]);
        assert_eq!(driver.read(address + 256 + u64::from(piece), 64), [0; 64]);
    }

    #[test]
    fn a_large_request_gets_a_part() {
        let mut driver = new_driver();
        let address = add(&mut driver, 1 << 20);
        assert_eq!(driver.exchange(0, 1)[0].length, 64 << 10);
        assert_eq!(driver.read(address + (64 << 10), 1024), [0; 1024]);
    }

    #[test]
    fn a_greedy_guest_has_to_wait_for_the_next_period() {
        let mut driver = new_driver();
        let requests = u16::try_from(BUDGET / MAX_REQUEST).unwrap() + 1;
        for _ in 0..requests {
            add(&mut driver, MAX_REQUEST);
        }
        driver.transport.process(DeviceEvent::Queue(0));
        driver.transport.process(DeviceEvent::Queue(0));
        assert_eq!(driver.queues[0].pending(), requests - 1);
        // The timer's doing.
        driver.run_until(|driver| driver.queues[0].pending() == requests);
        driver.queues[0].used();
        assert_works(&mut driver);
    }

    #[test]
    fn a_reset_is_no_way_to_more() {
        let mut driver = new_driver();
        for _ in 0..BUDGET / MAX_REQUEST {
            add(&mut driver, MAX_REQUEST);
        }
        driver.transport.process(DeviceEvent::Queue(0));
        assert_eq!(driver.queues[0].used().len(), BUDGET / MAX_REQUEST);

        driver.start(0);
        add(&mut driver, 64);
        driver.transport.process(DeviceEvent::Queue(0));
        assert_eq!(driver.queues[0].pending(), 0);
        // The timer's doing.
        driver.run_until(|driver| driver.queues[0].pending() == 1);
    }

    #[test]
    fn bad_requests_get_nothing_and_are_counted() {
        let mut driver = new_driver();
        let address = driver.alloc(64);
        let bad = [
            vec![Descriptor::writable(address, 0)],
            vec![Descriptor::readable(address, 64)],
            vec![Descriptor::readable(address, 64), Descriptor::writable(address, 64)],
            vec![Descriptor::writable(u64::MAX, 64)],
        ];
        for chain in &bad {
            driver.queues[0].add(chain);
        }
        let endless = driver.queues[0].add(&[Descriptor::writable(address, 64)]);
        let looped = Descriptor { next: endless, ..Descriptor::writable(address, 64) };
        driver.queues[0].write_descriptor(endless, Descriptor { flags: looped.flags | NEXT, ..looped });
        let used = driver.exchange(0, 5);
        assert!(used.iter().all(|used| used.length == 0), "{used:?}");
        assert_eq!(driver.transport.health().errors(), 5);
        assert_works(&mut driver);
    }

    #[test]
    fn even_requests_for_nothing_use_up_the_period() {
        let mut driver = new_driver();
        let mut served = 0;
        loop {
            driver.queues[0].add(&[Descriptor::writable(0, 0)]);
            driver.transport.process(DeviceEvent::Queue(0));
            if driver.queues[0].used().is_empty() {
                break;
            }
            served += 1;
        }
        assert_eq!(served, BUDGET / MIN_COST);
        driver.run_until(|driver| driver.queues[0].pending() == 1);
        driver.queues[0].used();
        assert_works(&mut driver);
    }

    #[test]
    fn an_available_ring_beyond_belief_needs_a_reset() {
        let mut driver = new_driver();
        driver.queues[0].set_avail_index(QUEUE_SIZES[0] + 1);
        driver.kick(0);
        driver.run_until_broken();
        assert_eq!(driver.take_interrupt(), VIRTIO_MMIO_INT_CONFIG);
        driver.start(0);
        assert_works(&mut driver);
    }

    #[test]
    fn a_head_outside_the_table_needs_a_reset() {
        let mut driver = new_driver();
        driver.queues[0].publish(QUEUE_SIZES[0]);
        driver.kick(0);
        driver.run_until_broken();
        driver.start(0);
        assert_works(&mut driver);
    }

    #[test]
    fn with_event_indices_it_interrupts_only_when_asked() {
        let mut driver = Driver::new(Box::new(Rng::new()));
        driver.start(EVENT_IDX);
        driver.queues[0].set_used_event(1);
        add(&mut driver, 1);
        driver.exchange(0, 1);
        assert_eq!(driver.take_interrupt(), 0);
        add(&mut driver, 1);
        driver.exchange(0, 1);
        assert_eq!(driver.take_interrupt(), VIRTIO_MMIO_INT_VRING);
    }

    #[test]
    fn a_restored_device_goes_on_with_what_was_queued() {
        let mut driver = Driver::new(Box::new(Rng::new()));
        driver.start(EVENT_IDX);
        for _ in 0..20 {
            assert_works(&mut driver);
        }
        driver.transport.pause();
        let address = add(&mut driver, 64);
        driver.kick(0);
        driver.run();
        assert_eq!(driver.queues[0].used(), []);
        let state = driver.transport.save().unwrap();

        let mut driver = driver.move_to(Box::new(Rng::new()));
        driver.transport.restore(&state).unwrap();
        driver.transport.resume();

        assert_eq!(driver.queues[0].used(), [Used { head: 4, length: 64 }]);
        assert_ne!(driver.read(address, 64), [0; 64]);
        assert_works(&mut driver);
    }

    proptest! {
        #[test]
        fn no_table_breaks_it_for_good(
            table in prop::collection::vec((any::<u64>(), any::<u32>(), 0_u16..8, 0_u16..18, any::<bool>()), 16),
            index in 0_u16..18,
        ) {
            let mut driver = new_driver();
            for (number, &(address, length, flags, next, near)) in (0..).zip(&table) {
                // Mostly in guest memory, and not over the rings.
                let (address, length) =
                    if near { ((1 << 21) + address % (1 << 20), length % 0x2_0000) } else { (address, length) };
                driver.queues[0].write_descriptor(number, Descriptor { address, length, flags, next });
                driver.queues[0].publish(number);
            }
            driver.queues[0].set_avail_index(index);
            driver.kick(0);
            driver.run_until(|driver| driver.status() & NEEDS_RESET != 0 || driver.queues[0].pending() == index);
            prop_assert_eq!(driver.status() & NEEDS_RESET != 0, index > 16);
            driver.start(0);
            prop_assert_eq!(driver.status(), RUNNING);
            assert_works(&mut driver);
        }
    }
}
