//! A guest that breaks the rules hurts nobody but itself, and is counted.

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::testing::{HIGH_MEMORY, LOW_MEMORY, NEXT};
use crate::devices::virtio::vsock::muxer::{MAX_ACCEPTED, MAX_CONNECTIONS};

/// What the device answers to `header`.
fn answer(guest: &mut Guest, header: Header) -> Vec<Packet> {
    guest.send(header, &[]);
    guest.receive()
}

#[test]
fn packets_of_no_connection_are_refused() {
    for op in [Op::Response, Op::Shutdown, Op::Rw, Op::CreditUpdate, Op::CreditRequest] {
        let mut guest = Guest::new();
        guest.send(header(op, 5000, ALLOWED), &[]);
        let reset = guest.receive_one();
        assert!(reset.is(Op::Reset));
        assert_eq!((reset.header.src_port, reset.header.dst_port), (ALLOWED, 5000));
        assert_eq!(guest.errors(), 1);
    }
}

#[test]
fn a_reset_of_no_connection_is_not_answered() {
    let mut guest = Guest::new();
    assert!(answer(&mut guest, header(Op::Reset, 5000, ALLOWED)).is_empty());
}

#[test]
fn unknown_types_of_socket_are_refused() {
    let mut guest = Guest::new();
    let request = Header { kind: 2, ..header(Op::Request, 5000, ALLOWED) };
    let resets = answer(&mut guest, request);
    assert!(resets[0].is(Op::Reset));
    assert_eq!(resets[0].header.kind, 2);
    assert_eq!(guest.errors(), 1);
}

#[test]
fn other_machines_are_not_reached() {
    for dst_cid in [0, 1, GUEST, 4, u64::MAX, HOST | 1 << 32] {
        let mut guest = Guest::new();
        let request = Header { dst_cid, ..header(Op::Request, 5000, ALLOWED) };
        let resets = answer(&mut guest, request);
        assert!(resets[0].is(Op::Reset));
        assert_eq!(resets[0].header.src_cid, dst_cid);
        assert!(guest.accepted.try_recv().is_err());
        assert_eq!(guest.errors(), 1);
    }
}

#[test]
fn a_forged_sender_gets_nothing() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    let forged = Header { src_cid: 4, ..pair.data(4) };
    guest.send(forged, b"evil");
    assert!(guest.receive().is_empty());
    assert_eq!(guest.errors(), 1);

    guest.send(pair.data(4), b"good");
    assert_eq!(pair.read(), b"good");
}

#[test]
fn what_does_not_belong_ends_the_connection() {
    let unexpected = [Op::Request as u16, Op::Response as u16, 0, 8, u16::MAX];
    for op in unexpected {
        let mut guest = Guest::new();
        let mut pair = guest.guest_connects();
        let packet = Header { op, ..pair.header(Op::Rw) };
        let resets = answer(&mut guest, packet);
        assert!(resets[0].is(Op::Reset), "{op}");
        assert!(pair.is_at_end());
        assert_eq!(guest.errors(), 1);
    }
}

#[test]
fn what_does_not_belong_ends_a_connect() {
    for op in [Op::Request, Op::Shutdown, Op::Rw, Op::CreditUpdate, Op::CreditRequest] {
        let mut guest = Guest::new();
        let (_host, result) = guest.request(1024);
        let request = guest.receive_one();
        let resets = answer(&mut guest, header(op, 1024, request.header.src_port));
        assert!(resets[0].is(Op::Reset), "{op:?}");
        assert!(result.try_recv().unwrap().unwrap_err().contains("protocol"));
        assert_eq!(guest.errors(), 1);
    }
}

#[test]
fn data_after_the_end_ends_the_connection() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    guest.send(pair.shutdown(SHUTDOWN_SEND), &[]);
    guest.send(pair.data(4), b"more");
    assert!(guest.receive_one().is(Op::Reset));
    assert!(pair.is_at_end());
    assert_eq!(guest.errors(), 1);
}

#[test]
fn more_than_the_credit_ends_the_connection() {
    // One buffer, for the response: the guest is never told that the host has read something.
    let mut guest = Guest::without_buffers();
    guest.refill = false;
    guest.provide(1, &[4096]);
    let mut pair = guest.guest_connects();
    let bytes = pattern(64 * 1024);
    for _ in 0..4 {
        guest.send(pair.data(bytes.len()), &bytes);
    }
    assert_eq!(guest.errors(), 0);

    let before = pair.read();
    guest.send(pair.data(1), &[1]);
    assert_eq!(guest.errors(), 1);
    assert!(before.len() + pair.read().len() <= 256 * 1024);
    assert!(pair.is_at_end());
    guest.provide(1, &[4096]);
    assert!(guest.receive_one().is(Op::Reset));
}

#[test]
fn data_before_the_response_ends_the_connection() {
    let mut guest = Guest::without_buffers();
    guest.send(header(Op::Request, 5000, ALLOWED), &[]);
    let (_, host) = guest.accepted.try_recv().unwrap();
    let mut pair = Pair { host, host_port: ALLOWED, guest_port: 5000 };
    guest.send(pair.data(4), b"soon");
    assert!(pair.is_at_end());
    assert_eq!(guest.errors(), 1);
}

#[test]
fn forged_credit_makes_no_credit() {
    for fwd_cnt in [1, 5, 1000, 1 << 31, u32::MAX] {
        let mut guest = Guest::new();
        let mut pair = guest.guest_connects_with(4);
        pair.host.write_all(b"12345678").unwrap();
        assert_eq!(guest.receive()[0].payload, b"1234");

        let forged = Header { buf_alloc: 4, fwd_cnt, ..pair.header(Op::CreditUpdate) };
        let packets = answer(&mut guest, forged);
        let sent: usize = packets.iter().map(|packet| packet.payload.len()).sum();
        assert_eq!(sent, if fwd_cnt <= 4 { fwd_cnt as usize } else { 0 });
    }
}

#[test]
fn a_hundred_thousand_connects_are_as_many_as_there_may_be() {
    let mut guest = Guest::new();
    let mut streams = Vec::new();
    for guest_port in 0..100_000 {
        guest.send(header(Op::Request, guest_port, ALLOWED), &[]);
        let granted = streams.len() < MAX_ACCEPTED;
        assert!(guest.receive_one().is(if granted { Op::Response } else { Op::Reset }));
        streams.extend(guest.accepted.try_recv());
    }
    assert_eq!(streams.len(), MAX_ACCEPTED);
    let _by_the_host = guest.host_connects(1024);

    // Nothing remembers those that were refused.
    drop(streams);
    assert_eq!(guest.receive().len(), MAX_ACCEPTED);
    guest.guest_connects();
}

#[test]
fn half_closed_connections_are_bounded() {
    let mut guest = Guest::new();
    let mut pairs = Vec::new();
    for guest_port in 10_000..12_000 {
        guest.send(header(Op::Request, guest_port, ALLOWED), &[]);
        if guest.receive_one().is(Op::Reset) {
            continue;
        }
        let (host_port, host) = guest.accepted.try_recv().unwrap();
        let pair = Pair { host, host_port, guest_port };
        guest.send(pair.shutdown(SHUTDOWN_SEND), &[]);
        pairs.push(pair);
    }
    assert!(pairs.len() < MAX_CONNECTIONS);

    // All of them can still end.
    for pair in pairs.drain(..) {
        drop(pair);
        assert!(guest.receive_one().is(Op::Reset));
    }
    guest.guest_connects();
}

#[test]
fn resets_that_nobody_takes_are_bounded() {
    let mut guest = Guest::without_buffers();
    for guest_port in 0..3000 {
        guest.send(header(Op::Request, guest_port, ALLOWED + 1), &[]);
    }
    assert_eq!(guest.errors(), 3000 - MAX_CONNECTIONS as u64);

    guest.provide(128, &[4096]);
    assert_eq!(guest.receive().len(), MAX_CONNECTIONS);
}

#[test]
fn chains_that_hold_no_packet_are_counted() {
    let mut guest = Guest::new();
    let buffer = guest.driver.alloc(70_000);
    let wrong: &[&[Descriptor]] = &[
        &[Descriptor::readable(buffer, 0)],
        &[Descriptor::readable(buffer, 43)],
        &[Descriptor::writable(buffer, 4096)],
        &[Descriptor::readable(buffer, 44), Descriptor::writable(buffer, 4096)],
        &[Descriptor::readable(LOW_MEMORY - 43, 44)],
        &[Descriptor::readable(LOW_MEMORY, 44)],
        &[Descriptor::readable(u64::MAX - 20, 44)],
        &[Descriptor::readable(HIGH_MEMORY - 1, 44)],
        &[Descriptor::readable(buffer, u32::MAX)],
        &[Descriptor::indirect(buffer, 0)],
        &[Descriptor::indirect(u64::MAX - 15, 1)],
    ];
    for (count, chain) in (1..).zip(wrong) {
        guest.send_chain(chain);
        assert!(guest.receive().is_empty());
        assert_eq!(guest.errors(), count, "{chain:?}");
        assert!(guest.is_running());
    }
}

#[test]
fn an_endless_chain_ends() {
    let mut guest = Guest::new();
    let buffer = guest.driver.alloc(4096);
    let endless = Descriptor { flags: NEXT, ..Descriptor::readable(buffer, 44) };
    guest.driver.queues[TX].write_descriptor(0, endless);
    guest.driver.queues[TX].publish(0);
    guest.driver.exchange(TX as u16, 1);
    assert_eq!(guest.errors(), 1);
    assert!(guest.is_running());
}

#[test]
fn a_payload_that_is_not_there_ends_the_connection() {
    for (claimed, there) in [(5, 4), (u32::MAX, 4), (65_537, 65_537), (1, 0)] {
        let mut guest = Guest::new();
        let mut pair = guest.guest_connects();
        let packet = Header { len: claimed, ..pair.header(Op::Rw) };
        guest.send(packet, &pattern(there));
        assert!(guest.receive_one().is(Op::Reset), "{claimed} bytes of {there}");
        assert!(pair.is_at_end());
        assert_eq!(guest.errors(), 1);
    }
}

#[test]
fn a_length_without_payload_means_nothing_elsewhere() {
    let mut guest = Guest::new();
    let pair = guest.guest_connects();
    let update = Header { len: u32::MAX, ..pair.header(Op::CreditUpdate) };
    guest.send(update, b"ignored");
    assert!(guest.receive().is_empty());
    assert_eq!(guest.errors(), 0);
}

#[test]
fn buffers_that_take_no_packet_are_counted_and_passed_over() {
    let mut guest = Guest::without_buffers();
    let buffer = guest.driver.alloc(4096);
    for chain in [
        vec![Descriptor::writable(buffer, 43)],
        vec![Descriptor::writable(buffer, 44)],
        vec![Descriptor::readable(buffer, 4096)],
        vec![Descriptor::readable(buffer, 44), Descriptor::writable(buffer, 4096)],
        vec![Descriptor::writable(LOW_MEMORY - 10, 4096)],
    ] {
        guest.add_buffer(chain);
    }
    guest.refill = false;
    guest.provide(1, &[4096]);

    guest.send(header(Op::Request, 5000, ALLOWED), &[]);
    assert!(guest.receive_one().is(Op::Response));
    assert_eq!(guest.errors(), 5);
    assert!(guest.is_running());
}

#[test]
fn a_broken_ring_breaks_the_device_until_its_reset() {
    for queue in [RX, TX] {
        let mut guest = Guest::without_buffers();
        let (mut host, result) = guest.request(1024);
        guest.driver.run();
        guest.driver.queues[queue].set_avail_index(1000);
        guest.driver.kick(queue as u16);
        guest.driver.run_until_broken();
        assert!(result.try_recv().unwrap().unwrap_err().contains("reset"));
        assert_eq!(host.read(&mut [0]).unwrap(), 0);

        guest.driver.start(0);
        guest.buffers.clear();
        guest.provide(16, &[4096]);
        guest.host_connects(1024);
    }
}

#[test]
fn a_head_outside_of_the_table_breaks_the_device() {
    let mut guest = Guest::new();
    guest.driver.queues[TX].publish(1000);
    guest.driver.kick(TX as u16);
    guest.driver.run_until_broken();
}

/// What a guest and its host may do.
#[derive(Clone, Debug)]
enum Step {
    Packet(Header, usize),
    Chain(Vec<(u64, u32, u16)>),
    Buffers(usize, usize),
    Connect,
    Write(usize, usize),
    Read(usize),
    ShutdownWrite(usize),
    ShutdownRead(usize),
    Close(usize),
    PauseAndResume,
}

fn any_header() -> impl Strategy<Value = Header> {
    let cids = prop_oneof![9 => Just((GUEST, HOST)), 1 => (0u64..5, 0u64..5)];
    let host_port = prop_oneof![Just(ALLOWED), (1u32 << 30)..(1 << 30) + 3, Just(0)];
    let credit = (
        prop_oneof![Just(GUEST_BUFFER), 0u32..10_000, any::<u32>()],
        prop_oneof![0u32..10_000, any::<u32>()],
    );
    let op = prop_oneof![4 => 1u16..8, 2 => Just(Op::Response as u16), 3 => Just(Op::Rw as u16), 1 => any::<u16>()];
    let len = prop_oneof![3 => Just(None), 1 => any::<u32>().prop_map(Some)];
    (cids, 0u32..4, host_port, op, 0u32..5, credit, len).prop_map(
        |((src_cid, dst_cid), guest_port, host_port, op, flags, (buf_alloc, fwd_cnt), len)| Header {
            src_cid,
            dst_cid,
            src_port: guest_port,
            dst_port: host_port,
            // Stands for the length that is there.
            len: len.unwrap_or(u32::MAX - 1),
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        },
    )
}

fn any_step() -> impl Strategy<Value = Step> {
    let address = prop_oneof![0u64..LOW_MEMORY, any::<u64>()];
    let descriptor = (address, 0u32..70_000, 0u16..8);
    prop_oneof![
        8 => (any_header(), 0usize..65_000).prop_map(|(header, len)| Step::Packet(header, len)),
        1 => prop::collection::vec(descriptor, 1..5).prop_map(Step::Chain),
        3 => (1usize..4, 1usize..9000).prop_map(|(count, len)| Step::Buffers(count, len)),
        2 => Just(Step::Connect),
        3 => (0usize..8, 1usize..200_000).prop_map(|(which, len)| Step::Write(which, len)),
        3 => (0usize..8).prop_map(Step::Read),
        1 => (0usize..8).prop_map(Step::ShutdownWrite),
        1 => (0usize..8).prop_map(Step::ShutdownRead),
        1 => (0usize..8).prop_map(Step::Close),
        1 => Just(Step::PauseAndResume),
    ]
}

fn take_step(guest: &mut Guest, streams: &mut Vec<UnixStream>, step: Step) {
    let which =
        |which: usize, streams: &Vec<UnixStream>| (!streams.is_empty()).then(|| which % streams.len());
    match step {
        Step::Packet(header, there) => {
            let len = if header.len == u32::MAX - 1 { there as u32 } else { header.len };
            guest.send(Header { len, ..header }, &pattern(there));
        }
        Step::Chain(descriptors) => {
            let chain: Vec<_> = descriptors
                .into_iter()
                .map(|(address, length, flags)| Descriptor { address, length, flags, next: 0 })
                .collect();
            guest.send_chain(&chain);
        }
        Step::Buffers(count, len) => {
            if guest.buffers.len() < 100 {
                guest.provide(count, &[len]);
            }
        }
        Step::Connect => streams.push(guest.request(1).0),
        Step::Write(at, len) => {
            if let Some(at) = which(at, streams) {
                // Refused or taken in part, as it may be.
                let _ = streams[at].write(&pattern(len));
            }
        }
        Step::Read(at) => {
            if let Some(at) = which(at, streams) {
                // As above.
                let _ = streams[at].read(&mut [0; 100_000]);
            }
        }
        Step::ShutdownWrite(at) => {
            if let Some(at) = which(at, streams) {
                // As above.
                let _ = streams[at].shutdown(std::net::Shutdown::Write);
            }
        }
        Step::ShutdownRead(at) => {
            if let Some(at) = which(at, streams) {
                // As above.
                let _ = streams[at].shutdown(std::net::Shutdown::Read);
            }
        }
        Step::Close(at) => {
            if let Some(at) = which(at, streams) {
                streams.remove(at);
            }
        }
        Step::PauseAndResume => {
            guest.driver.transport.pause();
            guest.driver.run();
            guest.driver.transport.resume();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever a guest and its host do, the device goes on, rests when there is nothing to do, and stays good for
    /// others.
    #[test]
    fn nothing_stops_the_device(steps in prop::collection::vec(any_step(), 1..60)) {
        let mut guest = Guest::without_buffers();
        guest.refill = false;
        let mut streams = Vec::new();
        for step in steps {
            take_step(&mut guest, &mut streams, step);
            guest.receive();
            while let Ok((_, stream)) = guest.accepted.try_recv() {
                streams.push(stream);
            }
        }
        prop_assert!(guest.is_running());

        // Everybody lets go; then a connection like any other works.
        drop(streams);
        guest.refill = true;
        guest.provide(8, &[4096]);
        guest.receive();
        let mut pair = guest.host_connects(40);
        pair.host.write_all(b"fine").unwrap();
        // In pieces, where the guest's own small buffers are still there.
        let received: Vec<u8> = guest.receive().into_iter().flat_map(|packet| packet.payload).collect();
        prop_assert_eq!(received.as_slice(), b"fine");
    }
}
