use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::GuestAddressSpace;

use super::*;
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::testing::{
    Descriptor, Driver, HIGH_MEMORY, HIGH_MEMORY_SIZE, LOW_MEMORY, NEEDS_RESET, RUNNING, Used,
};

const USED: u32 = VIRTIO_MMIO_INT_VRING;
const CHANGED: u32 = VIRTIO_MMIO_INT_CONFIG;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// What a device was called for, and what it shall do.
#[derive(Default)]
struct Log {
    activations: usize,
    resets: usize,
    features: u64,
    ready: Vec<bool>,
    events: Vec<DeviceEvent>,
    generation: u32,
    refuse_activation: bool,
    fail_processing: bool,
    find_broken: bool,
    health: Option<Health>,
}

/// Writes what it reads from a chain into the same chain.
struct Echo {
    log: Arc<Mutex<Log>>,
    active: Option<Activation>,
}

impl Echo {
    fn new() -> (Self, Arc<Mutex<Log>>) {
        let log = Arc::<Mutex<Log>>::default();
        (Self { log: Arc::clone(&log), active: None }, log)
    }

    fn serve(active: &mut Activation, number: usize) -> Result<()> {
        let memory = active.memory.memory();
        let queue = &mut active.queues[number];
        let failed = |source| Error::Queue { device: "echo", queue: 0, source };
        while let Some(chain) = queue.iter(&*memory).map_err(failed)?.next() {
            let head = chain.head_index();
            let mut written = 0;
            if let Some(buffers) = Chain::walk(&memory, chain, queue.size()) {
                let mut bytes = vec![0; buffers.readable.len().min(4096)];
                buffers.readable.copy_to(&mut bytes);
                buffers.writable.copy_from(&bytes);
                written = u32::try_from(bytes.len().min(buffers.writable.len())).unwrap();
            } else {
                active.health.count_error();
            }
            queue.add_used(&*memory, head, written).map_err(failed)?;
        }
        active.interrupt.used_ring().map_err(Error::EventFd)
    }
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        EVENT_IDX | 1 << 35 | 1
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 4]
    }

    fn read_config(&self, offset: u64, out: &mut [u8]) {
        super::super::read_config_from(&[1, 2, 3, 4, 5, 6, 7, 8], offset, out);
    }

    fn config_generation(&self) -> u32 {
        self.log.lock().unwrap().generation
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let mut log = self.log.lock().unwrap();
        log.activations += 1;
        log.features = activation.features;
        log.ready = activation.queues.iter().map(Queue::ready).collect();
        log.health = Some(activation.health.clone());
        if log.refuse_activation {
            return Err(Error::EventFd(std::io::Error::other("refused")));
        }
        for (number, event) in (0..).zip(&activation.queue_events) {
            activation.registrar.watch_queue(number, event)?;
        }
        self.active = Some(activation);
        Ok(())
    }

    fn process(&mut self, event: DeviceEvent) -> Result<()> {
        let mut log = self.log.lock().unwrap();
        log.events.push(event);
        if log.fail_processing {
            return Err(Error::EventFd(std::io::Error::other("failed")));
        }
        match (event, &mut self.active) {
            (_, Some(active)) if log.find_broken => {
                active.health.set_broken();
                Ok(())
            }
            (DeviceEvent::Queue(queue), Some(active)) => Self::serve(active, usize::from(queue)),
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.log.lock().unwrap().resets += 1;
        if let Some(active) = self.active.take() {
            for event in &active.queue_events {
                active.registrar.forget(event).unwrap();
            }
        }
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {
        for number in 0..self.active.iter().flat_map(|active| &active.queues).count() {
            Self::serve(self.active.as_mut().unwrap(), number).unwrap();
        }
    }

    fn save(&self) -> Result<DeviceState> {
        Ok(DeviceState::Rng)
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.active.iter().flat_map(|active| &active.queues).map(Queue::state).collect()
    }
}

fn new_driver() -> (Driver, Arc<Mutex<Log>>) {
    let (device, log) = Echo::new();
    (Driver::new(Box::new(device)), log)
}

/// Has the device echo a line through this queue.
fn assert_echoes(driver: &mut Driver, queue: u16) {
    let from = driver.alloc_bytes(b"cocoon");
    let to = driver.alloc(6);
    let chain = [Descriptor::readable(from, 6), Descriptor::writable(to, 6)];
    let head = driver.queues[usize::from(queue)].add(&chain);
    let used = driver.exchange(queue, 1);
    assert_eq!(used, [Used { head: u32::from(head), length: 6 }]);
    assert_eq!(driver.read(to, 6), b"cocoon");
}

fn errors(driver: &Driver) -> u64 {
    driver.transport.health().errors()
}

#[test]
fn it_says_what_it_is() {
    let (mut driver, _) = new_driver();
    assert_eq!(driver.read_register(VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(driver.read_register(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.read_register(VIRTIO_MMIO_DEVICE_ID), 42);
    assert_eq!(driver.read_register(VIRTIO_MMIO_VENDOR_ID).to_le_bytes(), *b"mayu");
    for (select, features) in [(0, 1 | 1 << 29), (1, 0b1001), (2, 0), (u32::MAX, 0)] {
        driver.write_register(VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
        assert_eq!(driver.read_register(VIRTIO_MMIO_DEVICE_FEATURES), features, "{select}");
    }
    for (queue, size) in [(0, 16), (1, 4), (2, 0), (u32::MAX, 0)] {
        driver.write_register(VIRTIO_MMIO_QUEUE_SEL, queue);
        assert_eq!(driver.read_register(VIRTIO_MMIO_QUEUE_NUM_MAX), size, "{queue}");
    }
    assert_eq!(errors(&driver), 0);
}

#[test]
fn there_is_no_shared_memory() {
    let (mut driver, _) = new_driver();
    driver.write_register(VIRTIO_MMIO_SHM_SEL, 0);
    for register in [
        VIRTIO_MMIO_SHM_LEN_LOW,
        VIRTIO_MMIO_SHM_LEN_HIGH,
        VIRTIO_MMIO_SHM_BASE_LOW,
        VIRTIO_MMIO_SHM_BASE_HIGH,
    ] {
        assert_eq!(driver.read_register(register), u32::MAX);
    }
    assert_eq!(errors(&driver), 0);
}

#[test]
fn the_configuration_can_be_read_in_any_pieces() {
    let (mut driver, log) = new_driver();
    assert_eq!(driver.config(0, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(driver.config(3, 1), [4]);
    assert_eq!(driver.config(6, 4), [7, 8, 0, 0]);
    assert_eq!(driver.config(0xeff, 2), [0, 0]);
    driver.transport.read(u64::MAX, &mut [0xee; 8]);
    log.lock().unwrap().generation = 7;
    assert_eq!(driver.read_register(VIRTIO_MMIO_CONFIG_GENERATION), 7);
    assert_eq!(errors(&driver), 0);
    driver.write_register(VIRTIO_MMIO_CONFIG, 1);
    assert_eq!(driver.config(0, 4), [1, 2, 3, 4]);
    assert_eq!(errors(&driver), 1);
}

#[test]
fn the_status_goes_one_step_at_a_time() {
    let ladder = [0, 1, 3, 0xb, 0xf];
    for (step, &from) in ladder.iter().enumerate() {
        for to in (0..=0xff).chain([0x100, 0x8000_0000, u32::MAX]) {
            let (mut driver, _) = new_driver();
            driver.write_register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
            for &status in &ladder[1..=step] {
                driver.write_register(VIRTIO_MMIO_STATUS, status);
                driver.write_register(VIRTIO_MMIO_DRIVER_FEATURES, 1);
            }
            let before = errors(&driver);
            assert_eq!(driver.status(), from);

            driver.write_register(VIRTIO_MMIO_STATUS, to);

            let without = to & !NEEDS_RESET;
            let legal = to == 0
                || without == from
                || ladder.get(step + 1) == Some(&without)
                || without == from | FAILED;
            assert_eq!(driver.status(), if legal { without } else { from }, "{from:#x} to {to:#x}");
            assert_eq!(errors(&driver) - before, u64::from(!legal), "{from:#x} to {to:#x}");
        }
    }
}

#[test]
fn a_driver_that_failed_can_only_reset() {
    let (mut driver, _) = new_driver();
    driver.write_register(VIRTIO_MMIO_STATUS, 1);
    driver.write_register(VIRTIO_MMIO_STATUS, 1 | FAILED);
    for status in [3 | FAILED, 3, 1] {
        driver.write_register(VIRTIO_MMIO_STATUS, status);
        assert_eq!(driver.status(), 1 | FAILED);
    }
    driver.start(0);
    assert_echoes(&mut driver, 0);
}

#[test]
fn features_are_agreed_only_if_offered_and_of_version_1() {
    let version_1 = 1_u64 << 32;
    let cases = [
        (version_1, true),
        (version_1 | EVENT_IDX | 1 << 35 | 1, true),
        (0, false),
        (EVENT_IDX, false),
        (version_1 | 2, false),
        (version_1 | 1 << 63, false),
        (u64::MAX, false),
    ];
    for (features, acceptable) in cases {
        let (mut driver, _) = new_driver();
        driver.write_register(VIRTIO_MMIO_STATUS, 1);
        driver.write_register(VIRTIO_MMIO_STATUS, 3);
        for select in [0, 1] {
            driver.write_register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            driver.write_register(VIRTIO_MMIO_DRIVER_FEATURES, half(features, select));
        }
        driver.write_register(VIRTIO_MMIO_STATUS, 0xb);
        assert_eq!(driver.status(), if acceptable { 0xb } else { 3 }, "{features:#x}");
        assert_eq!(errors(&driver), u64::from(!acceptable), "{features:#x}");
    }
}

#[test]
fn features_stay_as_agreed() {
    let (mut driver, log) = new_driver();
    driver.write_register(VIRTIO_MMIO_DRIVER_FEATURES, 1);
    assert_eq!(errors(&driver), 1, "before DRIVER");
    driver.negotiate(EVENT_IDX);
    for select in 0..3 {
        driver.write_register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
        driver.write_register(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    }
    assert_eq!(errors(&driver), 4, "after FEATURES_OK");
    driver.write_register(VIRTIO_MMIO_STATUS, RUNNING);
    assert_eq!(log.lock().unwrap().features, EVENT_IDX | 1 << 32);
}

#[test]
fn the_device_gets_the_queues_as_the_driver_made_them() {
    let (mut driver, log) = new_driver();
    driver.start(EVENT_IDX);
    for (queue, state) in driver.queues.iter().zip(driver.transport.device.queue_states()) {
        let expected = QueueState {
            max_size: queue.size,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: true,
            size: queue.size,
            ready: true,
            desc_table: queue.descriptor_table,
            avail_ring: queue.avail_ring,
            used_ring: queue.used_ring,
        };
        assert_eq!(state, expected);
    }
    assert_eq!(log.lock().unwrap().activations, 1);
}

#[test]
fn a_queue_may_be_left_out() {
    let (mut driver, log) = new_driver();
    driver.negotiate(0);
    driver.set_up_queue(1);
    driver.write_register(VIRTIO_MMIO_STATUS, RUNNING);
    assert_eq!(driver.status(), RUNNING);
    assert_eq!(log.lock().unwrap().ready, [false, true]);
    assert_echoes(&mut driver, 1);
}

#[test]
fn queue_registers_are_open_only_between_features_ok_and_queue_ready() {
    let registers = [
        VIRTIO_MMIO_QUEUE_NUM,
        VIRTIO_MMIO_QUEUE_DESC_LOW,
        VIRTIO_MMIO_QUEUE_DESC_HIGH,
        VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        VIRTIO_MMIO_QUEUE_USED_LOW,
        VIRTIO_MMIO_QUEUE_USED_HIGH,
    ];
    let (mut driver, _) = new_driver();
    let assert_closed = |driver: &mut Driver| {
        let (before, counted) = (driver.transport.registers.clone(), errors(driver));
        for register in registers {
            driver.write_register(register, 0x10);
        }
        driver.write_register(VIRTIO_MMIO_QUEUE_READY, 2);
        assert_eq!(driver.transport.registers, before);
        assert_eq!(errors(driver) - counted, 8);
    };
    driver.write_register(VIRTIO_MMIO_QUEUE_SEL, 0);
    assert_closed(&mut driver);
    driver.write_register(VIRTIO_MMIO_STATUS, 1);
    driver.write_register(VIRTIO_MMIO_STATUS, 3);
    assert_closed(&mut driver);

    driver.negotiate(0);
    driver.write_register(VIRTIO_MMIO_QUEUE_SEL, 2);
    assert_closed(&mut driver);
    driver.set_up_queue(0);
    assert_eq!(driver.read_register(VIRTIO_MMIO_QUEUE_READY), 1);
    assert_closed(&mut driver);
    driver.write_register(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.read_register(VIRTIO_MMIO_QUEUE_READY), 0);
    let before = errors(&driver);
    driver.set_up_queue(0);
    assert_eq!(errors(&driver), before, "open again");

    driver.write_register(VIRTIO_MMIO_STATUS, RUNNING);
    assert_closed(&mut driver);
    driver.write_register(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.read_register(VIRTIO_MMIO_QUEUE_READY), 1, "frozen");
    assert_echoes(&mut driver, 0);
}

#[test]
fn a_driver_with_a_bad_queue_has_to_reset() {
    let end = HIGH_MEMORY + HIGH_MEMORY_SIZE;
    // The queue's size; where its table and rings are; and what is said about it.
    let cases = [
        (0, [0x1000, 0x2000, 0x3000], "power of two"),
        (3, [0x1000, 0x2000, 0x3000], "power of two"),
        (u32::MAX, [0x1000, 0x2000, 0x3000], "power of two"),
        (32, [0x1000, 0x2000, 0x3000], "above the maximum"),
        (1 << 16, [0x1000, 0x2000, 0x3000], "above the maximum"),
        (1 << 31, [0x1000, 0x2000, 0x3000], "above the maximum"),
        (16, [0x1008, 0x2000, 0x3000], "misaligned"),
        (16, [0x1000, 0x2001, 0x3000], "misaligned"),
        (16, [0x1000, 0x2000, 0x3002], "misaligned"),
        (16, [0x1000, 0, 0x3000], "address zero"),
        (16, [LOW_MEMORY, 0x2000, 0x3000], "outside"),
        (16, [LOW_MEMORY - 16, 0x2000, 0x3000], "outside"),
        (16, [HIGH_MEMORY - 16, 0x2000, 0x3000], "outside"),
        (16, [0x1000, end - 2, 0x3000], "outside"),
        (16, [0x1000, 0x2000, end - 4], "outside"),
        // But for the event index after the ring, these would fit.
        (16, [0x1000, end - 4 - 2 * 16, 0x3000], "outside"),
        (16, [0x1000, 0x2000, end - 4 - 8 * 16], "outside"),
        (16, [u64::MAX - 15, 0x2000, 0x3000], "outside"),
        (16, [0x1000, u64::MAX - 1, 0x3000], "outside"),
        (16, [0x1000, 0x2000, u64::MAX - 3], "outside"),
        (16, [0x1000, 0x1000, 0x3000], "overlaps"),
        (16, [0x1000, 0x10fe, 0x3000], "overlaps"),
        (16, [0x1000, 0x2000, 0x2024], "overlaps"),
        (16, [0x1000, 0x2000, 0x0f80], "overlaps"),
        // Queue 1's used ring.
        (16, [0x1000, 0x2000, 0x2_c000], "overlaps"),
    ];
    for (size, addresses, problem) in cases {
        let (mut driver, log) = new_driver();
        driver.negotiate(0);
        driver.set_up_queue(1);
        driver.write_register(VIRTIO_MMIO_QUEUE_SEL, 0);
        driver.write_register(VIRTIO_MMIO_QUEUE_NUM, size);
        let registers = [VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_USED_LOW];
        for (register, address) in registers.into_iter().zip(addresses) {
            driver.write_register(register, half(address, 0));
            driver.write_register(register + 4, half(address, 1));
        }
        driver.write_register(VIRTIO_MMIO_QUEUE_READY, 1);

        driver.write_register(VIRTIO_MMIO_STATUS, RUNNING);

        assert_eq!(driver.status(), RUNNING | NEEDS_RESET, "{size} {addresses:x?}");
        assert_eq!(driver.take_interrupt(), CHANGED);
        let failure = driver.transport.health().take_failure().unwrap().to_string();
        assert!(failure.contains(problem), "{size} {addresses:x?}: {failure}");
        assert_eq!(log.lock().unwrap().activations, 0);
        driver.start(0);
        assert_echoes(&mut driver, 0);
    }
}

#[test]
fn a_queue_may_end_where_memory_ends() {
    let (mut driver, _) = new_driver();
    driver.queues[0].used_ring = HIGH_MEMORY + HIGH_MEMORY_SIZE - 6 - 16 * 8 - 2;
    driver.queues[0].avail_ring = LOW_MEMORY - 6 - 16 * 2;
    driver.start(0);
    for _ in 0..40 {
        assert_echoes(&mut driver, 0);
    }
}

#[test]
fn buffers_used_raise_an_interrupt_until_it_is_acknowledged() {
    let (mut driver, _) = new_driver();
    driver.start(0);
    assert_eq!(driver.take_interrupt(), 0);
    assert_echoes(&mut driver, 0);
    driver.run();
    assert_eq!(driver.interrupts, 1);
    assert_eq!(driver.read_register(VIRTIO_MMIO_INTERRUPT_STATUS), USED);
    driver.write_register(VIRTIO_MMIO_INTERRUPT_ACK, CHANGED);
    assert_eq!(driver.read_register(VIRTIO_MMIO_INTERRUPT_STATUS), USED);
    assert_eq!(driver.take_interrupt(), USED);
    assert_eq!(driver.take_interrupt(), 0);
}

#[test]
fn a_kick_of_nothing_is_ignored() {
    let (mut driver, log) = new_driver();
    driver.kick(0);
    assert_eq!(errors(&driver), 1, "not started");
    driver.start(0);
    for queue in [2, 0xffff] {
        driver.kick(queue);
    }
    driver.write_register(VIRTIO_MMIO_QUEUE_NOTIFY, 1 << 16);
    driver.run();
    assert_eq!(errors(&driver), 4);
    assert!(log.lock().unwrap().events.is_empty());
}

#[test]
fn a_reset_with_requests_in_the_queue_starts_from_nothing() {
    let (mut driver, log) = new_driver();
    driver.start(0);
    assert_echoes(&mut driver, 0);
    let from = driver.alloc(64);
    driver.queues[0].add(&[Descriptor::readable(from, 64)]);
    driver.kick(0);

    driver.write_register(VIRTIO_MMIO_STATUS, 0);

    driver.run();
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.read_register(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert_eq!(driver.transport.registers, Registers::new(2));
    assert_eq!(log.lock().unwrap().resets, 1);
    assert_eq!(log.lock().unwrap().events.len(), 1, "the kick came to nothing");
    driver.start(0);
    assert_echoes(&mut driver, 0);
    assert_echoes(&mut driver, 1);
}

/// Asserts that the device has broken down, stays so whatever the driver does, and works after a reset.
fn assert_broken_until_reset(driver: &mut Driver, log: &Mutex<Log>) {
    assert_eq!(driver.status(), RUNNING | NEEDS_RESET);
    assert_eq!(log.lock().unwrap().resets, 1, "stopped");
    let events = log.lock().unwrap().events.len();
    driver.write_register(VIRTIO_MMIO_STATUS, RUNNING | NEEDS_RESET);
    driver.kick(0);
    driver.run();
    driver.transport.pause();
    driver.transport.resume();
    assert_eq!(driver.status(), RUNNING | NEEDS_RESET);
    assert_eq!(log.lock().unwrap().events.len(), events);
    driver.start(0);
    assert_eq!(log.lock().unwrap().resets, 1, "stopped only once");
    assert_echoes(driver, 0);
}

#[test]
fn a_device_that_refuses_to_start_needs_a_reset() {
    let (mut driver, log) = new_driver();
    log.lock().unwrap().refuse_activation = true;
    driver.negotiate(0);
    driver.set_up_queue(0);
    driver.write_register(VIRTIO_MMIO_STATUS, RUNNING);
    assert_eq!(driver.take_interrupt(), CHANGED);
    log.lock().unwrap().refuse_activation = false;
    assert_broken_until_reset(&mut driver, &log);
}

#[test]
fn a_device_that_fails_needs_a_reset() {
    let (mut driver, log) = new_driver();
    driver.start(0);
    log.lock().unwrap().fail_processing = true;
    driver.kick(0);
    driver.run_until_broken();
    assert_eq!(driver.take_interrupt(), CHANGED);
    assert!(driver.transport.health().take_failure().is_some());
    log.lock().unwrap().fail_processing = false;
    assert_broken_until_reset(&mut driver, &log);
}

#[test]
fn a_device_that_finds_itself_broken_needs_a_reset() {
    let (mut driver, log) = new_driver();
    driver.start(0);
    log.lock().unwrap().find_broken = true;
    driver.kick(0);
    driver.run_until(|driver| driver.interrupts == 1);
    assert_eq!(driver.take_interrupt(), CHANGED);
    log.lock().unwrap().find_broken = false;
    assert_broken_until_reset(&mut driver, &log);
}

#[test]
fn a_device_broken_by_its_driver_needs_a_reset() {
    let (mut driver, log) = new_driver();
    driver.start(0);
    driver.queues[0].set_avail_index(17);
    driver.kick(0);
    driver.run_until_broken();
    assert_eq!(driver.take_interrupt(), CHANGED);
    assert_broken_until_reset(&mut driver, &log);
}

#[test]
fn a_device_found_broken_by_its_own_thread_needs_a_reset() {
    let (mut driver, log) = new_driver();
    driver.start(0);
    let health = log.lock().unwrap().health.clone().unwrap();
    std::thread::spawn(move || health.set_broken()).join().unwrap();
    assert_broken_until_reset(&mut driver, &log);
}

#[test]
fn a_paused_device_is_left_alone() {
    let (mut driver, log) = new_driver();
    driver.start(0);
    let from = driver.alloc(1);
    driver.queues[0].add(&[Descriptor::readable(from, 1)]);
    driver.transport.pause();
    driver.kick(0);
    driver.run();
    assert!(log.lock().unwrap().events.is_empty());
    driver.transport.resume();
    assert_eq!(driver.queues[0].used().len(), 1);
    assert_echoes(&mut driver, 0);
}

fn restored(driver: Driver, state: &TransportState) -> (Driver, Arc<Mutex<Log>>) {
    let json = serde_json::to_string(state).unwrap();
    let state: TransportState = serde_json::from_str(&json).unwrap();
    let (device, log) = Echo::new();
    let mut driver = driver.move_to(Box::new(device));
    driver.transport.restore(&state).unwrap();
    (driver, log)
}

#[test]
fn a_restored_device_goes_on_where_it_was() {
    let (mut driver, _) = new_driver();
    driver.start(EVENT_IDX);
    for _ in 0..21 {
        assert_echoes(&mut driver, 0);
    }
    assert_echoes(&mut driver, 1);
    let from = driver.alloc(1);
    driver.transport.pause();
    driver.queues[0].add(&[Descriptor::readable(from, 1)]);
    let state = driver.transport.save().unwrap();

    let (mut driver, log) = restored(driver, &state);

    assert_eq!(log.lock().unwrap().features, EVENT_IDX | 1 << 32);
    assert_eq!(driver.status(), RUNNING);
    assert_eq!(driver.queues[0].used(), [], "still paused");
    driver.run();
    assert_eq!(driver.interrupts, 1, "the interrupt that may have been lost");
    assert_eq!(driver.take_interrupt(), USED);
    assert_eq!(driver.transport.save().unwrap(), TransportState { interrupt_status: 0, ..state });
    driver.transport.resume();
    assert_eq!(driver.queues[0].used().len(), 1);
    for queue in [0, 1, 0] {
        assert_echoes(&mut driver, queue);
    }
}

#[test]
fn a_device_saved_half_way_through_its_set_up_goes_on_from_there() {
    let (mut driver, _) = new_driver();
    driver.negotiate(0);
    driver.set_up_queue(0);
    let state = driver.transport.save().unwrap();
    let (mut driver, log) = restored(driver, &state);
    driver.transport.resume();
    assert_eq!(log.lock().unwrap().activations, 0);
    driver.set_up_queue(1);
    driver.write_register(VIRTIO_MMIO_STATUS, RUNNING);
    assert_echoes(&mut driver, 0);
    assert_echoes(&mut driver, 1);
}

#[test]
fn a_broken_device_is_restored_broken() {
    let (mut driver, log) = new_driver();
    driver.start(0);
    log.lock().unwrap().fail_processing = true;
    driver.kick(0);
    driver.run_until_broken();
    let state = driver.transport.save().unwrap();
    let (mut driver, log) = restored(driver, &state);
    driver.transport.resume();
    assert_eq!(driver.status(), RUNNING | NEEDS_RESET);
    assert_eq!(log.lock().unwrap().activations, 0);
    driver.start(0);
    assert_echoes(&mut driver, 0);
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let (mut driver, _) = new_driver();
    driver.start(0);
    driver.transport.pause();
    let state = driver.transport.save().unwrap();
    let mut other_queues = state.clone();
    other_queues.registers.queues.pop();
    let mut other_features = state.clone();
    other_features.registers.driver_features |= 2;
    let mut other_place = state.clone();
    other_place.registers.queues[1].used_ring = u64::MAX - 3;
    for wrong in [other_queues, other_features, other_place] {
        let (mut driver, _) = new_driver();
        assert!(driver.transport.restore(&wrong).is_err());
    }
    assert!(new_driver().0.transport.restore(&state).is_ok());
}

/// One access to the registers, legal or not.
#[derive(Clone, Debug)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Kick(u16),
    Run,
    Pause,
    Resume,
}

fn access() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![
        8 => (0_u64..0x48).prop_map(|register| register * 4),
        1 => 0_u64..0x1000,
        1 => any::<u64>(),
    ];
    let status = prop::sample::select(vec![0_u32, 1, 3, 0xb, 0xf, 0x4f, 0x80]);
    let value = prop_oneof![4 => 0_u32..0x40, 2 => any::<u32>(), 2 => status];
    prop_oneof![
        2 => (offset.clone(), 0_usize..9).prop_map(|(offset, length)| Access::Read(offset, length)),
        1 => (offset.clone(), prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, bytes)| Access::Write(offset, bytes)),
        8 => (offset, value.clone()).prop_map(|(offset, value)| Access::Write(offset, value.to_le_bytes().to_vec())),
        8 => value.prop_map(|value| Access::Write(0x70, value.to_le_bytes().to_vec())),
        1 => (0_u16..4).prop_map(Access::Kick),
        2 => Just(Access::Run),
        1 => Just(Access::Pause),
        1 => Just(Access::Resume),
    ]
}

proptest! {
    #[test]
    fn no_access_breaks_it_for_good(started: bool, accesses in prop::collection::vec(access(), 0..100)) {
        let (mut driver, _) = new_driver();
        if started {
            driver.start(0);
        }
        for access in accesses {
            match access {
                Access::Read(offset, length) => driver.transport.read(offset, &mut vec![0xee; length]),
                Access::Write(offset, bytes) => driver.transport.write(offset, &bytes),
                Access::Kick(queue) => driver.kick(queue),
                Access::Run => driver.run(),
                Access::Pause => driver.transport.pause(),
                Access::Resume => driver.transport.resume(),
            }
        }
        driver.transport.resume();
        driver.run();
        driver.start(0);
        assert_echoes(&mut driver, 0);
        assert_echoes(&mut driver, 1);
    }

    #[test]
    fn no_ring_or_table_breaks_it_for_good(
        table in prop::collection::vec(any::<u8>(), 16 * 16),
        small in any::<bool>(),
        heads in prop::collection::vec(0_u16..20, 0..16),
        index in prop_oneof![0_u16..17, any::<u16>()],
    ) {
        let (mut driver, _) = new_driver();
        driver.start(0);
        for (number, bytes) in table.chunks(16).enumerate() {
            let mut bytes = bytes.to_vec();
            if small {
                // Addresses below 16 MiB, lengths below 64 KiB, links inside the table, and flags that exist.
                bytes[3..8].fill(0);
                bytes[10..12].fill(0);
                bytes[12] &= 7;
                bytes[13] = 0;
                bytes[14] &= 15;
                bytes[15] = 0;
                // Not over the rings themselves.
                bytes[2] |= 0x10;
            }
            driver.write(driver.queues[0].descriptor_table + 16 * u64::try_from(number).unwrap(), &bytes);
        }
        for (slot, head) in (0_u64..).zip(&heads) {
            driver.write(driver.queues[0].avail_ring + 4 + 2 * slot, &head.to_le_bytes());
        }
        driver.queues[0].set_avail_index(index);
        driver.kick(0);
        driver.run();
        if driver.status() == RUNNING {
            prop_assert_eq!(driver.queues[0].pending(), index);
        } else {
            prop_assert_eq!(driver.status(), RUNNING | NEEDS_RESET);
        }
        driver.start(0);
        assert_echoes(&mut driver, 0);
    }
}
