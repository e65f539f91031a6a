//! Packets, both ways.

use super::*;

#[test]
fn packets_go_out_as_the_driver_made_them() {
    let mut port = Port::new(MERGEABLE);
    let sent = frame(1, 1514);
    let packet: Vec<u8> = [&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], &sent[..]].concat();
    let address = port.driver.alloc_bytes(&packet);
    let cuts: [&[u32]; 5] =
        [&[1526], &[12, 1514], &[1, 11, 0, 1, 1513], &[13, 0, 0, 1513], &[5, 500, 500, 500, 21]];
    for cut in cuts {
        let mut offset = 0;
        let chain: Vec<_> = cut
            .iter()
            .map(|length| {
                let descriptor = Descriptor::readable(address + offset, *length);
                offset += u64::from(*length);
                descriptor
            })
            .collect();
        let table = port.driver.alloc_table(&link(&chain, 0, 256));
        for chain in [chain, vec![Descriptor::indirect(table, len(&vec![0; cut.len()]))]] {
            let head = port.driver.queues[1].add(&chain);
            port.kick(TX);
            assert_eq!(port.arrived(), packet, "{cut:?}");
            port.wait(TX, 1);
            assert_eq!(port.driver.queues[1].used(), [Used { head: u32::from(head), length: 0 }]);
        }
    }
    assert_eq!(port.driver.take_interrupt(), USED | CHANGED);
    assert_eq!(port.errors(), 0);
}

#[test]
fn a_packet_comes_in_one_buffer_if_it_fits() {
    let mut port = Port::new(MERGEABLE);
    port.post(2, 1526);
    port.kick(RX);
    let sent = frame(1, 1514);
    port.deliver(&sent);
    assert_eq!(port.receive(), (sent, 1));
    assert_eq!(port.driver.take_interrupt(), USED | CHANGED);
    port.assert_works();
}

#[test]
fn a_packet_takes_as_many_buffers_as_it_needs_and_no_more() {
    let mut port = Port::new(MERGEABLE);
    port.post(100, 1000);
    port.kick(RX);
    for (number, (length, buffers)) in
        [(988, 1), (989, 2), (2988, 3), (60, 1), (9000, 10), (65535 + 14, 66)].into_iter().enumerate()
    {
        let sent = frame(number, length);
        port.deliver(&sent);
        assert_eq!(port.receive(), (sent, buffers), "{length}");
        port.post(usize::from(buffers), 1000);
        port.kick(RX);
    }
    assert_eq!(port.errors(), 0);
}

#[test]
fn buffers_may_be_of_any_size_and_cut_anyhow() {
    let mut port = Port::new(MERGEABLE);
    let address = port.driver.alloc(1 << 17);
    let mut offset = 0;
    let mut chain = |lengths: &[u32]| -> Vec<Descriptor> {
        lengths
            .iter()
            .map(|length| {
                let descriptor = Descriptor::writable(address + offset, *length);
                offset += u64::from(*length);
                descriptor
            })
            .collect()
    };
    // A header that is cut in two, empty buffers, one byte more than a header, and one that holds any packet.
    for lengths in [&[7, 0, 6, 100][..], &[13], &[0, 1000, 0], &[70_000]] {
        port.driver.queues[0].add(&chain(lengths));
    }
    port.kick(RX);
    let sent = frame(5, 2000);
    port.deliver(&sent);
    port.wait(RX, 1);
    let lengths: Vec<_> = port.driver.queues[0].used().iter().map(|used| used.length).collect();
    assert_eq!(lengths, [113, 13, 1000, 2012 - 1126]);
    let packet = port.driver.read(address, 2012);
    assert_eq!(packet[..HEADER_SIZE], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0]);
    assert_eq!(packet[HEADER_SIZE..], sent);
}

#[test]
fn the_longest_packet_goes_both_ways() {
    let mut port = Port::new(MERGEABLE);
    let sent = frame(1, MAX_PACKET - HEADER_SIZE);
    port.send(&sent);
    assert_eq!(port.arrived()[HEADER_SIZE..], sent);
    port.post(17, 4096);
    port.kick(RX);
    port.deliver(&sent);
    assert_eq!(port.receive(), (sent, 17));
}

#[test]
fn a_driver_that_does_not_merge_buffers_gets_each_packet_in_one() {
    for length in [1526, 65562] {
        let mut port = Port::new(0);
        port.post(3, length);
        port.kick(RX);
        for number in 0..2 {
            let sent = frame(number, 1514);
            port.deliver(&sent);
            assert_eq!(port.receive(), (sent, 1));
        }
        // One that is too long for it is lost, and costs no buffer.
        if length == 1526 {
            port.deliver(&frame(2, 1515));
        }
        let sent = frame(3, 60);
        port.deliver(&sent);
        assert_eq!(port.receive(), (sent, 1));
        assert_eq!(port.errors(), 0);
    }
}

#[test]
fn flags_reach_only_a_driver_that_knows_them() {
    for (features, flags) in [(MERGEABLE, 0), (MERGEABLE | 1 << VIRTIO_NET_F_GUEST_CSUM, 2)] {
        let mut port = Port::new(features);
        // Into the buffers, and by way of the device's own memory.
        for buffers in [1, 50] {
            port.post(buffers, 2000);
            port.kick(RX);
            port.host
                .write_all(&[&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], &frame(1, 60)].concat())
                .unwrap();
            port.wait(RX, 1);
            let used = port.driver.queues[0].used_one();
            assert_eq!(port.content(used)[..HEADER_SIZE], [flags, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        }
    }
}

#[test]
fn packets_wait_in_the_host_until_there_are_buffers() {
    for features in [MERGEABLE, MERGEABLE | EVENT_IDX, 0, EVENT_IDX] {
        let mut port = Port::new(features);
        let frames: Vec<_> = (0..20).map(|number| frame(number, 200)).collect();
        for frame in &frames {
            port.deliver(frame);
        }
        port.post(1, 1526);
        port.kick(RX);
        for (number, frame) in frames.iter().enumerate() {
            assert_eq!(port.receive(), (frame.clone(), 1), "{number}");
            // The device asks for a kick once it has run out of buffers, and needs no more than that.
            port.post(1, 1526);
            port.kick(RX);
        }
        assert_eq!(port.errors(), 0);
        port.fence();
    }
}

#[test]
fn a_packet_that_was_read_too_early_is_held_until_it_fits() {
    for features in [MERGEABLE, MERGEABLE | EVENT_IDX] {
        let mut port = Port::new(features);
        let (large, small) = (frame(1, 30_000), frame(2, 60));
        port.deliver(&large);
        port.deliver(&small);
        for _ in 0..9 {
            port.post(2, 1526);
            port.kick(RX);
            port.fence();
            assert_eq!(port.driver.queues[0].pending(), 0);
        }
        port.post(2, 1526);
        port.kick(RX);
        assert_eq!(port.receive(), (large, 20));
        port.post(1, 1526);
        port.kick(RX);
        assert_eq!(port.receive(), (small, 1));
        assert_eq!(port.errors(), 0);
    }
}

#[test]
fn a_packet_that_the_whole_queue_has_no_room_for_is_dropped() {
    let mut port = Port::new(MERGEABLE);
    port.post(256, 100);
    port.kick(RX);
    port.deliver(&frame(1, 25_600));
    let fits = frame(2, 25_600 - HEADER_SIZE);
    port.deliver(&fits);
    assert_eq!(port.receive(), (fits, 256));
    assert_eq!(port.errors(), 0);
}

#[test]
fn thousands_of_packets_go_both_ways_in_order() {
    for features in [MERGEABLE, MERGEABLE | EVENT_IDX] {
        let mut port = Port::new(features);
        port.post(100, 700);
        port.kick(RX);
        let (mut sent, mut arrived, mut delivered, mut received) = (0, 0, 0, 0);
        while received < 3000 || arrived < 3000 {
            while sent < 3000 && sent - arrived < 100 {
                port.add(&frame(sent, 60 + sent % 1000));
                sent += 1;
            }
            port.kick(TX);
            while delivered < 3000 && delivered - received < 40 {
                port.deliver(&frame(delivered, 60 + delivered % 1200));
                delivered += 1;
            }
            while readable(&port.host, 0) {
                assert_eq!(port.arrived()[HEADER_SIZE..], frame(arrived, 60 + arrived % 1000));
                arrived += 1;
            }
            port.driver.run();
            port.driver.queues[1].used();
            while port.driver.queues[0].pending() > 0 {
                let (got, buffers) = port.receive();
                assert_eq!(got, frame(received, 60 + received % 1200));
                received += 1;
                port.post(usize::from(buffers), 700);
            }
            port.kick(RX);
        }
        assert_eq!(port.errors(), 0);
    }
}

#[test]
fn a_wire_that_takes_no_more_holds_the_packets_and_stops_nothing_else() {
    for features in [MERGEABLE, MERGEABLE | EVENT_IDX] {
        let mut port = Port::new(features);
        // More than the socket takes.
        let frames: Vec<_> = (0..60).map(|number| frame(number, 10_000)).collect();
        for frame in &frames {
            port.add(frame);
        }
        port.kick(TX);
        // The other direction goes on.
        port.post(3, 1526);
        port.kick(RX);
        let incoming = frame(100, 1000);
        port.deliver(&incoming);
        assert_eq!(port.receive(), (incoming, 1));
        assert!(port.driver.queues[1].pending() < 60, "some of them wait");
        for frame in &frames {
            assert_eq!(port.arrived()[HEADER_SIZE..], *frame);
        }
        port.wait(TX, 60);
        port.driver.queues[1].used();
        port.assert_works();
    }
}

#[test]
fn a_batch_of_packets_is_one_interrupt() {
    let mut port = Port::new(MERGEABLE);
    port.assert_works();
    port.post(60, 1526);
    port.driver.transport.pause();
    port.driver.run();
    port.driver.interrupts = 0;
    for number in 0..30 {
        port.deliver(&frame(number, 100));
        port.add(&frame(number, 100));
    }
    port.driver.transport.resume();
    port.driver.run_until(|driver| driver.interrupts > 0);
    port.driver.transport.pause();
    port.driver.run();
    let used = [port.driver.queues[0].pending(), port.driver.queues[1].pending()];
    assert_eq!((port.driver.interrupts, used), (1, [30, 30]));
}

#[test]
fn a_driver_says_with_event_indices_when_it_wants_an_interrupt() {
    let mut port = Port::new(MERGEABLE | EVENT_IDX);
    port.post(40, 1526);
    port.driver.queues[0].set_used_event(9);
    port.driver.queues[1].set_used_event(100);
    port.kick(RX);
    port.driver.run();
    port.driver.interrupts = 0;
    for number in 0..9 {
        port.deliver(&frame(number, 100));
        port.fence();
    }
    port.driver.transport.pause();
    port.driver.run();
    assert_eq!((port.driver.queues[0].pending(), port.driver.interrupts), (9, 0));
    port.driver.transport.resume();
    port.deliver(&frame(9, 100));
    port.driver.run_until(|driver| driver.interrupts == 1);
    assert_eq!(port.driver.queues[0].pending(), 10);
}

#[test]
fn a_driver_without_event_indices_is_asked_for_kicks_only_when_they_matter() {
    let mut port = Port::new(MERGEABLE);
    let flags = |port: &Port, queue: usize| port.driver.read(port.driver.queues[queue].used_ring, 1)[0];
    port.post(64, 1526);
    port.kick(RX);
    port.deliver(&frame(1, 100));
    port.receive();
    port.fence();
    port.driver.transport.pause();
    assert_eq!(
        (flags(&port, 0), flags(&port, 1)),
        (NO_NOTIFY, 0),
        "there are buffers, and no packet to send"
    );
    for number in 0..70 {
        port.deliver(&frame(number, 100));
    }
    port.driver.transport.resume();
    port.wait(RX, 63);
    port.fence();
    port.driver.transport.pause();
    assert_eq!(flags(&port, 0), 0, "packets wait for buffers");
}
