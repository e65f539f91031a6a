//! Streams arrive whole, in order and in time, and end properly.

use super::*;

/// Sends `bytes` to the host within the credit that it grants, while the host reads in pieces of `piece` bytes.
fn stream_to_host(guest: &mut Guest, pair: &mut Pair, bytes: &[u8], piece: usize) {
    let (mut sent, mut got) = (0, Vec::new());
    let (mut buf_alloc, mut fwd_cnt) = (256 * 1024, 0u32);
    let mut buffer = vec![0; piece];
    while got.len() < bytes.len() {
        let in_flight = (sent as u32).wrapping_sub(fwd_cnt);
        let len = (buf_alloc - in_flight).min(60_000).min((bytes.len() - sent) as u32) as usize;
        if len > 0 {
            guest.send(pair.data(len), &bytes[sent..sent + len]);
            sent += len;
        }
        if let Ok(count) = pair.host.read(&mut buffer) {
            got.extend_from_slice(&buffer[..count]);
        }
        for packet in guest.receive() {
            assert!(packet.is(Op::CreditUpdate));
            (buf_alloc, fwd_cnt) = (packet.header.buf_alloc, packet.header.fwd_cnt);
        }
    }
    assert!(got == bytes, "the stream has changed");
}

/// Has the host write `bytes`, and the guest take them `take` bytes at a time with a buffer of `buf_alloc` bytes.
fn stream_to_guest(guest: &mut Guest, pair: &mut Pair, bytes: &[u8], buf_alloc: u32, take: u32) {
    let (mut written, mut got, mut fwd_cnt) = (0, Vec::new(), 0u32);
    while got.len() < bytes.len() {
        if let Ok(count) = pair.host.write(&bytes[written..]) {
            written += count;
        }
        for packet in guest.receive().iter().filter(|packet| packet.is(Op::Rw)) {
            got.extend_from_slice(&packet.payload);
        }
        let held = (got.len() as u32).wrapping_sub(fwd_cnt);
        assert!(held <= buf_alloc, "the device sent {held} bytes into a buffer of {buf_alloc}");
        fwd_cnt = fwd_cnt.wrapping_add(held.min(take));
        let update = Header { buf_alloc, fwd_cnt, ..pair.header(Op::CreditUpdate) };
        guest.send(update, &[]);
    }
    assert!(got == bytes, "the stream has changed");
}

#[test]
fn megabytes_to_the_host() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    stream_to_host(&mut guest, &mut pair, &pattern(32 << 20), 1 << 20);
    assert_eq!(guest.errors(), 0);
}

#[test]
fn megabytes_to_a_slow_host() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    stream_to_host(&mut guest, &mut pair, &pattern(4 << 20), 7777);
    assert_eq!(guest.errors(), 0);
}

#[test]
fn megabytes_to_the_guest() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects_with(256 * 1024);
    stream_to_guest(&mut guest, &mut pair, &pattern(32 << 20), 256 * 1024, u32::MAX);
    assert_eq!(guest.errors(), 0);
}

#[test]
fn megabytes_to_a_stingy_guest() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects_with(5000);
    stream_to_guest(&mut guest, &mut pair, &pattern(2 << 20), 5000, 1777);
    assert_eq!(guest.errors(), 0);
}

#[test]
fn buffers_are_cut_as_the_guest_likes() {
    let mut guest = Guest::without_buffers();
    // The header lies in three descriptors, the payload in four.
    guest.provide(8, &[1, 20, 60, 700, 3, 1000]);
    let mut pair = guest.guest_connects_with(100_000);
    stream_to_guest(&mut guest, &mut pair, &pattern(1 << 20), 100_000, u32::MAX);
    assert_eq!(guest.errors(), 0);
}

#[test]
fn large_buffers_are_filled() {
    let mut guest = Guest::without_buffers();
    guest.provide(4, &[HEADER_SIZE + 100_000]);
    let mut pair = guest.guest_connects();
    let bytes = pattern(100_000);
    pair.host.write_all(&bytes).unwrap();

    let packets = guest.receive();
    assert_eq!(packets[0].payload.len(), 64 * 1024);
    assert_eq!([packets[0].payload.clone(), packets[1].payload.clone()].concat(), bytes);
}

#[test]
fn packets_are_cut_as_the_guest_likes() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    let bytes = pattern(10_000);
    let packet = [&pair.data(bytes.len()).to_bytes()[..], &bytes].concat();
    let mut chain = Vec::new();
    for piece in packet.chunks(777) {
        let address = guest.driver.alloc_bytes(piece);
        chain.push(Descriptor::readable(address, piece.len() as u32));
    }

    guest.send_chain(&chain);
    assert_eq!(pair.read(), bytes);

    let table = guest.driver.alloc_table(&crate::devices::virtio::testing::link(&chain, 0, 64));
    guest.send_chain(&[Descriptor::indirect(table, chain.len() as u32)]);
    assert_eq!(pair.read(), bytes);
    assert_eq!(guest.errors(), 0);
}

#[test]
fn a_guest_without_buffers_stops_the_host() {
    let mut guest = Guest::new();
    guest.refill = false;
    let mut pair = guest.guest_connects();
    let bytes = pattern(2 << 20);
    let mut written = 0;
    let mut got = Vec::new();
    while let Ok(count) = pair.host.write(&bytes[written..]) {
        written += count;
        for packet in guest.receive() {
            got.extend(packet.payload);
        }
    }
    assert!(written < bytes.len());
    assert!(guest.receive().is_empty());

    guest.refill = true;
    guest.provide(128, &[4096]);
    while got.len() < written {
        let packets = guest.receive();
        assert!(!packets.is_empty(), "the device does not go on");
        packets.iter().for_each(|packet| got.extend_from_slice(&packet.payload));
    }
    assert!(got == bytes[..written]);
}

#[test]
fn a_buffer_that_is_not_needed_is_kept() {
    let mut guest = Guest::without_buffers();
    guest.refill = false;
    guest.provide(3, &[HEADER_SIZE + 10]);
    let mut pair = guest.guest_connects();
    // Fills the second buffer, so that the device looks for more.
    pair.host.write_all(b"0123456789").unwrap();
    assert_eq!(guest.receive_one().payload, b"0123456789");

    pair.host.write_all(b"last").unwrap();
    assert_eq!(guest.receive_one().payload, b"last");
}

#[test]
fn a_guest_without_credit_stops_the_host() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects_with(0);
    pair.host.write_all(b"data").unwrap();
    assert!(guest.receive_one().is(Op::CreditRequest));
    assert!(guest.receive().is_empty(), "asked once");

    // Says that there is still none.
    let none = Header { buf_alloc: 0, ..pair.header(Op::CreditUpdate) };
    guest.send(none, &[]);
    assert!(guest.receive().is_empty(), "it has been asked");

    let some = Header { buf_alloc: 3, ..pair.header(Op::CreditUpdate) };
    guest.send(some, &[]);
    let packets = guest.receive();
    assert_eq!(packets[0].payload, b"dat");
    assert!(packets[1].is(Op::CreditRequest));
    assert_eq!(packets.len(), 2);

    let more = Header { buf_alloc: 3, fwd_cnt: 1, ..pair.header(Op::CreditUpdate) };
    guest.send(more, &[]);
    assert_eq!(guest.receive()[0].payload, b"a");
}

#[test]
fn host_closes_while_the_guest_grants_nothing() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects_with(0);
    pair.host.write_all(b"last words").unwrap();
    let (guest_port, header) = (pair.guest_port, pair.header(Op::CreditUpdate));
    assert!(guest.receive_one().is(Op::CreditRequest));
    drop(pair);
    assert!(guest.receive().is_empty(), "the event loop rests");

    guest.send(header, &[]);
    let packets = guest.receive();
    assert_eq!(packets[0].payload, b"last words");
    assert!(packets[1].is(Op::Reset));
    assert_eq!(packets[1].header.dst_port, guest_port);
}

#[test]
fn credit_is_told_when_asked() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    guest.send(pair.data(10), &pattern(10));
    assert!(guest.receive().is_empty(), "not for ten bytes");

    guest.send(pair.header(Op::CreditRequest), &[]);
    let update = guest.receive_one();
    assert!(update.is(Op::CreditUpdate));
    assert_eq!((update.header.buf_alloc, update.header.fwd_cnt), (256 * 1024, 10));
    assert_eq!(pair.read().len(), 10);
}

#[test]
fn credit_is_withheld_while_the_host_does_not_read() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    let bytes = pattern(64 * 1024);
    let mut sent = 0u32;
    let mut fwd_cnt = 0;
    while sent.wrapping_sub(fwd_cnt) + bytes.len() as u32 <= 256 * 1024 {
        guest.send(pair.data(bytes.len()), &bytes);
        sent += bytes.len() as u32;
        guest.receive().iter().for_each(|packet| fwd_cnt = packet.header.fwd_cnt);
    }
    // Until now everything fits: into the socket, and then into the device.
    assert_eq!(guest.errors(), 0);
    assert!(guest.receive().is_empty());

    let mut got = 0;
    while got < sent as usize {
        got += pair.read().len();
        guest.receive().iter().for_each(|packet| fwd_cnt = packet.header.fwd_cnt);
    }
    // What is not told yet is less than what an update is sent for.
    assert!(sent - fwd_cnt <= 64 * 1024, "{fwd_cnt} of {sent}");
}

#[test]
fn host_ends_its_direction_after_all_is_sent() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    let bytes = pattern(50_000);
    pair.host.write_all(&bytes).unwrap();
    pair.host.shutdown(std::net::Shutdown::Write).unwrap();

    let mut packets = guest.receive();
    let shutdown = packets.pop().unwrap();
    assert!(shutdown.is(Op::Shutdown));
    assert_eq!(shutdown.header.flags, SHUTDOWN_SEND);
    assert_eq!(packets.iter().flat_map(|packet| packet.payload.clone()).collect::<Vec<_>>(), bytes);

    // The other direction goes on.
    guest.send(pair.data(3), b"yes");
    assert_eq!(pair.read(), b"yes");
    guest.send(pair.shutdown(SHUTDOWN_SEND), &[]);
    assert!(guest.receive_one().is(Op::Reset), "both have ended");
    assert!(pair.is_at_end());
    assert_eq!(guest.errors(), 0);
}

#[test]
fn guest_ends_its_direction_after_all_is_delivered() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    // More than the socket takes: the device keeps the rest.
    let bytes = pattern(60_000);
    let mut sent = Vec::new();
    for _ in 0..5 {
        guest.send(pair.data(bytes.len()), &bytes);
        sent.extend_from_slice(&bytes);
        guest.receive();
    }
    guest.send(pair.shutdown(SHUTDOWN_SEND), &[]);

    let mut got = Vec::new();
    while got.len() < sent.len() {
        let bytes = pair.read();
        assert!(!bytes.is_empty() || got.len() < sent.len());
        got.extend(bytes);
        guest.receive();
    }
    assert!(got == sent);
    assert!(pair.is_at_end());

    // The other direction goes on.
    pair.host.write_all(b"more").unwrap();
    assert_eq!(guest.receive_one().payload, b"more");
    drop(pair);
    assert!(guest.receive_one().is(Op::Reset), "both have ended");
    assert_eq!(guest.errors(), 0);
}

#[test]
fn guest_closes_while_the_host_has_not_read() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    let bytes = pattern(60_000);
    for _ in 0..5 {
        guest.send(pair.data(bytes.len()), &bytes);
        guest.receive();
    }
    guest.send(pair.shutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE), &[]);
    assert!(guest.receive().is_empty(), "no RST before all is delivered");

    let (mut got, mut resets) = (0, 0);
    while got < 5 * bytes.len() {
        got += pair.read().len();
        resets += guest.receive().iter().filter(|packet| packet.is(Op::Reset)).count();
    }
    assert_eq!(resets, 1);
    assert!(pair.is_at_end());
    assert!(pair.is_write_refused());
}

#[test]
fn guest_resets_while_the_host_has_not_read() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    let bytes = pattern(60_000);
    for _ in 0..5 {
        guest.send(pair.data(bytes.len()), &bytes);
        guest.receive();
    }
    guest.send(pair.header(Op::Reset), &[]);

    // The same ports are free again meanwhile.
    guest.send(pair.header(Op::Request), &[]);
    assert!(guest.receive_one().is(Op::Response));
    let _again = guest.accepted.try_recv().unwrap();

    let mut got = 0;
    while got < 5 * bytes.len() {
        got += pair.read().len();
        assert!(guest.receive().is_empty(), "the guest has forgotten the connection");
    }
    assert!(pair.is_at_end());
    assert_eq!(guest.errors(), 0);
}

#[test]
fn guest_reads_no_more() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    guest.send(pair.shutdown(SHUTDOWN_RECEIVE), &[]);
    assert!(pair.is_write_refused());

    guest.send(pair.data(5), b"still");
    assert_eq!(pair.read(), b"still");
    drop(pair);
    assert!(guest.receive_one().is(Op::Reset));
}

#[test]
fn host_reads_no_more() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    pair.host.shutdown(std::net::Shutdown::Read).unwrap();
    guest.send(pair.data(5), b"lost!");
    let shutdown = guest.receive_one();
    assert!(shutdown.is(Op::Shutdown));
    assert_eq!(shutdown.header.flags, SHUTDOWN_RECEIVE);

    // What is under way already is dropped, and its credit given back.
    let bytes = pattern(64 * 1024);
    for _ in 0..16 {
        guest.send(pair.data(bytes.len()), &bytes);
        guest.receive();
    }
    assert_eq!(guest.errors(), 0);
    pair.host.write_all(b"still").unwrap();
    assert_eq!(guest.receive_one().payload, b"still");
}

#[test]
fn host_closes_after_all_is_sent() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    let bytes = pattern(50_000);
    pair.host.write_all(&bytes).unwrap();
    drop(pair);

    let mut packets = guest.receive();
    assert!(packets.pop().unwrap().is(Op::Reset));
    assert_eq!(packets.iter().flat_map(|packet| packet.payload.clone()).collect::<Vec<_>>(), bytes);
}

#[test]
fn host_closes_with_bytes_of_the_guest_unread() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();
    let bytes = pattern(60_000);
    for _ in 0..5 {
        guest.send(pair.data(bytes.len()), &bytes);
        guest.receive();
    }
    pair.host.write_all(b"bye").unwrap();
    drop(pair);

    let packets = guest.receive();
    let data: Vec<_> = packets.iter().filter(|packet| packet.is(Op::Rw)).collect();
    assert_eq!(data[0].payload, b"bye");
    assert!(packets.last().unwrap().is(Op::Reset));
    assert!(guest.receive().is_empty(), "the event loop rests");
}

#[test]
fn host_closes_after_it_ended_its_direction() {
    let mut guest = Guest::new();
    let pair = guest.guest_connects();
    pair.host.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(guest.receive_one().is(Op::Shutdown));
    drop(pair);
    assert!(guest.receive_one().is(Op::Reset));
}

#[test]
fn a_busy_stream_starves_nobody() {
    let mut guest = Guest::without_buffers();
    guest.refill = false;
    guest.provide(2, &[4096]);
    let mut busy = guest.guest_connects();
    let mut quiet = guest.guest_connects();
    while busy.host.write(&[1; 4096]).is_ok() {}
    quiet.host.write_all(b"now").unwrap();

    // One wake-up's worth for the busy stream, then turns; it could fill more buffers than these.
    guest.provide(40, &[4096]);
    let packets = guest.receive();
    assert_eq!(packets.len(), 40);
    assert!(packets.iter().any(|packet| packet.payload == b"now"));
}
