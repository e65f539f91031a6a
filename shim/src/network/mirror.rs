//! What a guest is to have so that it is the pod to everyone outside.

use std::collections::HashMap;
use std::net::IpAddr;

use mayu_agent_api::sandbox::{ConfigureNetworkRequest, Interface, IpPrefix, Neighbour, Route};
use mayu_vmm_api::net_slot_address;
use nix::errno::Errno;
use rtnetlink::IpVersion;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};
use slog::{info, warn};

use super::links::{self, HardwareAddress, Link};
use super::namespace::{Inside, is_one_of};
use super::routes::{self, Known};
use crate::{Error, Result};

/// The most addresses, over all interfaces, that a pod may have.
const MAX_ADDRESSES: usize = 256;
/// The most routes that a pod may have.
const MAX_ROUTES: usize = 4096;
/// The most permanent neighbours that a pod may have.
const MAX_NEIGHBOURS: usize = 4096;
/// The most policy rules that are looked at.
const MAX_RULES: usize = 4096;

/// The priorities of the rules that every namespace starts with (ip-rule(8)).
const DEFAULT_RULES: [u32; 3] = [0, 32766, 32767];

/// As many of the routes that are left out are named in the log.
const EXAMPLES: usize = 4;

/// What CNI has made for a pod.
#[derive(Clone, Debug)]
pub struct Network {
    pub(super) links: Vec<Link>,
    request: ConfigureNetworkRequest,
}

impl Network {
    /// How many interfaces the guest gets, which is how many slots the machine needs.
    pub fn interfaces(&self) -> usize {
        self.links.len()
    }

    /// Whether the pod has no interface but its loopback.
    pub fn is_empty(&self) -> bool {
        self.links.is_empty()
    }

    /// What the agent is told. The n-th interface is the one in network slot n.
    pub fn request(&self) -> ConfigureNetworkRequest {
        self.request.clone()
    }

    /// Reads it from inside the namespace.
    pub(super) async fn read(inside: &Inside) -> Result<Self> {
        let links = links::read(inside).await?;
        let names: HashMap<_, _> = links.iter().map(|link| (link.index, link.name.clone())).collect();
        let mut interfaces: Vec<_> = links.iter().enumerate().map(interface).collect();
        for (index, address) in addresses(inside, &names).await? {
            if let Some(slot) = links.iter().position(|link| link.index == index) {
                insert(&mut interfaces[slot].addresses, address);
            }
        }
        let neighbours = neighbours(inside, &names).await?;
        let addresses = interfaces.iter().flat_map(|interface| &interface.addresses);
        let addresses = addresses.map(|address| address.ip.clone()).collect();
        let routes = routes(inside, &Known { interfaces: names, addresses }).await?;
        tell_of_rules(inside).await?;
        let request = ConfigureNetworkRequest { interfaces, routes, neighbours, ..Default::default() };
        Ok(Self { links, request })
    }
}

fn interface((slot, link): (usize, &Link)) -> Interface {
    Interface {
        // There are no more links than slots.
        slot_address: net_slot_address(slot as u8).into(),
        name: link.name.clone(),
        hardware_address: link.address.map(Vec::from).unwrap_or_default(),
        mtu: link.mtu,
        no_arp: link.no_arp,
        ..Default::default()
    }
}

/// Puts an address into the order in which addresses were added: among IPv6 addresses the kernel tells the newest first
/// (`ipv6_link_dev_addr()`, net/ipv6/addrconf.c), and of two that are as good, it sends from the first.
fn insert(addresses: &mut Vec<IpPrefix>, address: IpPrefix) {
    let newer = addresses.iter().position(|other| address.ip.len() == 16 && other.ip.len() == 16);
    addresses.insert(newer.unwrap_or(addresses.len()), address);
}

/// Every address with its interface's index, the kernel's own link-local ones included: how the kernel makes those is
/// a setting of the host, so the guest's would not make the same.
async fn addresses(inside: &Inside, names: &HashMap<u32, String>) -> Result<Vec<(u32, IpPrefix)>> {
    let dump = inside.netlink.address().get().execute();
    let keep = |message: AddressMessage| {
        let name = names.get(&message.header.index)?;
        let (ip, length) = local_address(&message)?;
        let flags = address_flags(&message);
        if ip.is_ipv6() && !flags.contains(AddressFlags::Permanent) {
            info!(inside.log, "an address stays outside the guest"; "address" => ip.to_string(), "interface" => name,
                "reason" => "it expires, as what router advertisements bring");
            return None;
        }
        if flags.contains(AddressFlags::Dadfailed) {
            warn!(inside.log, "another host has an address of the pod"; "address" => ip.to_string(),
                "interface" => name);
        }
        Some((message.header.index, IpPrefix { ip: octets(ip), length, ..Default::default() }))
    };
    inside.dump("addresses", MAX_ADDRESSES, dump, keep).await
}

/// The address and the length of its network.
fn local_address(message: &AddressMessage) -> Option<(IpAddr, u32)> {
    let (mut local, mut address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            _ => {}
        }
    }
    let ip = local.or(address)?;
    // Where there is a peer, the length is that of the peer's network, to which a route leads.
    let length = match address {
        Some(peer) if peer != ip => {
            if ip.is_ipv4() {
                32
            } else {
                128
            }
        }
        _ => message.header.prefix_len.into(),
    };
    Some((ip, length))
}

fn address_flags(message: &AddressMessage) -> AddressFlags {
    let flags = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    flags.unwrap_or_else(|| AddressFlags::from_bits_retain(message.header.flags.bits().into()))
}

async fn routes(inside: &Inside, known: &Known) -> Result<Vec<Route>> {
    let mut left_out: Vec<(String, &'static str)> = Vec::new();
    let mut count = 0_u64;
    let mut tell = |message: &RouteMessage, reason| {
        count += 1;
        if left_out.len() < EXAMPLES {
            left_out.push((routes::describe(message), reason));
        }
    };
    // Of all families: for one that the kernel lacks it would answer with all others.
    let dump = inside.netlink.route().get(RouteMessage::default()).execute();
    let keep = |message: RouteMessage| match routes::judge(&message, known) {
        routes::Verdict::Mirror(route) => Some(route),
        routes::Verdict::Reduced(route, reason) => {
            tell(&message, reason);
            Some(route)
        }
        routes::Verdict::LeaveOut(reason) => {
            tell(&message, reason);
            None
        }
        routes::Verdict::Pass => None,
    };
    let mut routes = inside.dump("routes", MAX_ROUTES, dump, keep).await?;
    routes::sort(&mut routes);
    if count > 0 {
        let examples: Vec<_> = left_out.iter().map(|(route, reason)| format!("{route}: {reason}")).collect();
        warn!(inside.log, "the guest does not have all routes as they are"; "routes" => count,
            "examples" => examples.join("; "));
    }
    Ok(routes)
}

async fn neighbours(inside: &Inside, names: &HashMap<u32, String>) -> Result<Vec<Neighbour>> {
    let dump = inside.netlink.neighbours().get().execute();
    let keep = |message: NeighbourMessage| neighbour(&message, names);
    inside.dump("permanent neighbours", MAX_NEIGHBOURS, dump, keep).await
}

fn neighbour(message: &NeighbourMessage, names: &HashMap<u32, String>) -> Option<Neighbour> {
    let interface =
        names.get(&message.header.ifindex).filter(|_| message.header.state == NeighbourState::Permanent)?;
    let (mut ip, mut hardware_address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some(IpAddr::V4(*v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some(IpAddr::V6(*v6)),
            NeighbourAttribute::LinkLayerAddress(address) => {
                hardware_address = HardwareAddress::try_from(address.as_slice()).ok();
            }
            _ => {}
        }
    }
    Some(Neighbour {
        interface: interface.clone(),
        ip: octets(ip?),
        hardware_address: hardware_address?.into(),
        ..Default::default()
    })
}

/// Rules are not mirrored: a line says so where there are any.
async fn tell_of_rules(inside: &Inside) -> Result<()> {
    let mut request = inside.netlink.rule().get(IpVersion::V4);
    request.message_mut().header.family = AddressFamily::Unspec;
    let keep = |message: RuleMessage| {
        let priority = message.attributes.iter().find_map(|attribute| match attribute {
            RuleAttribute::Priority(priority) => Some(*priority),
            _ => None,
        });
        (!DEFAULT_RULES.contains(&priority.unwrap_or_default())).then_some(())
    };
    match inside.dump("policy rules", MAX_RULES, request.execute(), keep).await {
        Ok(rules) if rules.is_empty() => Ok(()),
        Ok(rules) => {
            warn!(inside.log, "policy rules of the pod's network stay outside the guest"; "rules" => rules.len());
            Ok(())
        }
        // A kernel without CONFIG_IP_MULTIPLE_TABLES has no rules.
        Err(Error::Network { source, .. }) if is_one_of(&[Errno::EOPNOTSUPP], &source) => Ok(()),
        Err(error) => Err(error),
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().into(),
        IpAddr::V6(ip) => ip.octets().into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::sync::{Arc, Mutex};

    use protobuf::MessageField;
    use rtnetlink::packet_route::address::CacheInfo;
    use rtnetlink::packet_route::route::{RouteAttribute, RouteMetric, RouteProtocol, RouteScope, RouteType};
    use rtnetlink::{LinkUnspec, RouteMessageBuilder, RouteNextHopBuilder};

    use super::super::testing::{ETH0, TestNamespace};
    use super::*;

    const STATIC: u32 = 4;
    const KERNEL: u32 = 2;
    const MAIN: u32 = 254;
    const LINK: u32 = 253;
    const UNICAST: u32 = 1;

    async fn pod() -> Option<(TestNamespace, TestNamespace)> {
        let (pod, far) = (TestNamespace::new()?, TestNamespace::new()?);
        pod.veth("eth0", ETH0, &far, "far0").await;
        Some((pod, far))
    }

    async fn read(pod: &TestNamespace) -> ConfigureNetworkRequest {
        pod.namespace.network().await.unwrap().request()
    }

    fn bytes(ip: &str) -> Vec<u8> {
        octets(ip.parse().unwrap())
    }

    fn prefix(ip: &str, length: u32) -> IpPrefix {
        IpPrefix { ip: bytes(ip), length, ..Default::default() }
    }

    /// A route of the main table over eth0, with what `rtnetlink` fills in for IPv4.
    fn route(destination: &str, length: u32) -> Route {
        Route {
            interface: "eth0".into(),
            destination: MessageField::some(prefix(destination, length)),
            table: MAIN,
            kind: UNICAST,
            protocol: STATIC,
            ..Default::default()
        }
    }

    fn ipv4() -> RouteMessageBuilder<Ipv4Addr> {
        RouteMessageBuilder::<Ipv4Addr>::new()
    }

    fn ipv6() -> RouteMessageBuilder<Ipv6Addr> {
        RouteMessageBuilder::<Ipv6Addr>::new()
    }

    #[tokio::test]
    async fn a_namespace_with_nothing_but_loopback_is_an_empty_network() {
        let Some(pod) = TestNamespace::new() else { return };
        pod.set_link(LinkUnspec::new_with_name("lo").up()).await;
        let network = pod.namespace.network().await.unwrap();
        assert!(network.is_empty());
        assert_eq!((network.interfaces(), network.request()), (0, ConfigureNetworkRequest::default()));
        assert_eq!(pod.namespace.connect(&network).await.unwrap().len(), 0);
    }

    #[tokio::test]
    async fn a_dual_stack_pod_behind_a_bridge_is_read_as_it_is() {
        let Some((pod, _far)) = pod().await else { return };
        pod.add_address("eth0", "10.244.0.5", 24).await;
        pod.add_address("eth0", "fe80::5", 64).await;
        pod.add_address("eth0", "fd00::5", 64).await;
        pod.add_address("eth0", "fd00::6", 128).await;
        pod.add_route(ipv4().gateway("10.244.0.1".parse().unwrap()).build()).await;
        pod.add_route(ipv6().gateway("fd00::1".parse().unwrap()).build()).await;

        let request = read(&pod).await;

        let interface = Interface {
            slot_address: vec![2, b'm', b'a', b'y', b'u', 0],
            name: "eth0".into(),
            hardware_address: ETH0.into(),
            mtu: 1500,
            addresses: vec![
                prefix("10.244.0.5", 24),
                prefix("fe80::5", 64),
                prefix("fd00::5", 64),
                prefix("fd00::6", 128),
            ],
            ..Default::default()
        };
        assert_eq!(request.interfaces, [interface]);
        assert_eq!(request.neighbours, []);
        let connected = Route {
            preferred_source: bytes("10.244.0.5"),
            scope: LINK,
            protocol: KERNEL,
            ..route("10.244.0.0", 24)
        };
        let connected6 = |ip, length| Route { metric: 256, protocol: KERNEL, ..route(ip, length) };
        assert_eq!(
            request.routes,
            [
                connected,
                connected6("fd00::6", 128),
                connected6("fd00::", 64),
                connected6("fe80::", 64),
                Route { gateway: bytes("10.244.0.1"), ..route("0.0.0.0", 0) },
                Route { gateway: bytes("fd00::1"), metric: 1024, ..route("::", 0) },
            ]
        );
    }

    #[tokio::test]
    async fn a_pod_with_a_lone_address_and_a_gateway_of_no_network_is_read_as_it_is() {
        let Some((pod, _far)) = pod().await else { return };
        let gateway = "169.254.1.1".parse().unwrap();
        let index = pod.index("eth0").await;
        pod.add_address("eth0", "10.65.0.7", 32).await;
        let to_gateway = ipv4().destination_prefix(gateway, 32).output_interface(index);
        pod.add_route(to_gateway.scope(RouteScope::Link).build()).await;
        pod.add_route(ipv4().gateway(gateway).output_interface(index).build()).await;
        pod.add_neighbour("eth0", "169.254.1.1", [0xee; 6]).await;

        let request = read(&pod).await;

        assert_eq!(request.interfaces[0].addresses, [prefix("10.65.0.7", 32)]);
        assert_eq!(
            request.routes,
            [
                Route { scope: LINK, ..route("169.254.1.1", 32) },
                Route { gateway: bytes("169.254.1.1"), ..route("0.0.0.0", 0) },
            ]
        );
        let neighbour = Neighbour {
            interface: "eth0".into(),
            ip: bytes("169.254.1.1"),
            hardware_address: vec![0xee; 6],
            ..Default::default()
        };
        assert_eq!(request.neighbours, [neighbour]);
    }

    #[tokio::test]
    async fn every_field_of_a_route_is_told() {
        let Some((pod, _far)) = pod().await else { return };
        let index = pod.index("eth0").await;
        pod.add_address("eth0", "10.0.0.5", 32).await;
        let mut rich = ipv4()
            .destination_prefix([10, 9, 0, 0].into(), 16)
            .gateway([10, 8, 0, 1].into())
            .output_interface(index)
            .pref_source([10, 0, 0, 5].into())
            .table_id(1000)
            .priority(50)
            .protocol(RouteProtocol::Bird)
            .onlink()
            .build();
        rich.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(1400)]));
        pod.add_route(rich).await;
        let black_hole = ipv4().destination_prefix([10, 99, 0, 0].into(), 16).kind(RouteType::BlackHole);
        pod.add_route(black_hole.build()).await;
        pod.add_route(
            ipv6().destination_prefix("fd99::".parse().unwrap(), 16).kind(RouteType::Unreachable).build(),
        )
        .await;

        let request = read(&pod).await;

        let rich = Route {
            gateway: bytes("10.8.0.1"),
            preferred_source: bytes("10.0.0.5"),
            table: 1000,
            protocol: 12,
            metric: 50,
            mtu: 1400,
            on_link: true,
            ..route("10.9.0.0", 16)
        };
        let leading_nowhere = |ip, kind| Route { interface: String::new(), kind, ..route(ip, 16) };
        assert_eq!(
            request.routes,
            [leading_nowhere("10.99.0.0", 6), Route { metric: 1024, ..leading_nowhere("fd99::", 7) }, rich]
        );
    }

    #[tokio::test]
    async fn our_own_taps_change_nothing() {
        let Some((pod, _far)) = pod().await else { return };
        pod.add_address("eth0", "10.0.0.5", 24).await;
        let network = pod.namespace.network().await.unwrap();
        let _taps = pod.namespace.connect(&network).await.unwrap();
        assert_eq!(read(&pod).await, network.request());
    }

    #[tokio::test]
    async fn more_interfaces_than_slots_are_refused_by_name() {
        let (Some(pod), Some(far)) = (TestNamespace::new(), TestNamespace::new()) else { return };
        for name in ["e0", "e1", "e2", "e3", "e4", "e5", "e6", "e7", "e8"] {
            pod.veth(name, ETH0, &far, &format!("{name}-far")).await;
        }
        let message = pod.namespace.network().await.unwrap_err().to_string();
        assert!(message.contains("it has 9 interfaces (e0, e1, "), "{message}");
    }

    #[tokio::test]
    async fn more_addresses_than_a_guest_takes_are_refused() {
        let Some((pod, _far)) = pod().await else { return };
        let index = pod.index("eth0").await;
        pod.inside(move |inside| async move {
            for last in 0..=MAX_ADDRESSES {
                let ip = Ipv4Addr::from(0x0a00_0000 + last as u32).into();
                let add = inside.netlink.address().add(index, ip, 32);
                add.execute().await.map_err(inside.failed("add", "address"))?;
            }
            Ok(())
        })
        .await;
        let message = pod.namespace.network().await.unwrap_err().to_string();
        assert!(message.ends_with("it has more than 256 addresses"), "{message}");
    }

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn what_stays_outside_the_guest_is_told() {
        let lines = Lines::default();
        let log = crate::log::logger(lines.clone(), "pod", false);
        let (Some(pod), Some(far)) = (TestNamespace::with_log(&log), TestNamespace::new()) else { return };
        pod.veth("eth0", ETH0, &far, "far0").await;
        pod.veth("eth1", [0x0a, 0, 0, 0, 0, 2], &far, "far1").await;
        pod.add_address("eth0", "10.0.0.5", 24).await;
        let mut info = CacheInfo::default();
        (info.ifa_preferred, info.ifa_valid) = (1000, 1000);
        pod.add_address_with("eth0", "fd00::5", 64, AddressAttribute::CacheInfo(info)).await;
        let index = pod.index("eth0").await;
        let hop = |last| {
            RouteNextHopBuilder::new_ipv4().interface(index).via([10, 0, 0, last].into()).unwrap().build()
        };
        pod.add_route(ipv4().multipath(vec![hop(1), hop(2)]).build()).await;
        pod.set_link(LinkUnspec::new_with_name("eth1").down()).await;
        pod.inside(|inside| async move {
            let rule = inside.netlink.rule().add().v4().table_id(100).priority(5).fw_mark(7);
            rule.execute().await.map_err(inside.failed("add", "rule"))
        })
        .await;

        let request = read(&pod).await;

        let names: Vec<_> = request.interfaces.iter().map(|interface| interface.name.as_str()).collect();
        assert_eq!(names, ["eth0"]);
        assert_eq!(request.interfaces[0].addresses, [prefix("10.0.0.5", 24)]);
        let default = request.routes.iter().find(|route| route.destination.length == 0).unwrap();
        assert_eq!(default.gateway, bytes("10.0.0.1"));
        let lines = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        for told in [
            r#""reason":"it is down","interface":"eth1""#,
            r#"advertisements bring","interface":"eth0","address":"fd00::5""#,
            "0.0.0.0/0: it leads several ways, of which the guest takes the first",
            "fd00::/64: it expires",
            r#""rules":1"#,
        ] {
            assert!(lines.contains(told), "{told} in {lines}");
        }
    }
}
