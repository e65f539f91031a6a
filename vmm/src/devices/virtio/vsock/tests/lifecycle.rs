//! Activation, reset, pause, save and restore.

use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::*;
use crate::devices::virtio::{DeviceState, VirtioDevice};

const EVENT: usize = 2;

#[test]
fn the_guest_reads_its_context_id() {
    let (device, _, _) = device();
    let mut driver = Driver::new(device);
    assert_eq!(driver.config(0, 8), GUEST.to_le_bytes());
    assert_eq!(driver.config(4, 4), [0; 4]);
    assert_eq!(driver.config(6, 6), [0; 6]);
    assert_eq!(driver.config(1 << 20, 4), [0; 4]);
}

#[test]
fn requests_wait_for_the_driver() {
    let mut guest = Guest::switched_off();
    let (_host, result) = guest.request(1024);
    guest.driver.run();
    // Linux resets a device before it does anything else with it.
    guest.driver.start(0);
    guest.provide(8, &[4096]);
    assert!(guest.receive_one().is(Op::Request));
    assert_eq!(result.try_recv(), Err(TryRecvError::Empty));
}

#[test]
fn a_reset_ends_everything() {
    let mut guest = Guest::new();
    let mut open = guest.guest_connects();
    let (mut pending, result) = guest.request(1024);
    guest.receive_one();
    // In the middle of a transfer in both directions.
    guest.send(open.data(60_000), &pattern(60_000));
    guest.refill = false;
    while open.host.write(&[0; 4096]).is_ok() {}
    guest.receive();
    let (_, waiting) = guest.request(1025);

    guest.driver.write_register(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
    for result in [result, waiting] {
        assert!(result.try_recv().unwrap().unwrap_err().contains("reset"));
    }
    assert_eq!(pending.read(&mut [0]).unwrap(), 0);
    assert!(open.is_write_refused());
    guest.driver.run();

    guest.driver.start(0);
    guest.buffers.clear();
    guest.refill = true;
    guest.provide(16, &[4096]);
    guest.send(open.data(1), &[0]);
    assert!(guest.receive_one().is(Op::Reset), "the old connection is unknown");
    let again = guest.host_connects(1024);
    assert_ne!(again.host_port, 1 << 30, "ports go on");
}

#[test]
fn a_pause_keeps_connections() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    guest.driver.transport.pause();
    pair.host.write_all(b"later").unwrap();
    let (_host, result) = guest.request(1024);
    assert!(guest.receive().is_empty());

    guest.driver.transport.resume();
    let packets = guest.receive();
    assert!(packets.iter().any(|packet| packet.payload == b"later"));
    assert!(packets.iter().any(|packet| packet.is(Op::Request)));
    guest.send(pair.data(3), b"now");
    assert_eq!(pair.read(), b"now");
    assert_eq!(result.try_recv(), Err(TryRecvError::Empty));
}

#[test]
fn packets_sent_during_a_pause_are_taken_after_it() {
    let mut guest = Guest::new();
    guest.driver.transport.pause();
    let request = header(Op::Request, 5000, ALLOWED);
    let address = guest.driver.alloc_bytes(&request.to_bytes());
    guest.driver.queues[TX].add(&[Descriptor::readable(address, HEADER_SIZE as u32)]);
    guest.driver.kick(TX as u16);
    guest.driver.run();
    assert!(guest.accepted.try_recv().is_err());

    guest.driver.transport.resume();
    assert!(guest.receive_one().is(Op::Response));
}

/// The same guest on another machine, its devices restored from what was saved here.
fn move_guest(mut guest: Guest) -> Guest {
    guest.driver.transport.pause();
    let state = guest.driver.transport.save().unwrap();
    let state = serde_json::from_slice(&serde_json::to_vec(&state).unwrap()).unwrap();
    let (device, handle, accepted) = device();
    let mut driver = guest.driver.move_to(device);
    driver.transport.restore(&state).unwrap();
    driver.transport.resume();
    Guest { driver, handle, accepted, ..guest }
}

#[test]
fn a_restored_guest_hears_that_its_connections_are_gone() {
    let mut guest = Guest::with_features(1 << VIRTIO_RING_F_EVENT_IDX);
    guest.provide(16, &[4096]);
    let event = guest.driver.alloc_bytes(&[0xff; 4]);
    for _ in 0..8 {
        guest.driver.queues[EVENT].add(&[Descriptor::writable(event, 4)]);
    }
    let pair = guest.host_connects(1024);
    let old_port = pair.host_port;

    let mut guest = move_guest(guest);
    guest.driver.run();
    assert_eq!(guest.driver.queues[EVENT].used().len(), 1);
    assert_eq!(guest.driver.read(event, 4), [0; 4]);
    let queue = &guest.driver.queues[EVENT];
    let avail_event = queue.used_ring + 4 + 8 * u64::from(queue.size);
    assert_eq!(guest.driver.read(avail_event, 2), [8, 0], "the ninth buffer is worth a kick");

    // New connections wait until the guest has forgotten the old ones, and do not look like them.
    let (_host, _result) = guest.request(1024);
    assert!(guest.receive().is_empty());
    guest.driver.queues[EVENT].add(&[Descriptor::writable(event, 4)]);
    guest.driver.kick(EVENT as u16);
    let request = guest.receive_one();
    assert!(request.is(Op::Request));
    assert_eq!(request.header.src_port, old_port + 1);

    guest.send(pair.data(1), &[0]);
    assert!(guest.receive_one().is(Op::Reset), "the old connection is unknown");
}

#[test]
fn the_news_waits_for_a_buffer() {
    let mut guest = move_guest(Guest::new());
    guest.driver.run();
    let event = guest.driver.alloc_bytes(&[0xff; 4]);
    // The first is too small to hold it.
    guest.driver.queues[EVENT].add(&[Descriptor::writable(event, 3)]);
    guest.driver.queues[EVENT].add(&[Descriptor::writable(event, 4)]);
    guest.driver.kick(EVENT as u16);
    guest.driver.run();
    let used = guest.driver.queues[EVENT].used();
    assert_eq!(used.iter().map(|used| used.length).collect::<Vec<_>>(), [0, 4]);
    assert_eq!(guest.driver.read(event, 4), [0; 4]);
    assert_eq!(guest.errors(), 1);
}

#[test]
fn a_guest_saved_before_its_driver_started_hears_nothing() {
    let mut guest = move_guest(Guest::switched_off());
    guest.driver.start(0);
    guest.provide(8, &[4096]);
    let event = guest.driver.alloc_bytes(&[0xff; 4]);
    guest.driver.queues[EVENT].add(&[Descriptor::writable(event, 4)]);
    guest.driver.kick(EVENT as u16);
    let (_host, _result) = guest.request(1024);
    assert!(guest.receive_one().is(Op::Request));
    assert!(guest.driver.queues[EVENT].used().is_empty());
}

#[test]
fn another_devices_state_is_refused() {
    let (mut device, _, _) = device();
    assert!(device.restore(&DeviceState::Rng).is_err());
}

#[test]
fn one_interrupt_for_many_packets() {
    let mut guest = Guest::with_features(1 << VIRTIO_RING_F_EVENT_IDX);
    guest.refill = false;
    guest.provide(20, &[4096]);
    let mut pair = guest.guest_connects();
    // Interrupts once the used index passes what the guest has seen.
    guest.driver.queues[RX].set_used_event(1);
    let before = guest.driver.interrupts;
    pair.host.write_all(&pattern(40_000)).unwrap();
    assert_eq!(guest.receive().len(), 10);
    assert_eq!(guest.driver.interrupts, before + 1);

    // Not before the guest wants one.
    guest.driver.queues[RX].set_used_event(1000);
    pair.host.write_all(&pattern(4000)).unwrap();
    assert_eq!(guest.receive().len(), 1);
    assert_eq!(guest.driver.interrupts, before + 1);
}

#[test]
fn one_kick_is_enough_for_many_packets() {
    let mut guest = Guest::without_buffers();
    guest.refill = false;
    let count = 64;
    for guest_port in 0..count {
        let request = header(Op::Request, guest_port, ALLOWED + 1);
        let address = guest.driver.alloc_bytes(&request.to_bytes());
        guest.driver.queues[TX].add(&[Descriptor::readable(address, HEADER_SIZE as u32)]);
    }
    guest.driver.kick(TX as u16);
    guest.driver.run();
    assert_eq!(guest.driver.queues[TX].used().len(), 64);

    guest.provide(64, &[4096]);
    let ports: Vec<_> = guest.receive().iter().map(|packet| packet.header.dst_port).collect();
    assert_eq!(ports, (0..count).collect::<Vec<_>>());
}

#[test]
fn a_stream_that_cannot_be_watched_ends_its_connection() {
    let mut guest = Guest::new();
    let result = Arc::new(Mutex::new(None));
    let slot = Arc::clone(&result);
    let file = tempfile::tempfile().unwrap();
    guest.handle.connect(file.into(), 1024, Box::new(move |result| *slot.lock().unwrap() = Some(result)));
    assert!(guest.receive().last().unwrap().is(Op::Reset));
    assert!(result.lock().unwrap().take().unwrap().is_err());
}
