//! Connections come about, are refused, and are given up.

use super::*;
use crate::devices::virtio::vsock::muxer::{FIRST_HOST_PORT, MAX_ACCEPTED, MAX_CONNECTIONS};

#[test]
fn host_connects_and_both_sides_talk() {
    let mut guest = Guest::new();
    let (mut host, result) = guest.request(1024);
    let request = guest.receive_one();
    assert_eq!(
        request.header,
        Header {
            src_cid: HOST,
            dst_cid: GUEST,
            src_port: FIRST_HOST_PORT,
            dst_port: 1024,
            kind: TYPE_STREAM,
            op: Op::Request as u16,
            buf_alloc: 256 * 1024,
            ..Header::default()
        }
    );
    assert_eq!(result.try_recv(), Err(TryRecvError::Empty));

    guest.send(header(Op::Response, 1024, FIRST_HOST_PORT), &[]);
    assert_eq!(result.try_recv(), Ok(Ok(())));
    host.write_all(b"ping").unwrap();
    let ping = guest.receive_one();
    assert!(ping.is(Op::Rw));
    assert_eq!(ping.payload, b"ping");

    let mut pair = Pair { host, host_port: FIRST_HOST_PORT, guest_port: 1024 };
    guest.send(pair.data(4), b"pong");
    assert_eq!(pair.read(), b"pong");
    assert_eq!(guest.errors(), 0);
}

#[test]
fn host_may_write_before_the_guest_grants() {
    let mut guest = Guest::new();
    let (mut host, _result) = guest.request(1024);
    host.write_all(b"early").unwrap();
    let request = guest.receive_one();
    assert!(request.is(Op::Request));

    guest.send(header(Op::Response, 1024, request.header.src_port), &[]);
    assert_eq!(guest.receive_one().payload, b"early");
}

#[test]
fn host_half_closes_before_the_guest_grants() {
    let mut guest = Guest::new();
    let (mut host, _result) = guest.request(1024);
    host.write_all(b"all").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let request = guest.receive_one();
    guest.send(header(Op::Response, 1024, request.header.src_port), &[]);

    let packets = guest.receive();
    assert_eq!(packets[0].payload, b"all");
    assert!(packets[1].is(Op::Shutdown));
    assert_eq!(packets[1].header.flags, SHUTDOWN_SEND);
}

#[test]
fn guest_refuses() {
    let mut guest = Guest::new();
    let (mut host, result) = guest.request(1024);
    let request = guest.receive_one();

    guest.send(header(Op::Reset, 1024, request.header.src_port), &[]);
    assert_eq!(result.try_recv(), Ok(Err("refused by the guest".to_owned())));
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    assert!(guest.receive().is_empty(), "a RST is never answered");
    assert_eq!(guest.errors(), 0);
}

#[test]
fn host_gives_up() {
    let mut guest = Guest::new();
    let (host, result) = guest.request(1024);
    let request = guest.receive_one();

    drop(host);
    let reset = guest.receive_one();
    assert!(reset.is(Op::Reset));
    assert_eq!(reset.header.src_port, request.header.src_port);
    assert_eq!(result.try_recv(), Ok(Err("given up by the host".to_owned())));

    guest.send(header(Op::Response, 1024, request.header.src_port), &[]);
    assert!(guest.receive_one().is(Op::Reset), "too late");
}

#[test]
fn host_gives_up_before_the_guest_has_a_buffer() {
    let mut guest = Guest::without_buffers();
    let (host, result) = guest.request(1024);
    guest.driver.run();
    drop(host);
    guest.driver.run();
    assert_eq!(result.try_recv(), Ok(Err("given up by the host".to_owned())));
}

#[test]
fn each_connection_has_a_port_of_its_own() {
    let mut guest = Guest::new();
    let first = guest.host_connects(1024);
    let second = guest.host_connects(1024);
    assert_ne!(first.host_port, second.host_port);

    let (third, _result) = guest.request(1024);
    drop(third);
    guest.receive();
    let fourth = guest.host_connects(1024);
    assert_eq!(fourth.host_port, FIRST_HOST_PORT + 3, "no port is used again soon");
}

#[test]
fn guest_connects_and_both_sides_talk() {
    let mut guest = Guest::new();
    let mut pair = guest.guest_connects();

    guest.send(pair.data(5), b"hello");
    assert_eq!(pair.read(), b"hello");
    pair.host.write_all(b"you").unwrap();
    assert_eq!(guest.receive_one().payload, b"you");
    assert_eq!(guest.errors(), 0);
}

#[test]
fn other_ports_are_refused() {
    let mut guest = Guest::new();
    guest.send(header(Op::Request, 5000, ALLOWED + 1), &[]);

    let reset = guest.receive_one();
    assert_eq!(
        reset.header,
        Header {
            src_cid: HOST,
            dst_cid: GUEST,
            src_port: ALLOWED + 1,
            dst_port: 5000,
            kind: TYPE_STREAM,
            op: Op::Reset as u16,
            ..Header::default()
        }
    );
    assert!(guest.accepted.try_recv().is_err());
}

#[test]
fn a_thousand_connects_and_closes_leave_nothing() {
    let mut guest = Guest::new();
    for _ in 0..1000 {
        let mut pair = guest.guest_connects();
        guest.send(pair.shutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE), &[]);
        assert!(guest.receive_one().is(Op::Reset));
        assert!(pair.is_at_end());
    }
    for _ in 0..1000 {
        let pair = guest.host_connects(1024);
        drop(pair);
        assert!(guest.receive_one().is(Op::Reset));
    }
    let (_host, _result) = guest.request(1024);
    assert_eq!(guest.receive_one().header.buf_alloc, 256 * 1024, "as for the first one");
    assert_eq!(guest.errors(), 0);
}

#[test]
fn guest_cannot_take_all_connections() {
    let mut guest = Guest::new();
    let mut accepted = Vec::new();
    for guest_port in 10_000..12_000 {
        guest.send(header(Op::Request, guest_port, ALLOWED), &[]);
        let answer = guest.receive_one();
        let granted = accepted.len() < MAX_ACCEPTED;
        assert!(answer.is(if granted { Op::Response } else { Op::Reset }));
        accepted.extend(guest.accepted.try_recv());
    }
    assert_eq!(accepted.len(), MAX_ACCEPTED);

    guest.host_connects(1024);
}

#[test]
fn host_connections_are_bounded() {
    let mut guest = Guest::new();
    let mut pending = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        let (host, result) = guest.request(1024);
        assert!(guest.receive_one().is(Op::Request));
        assert_eq!(result.try_recv(), Err(TryRecvError::Empty));
        pending.push((host, result));
    }

    let (_host, refused) = guest.request(1024);
    assert!(guest.receive().is_empty());
    assert!(refused.try_recv().unwrap().unwrap_err().contains("too many connections"));

    pending.pop();
    assert!(guest.receive_one().is(Op::Reset));
    guest.host_connects(1024);
}

#[test]
fn many_connections_get_small_buffers() {
    let mut guest = Guest::new();
    let mut total = 0u64;
    let mut pending = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        pending.push(guest.request(1024));
        total += u64::from(guest.receive_one().header.buf_alloc);
    }
    assert!(total <= 32 << 20, "{total} bytes could be buffered");
}

#[test]
fn requests_that_wait_are_bounded() {
    let mut guest = Guest::new();
    let waiting: Vec<_> = (0..MAX_CONNECTIONS).map(|_| guest.request(1024)).collect();
    let (_host, refused) = guest.request(1024);
    assert!(refused.try_recv().unwrap().unwrap_err().contains("too many requests"));

    assert_eq!(guest.receive().len(), MAX_CONNECTIONS);
    drop(waiting);
}
