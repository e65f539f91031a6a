//! A limit lets so much through and no more, and holds nothing else up.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::receive::Receiver;
use super::super::tap::Tap;
use super::super::transmit::Transmitter;
use super::super::wire::Wire;
use super::super::worker::Worker;
use super::*;
use crate::devices::virtio::testing::{DriverQueue, guest_memory};
use crate::devices::virtio::{Health, Interrupt};

/// Three large frames each way at once, and then none for as long as a test runs: 200 kB, and one byte a second.
const NEARLY_CLOSED: RateLimit =
    RateLimit { bandwidth: NonZeroU64::new(1), operations: None, burst_ms: 200_000_000 };

const LARGE: usize = 60_000;

/// One packet at once, or 1000 bytes.
const QUICK: RateLimit =
    RateLimit { bandwidth: NonZeroU64::new(1_000_000), operations: NonZeroU64::new(1000), burst_ms: 1 };

fn small() -> Vec<u8> {
    frame(99, 60)
}

/// A device whose guest has sent all that it may, and one frame more.
fn throttled() -> Port {
    let mut port = Port::limited(MERGEABLE, &NEARLY_CLOSED);
    for number in 0..4 {
        port.add(&frame(number, LARGE));
    }
    port.kick(TX);
    for number in 0..3 {
        assert_eq!(port.arrived()[HEADER_SIZE..], frame(number, LARGE));
    }
    port
}

/// Returns when the device has done what it can about what the guest has sent: in a turn, that comes after what the host has
/// sent, and a pause waits for the turn's end.
fn assert_nothing_more_is_sent(port: &mut Port) {
    port.post(1, 1526);
    port.kick(RX);
    port.deliver(&small());
    assert_eq!(port.receive(), (small(), 1), "the other direction has a limit of its own");
    port.driver.transport.pause();
    assert!(!readable(&port.host, 0));
    port.driver.transport.resume();
}

#[test]
fn what_the_guest_sends_waits_for_its_limit_and_then_goes() {
    let mut port = Port::limited(MERGEABLE | EVENT_IDX, &QUICK);
    let started = Instant::now();
    for number in 0..20 {
        port.add(&frame(number, 1500));
    }
    port.kick(TX);
    for number in 0..20 {
        assert_eq!(port.arrived()[HEADER_SIZE..], frame(number, 1500));
    }
    port.wait(TX, 20);
    // Each is larger than the burst, so each but the first has waited for the one before.
    assert!(started.elapsed() >= Duration::from_micros(19 * 1500));
    assert_eq!(port.errors(), 0);
}

#[test]
fn what_the_host_sends_waits_for_its_limit_and_then_arrives() {
    let mut port = Port::limited(MERGEABLE | EVENT_IDX, &QUICK);
    port.post(20, 1526);
    port.kick(RX);
    let started = Instant::now();
    for number in 0..20 {
        port.deliver(&frame(number, 1500));
    }
    for number in 0..20 {
        assert_eq!(port.receive(), (frame(number, 1500), 1));
    }
    assert!(started.elapsed() >= Duration::from_micros(19 * 1500));
}

#[test]
fn packets_are_counted_however_small_they_are() {
    let limit = RateLimit { bandwidth: None, operations: NonZeroU64::new(100), burst_ms: 20 };
    let mut port = Port::limited(MERGEABLE, &limit);
    let started = Instant::now();
    for number in 0..10 {
        port.send(&frame(number, 60));
    }
    for number in 0..10 {
        assert_eq!(port.arrived()[HEADER_SIZE..], frame(number, 60));
    }
    assert!(started.elapsed() >= Duration::from_millis(80), "two at once, and one each 10 ms");
}

#[test]
fn no_more_is_sent_than_the_limit_lets_through() {
    let mut port = throttled();
    assert_nothing_more_is_sent(&mut port);
    assert_eq!(port.driver.queues[1].pending(), 3);
}

#[test]
fn no_more_is_received_than_the_limit_lets_through() {
    let mut port = Port::limited(MERGEABLE, &NEARLY_CLOSED);
    port.post(200, 1526);
    port.kick(RX);
    // For the next there would not be enough, if it were as long as can be.
    for number in 0..3 {
        port.deliver(&frame(number, LARGE));
        assert_eq!(port.receive().0, frame(number, LARGE));
    }
    port.deliver(&small());
    port.fence();
    assert_eq!(port.driver.queues[0].pending(), 0);
}

#[test]
fn a_packet_that_is_larger_than_the_burst_passes_a_full_bucket() {
    let limit = RateLimit { burst_ms: 1_000, ..NEARLY_CLOSED };
    let mut port = Port::limited(MERGEABLE, &limit);
    port.send(&frame(1, LARGE));
    assert_eq!(port.arrived()[HEADER_SIZE..], frame(1, LARGE));
    port.post(50, 1526);
    port.kick(RX);
    port.deliver(&frame(2, LARGE));
    assert_eq!(port.receive().0, frame(2, LARGE));
}

#[test]
fn a_driver_that_resets_the_device_does_not_wait_and_gains_nothing() {
    let mut port = throttled();
    for _ in 0..3 {
        port.start(MERGEABLE);
        port.driver.run();
        port.send(&frame(7, LARGE));
        assert_nothing_more_is_sent(&mut port);
        assert_eq!(port.driver.queues[1].pending(), 0);
    }
    // What is left is enough for smaller ones.
    port.start(MERGEABLE);
    port.assert_works();
}

#[test]
fn a_device_that_waits_can_be_paused_and_goes_on_elsewhere() {
    let mut port = throttled();
    assert_nothing_more_is_sent(&mut port);
    port.driver.transport.pause();
    let state = port.driver.transport.save().unwrap();
    let (net, slot) = Net::new(3, &RateLimit::default()).unwrap();
    let mut port = Port { driver: port.driver.move_to(Box::new(net)), slot, ..port };
    port.driver.transport.restore(&state).unwrap();
    port.plug_in();
    port.driver.transport.resume();
    port.driver.run();
    assert_eq!(port.arrived()[HEADER_SIZE..], frame(3, LARGE));
}

#[test]
fn kicks_do_not_make_it_go_faster() {
    let mut port = throttled();
    for _ in 0..1000 {
        port.driver.kick(TX);
        port.driver.run();
    }
    assert_nothing_more_is_sent(&mut port);
    assert_eq!(port.driver.queues[1].pending(), 3);
}

/// A turn that says that there is more is followed by another one at once; after one that does not, the thread sleeps.
#[test]
fn while_it_waits_every_turn_is_the_last() {
    let memory = guest_memory();
    let queue = |number| DriverQueue::new(&memory, number, 16);
    let (rx, mut tx) = (queue(0), queue(1));
    for _ in 0..8 {
        tx.add(&[Descriptor::readable(1 << 20, 1000)]);
    }
    let mut worker = Worker {
        receiver: Receiver::new(rx.device_side(), 0),
        transmitter: Transmitter::new(tx.device_side()),
        memory: memory.clone(),
        interrupt: Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        health: Health::default(),
        link: Arc::default(),
        notice: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
    };
    let (ours, _host) = cable();
    // Four packets without their headers.
    let limit = RateLimit { burst_ms: 4 * 988 * 1000, ..NEARLY_CLOSED };
    let limiter = || RateLimiter::new(&limit).unwrap();
    let limiters = Limiters { receive: limiter(), transmit: limiter() };
    let mut wire = Wire::new(Tap::stand_in(ours), limiters.clone());

    for _ in 0..1000 {
        assert!(!worker.turn(&mut wire).unwrap());
    }

    assert_eq!(tx.pending(), 4);
    assert!(limiters.transmit.is_waiting());
}
