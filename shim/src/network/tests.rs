//! Frames between a pod's network and the guest's end of it, through the host's kernel.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::unistd::{read, write};
use rtnetlink::packet_route::link::{
    InfoKind, IpVlanMode, LinkAttribute, LinkFlags, LinkMessage, MacVlanMode, NetkitMode,
};
use rtnetlink::packet_route::tc::{TcFilterU32Option, TcMessage, TcU32Key, TcU32Selector};
use rtnetlink::{LinkIpVlan, LinkMacVlan, LinkNetkit, LinkUnspec};

use super::links::HardwareAddress;
use super::testing::{ETH0, TestNamespace, readable};
use super::{Network, links};

/// `struct virtio_net_hdr`.
const VNET_HEADER: usize = 10;
const POD_IP: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 5);
const FAR_IP: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);

/// A pod's namespace, one that stands for the rest of the world, and between them `eth0` and `far0`.
struct Wire {
    pod: TestNamespace,
    far: TestNamespace,
    /// Where an interface has its parent.
    host: Option<TestNamespace>,
}

impl Wire {
    async fn veth() -> Option<Self> {
        let wire = Self { pod: TestNamespace::new()?, far: TestNamespace::new()?, host: None };
        wire.pod.veth("eth0", ETH0, &wire.far, "far0").await;
        wire.give_addresses().await;
        Some(wire)
    }

    async fn give_addresses(&self) {
        self.pod.add_address("eth0", "10.1.0.5", 24).await;
        self.far.add_address("far0", "10.1.0.1", 24).await;
    }

    async fn connect(&self) -> (Network, Vec<Tap>) {
        let network = self.pod.namespace.network().await.unwrap();
        let taps = self.pod.namespace.connect(&network).await.unwrap();
        (network, taps.into_iter().map(Tap).collect())
    }

    /// A socket of the rest of the world which knows where the pod is.
    async fn far_socket(&self, pod: HardwareAddress) -> UdpSocket {
        // An interface that resolves nothing needs to know nothing.
        if !self.far.link("far0").await.unwrap().header.flags.contains(LinkFlags::Noarp) {
            self.far.add_neighbour("far0", "10.1.0.5", pod).await;
        }
        self.far.inside(|_| async { Ok(UdpSocket::bind((FAR_IP, 0)).unwrap()) }).await
    }

    async fn far_address(&self) -> HardwareAddress {
        address_of(&self.far.link("far0").await.unwrap())
    }

    /// Whether datagrams pass both ways.
    async fn assert_connected(&self, network: &Network, tap: &Tap) {
        let interface = &network.request().interfaces[0];
        let to_guest = match interface.hardware_address.is_empty() {
            true => interface.slot_address.as_slice(),
            false => &interface.hardware_address,
        };
        let to_guest = HardwareAddress::try_from(to_guest).unwrap();
        let far = self.far_socket(to_guest).await;
        far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();

        far.send_to(b"for the guest", (POD_IP, 7)).unwrap();
        let frame = tap.datagram(7);
        assert_eq!(frame[..6], to_guest);
        assert_eq!(&frame[42..], b"for the guest");

        let to_far = match interface.no_arp {
            // As the guest's kernel addresses frames of an interface that resolves nothing.
            true => to_guest,
            false => self.far_address().await,
        };
        tap.send(&udp_frame(to_far, to_guest, far.local_addr().unwrap(), b"from the guest"));
        let mut buffer = [0; 64];
        let (length, from) = far.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"from the guest");
        assert_eq!(from, SocketAddr::from((POD_IP, 7)));
    }
}

fn address_of(message: &LinkMessage) -> HardwareAddress {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(address) => Some(address.as_slice()),
        _ => None,
    });
    address.unwrap().try_into().unwrap()
}

/// What the VMM would read and write.
struct Tap(OwnedFd);

impl Tap {
    fn send(&self, frame: &[u8]) {
        let mut packet = vec![0; VNET_HEADER];
        packet.extend(frame);
        assert_eq!(write(&self.0, &packet), Ok(packet.len()));
    }

    fn receive(&self) -> Vec<u8> {
        assert!(readable(self.0.as_fd()), "no frame arrives");
        let mut packet = vec![0; VNET_HEADER + 65536];
        let length = read(&self.0, &mut packet).unwrap();
        packet.truncate(length);
        packet.split_off(VNET_HEADER)
    }

    /// The next IPv4 datagram to `port`; the rest of the world sends a few frames of its own.
    fn datagram(&self, port: u16) -> Vec<u8> {
        loop {
            let frame = self.receive();
            if frame[12..14] == [8, 0] && frame[36..38] == port.to_be_bytes() {
                return frame;
            }
        }
    }
}

/// A socket that receives every frame of a namespace.
async fn sniff(namespace: &TestNamespace) -> OwnedFd {
    let (family, protocol) = (AddressFamily::Packet, SockProtocol::EthAll);
    let make =
        move |_| async move { Ok(socket(family, SockType::Raw, SockFlag::empty(), protocol).unwrap()) };
    namespace.inside(make).await
}

fn assert_arrives(sniffer: &OwnedFd, frame: &[u8]) {
    let mut buffer = [0; 2048];
    loop {
        assert!(readable(sniffer.as_fd()), "{frame:x?} does not arrive");
        let length = recv(sniffer.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
        if buffer[..length] == *frame {
            return;
        }
    }
}

/// From the pod's port 7, without a UDP checksum.
fn udp_frame(to: HardwareAddress, from: HardwareAddress, destination: SocketAddr, data: &[u8]) -> Vec<u8> {
    let SocketAddr::V4(destination) = destination else { panic!() };
    let mut ip = vec![0x45, 0];
    ip.extend((28 + data.len() as u16).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(POD_IP.octets());
    ip.extend(destination.ip().octets());
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip.extend(7_u16.to_be_bytes());
    ip.extend(destination.port().to_be_bytes());
    ip.extend((8 + data.len() as u16).to_be_bytes());
    ip.extend([0, 0]);
    ip.extend(data);
    [&to[..], &from, &[8, 0], &ip].concat()
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)))
        .sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

async fn filters(namespace: &TestNamespace, name: &'static str) -> Vec<TcMessage> {
    let index = namespace.index(name).await.cast_signed();
    let filters = namespace.inside(move |inside| async move {
        let dump = inside.netlink.traffic_filter(index).get().ingress().execute();
        inside.dump("filters", 100, dump, Some).await
    });
    // u32 tells of its hash table as well.
    filters.await.into_iter().filter(|filter| filter.header.handle.minor != 0).collect()
}

#[tokio::test]
async fn frames_travel_both_ways() {
    let Some(wire) = Wire::veth().await else { return };
    let (network, taps) = wire.connect().await;
    assert_eq!((network.interfaces(), taps.len()), (1, 1));
    wire.assert_connected(&network, &taps[0]).await;
}

#[tokio::test]
async fn frames_of_every_protocol_pass_down_to_the_shortest() {
    let Some(wire) = Wire::veth().await else { return };
    let (_, taps) = wire.connect().await;
    let sniffer = sniff(&wire.far).await;
    let to = [0xff; 6];
    let experimental = [&to[..], &ETH0, &[0x88, 0xb5], b"an experiment"].concat();
    let ipv6 = [&to[..], &ETH0, &[0x86, 0xdd], &[0x60; 40]].concat();
    let runt = [&to[..], &ETH0, &[0x08, 0x00]].concat();
    for frame in [experimental, ipv6, runt] {
        taps[0].send(&frame);
        assert_arrives(&sniffer, &frame);
    }
}

#[tokio::test]
async fn a_large_datagram_is_cut_and_summed_for_a_tap_without_offloads() {
    let Some(wire) = Wire::veth().await else { return };
    let (_, taps) = wire.connect().await;
    let far = wire.far_socket(ETH0).await;
    setsockopt(&far, sockopt::UdpGsoSegment, &1000).unwrap();
    let data: Vec<u8> = (0..4000).map(|byte| (byte % 251) as u8).collect();
    far.send_to(&data, (POD_IP, 7)).unwrap();
    for part in data.chunks(1000) {
        let frame = taps[0].datagram(7);
        assert_eq!(&frame[42..], part);
        // The pseudo-header: addresses, protocol, length.
        let mut summed = frame[26..34].to_vec();
        summed.extend([0, 17]);
        summed.extend(&frame[38..40]);
        summed.extend(&frame[34..]);
        assert_eq!(checksum(&summed), 0, "UDP checksum");
    }
}

#[tokio::test]
async fn a_tap_is_a_quiet_copy_of_its_interface() {
    let Some(wire) = Wire::veth().await else { return };
    wire.pod.set_link(LinkUnspec::new_with_name("eth0").mtu(1450)).await;
    let (_, _taps) = wire.connect().await;
    let tap = wire.pod.link("mayu0").await.unwrap();
    assert_eq!(links::kind(&tap), Some(&InfoKind::Tun));
    assert!(tap.attributes.contains(&LinkAttribute::Mtu(1450)));
    assert!(tap.header.flags.contains(LinkFlags::Up | LinkFlags::Noarp));
    let index = tap.header.index;
    let addresses = wire.pod.inside(move |inside| async move {
        let dump = inside.netlink.address().get().set_link_index_filter(index).execute();
        inside.dump("addresses", 100, dump, Some).await
    });
    assert_eq!(addresses.await, []);
}

#[tokio::test]
async fn connecting_again_replaces_what_was_there() {
    let Some(wire) = Wire::veth().await else { return };
    let (network, old) = wire.connect().await;
    let (again, taps) = wire.connect().await;
    assert_eq!(network.request(), again.request());
    wire.assert_connected(&again, &taps[0]).await;
    assert_eq!(filters(&wire.pod, "eth0").await.len(), 1);
    assert!(read(&old[0].0, &mut [0; 64]).is_err());

    drop((old, taps));
    assert!(wire.pod.link("mayu0").await.is_none());
    let (network, taps) = wire.connect().await;
    wire.assert_connected(&network, &taps[0]).await;
    assert_eq!(filters(&wire.pod, "eth0").await.len(), 1);
}

#[tokio::test]
async fn filters_of_others_stay() {
    let Some(wire) = Wire::veth().await else { return };
    let index = wire.pod.index("eth0").await.cast_signed();
    wire.pod
        .inside(move |inside| async move {
            inside
                .netlink
                .qdisc()
                .add(index)
                .ingress()
                .execute()
                .await
                .map_err(inside.failed("add", "qdisc"))?;
            let mut selector = TcU32Selector::default();
            selector.nkeys = 1;
            selector.keys = vec![TcU32Key::default()];
            let options = [TcFilterU32Option::Selector(selector)];
            let filter = inside.netlink.traffic_filter(index).add();
            // Of a protocol that nothing here speaks.
            let filter = filter.ingress().priority(1).protocol(0x88b5_u16.to_be()).u32(&options).unwrap();
            filter.execute().await.map_err(inside.failed("add", "filter"))
        })
        .await;
    let theirs = filters(&wire.pod, "eth0").await;
    assert_eq!(theirs.len(), 1);

    for _ in 0..2 {
        let (network, taps) = wire.connect().await;
        wire.assert_connected(&network, &taps[0]).await;
        let now = filters(&wire.pod, "eth0").await;
        assert_eq!(now.len(), 2);
        let same = |filter: &&TcMessage| filter.header == theirs[0].header;
        assert_eq!(now.iter().filter(same).count(), 1);
    }
}

#[tokio::test]
async fn two_interfaces_get_two_taps_in_their_order() {
    let Some(wire) = Wire::veth().await else { return };
    let second = TestNamespace::new().unwrap();
    wire.pod.veth("a-second-one", [0x0a, 0, 0, 0, 0, 2], &second, "far1").await;
    let (network, taps) = wire.connect().await;
    let request = network.request();
    let names: Vec<_> = request.interfaces.iter().map(|interface| interface.name.as_str()).collect();
    assert_eq!(names, ["eth0", "a-second-one"]);
    assert_eq!(request.interfaces[1].slot_address, mayu_vmm_api::net_slot_address(1));
    wire.assert_connected(&network, &taps[0]).await;
    let sniffer = sniff(&second).await;
    let frame = [&[0xff; 6][..], &[0x0a, 0, 0, 0, 0, 2], &[0x88, 0xb5], b"second"].concat();
    taps[1].send(&frame);
    assert_arrives(&sniffer, &frame);
}

/// An interface of the pod that is made on one end of a veth pair, whose other end is `far0`. None where the kernel
/// has none of that kind.
async fn made_on_another(make: impl Fn(u32) -> LinkMessage) -> Option<Wire> {
    let host = TestNamespace::new()?;
    let wire = Wire { pod: TestNamespace::new()?, far: TestNamespace::new()?, host: Some(host) };
    let host = wire.host.as_ref()?;
    host.veth("uplink", [0x0a, 0, 0, 0, 0, 9], &wire.far, "far0").await;
    if !host.add_link(make(host.index("uplink").await)).await {
        return None;
    }
    host.give("eth0", &wire.pod).await;
    wire.give_addresses().await;
    Some(wire)
}

#[tokio::test]
async fn a_macvlan_interface_is_connected() {
    let make = |parent| LinkMacVlan::new("eth0", parent, MacVlanMode::Bridge).build();
    let Some(wire) = made_on_another(make).await else { return eprintln!("SKIPPED: needs macvlan") };
    let (network, taps) = wire.connect().await;
    wire.assert_connected(&network, &taps[0]).await;
}

#[tokio::test]
async fn ipvlan_interfaces_of_two_modes_are_connected() {
    for mode in [IpVlanMode::L2, IpVlanMode::L3] {
        let make = |parent| LinkIpVlan::new("eth0", parent, mode).build();
        let Some(wire) = made_on_another(make).await else { return eprintln!("SKIPPED: needs ipvlan") };
        let (network, taps) = wire.connect().await;
        assert_eq!(network.request().interfaces[0].no_arp, mode == IpVlanMode::L3);
        wire.assert_connected(&network, &taps[0]).await;
    }
}

#[tokio::test]
async fn netkit_interfaces_of_both_modes_are_connected() {
    for mode in [NetkitMode::L2, NetkitMode::L3] {
        let (Some(pod), Some(far)) = (TestNamespace::new(), TestNamespace::new()) else { return };
        if !far.add_link(LinkNetkit::new("far0", "eth0", mode).build()).await {
            return eprintln!("SKIPPED: needs netkit");
        }
        far.give("eth0", &pod).await;
        far.set_link(LinkUnspec::new_with_name("far0").up()).await;
        let wire = Wire { pod, far, host: None };
        wire.give_addresses().await;
        let (network, taps) = wire.connect().await;
        assert_eq!(network.request().interfaces[0].hardware_address.is_empty(), mode == NetkitMode::L3);
        wire.assert_connected(&network, &taps[0]).await;
    }
}

#[tokio::test]
async fn frames_to_nobody_reach_the_guest_or_the_error_names_the_missing_module() {
    let Some(wire) = Wire::veth().await else { return };
    let mut network = wire.pod.namespace.network().await.unwrap();
    network.links[0].address = None;
    match wire.pod.namespace.connect(&network).await {
        Ok(taps) => {
            let far = wire.far_socket(ETH0).await;
            far.send_to(b"x", (POD_IP, 7)).unwrap();
            let tap = Tap(taps.into_iter().next().unwrap());
            assert_eq!(tap.datagram(7)[..6], mayu_vmm_api::net_slot_address(0));

            let sniffer = sniff(&wire.far).await;
            let frame = |to: [u8; 6]| [&to[..], &ETH0, &[0x88, 0xb5], b"addressed to nobody"].concat();
            tap.send(&frame([0xff; 6]));
            assert_arrives(&sniffer, &frame([0; 6]));
        }
        Err(error) => {
            let message = error.to_string();
            assert!(message.contains("CONFIG_NET_ACT_SKBMOD"), "{message}");
            assert!(wire.pod.link("mayu0").await.is_none());
            assert_eq!(filters(&wire.pod, "eth0").await, []);
            eprintln!("SKIPPED: needs act_skbmod: {message}");
        }
    }
}

#[tokio::test]
async fn an_interface_that_has_gone_is_named_and_leaves_no_tap() {
    let Some(wire) = Wire::veth().await else { return };
    let network = wire.pod.namespace.network().await.unwrap();
    let index = wire.pod.index("eth0").await;
    wire.pod
        .inside(move |inside| async move {
            inside.netlink.link().del(index).execute().await.map_err(inside.failed("delete", "eth0"))
        })
        .await;
    let message = wire.pod.namespace.connect(&network).await.unwrap_err().to_string();
    assert!(message.contains(" eth0 ") || message.contains(" mayu0 "), "{message}");
    assert!(wire.pod.link("mayu0").await.is_none());
}
