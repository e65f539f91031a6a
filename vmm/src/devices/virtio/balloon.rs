//! The balloon device (virtio 1.2, 5.5), of which mayu wants one thing: free page reporting.
//!
//! The driver reports pages that the guest does not use, and the host takes back what lies behind them before it answers. The
//! guest may use them again at any time, without a word, and gets new memory by touching them. A range is reported once it is
//! free, whoever had it, so that what a guest peaked at goes back to the host with nobody asking for it.
//!
//! Nothing is ever asked of the driver: the balloon's target stays zero. Inflating needs somebody who decides by how much, and who
//! is fast when the guest wants its memory back; what a guest may have at most is bounded anyway. Its two queues are there because a
//! driver is given them in any case, and requests in them are answered, with no effect (5.5.6: a device *may* use a page).
//!
//! [`BalloonHandle`] is how the host knows how much was reported.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT as _, QueueState, QueueT as _};
use vm_memory::{GuestAddressSpace as _, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Buffers, Chain};
use super::discard::{discard, is_of_whole_pages};
use super::{Activation, DeviceEvent, DeviceState, GuestMemory, Health, Interrupt, VirtioDevice};
use crate::error::{Error, Result};
use crate::event_loop::Registrar;

/// The driver reports free pages (virtio 1.2, 5.5.3).
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

/// Inflate, deflate, and the reports. The queues of features that are not offered are not there, and those that follow move up: so
/// Linux counts them (`vm_find_vqs` in drivers/virtio/virtio_mmio.c). It reports 32 ranges at a time, for which a queue has to have
/// room (`PAGE_REPORTING_CAPACITY`).
const QUEUE_SIZES: [u16; 3] = [16, 16, 32];

/// The queue with the reports.
const REPORTING: u16 = 2;

/// The length of a page's number in the other queues, in bytes.
const PAGE_NUMBER: usize = 4;

/// How much of a report counts, in bytes: 32 ranges of the largest size that Linux has (`MAX_PAGE_ORDER`). Thus one takes the event
/// loop milliseconds at most.
const MAX_REPORT: usize = 128 << 20;

/// Says how much was reported, to any thread.
#[derive(Clone, Default)]
pub struct BalloonHandle {
    reported: Arc<AtomicU64>,
}

impl BalloonHandle {
    /// What was ever taken back, in bytes. A page counts each time.
    pub fn reported(&self) -> u64 {
        self.reported.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: usize) {
        self.reported.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// The balloon device.
pub struct Balloon {
    handle: BalloonHandle,
    active: Option<Active>,
}

struct Active {
    /// Each with the doorbell of its own.
    queues: Vec<(Queue, EventFd)>,
    memory: GuestMemory,
    interrupt: Interrupt,
    health: Health,
    registrar: Registrar,
    handle: BalloonHandle,
    paused: bool,
}

impl Balloon {
    /// A balloon device, of whose driver nothing has been heard.
    pub fn new() -> (Self, BalloonHandle) {
        let handle = BalloonHandle::default();
        (Self { handle: handle.clone(), active: None }, handle)
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_REPORTING | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// The target is zero, and what the driver says of itself does not matter.
    fn read_config(&self, _offset: u64, out: &mut [u8]) {
        out.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let active = self.active.insert(Active {
            queues: activation.queues.into_iter().zip(activation.queue_events).collect(),
            memory: activation.memory,
            interrupt: activation.interrupt,
            health: activation.health,
            registrar: activation.registrar,
            handle: self.handle.clone(),
            paused: false,
        });
        for (number, (_, event)) in (0..).zip(&active.queues) {
            active.registrar.watch_queue(number, event)?;
        }
        Ok(())
    }

    fn process(&mut self, event: DeviceEvent) -> Result<()> {
        match (&mut self.active, event) {
            (Some(active), DeviceEvent::Queue(number)) => active.serve(number),
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            for (_, event) in &active.queues {
                // Fails only if `activate` did not get so far.
                let _ = active.registrar.forget(event);
            }
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
            if let Err(error) = (0..).take(QUEUE_SIZES.len()).try_for_each(|number| active.serve(number)) {
                active.health.fail(error);
            }
        }
    }

    fn save(&self) -> Result<DeviceState> {
        Ok(DeviceState::Balloon)
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.active.iter().flat_map(|active| &active.queues).map(|(queue, _)| queue.state()).collect()
    }
}

impl Active {
    /// Answers one request of a queue, and asks for another turn if there is more.
    fn serve(&mut self, number: u16) -> Result<()> {
        let Some((queue, event)) =
            self.queues.get_mut(usize::from(number)).filter(|(queue, _)| queue.ready())
        else {
            return Ok(());
        };
        if self.paused {
            return Ok(());
        }
        let failed = |source| Error::Queue { device: "balloon", queue: number, source };
        let memory = self.memory.memory();
        queue.disable_notification(&*memory).map_err(failed)?;
        let chain = queue.iter(&*memory).map_err(failed)?.next();
        if let Some(chain) = chain {
            let head = chain.head_index();
            match answer(&memory, chain, number, queue.size()) {
                Some(taken) => self.handle.add(taken),
                None => self.health.count_error(),
            }
            queue.add_used(&*memory, head, 0).map_err(failed)?;
            if queue.needs_notification(&*memory).map_err(failed)? {
                self.interrupt.used_ring().map_err(Error::EventFd)?;
            }
        }
        if queue.enable_notification(&*memory).map_err(failed)? {
            event.write(1).map_err(Error::EventFd)?;
        }
        Ok(())
    }
}

/// Does what a request is for, if it is one. Says how many bytes were taken back.
fn answer(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    queue: u16,
    size: u16,
) -> Option<usize> {
    let Chain { readable, writable } = Chain::walk(memory, chain, size)?;
    match queue {
        REPORTING if readable.is_empty() && !writable.is_empty() => take_back(memory, writable),
        REPORTING => None,
        _ => {
            let are_numbers = !readable.is_empty() && readable.len().is_multiple_of(PAGE_NUMBER);
            (writable.is_empty() && are_numbers).then_some(0)
        }
    }
}

/// Gives reported pages back to the host, if they are pages.
fn take_back(memory: &GuestMemoryMmap, mut reported: Buffers<'_>) -> Option<usize> {
    if !reported.slices().all(is_of_whole_pages) {
        return None;
    }
    let length = reported.len().min(MAX_REPORT);
    let pages = reported.split_front(length)?;
    // What the kernel does not take stays the guest's.
    pages.slices().all(|pages| discard(memory, pages).is_ok()).then_some(length)
}

impl Drop for Balloon {
    fn drop(&mut self) {
        self.reset();
    }
}

#[cfg(test)]
mod tests {
    use std::iter::repeat_n;

    use proptest::prelude::*;

    use super::*;
    use crate::devices::virtio::discard::PAGE_SIZE;
    use crate::devices::virtio::testing::{
        Descriptor, Driver, HIGH_MEMORY, HIGH_MEMORY_SIZE, LOW_MEMORY, RUNNING, Used,
    };

    const PAGE: u64 = PAGE_SIZE as u64;

    /// Beyond the queues.
    const FREE: u64 = 16 << 20;

    /// How many pages the tests look at, from [`FREE`] on.
    const PAGES: u64 = 64;

    /// A driver in whose memory each of the pages is full of a byte that is not zero.
    fn new_driver() -> Driver {
        let mut driver = Driver::new(Box::new(Balloon::new().0));
        driver.start(1 << VIRTIO_BALLOON_F_REPORTING);
        fill(&driver);
        driver
    }

    fn fill(driver: &Driver) {
        driver.write(FREE, &vec![0xee; PAGE_SIZE * PAGES as usize]);
        driver.write(HIGH_MEMORY, &vec![0xee; HIGH_MEMORY_SIZE as usize]);
    }

    /// So many pages from a page on.
    fn pages(first: u64, count: u32) -> Descriptor {
        Descriptor::writable(FREE + first * PAGE, count * PAGE as u32)
    }

    fn report(driver: &mut Driver, ranges: &[Descriptor]) {
        let head = driver.queues[usize::from(REPORTING)].add(ranges);
        assert_eq!(driver.exchange(REPORTING, 1), [Used { head: u32::from(head), length: 0 }]);
    }

    /// The numbers of the pages that have been taken back, of which nothing is left.
    fn taken(driver: &Driver) -> Vec<u64> {
        let is_taken = |page: &u64| match driver.read(FREE + page * PAGE, PAGE_SIZE) {
            page if page.iter().all(|byte| *byte == 0) => true,
            page => {
                assert!(page.iter().all(|byte| *byte == 0xee), "a page is taken back whole");
                false
            }
        };
        (0..PAGES).filter(is_taken).collect()
    }

    #[test]
    fn reported_pages_go_back_to_the_host_and_can_be_used_again() {
        let mut driver = new_driver();
        report(&mut driver, &[pages(3, 2), pages(10, 1), Descriptor::writable(HIGH_MEMORY, 4096)]);
        assert_eq!(taken(&driver), [3, 4, 10]);
        assert_eq!(driver.read(HIGH_MEMORY, 4097), [vec![0; 4096], vec![0xee]].concat());
        assert_eq!(driver.transport.health().errors(), 0);
        fill(&driver);
        assert_eq!(taken(&driver), [0; 0]);
    }

    #[test]
    fn what_is_reported_is_counted() {
        let (device, handle) = Balloon::new();
        let mut driver = Driver::new(Box::new(device));
        driver.start(1 << VIRTIO_BALLOON_F_REPORTING);
        assert_eq!(handle.reported(), 0);
        report(&mut driver, &[pages(0, 4), pages(3, 1)]);
        report(&mut driver, &[Descriptor::writable(FREE, 1)]);
        driver.queues[0].add(&[Descriptor::readable(FREE, 4)]);
        driver.exchange(0, 1);
        assert_eq!(handle.reported(), 5 * PAGE);
    }

    #[test]
    fn a_full_report_of_linux_is_one_request() {
        let mut driver = new_driver();
        let ranges: Vec<_> = (0..32).map(|range| pages(range * 2, 1)).collect();
        report(&mut driver, &ranges);
        assert_eq!(taken(&driver), (0..32).map(|range| range * 2).collect::<Vec<_>>());
        let table = driver.alloc_table(&crate::devices::virtio::testing::link(&ranges, 0, 32));
        fill(&driver);
        report(&mut driver, &[Descriptor::indirect(table, 32)]);
        assert_eq!(taken(&driver).len(), 32);
    }

    #[test]
    fn what_is_not_of_whole_pages_stays_and_so_does_what_is_reported_with_it() {
        let mut driver = new_driver();
        let bad = [
            Descriptor::writable(FREE + 1, 4096),
            Descriptor::writable(FREE + 4095, 4096),
            Descriptor::writable(FREE, 1),
            Descriptor::writable(FREE, 4095),
            Descriptor::writable(FREE, 4097),
            Descriptor::writable(LOW_MEMORY - PAGE, 8192),
            Descriptor::writable(HIGH_MEMORY - PAGE, 8192),
            Descriptor::writable(u64::MAX - 4095, 4096),
            Descriptor::writable(FREE, u32::MAX - 4095),
            Descriptor::writable(FREE, 0),
            Descriptor::readable(FREE, 4096),
        ];
        for (number, range) in (1..).zip(bad) {
            report(&mut driver, &[range]);
            assert_eq!((taken(&driver), driver.transport.health().errors()), (vec![], number), "{range:x?}");
        }
        for range in &bad[..9] {
            report(&mut driver, &[pages(0, 4), *range, pages(8, 4)]);
            assert_eq!(taken(&driver), [0; 0], "{range:x?}");
        }
        assert_eq!(driver.status(), RUNNING);
    }

    #[test]
    fn pages_may_be_reported_twice_and_at_once() {
        let mut driver = new_driver();
        report(&mut driver, &[pages(1, 4), pages(3, 4), pages(1, 4)]);
        report(&mut driver, &[pages(0, 3)]);
        assert_eq!(taken(&driver), [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(driver.transport.health().errors(), 0);
    }

    #[test]
    fn a_report_that_is_too_large_counts_in_part() {
        let mut driver = new_driver();
        // Half of memory twice, which is as much as counts, and a page more.
        let half = Descriptor::writable(FREE - (8 << 20), 32 << 20);
        let ranges: Vec<_> = repeat_n(half, MAX_REPORT >> 25).collect();
        driver.write(HIGH_MEMORY, &[0xee]);
        report(&mut driver, &[&ranges[..], &[Descriptor::writable(HIGH_MEMORY, 4096)]].concat());
        assert_eq!(taken(&driver).len(), PAGES as usize);
        assert_eq!(driver.read(HIGH_MEMORY, 1), [0xee]);
    }

    #[test]
    fn one_report_is_served_in_a_turn_of_the_event_loop() {
        let mut driver = new_driver();
        for page in 0..8 {
            driver.queues[usize::from(REPORTING)].add(&[pages(page, 1)]);
        }
        let events = driver.events;
        assert_eq!(driver.exchange(REPORTING, 8).len(), 8);
        assert!(driver.events - events >= 8, "{} turns", driver.events - events);
        assert_eq!(taken(&driver), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn nothing_is_asked_of_the_driver_and_what_it_inflates_stays_its_own() {
        let mut driver = new_driver();
        assert_eq!(driver.config(0, 16), [0; 16]);
        for queue in [0, 1] {
            let numbers = driver.alloc_bytes(&(FREE as u32 / 4096).to_le_bytes());
            driver.queues[queue].add(&[Descriptor::readable(numbers, 4)]);
            assert_eq!(driver.exchange(queue as u16, 1)[0].length, 0);
        }
        assert_eq!(driver.transport.health().errors(), 0);
        for (queue, chain) in [(0, pages(0, 1)), (1, pages(0, 1)), (0, Descriptor::readable(FREE, 5))] {
            driver.queues[queue].add(&[chain]);
            driver.exchange(queue as u16, 1);
        }
        assert_eq!((taken(&driver), driver.transport.health().errors()), (vec![], 3));
    }

    #[test]
    fn a_restored_device_goes_on_with_what_was_queued() {
        let mut driver = new_driver();
        driver.queues[usize::from(REPORTING)].add(&[pages(0, 1)]);
        driver.queues[0].add(&[Descriptor::readable(FREE, 4)]);
        driver.transport.pause();
        driver.kick(REPORTING);
        driver.run();
        assert_eq!(taken(&driver), [0; 0]);
        let saved = driver.transport.save().unwrap();

        let mut driver = driver.move_to(Box::new(Balloon::new().0));
        driver.transport.restore(&saved).unwrap();
        driver.transport.resume();

        assert_eq!([0, 2].map(|queue: usize| driver.queues[queue].used().len()), [1, 1]);
        assert_eq!(taken(&driver), [0]);
        report(&mut driver, &[pages(7, 1)]);
        assert_eq!(taken(&driver), [0, 7]);
    }

    proptest! {
        #[test]
        fn nothing_but_what_is_reported_is_taken(
            reports in prop::collection::vec(
                prop::collection::vec((0..PAGES * 2, 0..4_u32, prop::bool::weighted(0.9)), 1..6),
                1..6,
            )
        ) {
            let mut driver = new_driver();
            let mut expected = std::collections::BTreeSet::new();
            for ranges in reports {
                let descriptors: Vec<_> = ranges
                    .iter()
                    .map(|&(first, count, whole)| {
                        let range = pages(first, count);
                        Descriptor { length: range.length + u32::from(!whole), ..range }
                    })
                    .collect();
                report(&mut driver, &descriptors);
                if ranges.iter().all(|(.., whole)| *whole) {
                    let all = ranges.iter().flat_map(|&(first, count, _)| first..first + u64::from(count));
                    expected.extend(all.filter(|page| *page < PAGES));
                }
            }
            prop_assert_eq!(taken(&driver), expected.into_iter().collect::<Vec<_>>());
        }
    }
}
