//! Routes of the namespace in the terms of the agent's service.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use mayu_agent_api::sandbox::{IpPrefix, Route};
use protobuf::MessageField;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
    RouteNextHopFlags, RouteProtocol, RouteType, RouteVia,
};

use super::links::LOOPBACK;

/// `RT_TABLE_LOCAL`, which the guest's kernel fills by itself.
const LOCAL_TABLE: u32 = 255;

/// What becomes of a route.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    Mirror(Route),
    /// The guest gets it, but not all of it.
    Reduced(Route, &'static str),
    /// The guest's kernel makes it by itself, or it is no route of the pod's.
    Pass,
    /// The guest does without it.
    LeaveOut(&'static str),
}

/// What a route of the guest may refer to.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Names by index.
    pub interfaces: HashMap<u32, String>,
    /// In network order.
    pub addresses: HashSet<Vec<u8>>,
}

/// Where a route leads.
#[derive(Default)]
struct Hop {
    interface: Option<u32>,
    gateway: Vec<u8>,
    on_link: bool,
}

/// Decides on one route.
pub(super) fn judge(message: &RouteMessage, known: &Known) -> Verdict {
    let header = &message.header;
    let table = table(message);
    let ip = matches!(header.address_family, AddressFamily::Inet | AddressFamily::Inet6);
    if !ip || table == LOCAL_TABLE || header.flags.contains(RouteFlags::Cloned) {
        return Verdict::Pass;
    }
    if let Some(reason) = cannot_be_told(message) {
        return Verdict::LeaveOut(reason);
    }
    let (hop, mut reduced) = hop(message);
    let name = hop.interface.and_then(|index| known.interfaces.get(&index));
    let interface = match (hop.interface, name) {
        // IPv6 lets the others, which lead nowhere, lead to the loopback interface.
        _ if header.kind != RouteType::Unicast => String::new(),
        (_, Some(name)) => name.clone(),
        // What the kernel keeps for loopback and for interfaces that are down.
        _ if header.protocol == RouteProtocol::Kernel => return Verdict::Pass,
        (Some(LOOPBACK), None) => "lo".into(),
        (Some(_), None) => {
            return Verdict::LeaveOut("it leads over an interface that the guest does not get");
        }
        // With net.ipv4.nexthop_compat_mode off.
        (None, None) => return Verdict::LeaveOut("its next hop is an object of its own"),
    };
    let mut route = Route {
        interface,
        destination: MessageField::some(destination(message)),
        gateway: hop.gateway,
        on_link: hop.on_link,
        table,
        scope: u8::from(header.scope).into(),
        kind: u8::from(header.kind).into(),
        protocol: u8::from(header.protocol).into(),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::PrefSource(address) => {
                let address = octets(address);
                match known.addresses.contains(&address) {
                    true => route.preferred_source = address,
                    false => reduced = reduced.or(Some("its source is no address of the guest's interfaces")),
                }
            }
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) if mtu(metrics, &mut route.mtu) => {
                reduced = reduced.or(Some("it has metrics besides the MTU"));
            }
            _ => {}
        }
    }
    match reduced {
        Some(reason) => Verdict::Reduced(route, reason),
        None => Verdict::Mirror(route),
    }
}

/// Puts routes into an order in which the kernel takes them: it looks a gateway up when it is given the route over it,
/// among the routes of a narrower scope (`fib_check_nh()`, net/ipv4/fib_semantics.c) or, for IPv6, without a gateway of
/// their own (`ip6_route_check_nh()`, net/ipv6/route.c).
pub(super) fn sort(routes: &mut [Route]) {
    routes.sort_by_key(|route| (!route.gateway.is_empty(), Reverse(route.scope)));
}

/// A route's destination and table, for the log.
pub(super) fn describe(message: &RouteMessage) -> String {
    let IpPrefix { ip, length, .. } = destination(message);
    let ip = match <[u8; 4]>::try_from(ip.as_slice()) {
        Ok(ip) => Ipv4Addr::from(ip).to_string(),
        Err(_) => <[u8; 16]>::try_from(ip.as_slice())
            .map(Ipv6Addr::from)
            .unwrap_or(Ipv6Addr::UNSPECIFIED)
            .to_string(),
    };
    match table(message) {
        table if table == u32::from(RouteHeader::RT_TABLE_MAIN) => format!("{ip}/{length}"),
        table => format!("{ip}/{length} table {table}"),
    }
}

/// Why leaving out a part of a route would make another one of it.
fn cannot_be_told(message: &RouteMessage) -> Option<&'static str> {
    let header = &message.header;
    let kinds = [
        RouteType::Unicast,
        RouteType::BlackHole,
        RouteType::Unreachable,
        RouteType::Prohibit,
        RouteType::Throw,
    ];
    if !kinds.contains(&header.kind) {
        return Some("its kind is none of unicast, blackhole, unreachable, prohibit, throw");
    }
    if header.source_prefix_length != 0 {
        return Some("it applies to some source addresses only");
    }
    if header.tos != 0 {
        return Some("it applies to one type of service only");
    }
    if header.protocol == RouteProtocol::Ra {
        return Some("router advertisements brought it");
    }
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::CacheInfo(info) if info.expires != 0 => Some("it expires"),
        RouteAttribute::Encap(_) | RouteAttribute::EncapType(_) => Some("it encapsulates"),
        _ => None,
    })
}

fn table(message: &RouteMessage) -> u32 {
    let table = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    table.unwrap_or(message.header.table.into())
}

fn destination(message: &RouteMessage) -> IpPrefix {
    let ip = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => Some(octets(address)),
        _ => None,
    });
    // The default route has none.
    let ip = ip.unwrap_or_else(|| match message.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.octets().into(),
        _ => Ipv6Addr::UNSPECIFIED.octets().into(),
    });
    IpPrefix { ip, length: message.header.destination_prefix_length.into(), ..Default::default() }
}

/// Where it leads; the first way of several, and then that there are several.
fn hop(message: &RouteMessage) -> (Hop, Option<&'static str>) {
    let several = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::MultiPath(hops) => hops.first(),
        _ => None,
    });
    if let Some(RouteNextHop { flags, interface_index, attributes, .. }) = several {
        let mut hop = hop_of(attributes);
        hop.interface = Some(*interface_index);
        hop.on_link = flags.contains(RouteNextHopFlags::Onlink);
        return (hop, Some("it leads several ways, of which the guest takes the first"));
    }
    let mut hop = hop_of(&message.attributes);
    hop.on_link = message.header.flags.contains(RouteFlags::Onlink);
    (hop, None)
}

fn hop_of(attributes: &[RouteAttribute]) -> Hop {
    let mut hop = Hop::default();
    for attribute in attributes {
        match attribute {
            RouteAttribute::Oif(index) => hop.interface = Some(*index),
            RouteAttribute::Gateway(address) => hop.gateway = octets(address),
            RouteAttribute::Via(RouteVia::Inet(address)) => hop.gateway = address.octets().into(),
            RouteAttribute::Via(RouteVia::Inet6(address)) => hop.gateway = address.octets().into(),
            _ => {}
        }
    }
    hop
}

/// Takes the MTU out of a route's metrics; whether there are others.
fn mtu(metrics: &[RouteMetric], mtu: &mut u32) -> bool {
    let mut others = false;
    for metric in metrics {
        match metric {
            RouteMetric::Mtu(value) => *mtu = *value,
            // Zero is the value of a metric that is not set.
            RouteMetric::Hoplimit(0) | RouteMetric::Advmss(0) => {}
            _ => others = true,
        }
    }
    others
}

fn octets(address: &RouteAddress) -> Vec<u8> {
    match address {
        RouteAddress::Inet(address) => address.octets().into(),
        RouteAddress::Inet6(address) => address.octets().into(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use rtnetlink::RouteMessageBuilder;
    use rtnetlink::packet_route::route::{RouteCacheInfo, RouteScope};

    use super::*;

    fn known() -> Known {
        Known {
            interfaces: HashMap::from([(2, "eth0".to_string())]),
            addresses: HashSet::from([vec![10, 0, 0, 5]]),
        }
    }

    fn route(prefix: [u8; 4], length: u8) -> RouteMessageBuilder<Ipv4Addr> {
        RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(prefix.into(), length).output_interface(2)
    }

    fn over(prefix: [u8; 4], interface: u32) -> RouteMessage {
        let builder = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(prefix.into(), 8);
        builder.output_interface(interface).build()
    }

    fn mirrored(message: &RouteMessage) -> Route {
        match judge(message, &known()) {
            Verdict::Mirror(route) => route,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_depends_on_more_than_the_destination_is_left_out() {
        let mut expiring = route([10, 0, 0, 0], 8).build();
        // `struct rta_cacheinfo`, of which the third field is `rta_expires`.
        let mut info = [0; 32];
        info[8] = 100;
        let info = RouteCacheInfo::parse(&info).unwrap();
        expiring.attributes.push(RouteAttribute::CacheInfo(info));
        for message in [
            route([10, 0, 0, 0], 8).tos(8).build(),
            route([10, 0, 0, 0], 8).source_prefix([10, 1, 0, 0].into(), 16).build(),
            route([10, 0, 0, 0], 8).protocol(RouteProtocol::Ra).build(),
            route([10, 0, 0, 0], 8).kind(RouteType::Broadcast).build(),
            over([10, 0, 0, 0], 9),
            RouteMessageBuilder::<Ipv4Addr>::new().nhid(7).build(),
            expiring,
        ] {
            assert!(matches!(judge(&message, &known()), Verdict::LeaveOut(_)), "{message:?}");
        }
    }

    #[test]
    fn what_the_guests_kernel_makes_itself_is_passed_over() {
        let local = route([10, 0, 0, 1], 32).table_id(255).build();
        let mut cached = route([10, 0, 0, 1], 32).build();
        cached.header.flags |= RouteFlags::Cloned;
        let mut down = over([10, 0, 0, 0], 9);
        down.header.protocol = RouteProtocol::Kernel;
        let mut loopback = over([10, 0, 0, 0], LOOPBACK);
        loopback.header.protocol = RouteProtocol::Kernel;
        let mut multicast = route([10, 0, 0, 1], 32).build();
        multicast.header.address_family = AddressFamily::Other(128);
        for message in [local, cached, down, loopback, multicast] {
            assert_eq!(judge(&message, &known()), Verdict::Pass, "{message:?}");
        }
    }

    #[test]
    fn a_route_over_several_ways_takes_the_first_and_says_so() {
        let hops = [[10, 0, 0, 1], [10, 0, 0, 2]].map(|gateway| {
            let mut hop = RouteNextHop::default();
            hop.interface_index = 2;
            hop.flags = RouteNextHopFlags::Onlink;
            hop.attributes.push(RouteAttribute::Gateway(IpAddr::from(gateway).into()));
            hop
        });
        let mut message = RouteMessageBuilder::<Ipv4Addr>::new().build();
        message.attributes.push(RouteAttribute::MultiPath(hops.into()));
        let Verdict::Reduced(route, reason) = judge(&message, &known()) else { panic!() };
        assert_eq!(
            (route.interface.as_str(), route.gateway, route.on_link),
            ("eth0", vec![10, 0, 0, 1], true)
        );
        assert!(reason.contains("several ways"), "{reason}");
    }

    #[test]
    fn a_route_to_loopback_that_somebody_made_is_one_of_the_guests() {
        assert_eq!(mirrored(&over([10, 0, 0, 0], LOOPBACK)).interface, "lo");
    }

    #[test]
    fn a_source_that_the_guest_does_not_have_is_left_out() {
        let from = |last| route([10, 0, 0, 0], 8).pref_source([10, 0, 0, last].into()).build();
        assert_eq!(mirrored(&from(5)).preferred_source, [10, 0, 0, 5]);
        let Verdict::Reduced(route, _) = judge(&from(6), &known()) else { panic!() };
        assert!(route.preferred_source.is_empty());
    }

    #[test]
    fn an_ipv4_route_may_have_an_ipv6_gateway() {
        let gateway: Ipv6Addr = "fe80::1".parse().unwrap();
        let route = mirrored(&route([0, 0, 0, 0], 0).via(gateway).build());
        assert_eq!(route.gateway, gateway.octets());
        assert_eq!(route.destination.ip, [0; 4]);
    }

    #[test]
    fn other_metrics_than_the_mtu_are_told() {
        let mut message = route([10, 0, 0, 0], 8).build();
        message
            .attributes
            .push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(1400), RouteMetric::Hoplimit(0)]));
        assert_eq!(mirrored(&message).mtu, 1400);
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Advmss(1300)]));
        assert!(matches!(judge(&message, &known()), Verdict::Reduced(..)));
    }

    #[test]
    fn a_gateway_is_reachable_before_it_is_used() {
        let link = |scope| Route { scope, ..Default::default() };
        let via = |scope| Route { scope, gateway: vec![1], ..Default::default() };
        let mut routes = [via(0), via(200), link(0), via(253), link(253)];
        sort(&mut routes);
        assert_eq!(routes, [link(253), link(0), via(253), via(200), via(0)]);
    }

    #[test]
    fn the_log_names_a_route_by_its_destination() {
        let universe = |prefix, length| route(prefix, length).scope(RouteScope::Universe);
        assert_eq!(describe(&universe([10, 0, 0, 0], 8).build()), "10.0.0.0/8");
        assert_eq!(describe(&universe([0, 0, 0, 0], 0).table_id(100).build()), "0.0.0.0/0 table 100");
        assert_eq!(describe(&RouteMessageBuilder::<Ipv6Addr>::new().build()), "::/0");
    }
}
