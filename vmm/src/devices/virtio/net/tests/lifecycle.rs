//! The cable and the driver come and go.

use super::*;
use crate::devices::virtio::testing::NEEDS_RESET;

#[test]
fn it_says_its_address_and_what_it_can_do() {
    let mut port = Port::unplugged();
    assert_eq!(port.driver.config(0, 10), [2, b'm', b'a', b'y', b'u', 3, 0, 0, 0, 0]);
    assert_eq!(port.driver.config(4, 4), [b'u', 3, 0, 0]);
    let (net, _) = Net::new(0, &RateLimit::default()).unwrap();
    assert_eq!((net.device_type(), net.queue_sizes()), (1, &[256, 256][..]));
    let offered = net.features();
    for feature in [0, 1, 5, 7, 8, 9, 11, 12, 13, 15, 16, 28, 29] {
        assert_ne!(offered & 1 << feature, 0, "{feature}");
    }
    assert_eq!(offered.count_ones(), 13);
}

#[test]
fn the_link_comes_up_with_the_cable() {
    let mut port = Port::unplugged();
    port.start(MERGEABLE);
    assert!(!port.link_is_up());
    assert_eq!(port.driver.take_interrupt(), 0);
    let generation = port.driver.read_register(VIRTIO_MMIO_CONFIG_GENERATION);
    // A kick before that does no harm, and what the driver wants to send goes out later.
    let early = frame(7, 100);
    port.send(&early);
    port.driver.run();

    port.plug_in();

    port.driver.run_until(|driver| driver.take_interrupt() & CHANGED != 0);
    assert_ne!(port.driver.read_register(VIRTIO_MMIO_CONFIG_GENERATION), generation);
    assert!(port.link_is_up());
    assert_eq!(port.arrived()[HEADER_SIZE..], early);
    port.wait(TX, 1);
    port.driver.queues[1].used();
    port.assert_works();
}

#[test]
fn the_cable_may_come_before_the_driver() {
    let mut port = Port::unplugged();
    port.plug_in();
    assert!(port.link_is_up());
    port.driver.negotiate(MERGEABLE);
    port.driver.set_up_queue(0);
    port.driver.set_up_queue(1);
    assert_eq!(port.driver.take_interrupt(), 0, "not before DRIVER_OK");
    port.driver.write_register(VIRTIO_MMIO_STATUS, RUNNING);
    assert_eq!(port.driver.take_interrupt(), CHANGED, "it may have read the link before");
    port.assert_works();
}

#[test]
fn one_slot_takes_one_cable() {
    let mut port = Port::new(MERGEABLE);
    let (_ours, theirs) = cable();
    let refusal = port.slot.attach_stand_in(theirs).unwrap_err().to_string();
    assert_eq!(refusal, "network slot 3 has a TAP device already");
    port.assert_works();
}

#[test]
fn a_reset_driver_starts_again_on_the_same_cable() {
    let mut port = Port::new(MERGEABLE);
    for features in [MERGEABLE | EVENT_IDX, 0, MERGEABLE] {
        port.assert_works();
        // A packet under way and a buffer that was not used do not come with it.
        port.post(1, 100);
        port.start(features);
        assert!(port.link_is_up());
    }
    port.assert_works();
}

#[test]
fn a_paused_device_does_nothing_and_goes_on_with_what_came_meanwhile() {
    for features in [MERGEABLE, MERGEABLE | EVENT_IDX] {
        let mut port = Port::new(features);
        port.assert_works();
        port.driver.transport.pause();
        let (sent, received) = (frame(1, 100), frame(2, 100));
        port.post(1, 1526);
        port.kick(RX);
        port.deliver(&received);
        port.send(&sent);
        port.driver.run();
        let state = port.driver.transport.save().unwrap();
        assert_eq!(port.driver.transport.save().unwrap(), state);
        assert!(!readable(&port.host, 0));
        assert_eq!(port.driver.queues[0].pending(), 0);

        port.driver.transport.resume();

        assert_eq!(port.arrived()[HEADER_SIZE..], sent);
        assert_eq!(port.receive(), (received, 1));
        port.wait(TX, 1);
        port.driver.queues[1].used();
        port.assert_works();
    }
}

/// Moves the driver to another device, through a saved state.
fn moved(mut port: Port) -> Port {
    port.driver.transport.pause();
    let state = serde_json::to_string(&port.driver.transport.save().unwrap()).unwrap();
    let (net, slot) = Net::new(3, &RateLimit::default()).unwrap();
    let mut driver = port.driver.move_to(Box::new(net));
    driver.transport.restore(&serde_json::from_str(&state).unwrap()).unwrap();
    Port { driver, slot, ..port }
}

#[test]
fn a_restored_device_has_no_cable_until_it_is_given_one() {
    let mut port = Port::new(MERGEABLE | EVENT_IDX);
    for _ in 0..300 {
        port.assert_works();
    }
    port.driver.run();
    port.driver.take_interrupt();
    port.post(2, 1526);
    port.kick(RX);
    let mut port = moved(port);
    assert_eq!(port.driver.take_interrupt(), CHANGED);
    assert!(!port.link_is_up());
    port.driver.transport.resume();
    let sent = frame(1, 100);
    port.send(&sent);

    port.plug_in();

    port.driver.run_until(|driver| driver.take_interrupt() & CHANGED != 0);
    assert!(port.link_is_up());
    assert_eq!(port.arrived()[HEADER_SIZE..], sent);
    port.wait(TX, 1);
    port.driver.queues[1].used();
    let received = frame(2, 100);
    port.deliver(&received);
    assert_eq!(port.receive(), (received, 1));
    for _ in 0..300 {
        port.assert_works();
    }
}

#[test]
fn a_device_that_never_had_a_cable_is_given_one_while_it_is_paused() {
    let mut port = Port::unplugged();
    port.start(MERGEABLE);
    port.post(1, 1526);
    port.kick(RX);
    let mut port = moved(port);
    assert_eq!(port.driver.take_interrupt(), 0, "nothing has changed");
    port.plug_in();
    assert_eq!(port.driver.take_interrupt(), CHANGED);
    let received = frame(2, 100);
    port.deliver(&received);
    port.driver.run();
    assert_eq!(port.driver.queues[0].pending(), 0, "still paused");
    port.driver.transport.resume();
    assert_eq!(port.receive(), (received, 1));
    port.assert_works();
}

#[test]
fn a_restored_device_does_not_look_into_its_queues_before_it_goes_on() {
    let mut port = Port::new(MERGEABLE);
    port.assert_works();
    port.driver.transport.pause();
    let state = port.driver.transport.save().unwrap();
    port.post(1, 1526);
    let (net, slot) = Net::new(3, &RateLimit::default()).unwrap();
    let (ours, theirs) = cable();
    slot.attach_stand_in(theirs).unwrap();
    let mut port = Port { driver: port.driver.move_to(Box::new(net)), slot, host: ours, ..port };
    let received = frame(2, 100);
    port.deliver(&received);
    port.driver.transport.restore(&state).unwrap();
    assert_eq!(port.driver.transport.save().unwrap(), state);
    port.driver.transport.resume();
    assert_eq!(port.receive(), (received, 1));
    port.assert_works();
}

#[test]
fn a_held_packet_survives_a_pause() {
    let mut port = Port::new(MERGEABLE);
    port.post(1, 1526);
    port.kick(RX);
    let large = frame(1, 5000);
    port.deliver(&large);
    port.fence();
    port.driver.transport.pause();
    port.post(3, 1526);
    port.kick(RX);
    port.driver.transport.resume();
    assert_eq!(port.receive(), (large, 4));
}

#[test]
fn a_cable_that_is_cut_takes_the_link_down_and_what_is_sent_is_lost() {
    let mut port = Port::new(MERGEABLE);
    port.assert_works();
    port.driver.run();
    port.driver.take_interrupt();
    port.host = tempfile::tempfile().unwrap();
    port.driver.run_until(|driver| driver.take_interrupt() & CHANGED != 0);
    assert!(!port.link_is_up());
    for number in 0..10 {
        port.send(&frame(number, 100));
    }
    port.wait(TX, 10);
    assert_eq!((port.driver.status(), port.errors()), (RUNNING, 0));
}

#[test]
fn another_device_s_state_is_refused() {
    let (mut net, _) = Net::new(0, &RateLimit::default()).unwrap();
    assert!(net.restore(&DeviceState::Rng).is_err());
}

#[test]
fn the_thread_ends_with_the_device() {
    let mut port = Port::new(MERGEABLE);
    port.assert_works();
    let Port { driver, slot, mut host, .. } = port;
    drop(driver);
    // The handle keeps the cable; when that goes too, its other end is closed.
    drop(slot);
    assert_eq!(host.read(&mut [0; 64]).unwrap(), 0);
}

#[test]
fn a_broken_queue_ends_the_thread_and_is_told_to_the_log() {
    let mut port = Port::new(MERGEABLE);
    port.driver.run();
    let before = port.driver.events;
    port.driver.queues[1].set_avail_index(1000);
    port.kick(TX);
    // It is the event loop that has to be woken for the log, and not only the driver.
    port.driver.run_until(|driver| driver.events > before);
    assert!(port.driver.transport.health().take_failure().is_some());
    assert_eq!(port.driver.status(), RUNNING | NEEDS_RESET);
}
