//! Drivers that break the rules.

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::testing::{INDIRECT, LOW_MEMORY, NEEDS_RESET, WRITE};

/// Chains that no queue takes, each made from this address on.
fn broken_chains(port: &mut Port, good: Descriptor) -> Vec<Vec<Descriptor>> {
    let inner = port.driver.alloc_table(&[good]);
    let nested = port.driver.alloc_table(&link(&[good, Descriptor::indirect(inner, 1)], 0, 256));
    let outside = |address, length| Descriptor { address, length, ..good };
    vec![
        vec![Descriptor { flags: good.flags | NEXT, next: 256, ..good }],
        vec![good, Descriptor { flags: good.flags | NEXT, next: 0xffff, ..good }],
        vec![outside(LOW_MEMORY, 100)],
        vec![outside(LOW_MEMORY - 50, 100)],
        vec![outside(1 << 40, 100), good],
        vec![outside(u64::MAX - 50, 100)],
        vec![outside(good.address, u32::MAX)],
        vec![Descriptor::indirect(nested, 2)],
        vec![Descriptor { length: 17, ..Descriptor::indirect(inner, 1) }],
        vec![Descriptor { flags: INDIRECT, ..outside(1 << 40, 16) }],
        vec![Descriptor { length: 0, ..good }],
        vec![Descriptor { length: HEADER_SIZE as u32, ..good }],
    ]
}

#[test]
fn what_is_no_packet_is_not_sent() {
    let mut port = Port::new(MERGEABLE);
    let packet = port.driver.alloc(1 << 17);
    let good = Descriptor::readable(packet, 200);
    let mut chains = broken_chains(&mut port, good);
    chains.extend([
        vec![Descriptor::writable(packet, 200)],
        vec![good, Descriptor::writable(packet, 200)],
        vec![Descriptor::readable(packet, MAX_PACKET as u32 + 1)],
        vec![Descriptor::readable(packet, 60_000), Descriptor::readable(packet, 60_000)],
    ]);
    for (number, chain) in (1..).zip(&chains) {
        let head = port.driver.queues[1].add(chain);
        let used = port.driver.exchange(TX, 1);
        assert_eq!(used, [Used { head: u32::from(head), length: 0 }], "{chain:?}");
        assert_eq!(port.errors(), number, "{chain:?}");
        assert!(!readable(&port.host, 0), "{chain:?}");
    }
    port.assert_works();
}

#[test]
fn what_is_no_buffer_is_given_back_and_the_packet_goes_into_the_next() {
    let mut port = Port::new(MERGEABLE);
    let buffer = port.driver.alloc(4096);
    let good = Descriptor::writable(buffer, 2000);
    let mut chains = broken_chains(&mut port, good);
    chains.extend([
        vec![Descriptor::readable(buffer, 2000)],
        vec![Descriptor::readable(buffer, 2000), good],
        vec![good, Descriptor::readable(buffer, 2000)],
    ]);
    for (number, chain) in (1..).zip(&chains) {
        let head = port.driver.queues[0].add(chain);
        port.post(1, 2000);
        port.kick(RX);
        let sent = frame(number, 100);
        port.deliver(&sent);
        port.wait(RX, 2);
        let broken = port.driver.queues[0].used_one();
        assert_eq!(broken, Used { head: u32::from(head), length: 0 }, "{chain:?}");
        assert_eq!(port.receive(), (sent, 1), "{chain:?}");
        assert_eq!(port.errors(), number as u64, "{chain:?}");
    }
    port.assert_works();
}

#[test]
fn a_broken_buffer_behind_good_ones_waits_for_its_turn() {
    let mut port = Port::new(MERGEABLE);
    port.post(2, 1000);
    let broken = port.driver.queues[0].add(&[Descriptor::writable(1 << 40, 1000)]);
    port.post(30, 1000);
    port.kick(RX);
    // It fits before the broken one, and leaves one of the good ones.
    let small = frame(1, 500);
    port.deliver(&small);
    assert_eq!(port.receive(), (small, 1));
    // One that does not fit before it is lost.
    port.deliver(&frame(2, 2000));
    let small = frame(3, 988);
    port.deliver(&small);
    assert_eq!(port.receive(), (small, 1));
    // What comes then finds it given back.
    let large = frame(4, 20_000);
    port.deliver(&large);
    port.wait(RX, 2);
    assert_eq!(port.driver.queues[0].used_one(), Used { head: u32::from(broken), length: 0 });
    assert_eq!(port.receive(), (large, 21));
    assert_eq!(port.errors(), 1);
}

#[test]
fn buffers_too_many_for_one_call_cost_the_packet_and_nothing_else() {
    let mut port = Port::new(MERGEABLE);
    let address = port.driver.alloc(1 << 16);
    // Each chain is a table of 200 buffers of 13 bytes.
    let table: Vec<_> = (0..200).map(|number| Descriptor::writable(address + 13 * number, 13)).collect();
    let table = port.driver.alloc_table(&link(&table, 0, 256));
    for _ in 0..20 {
        port.driver.queues[0].add(&[Descriptor::indirect(table, 200)]);
    }
    port.kick(RX);
    port.deliver(&frame(1, 2600 * 5));
    port.deliver(&frame(2, 2600 * 5 - HEADER_SIZE));
    port.wait(RX, 1);
    let lengths: Vec<_> = port.driver.queues[0].used().iter().map(|used| used.length).collect();
    assert_eq!(lengths, [2600; 5]);
    assert_eq!(port.errors(), 0);
}

#[test]
fn chains_without_end_are_given_back() {
    let mut port = Port::new(MERGEABLE);
    let address = port.driver.alloc(2000);
    for (queue, descriptor) in
        [(RX, Descriptor::writable(address, 1)), (TX, Descriptor::readable(address, 1))]
    {
        let ring = &mut port.driver.queues[usize::from(queue)];
        let head = ring.add(&[descriptor]);
        ring.write_descriptor(head, Descriptor { flags: descriptor.flags | NEXT, next: head, ..descriptor });
        // The longest indirect table, every descriptor of which is empty.
        let empty = Descriptor { length: 0, flags: descriptor.flags | NEXT, next: 0, ..descriptor };
        let table = port.driver.alloc_table(&[empty]);
        port.driver.queues[usize::from(queue)].add(&[Descriptor::indirect(table, 0xffff)]);
        if queue == RX {
            port.deliver(&frame(1, 100));
        }
        assert_eq!(port.driver.exchange(queue, 2).len(), 2);
    }
    assert_eq!(port.errors(), 4);
    port.assert_works_in_the_end();
}

#[test]
fn an_index_beyond_belief_or_a_head_outside_the_table_needs_a_reset() {
    for queue in [RX, TX] {
        for spoil in [
            |port: &mut Port, queue: usize| port.driver.queues[queue].set_avail_index(1000),
            |port: &mut Port, queue: usize| port.driver.queues[queue].publish(256),
        ] {
            let mut port = Port::new(MERGEABLE);
            port.driver.run();
            port.driver.take_interrupt();
            spoil(&mut port, usize::from(queue));
            port.deliver(&frame(1, 100));
            port.kick(queue);
            port.driver.run_until_broken();
            assert_eq!(port.driver.status(), RUNNING | NEEDS_RESET);
            assert_eq!(port.driver.take_interrupt(), CHANGED);
            let failure = port.driver.transport.health().take_failure().unwrap().to_string();
            assert!(failure.contains(&format!("virtio-net: queue {queue}")), "{failure}");
            port.start(MERGEABLE);
            port.assert_works_in_the_end();
        }
    }
}

#[test]
fn a_driver_with_half_a_device_has_that_half() {
    let mut port = Port::unplugged();
    port.driver.negotiate(MERGEABLE);
    port.driver.set_up_queue(1);
    port.driver.write_register(VIRTIO_MMIO_STATUS, RUNNING);
    port.plug_in();
    port.deliver(&frame(1, 100));
    port.fence();
    port.kick(RX);
    port.fence();
    assert_eq!((port.driver.status(), port.errors()), (RUNNING, 0));
}

#[test]
fn buffers_over_the_rings_may_spoil_them_but_no_more() {
    let mut port = Port::new(MERGEABLE);
    let queue = port.driver.queues[0].descriptor_table;
    port.driver.queues[0].add(&[Descriptor::writable(queue, 0x1_0000)]);
    port.kick(RX);
    port.deliver(&frame(1, 60_000));
    // Whatever the device now makes of its rings, it takes a reset.
    port.start(MERGEABLE);
    port.assert_works_in_the_end();
}

/// Any descriptor: mostly one that points to somewhere in guest memory, and never into the queue.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![4 => (1_u64 << 21)..(1 << 22), 1 => any::<u64>()];
    let length = prop_oneof![1 => Just(0_u32), 1 => 1_u32..40, 4 => 0_u32..3000, 1 => any::<u32>()];
    let flags = prop_oneof![1 => Just(0_u16), 1 => Just(NEXT), 3 => Just(WRITE), 3 => Just(WRITE | NEXT), 1 => 0_u16..8];
    (address, length, flags, 0_u16..260).prop_map(|(address, length, flags, next)| Descriptor {
        address,
        length,
        flags,
        next,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_table_breaks_it_for_good(
        tables in prop::array::uniform2(prop::collection::vec(descriptor(), 256)),
        heads in prop::array::uniform2(prop::collection::vec(0_u16..256, 0..256)),
        packets in prop::collection::vec(1_usize..20_000, 0..8),
        features in prop_oneof![Just(0), Just(MERGEABLE), Just(EVENT_IDX), Just(MERGEABLE | EVENT_IDX)],
    ) {
        let mut port = Port::new(features);
        for (queue, (table, heads)) in tables.iter().zip(&heads).enumerate() {
            for (number, descriptor) in (0..).zip(table) {
                port.driver.queues[queue].write_descriptor(number, *descriptor);
            }
            for head in heads {
                port.driver.queues[queue].publish(*head);
            }
        }
        for length in packets {
            port.deliver(&frame(length, length));
        }
        port.kick(RX);
        port.kick(TX);
        let sent = heads[1].len() as u16;
        while port.driver.queues[1].pending() < sent {
            while readable(&port.host, 0) {
                port.arrived();
            }
            port.driver.run();
        }
        prop_assert_eq!(port.driver.queues[1].used().len(), heads[1].len());
        port.driver.transport.pause();
        let used = port.driver.queues[0].used();
        prop_assert!(used.len() <= heads[0].len());
        prop_assert!(used.iter().all(|used| heads[0].contains(&u16::try_from(used.head).unwrap())));
        port.driver.transport.resume();
        prop_assert_eq!(port.driver.status(), RUNNING);
        while readable(&port.host, 0) {
            port.arrived();
        }
        port.start(features);
        port.assert_works_in_the_end();
    }
}
