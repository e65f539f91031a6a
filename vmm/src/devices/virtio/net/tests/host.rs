//! The device on a real TAP, in a network namespace of the test's own.

#![allow(unsafe_code)]

use std::fs;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_TUN, IFF_UP, IFF_VNET_HDR};
use nix::sched::{CloneFlags, unshare};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
};

use super::*;

const TAP_FLAGS: i32 = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;

/// What the kernel puts before a packet without `num_buffers`, and what a packet socket takes and gives.
const SHORT_HEADER: usize = 10;

const ETHERNET: usize = 14;

/// What a TCP segment has before its data: Ethernet, IPv4 and TCP headers.
const TCP_HEADERS: usize = ETHERNET + 20 + 20;

/// Enters a new network namespace, if this test may.
fn new_namespace(test: &str) -> bool {
    let tun = File::options().read(true).write(true).open("/dev/net/tun");
    match unshare(CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from).and(tun) {
        Ok(_) => {
            // Nobody but the test sends packets.
            let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            true
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "\nSKIPPED: {test}: needs root and /dev/net/tun: {error}\n");
            false
        }
    }
}

fn check(result: i32) -> i32 {
    assert!(result >= 0, "{}", std::io::Error::last_os_error());
    result
}

fn interface(flags: i32) -> libc::ifreq {
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in interface.ifr_name.iter_mut().zip(b"mayu0") {
        *target = *byte as libc::c_char;
    }
    interface.ifr_ifru.ifru_flags = flags as libc::c_short;
    interface
}

/// Opens the TAP `mayu0` as the shim does.
fn open_tap(flags: i32) -> File {
    let tun = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let request = interface(flags);
    // SAFETY: the kernel reads and writes an `ifreq` at the address.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request) });
    tun
}

fn socket(domain: i32, kind: i32, protocol: i32) -> File {
    // SAFETY: a new descriptor that nobody else knows of.
    unsafe { File::from_raw_fd(check(libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol))) }
}

fn set_up(up: bool) {
    let request = interface(if up { IFF_UP } else { 0 });
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    // SAFETY: the kernel reads an `ifreq` at the address.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) });
}

fn index() -> i32 {
    // SAFETY: the name ends with a zero.
    unsafe { libc::if_nametoindex(c"mayu0".as_ptr()) }.cast_signed()
}

/// Deletes the interface (rtnetlink(7), RTM_DELLINK), though its descriptor is open.
fn delete_interface() {
    let socket = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
    let mut message = 32_u32.to_ne_bytes().to_vec();
    message.extend(libc::RTM_DELLINK.to_ne_bytes());
    message.extend(((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
    message.extend([0; 8]);
    message.extend([0; 4]);
    message.extend(index().to_ne_bytes());
    message.extend([0; 8]);
    (&socket).write_all(&message).unwrap();
    let mut answer = [0; 64];
    assert!((&socket).read(&mut answer).unwrap() >= 20);
    assert_eq!(i32::from_ne_bytes(answer[16..20].try_into().unwrap()), 0);
}

/// A packet socket on `mayu0`, whose packets have a header as the TAP's do.
fn packet_socket() -> File {
    let all = (libc::ETH_P_ALL as u16).to_be();
    let socket = socket(libc::AF_PACKET, libc::SOCK_RAW, all.into());
    let on = 1_i32;
    // SAFETY: the kernel reads an int at the address.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_VNET_HDR,
            (&raw const on).cast(),
            4,
        )
    });
    // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = all;
    address.sll_ifindex = index();
    let length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the kernel reads an address of that length.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) });
    socket
}

/// A device on a TAP whose interface is up. The host's end is a packet socket there.
fn port(test: &str, features: u64) -> Option<Port> {
    limited_port(test, features, &RateLimit::default())
}

/// The same, and so much may go each way.
fn limited_port(test: &str, features: u64, limit: &RateLimit) -> Option<Port> {
    if !new_namespace(test) {
        return None;
    }
    let tap = open_tap(TAP_FLAGS);
    let mut port = Port::without_cable(limit);
    port.start(features);
    port.slot.attach(tap).unwrap();
    set_up(true);
    port.host = packet_socket();
    Some(port)
}

/// A frame of a protocol that nobody listens to.
fn ethernet(number: usize, length: usize) -> Vec<u8> {
    let mut bytes = frame(number, length);
    bytes[..6].fill(0xff);
    bytes[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    // Local experimental EtherType 1 (IEEE 802).
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
    bytes
}

/// A TCP segment with so much data, whose checksum is left to whoever sends it.
fn tcp(data: &[u8]) -> Vec<u8> {
    let mut segment = vec![0xff; 6];
    segment.extend([2, 0, 0, 0, 0, 1, 0x08, 0x00]);
    let total = (20 + 20 + data.len()) as u16;
    let mut ip = [0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    let sum = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    segment.extend(ip);
    // Ports, sequence and acknowledgement numbers, header length, ACK, window, checksum, urgent pointer.
    segment.extend([0, 80, 0, 81, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(data);
    segment
}

/// The header of a segment that is to be cut into pieces with so much data.
fn tcp_header(size: u16) -> Vec<u8> {
    let mut header = vec![VIRTIO_NET_HDR_F_NEEDS_CSUM as u8, VIRTIO_NET_HDR_GSO_TCPV4 as u8];
    for field in [TCP_HEADERS as u16, size, (ETHERNET + 20) as u16, 16] {
        header.extend(field.to_le_bytes());
    }
    header
}

impl Port {
    /// The next packet that the device has written, header included.
    fn whole_packet(&mut self) -> Vec<u8> {
        self.wait(RX, 1);
        let used = self.driver.queues[0].used_one();
        let mut packet = self.content(used);
        for _ in 1..u16::from_le_bytes(packet[10..12].try_into().unwrap()) {
            let used = self.driver.queues[0].used_one();
            packet.extend(self.content(used));
        }
        packet
    }

    /// The guest sends a packet with this header.
    fn send_with(&mut self, header: &[u8], frame: &[u8]) {
        let packet = self.driver.alloc_bytes(&[header, &vec![0; HEADER_SIZE - header.len()], frame].concat());
        let length = HEADER_SIZE + frame.len();
        self.driver.queues[1].add(&[Descriptor::readable(packet, length as u32)]);
        self.driver.exchange(TX, 1);
    }

    /// What the host finds on its interface next, with the header.
    fn on_the_host(&mut self) -> Vec<u8> {
        self.arrived()
    }
}

#[test]
fn what_is_no_tap_is_refused_with_the_reason() {
    if !new_namespace("what_is_no_tap_is_refused_with_the_reason") {
        return;
    }
    let tun = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let (socket, _) = cable();
    let mut port = Port::unplugged();
    port.start(MERGEABLE);
    let mut refuse = |file: File, reason: &str| {
        let refusal = port.slot.attach(file).unwrap_err().to_string();
        assert!(refusal.contains(reason), "{refusal:?} does not say {reason:?}");
        assert!(!port.link_is_up());
    };
    refuse(tempfile::tempfile().unwrap(), "no descriptor of /dev/net/tun");
    refuse(socket, "no descriptor of /dev/net/tun");
    refuse(tun, "no interface belongs to it");
    refuse(open_tap(IFF_TUN | IFF_NO_PI | IFF_VNET_HDR), "no Ethernet frames");
    refuse(open_tap(IFF_TAP | IFF_NO_PI), "no IFF_VNET_HDR");
    port.slot.attach(open_tap(TAP_FLAGS | IFF_MULTI_QUEUE)).unwrap();
    assert!(port.link_is_up());
}

#[test]
fn no_privilege_is_needed_to_use_a_tap_that_was_handed_over() {
    if !new_namespace("no_privilege_is_needed_to_use_a_tap_that_was_handed_over") {
        return;
    }
    let tap = open_tap(TAP_FLAGS);
    set_up(true);
    let host = packet_socket();
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none }).unwrap();
    let mut port = Port::unplugged();
    port.start(FEATURES);
    port.slot.attach(tap).unwrap();
    port.host = host;
    let sent = ethernet(1, 100);
    port.send(&sent);
    assert_eq!(port.on_the_host()[SHORT_HEADER..], sent);
}

#[test]
fn packets_go_through_a_real_interface() {
    let Some(mut port) = port("packets_go_through_a_real_interface", MERGEABLE | EVENT_IDX) else { return };
    port.post(200, 1526);
    port.kick(RX);
    for number in 0..100 {
        let sent = ethernet(number, 60 + 14 * number);
        port.send(&sent);
        let arrived = port.on_the_host();
        assert_eq!(arrived[..SHORT_HEADER], [0; SHORT_HEADER]);
        assert_eq!(arrived[SHORT_HEADER..], sent);
        let delivered = ethernet(number + 1000, 1514 - 14 * number);
        port.host.write_all(&[&[0; SHORT_HEADER][..], &delivered].concat()).unwrap();
        assert_eq!(port.receive(), (delivered, 1));
    }
    assert_eq!(port.errors(), 0);
}

#[test]
fn a_driver_that_takes_large_segments_gets_them_whole() {
    let offloads = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    let Some(mut port) = port("a_driver_that_takes_large_segments_gets_them_whole", MERGEABLE | offloads)
    else {
        return;
    };
    port.post(60, 1526);
    port.kick(RX);
    let segment = tcp(&frame(1, 60_000));
    port.host.write_all(&[tcp_header(1448), segment.clone()].concat()).unwrap();
    let packet = port.whole_packet();
    assert_eq!(packet.len(), HEADER_SIZE + segment.len());
    assert_eq!(packet[..2], tcp_header(1448)[..2]);
    assert_eq!(packet[4..SHORT_HEADER], tcp_header(1448)[4..]);
    assert_eq!(packet[HEADER_SIZE + TCP_HEADERS..], segment[TCP_HEADERS..]);
}

#[test]
fn a_driver_that_does_not_gets_what_fits_on_the_wire_with_its_checksum() {
    let Some(mut port) =
        port("a_driver_that_does_not_gets_what_fits_on_the_wire_with_its_checksum", MERGEABLE)
    else {
        return;
    };
    port.post(60, 1526);
    port.kick(RX);
    let data = frame(1, 20_000);
    port.host.write_all(&[tcp_header(1448), tcp(&data)].concat()).unwrap();
    let mut received: Vec<u8> = Vec::new();
    while received.len() < data.len() {
        let packet = port.whole_packet();
        assert!(packet.len() <= HEADER_SIZE + 1514);
        assert_eq!(packet[..2], [0, VIRTIO_NET_HDR_GSO_NONE as u8]);
        assert_ne!(packet[HEADER_SIZE + TCP_HEADERS - 4..][..2], [0, 0], "a checksum");
        received.extend(&packet[HEADER_SIZE + TCP_HEADERS..]);
    }
    assert_eq!(received, data);
}

#[test]
fn what_a_new_driver_takes_counts_after_a_reset() {
    let Some(mut port) = port("what_a_new_driver_takes_counts_after_a_reset", MERGEABLE) else { return };
    let offloads = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    port.start(MERGEABLE | offloads);
    port.post(60, 1526);
    port.kick(RX);
    let segment = tcp(&frame(1, 20_000));
    port.host.write_all(&[tcp_header(1448), segment.clone()].concat()).unwrap();
    assert_eq!(port.whole_packet().len(), HEADER_SIZE + segment.len());
}

#[test]
fn what_was_meant_for_a_driver_that_is_gone_does_not_reach_the_next_one() {
    let offloads = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    let test = "what_was_meant_for_a_driver_that_is_gone_does_not_reach_the_next_one";
    let Some(mut port) = port(test, MERGEABLE | offloads) else { return };
    let data = frame(1, 4000);
    let segment = [tcp_header(1448), tcp(&data)].concat();
    // While nobody reads, both before the reset and after it.
    port.driver.transport.pause();
    port.host.write_all(&segment).unwrap();
    port.driver.write_register(VIRTIO_MMIO_STATUS, 0);
    port.host.write_all(&segment).unwrap();
    port.driver.transport.resume();
    port.start(MERGEABLE);
    port.post(60, 1526);
    port.kick(RX);
    let mut received: Vec<u8> = Vec::new();
    while received.len() < data.len() {
        let packet = port.whole_packet();
        assert_eq!(packet[..2], [0, VIRTIO_NET_HDR_GSO_NONE as u8]);
        received.extend(&packet[HEADER_SIZE + TCP_HEADERS..]);
    }
    assert_eq!(received, data);
    port.driver.transport.pause();
    assert_eq!(port.driver.queues[0].pending(), 0);
}

#[test]
fn a_large_segment_of_the_guest_reaches_the_host_whole() {
    let Some(mut port) = port("a_large_segment_of_the_guest_reaches_the_host_whole", MERGEABLE) else {
        return;
    };
    let segment = tcp(&frame(1, 50_000));
    port.send_with(&tcp_header(1448), &segment);
    let arrived = port.on_the_host();
    assert_eq!(arrived[1], VIRTIO_NET_HDR_GSO_TCPV4 as u8);
    assert_eq!(arrived[SHORT_HEADER + TCP_HEADERS..], segment[TCP_HEADERS..]);
    assert_eq!(port.errors(), 0);
}

#[test]
fn what_the_kernel_takes_for_no_packet_is_dropped_and_counted() {
    let Some(mut port) = port("what_the_kernel_takes_for_no_packet_is_dropped_and_counted", MERGEABLE) else {
        return;
    };
    let segment = tcp(&frame(1, 3000));
    let unknown = [&[0, 77][..], &[0; 8]].concat();
    let beyond = [&tcp_header(1448)[..6], &60_000_u16.to_le_bytes(), &[0, 0]].concat();
    let no_size = tcp_header(0);
    let cases =
        [(&unknown, &segment[..]), (&beyond, &segment), (&no_size, &segment), (&no_size, &segment[..13])];
    for (number, (header, frame)) in (1..).zip(cases) {
        port.send_with(header, frame);
        assert_eq!(port.errors(), number);
    }
    let sent = ethernet(1, 100);
    port.send(&sent);
    assert_eq!(port.on_the_host()[SHORT_HEADER..], sent);
}

#[test]
fn an_interface_that_is_down_loses_packets_and_works_again_when_it_is_up() {
    let test = "an_interface_that_is_down_loses_packets_and_works_again_when_it_is_up";
    let Some(mut port) = port(test, MERGEABLE) else { return };
    set_up(false);
    port.send_with(&[], &ethernet(1, 100));
    assert_eq!((port.errors(), port.link_is_up()), (0, true));
    set_up(true);
    // The old one was told that the network is down.
    port.host = packet_socket();
    port.driver.queues[1].used();
    let sent = ethernet(2, 100);
    port.send(&sent);
    assert_eq!(port.on_the_host()[SHORT_HEADER..], sent);
}

#[test]
fn a_deleted_interface_takes_the_link_down_once_and_for_all() {
    let test = "a_deleted_interface_takes_the_link_down_once_and_for_all";
    let Some(mut port) = port(test, MERGEABLE) else { return };
    port.driver.run();
    port.driver.take_interrupt();
    let events = port.driver.events;

    delete_interface();

    port.driver.run_until(|driver| driver.events > events);
    port.driver.run_until(|driver| driver.take_interrupt() & CHANGED != 0);
    assert!(!port.link_is_up());
    let failure = port.driver.transport.health().take_failure().unwrap().to_string();
    assert!(failure.contains("cannot reach the host's network any more"), "{failure}");
    // What the guest still sends is dropped, and what it posts stays where it is.
    port.post(10, 1526);
    port.kick(RX);
    for number in 0..100 {
        port.send_with(&[], &ethernet(number, 100));
    }
    port.driver.run();
    assert!(port.driver.transport.health().take_failure().is_none(), "once is enough");
    assert_eq!((port.driver.status(), port.errors()), (RUNNING, 0));
    // A driver that starts again finds the link down; the slot is not free for another TAP.
    port.start(MERGEABLE);
    assert!(!port.link_is_up());
    assert!(port.slot.attach(open_tap(TAP_FLAGS)).is_err());
}

#[test]
fn an_interface_that_was_deleted_before_the_driver_came_leaves_the_link_down() {
    let test = "an_interface_that_was_deleted_before_the_driver_came_leaves_the_link_down";
    if !new_namespace(test) {
        return;
    }
    let mut port = Port::unplugged();
    port.slot.attach(open_tap(TAP_FLAGS)).unwrap();
    delete_interface();
    port.start(MERGEABLE);
    assert!(!port.link_is_up());
    assert_eq!(port.driver.take_interrupt(), CHANGED);
    port.driver.run_until(|driver| driver.events > 0);
    assert!(port.driver.transport.health().take_failure().is_some());
}

#[test]
fn the_thread_sleeps_when_there_is_nothing_to_carry_and_after_the_interface_is_gone() {
    let test = "the_thread_sleeps_when_there_is_nothing_to_carry_and_after_the_interface_is_gone";
    let Some(mut port) = port(test, MERGEABLE) else { return };
    // Without buffers and with packets, which is where a device could spin.
    for number in 0..10 {
        port.host.write_all(&[&[0; SHORT_HEADER][..], &ethernet(number, 100)].concat()).unwrap();
    }
    port.send_with(&[], &ethernet(0, 100));
    assert_sleeps();
    delete_interface();
    port.driver.run_until(|driver| driver.take_interrupt() & CHANGED != 0 && driver.config(6, 2) == [0, 0]);
    port.send_with(&[], &ethernet(0, 100));
    assert_sleeps();
}

#[test]
fn a_kick_while_it_waits_for_its_limit_wakes_the_thread_no_more_than_once() {
    let test = "a_kick_while_it_waits_for_its_limit_wakes_the_thread_no_more_than_once";
    // One of these packets, and then one byte a second.
    let limit = RateLimit { bandwidth: NonZeroU64::new(1), operations: None, burst_ms: 1_500_000 };
    let Some(mut port) = limited_port(test, MERGEABLE, &limit) else { return };
    port.send_with(&[], &ethernet(0, 1000));
    port.add(&ethernet(1, 1000));
    port.driver.kick(TX);
    assert_sleeps();
    let before = times_slept();
    for _ in 0..1000 {
        port.driver.kick(TX);
        port.driver.run();
    }
    assert_sleeps();
    assert!(times_slept() - before <= 1000);
    assert_eq!(port.driver.queues[1].pending(), 0);
}

fn times_slept() -> u64 {
    let status = fs::read_to_string(device_thread().join("status")).unwrap();
    let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    count.unwrap().trim().parse().unwrap()
}

/// Waits until the device's thread is asleep and has not been on a processor between two looks.
fn assert_sleeps() {
    let deadline = Instant::now() + Duration::from_millis(PATIENCE.into());
    let thread = device_thread();
    let look = || {
        let status = fs::read_to_string(thread.join("status")).unwrap();
        let switches: Vec<_> = status.lines().filter(|line| line.contains("ctxt_switches")).collect();
        (status.contains("State:\tS"), switches.join(" "))
    };
    let mut before = look();
    loop {
        std::thread::yield_now();
        let now = look();
        if before.0 && now == before {
            return;
        }
        assert!(Instant::now() < deadline, "the thread does not sleep");
        before = now;
    }
}

/// The device's thread: of all of that name, the one in this test's network namespace.
fn device_thread() -> PathBuf {
    let namespace = |thread: &Path| fs::read_link(thread.join("ns/net")).ok();
    let own = namespace("/proc/thread-self".as_ref());
    let mut threads = fs::read_dir("/proc/self/task").unwrap().map(|thread| thread.unwrap().path());
    threads
        .find(|thread| {
            let name = fs::read_to_string(thread.join("comm")).unwrap_or_default();
            name.trim() == "net3" && namespace(thread) == own
        })
        .unwrap()
}
