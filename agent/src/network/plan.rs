//! What a request makes of the guest's network, checked before anything is touched.

use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;

use mayu_agent_api::sandbox::{self, ConfigureNetworkRequest};

use crate::error::{Error, Result};

/// How many interfaces there may be: as many as the machine has slots at most.
const MAX_INTERFACES: usize = 8;
/// How many addresses one interface may have.
const MAX_ADDRESSES: usize = 256;
/// How many routes there may be.
const MAX_ROUTES: usize = 4096;
/// How many neighbours there may be.
const MAX_NEIGHBOURS: usize = 4096;
/// The longest name of an interface: `IFNAMSIZ` of linux/if.h without the NUL.
const MAX_NAME: usize = 15;
/// What a virtio network device takes, in bytes: `ETH_MIN_MTU` and `MAX_MTU` of the kernel's drivers/net/virtio_net.c.
const MTU: std::ops::RangeInclusive<u32> = 68..=65535;
/// `RT_TABLE_LOCAL` of linux/rtnetlink.h: the kernel fills it in by itself.
const LOCAL_TABLE: u32 = 255;
/// The loopback interface, which routes may name.
pub const LOOPBACK: &str = "lo";

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct HardwareAddress(pub [u8; 6]);

/// All of it.
#[derive(Debug)]
pub struct Plan {
    /// The interfaces, beside loopback.
    pub interfaces: Vec<Interface>,
    /// Those without a gateway first: a gateway is reached through one of them.
    pub routes: Vec<Route>,
    /// The permanent neighbours.
    pub neighbours: Vec<Neighbour>,
}

/// One interface.
#[derive(Debug)]
pub struct Interface {
    /// The slot that becomes it.
    pub slot: HardwareAddress,
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub hardware_address: HardwareAddress,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its addresses with the lengths of their networks' prefixes.
    pub addresses: Vec<Prefix>,
    /// Whether it resolves no addresses.
    pub no_arp: bool,
}

/// An address and how many of its leading bits are those of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The address.
    pub ip: IpAddr,
    /// The number of bits.
    pub length: u8,
}

/// One route. Numbers are those of linux/rtnetlink.h.
#[derive(Debug)]
pub struct Route {
    /// The interface, by name.
    pub interface: Option<String>,
    /// Where it leads.
    pub destination: Prefix,
    /// The next hop.
    pub gateway: Option<IpAddr>,
    /// The source address of what is sent.
    pub preferred_source: Option<IpAddr>,
    /// Its table.
    pub table: u32,
    /// How far away the destination is.
    pub scope: u8,
    /// What happens to a packet.
    pub kind: u8,
    /// Who made it.
    pub protocol: u8,
    /// Its priority; 0 is the kernel's default.
    pub metric: u32,
    /// The MTU of the path in bytes; 0 is the interface's.
    pub mtu: u32,
    /// Whether the gateway counts as reached.
    pub on_link: bool,
}

/// One permanent neighbour.
#[derive(Debug)]
pub struct Neighbour {
    /// The interface, by name.
    pub interface: String,
    /// Its address.
    pub ip: IpAddr,
    /// Its hardware address.
    pub hardware_address: HardwareAddress,
}

impl Plan {
    /// Checks a request.
    ///
    /// # Errors
    ///
    /// `InvalidRequest` naming the interface, route or neighbour and what is wrong with it; `TooMany`.
    pub fn of(request: &ConfigureNetworkRequest) -> Result<Self> {
        bounded("interfaces", request.interfaces.len(), MAX_INTERFACES)?;
        bounded("routes", request.routes.len(), MAX_ROUTES)?;
        bounded("neighbours", request.neighbours.len(), MAX_NEIGHBOURS)?;
        let interfaces = request.interfaces.iter().map(interface).collect::<Result<Vec<_>>>()?;
        let mut names = HashSet::new();
        let mut slots = HashSet::new();
        for interface in &interfaces {
            if !names.insert(interface.name.as_str()) {
                return Err(invalid(format!("there are two interfaces {:?}", interface.name)));
            }
            if !slots.insert(interface.slot) {
                return Err(invalid(format!("two interfaces take the network slot {}", interface.slot)));
            }
        }
        let mut routes = request.routes.iter().map(route).collect::<Result<Vec<_>>>()?;
        for route in &routes {
            if let Some(name) = route.interface.as_deref().filter(|name| *name != LOOPBACK)
                && !names.contains(name)
            {
                return Err(invalid(format!("{route}: the request has no interface {name:?}")));
            }
        }
        // Stable: within each of the two groups the order stays the caller's.
        routes.sort_by_key(|route| route.gateway.is_some());
        let neighbours = request.neighbours.iter().map(neighbour).collect::<Result<Vec<_>>>()?;
        for neighbour in &neighbours {
            if !names.contains(neighbour.interface.as_str()) {
                return Err(invalid(format!(
                    "{neighbour}: the request has no interface {:?}",
                    neighbour.interface
                )));
            }
        }
        Ok(Self { interfaces, routes, neighbours })
    }
}

fn interface(message: &sandbox::Interface) -> Result<Interface> {
    let name = &message.name;
    check_name(name)?;
    let of_interface = |what: &str| invalid(format!("interface {name:?}: {what}"));
    let slot = HardwareAddress::read(&message.slot_address)
        .ok_or_else(|| of_interface("the slot's hardware address is not six bytes"))?;
    let hardware_address = match &message.hardware_address[..] {
        [] => slot,
        bytes => HardwareAddress::read(bytes)
            .filter(|address| address.is_unicast())
            .ok_or_else(|| of_interface("its hardware address is not that of one station"))?,
    };
    if !MTU.contains(&message.mtu) {
        return Err(of_interface(&format!(
            "its MTU is {}, not {} to {}",
            message.mtu,
            MTU.start(),
            MTU.end()
        )));
    }
    bounded("addresses of an interface", message.addresses.len(), MAX_ADDRESSES)?;
    let address = |message| prefix(message).ok_or_else(|| of_interface("one of its addresses is none"));
    Ok(Interface {
        slot,
        name: name.clone(),
        hardware_address,
        mtu: message.mtu,
        addresses: message.addresses.iter().map(address).collect::<Result<_>>()?,
        no_arp: message.no_arp,
    })
}

fn route(message: &sandbox::Route) -> Result<Route> {
    let destination = message
        .destination
        .as_ref()
        .and_then(prefix)
        .ok_or_else(|| invalid("a route's destination is no prefix of an address".into()))?;
    let interface = Some(message.interface.clone()).filter(|name| !name.is_empty());
    let to = |what: &str| invalid(format!("route to {destination}: {what}"));
    let optional = |bytes: &[u8], what: &str| match bytes {
        [] => Ok(None),
        bytes => ip(bytes).map(Some).ok_or_else(|| to(what)),
    };
    let byte = |number: u32, what: &str| u8::try_from(number).map_err(|_| to(what));
    let route = Route {
        gateway: optional(&message.gateway, "its gateway is no address")?,
        preferred_source: optional(&message.preferred_source, "its preferred source is no address")?,
        table: message.table,
        scope: byte(message.scope, "its scope is above 255")?,
        kind: byte(message.kind, "its kind is above 255")?,
        protocol: byte(message.protocol, "its protocol is above 255")?,
        metric: message.metric,
        mtu: message.mtu,
        on_link: message.on_link,
        interface,
        destination,
    };
    let reason = match (&route.destination.ip, &route.gateway, &route.preferred_source) {
        (IpAddr::V6(_), Some(IpAddr::V4(_)), _) => "its gateway is of the other family",
        (IpAddr::V4(_), _, Some(IpAddr::V6(_))) | (IpAddr::V6(_), _, Some(IpAddr::V4(_))) => {
            "its preferred source is of the other family"
        }
        _ if route.table == LOCAL_TABLE => "its table is the kernel's own",
        _ => match route.kind {
            libc::RTN_UNICAST if route.interface.is_none() => "it has no interface",
            libc::RTN_UNICAST
            | libc::RTN_BLACKHOLE
            | libc::RTN_UNREACHABLE
            | libc::RTN_PROHIBIT
            | libc::RTN_THROW => return Ok(route),
            _ => "its kind is none of unicast, blackhole, unreachable, prohibit, throw",
        },
    };
    Err(invalid(format!("{route}: {reason}")))
}

fn neighbour(message: &sandbox::Neighbour) -> Result<Neighbour> {
    let of_neighbour =
        |what: &str| invalid(format!("a neighbour on interface {:?}: {what}", message.interface));
    Ok(Neighbour {
        interface: message.interface.clone(),
        ip: ip(&message.ip).ok_or_else(|| of_neighbour("its address is none"))?,
        hardware_address: HardwareAddress::read(&message.hardware_address)
            .ok_or_else(|| of_neighbour("its hardware address is not six bytes"))?,
    })
}

/// The kernel's own rule (`dev_valid_name`), without what it would take for a pattern, and without the names that mean something
/// else below /proc/sys/net.
fn check_name(name: &str) -> Result<()> {
    let taken = [".", "..", "all", "default", LOOPBACK];
    let allowed = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
    let valid = (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(allowed) && !taken.contains(&name);
    if valid { Ok(()) } else { Err(invalid(format!("{name:?} is no name of an interface"))) }
}

fn bounded(what: &'static str, count: usize, limit: usize) -> Result<()> {
    if count > limit { Err(Error::TooMany { what, limit }) } else { Ok(()) }
}

fn invalid(reason: String) -> Error {
    Error::InvalidRequest(reason)
}

fn prefix(message: &sandbox::IpPrefix) -> Option<Prefix> {
    let ip = ip(&message.ip)?;
    let length = u8::try_from(message.length).ok()?;
    let bits = if ip.is_ipv4() { 32 } else { 128 };
    (length <= bits).then_some(Prefix { ip, length })
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let v6 = || <[u8; 16]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| v6()).ok()
}

impl HardwareAddress {
    /// The address in these bytes, if they are six.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().map(Self).ok()
    }

    /// Whether it is that of one station, rather than of a group or of none.
    fn is_unicast(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for HardwareAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for HardwareAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.length)
    }
}

/// As ip-route(8) writes it, as far as it tells one route from another.
impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "route to {}", self.destination)?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        if let Some(interface) = &self.interface {
            write!(f, " dev {interface}")?;
        }
        if let Some(source) = self.preferred_source {
            write!(f, " src {source}")?;
        }
        write!(f, " table {}", self.table)
    }
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "neighbour {} dev {}", self.ip, self.interface)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(number: u8) -> Vec<u8> {
        vec![2, b'm', b'a', b'y', b'u', number]
    }

    fn interface(name: &str, number: u8) -> sandbox::Interface {
        sandbox::Interface {
            slot_address: slot(number),
            name: name.into(),
            mtu: 1500,
            ..sandbox::Interface::default()
        }
    }

    fn prefix(ip: &[u8], length: u32) -> sandbox::IpPrefix {
        sandbox::IpPrefix { ip: ip.into(), length, ..sandbox::IpPrefix::default() }
    }

    fn route(to: &[u8]) -> sandbox::Route {
        sandbox::Route {
            interface: "eth0".into(),
            destination: Some(prefix(to, 0)).into(),
            table: 254,
            kind: 1,
            ..sandbox::Route::default()
        }
    }

    fn request() -> ConfigureNetworkRequest {
        ConfigureNetworkRequest {
            interfaces: vec![interface("eth0", 0)],
            ..ConfigureNetworkRequest::default()
        }
    }

    fn reason(change: impl FnOnce(&mut ConfigureNetworkRequest)) -> String {
        let mut request = request();
        change(&mut request);
        match Plan::of(&request) {
            Err(error @ (Error::InvalidRequest(_) | Error::TooMany { .. })) => error.to_string(),
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("accepted"),
        }
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let plan = Plan::of(&request()).unwrap();

        let [eth0] = &plan.interfaces[..] else { panic!("{plan:?}") };
        assert_eq!(eth0.hardware_address, eth0.slot);
        assert_eq!(eth0.slot.to_string(), "02:6d:61:79:75:00");
        assert!(Plan::of(&ConfigureNetworkRequest::default()).unwrap().interfaces.is_empty());
    }

    #[test]
    fn names_are_the_kernels() {
        for name in ["e", "eth0", "ens5.100", "a-b_c@d", "fifteen-letters"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            "lo",
            "all",
            "default",
            "a/b",
            "a b",
            "a\tb",
            "a:b",
            "eth%d",
            "sixteen-letters!",
            "ä",
        ] {
            assert!(reason(|r| r.interfaces[0].name = name.into()).contains("is no name"), "{name}");
        }
    }

    #[test]
    fn interfaces_are_checked() {
        assert!(reason(|r| r.interfaces[0].slot_address = vec![1; 5]).contains("slot"));
        assert!(reason(|r| r.interfaces[0].hardware_address = vec![1; 6]).contains("one station"));
        assert!(reason(|r| r.interfaces[0].hardware_address = vec![0; 6]).contains("one station"));
        assert!(reason(|r| r.interfaces[0].hardware_address = vec![0; 7]).contains("one station"));
        assert!(reason(|r| r.interfaces[0].mtu = 67).contains("MTU is 67"));
        assert!(reason(|r| r.interfaces[0].mtu = 65536).contains("MTU"));
        for (ip, length) in [(&[1; 4][..], 33), (&[1; 16], 129), (&[1; 5], 8), (&[], 0), (&[1; 4], u32::MAX)]
        {
            let text = reason(|r| r.interfaces[0].addresses = vec![prefix(ip, length)]);
            assert!(text.contains("\"eth0\": one of its addresses"), "{text}");
        }
        assert!(reason(|r| r.interfaces.push(interface("eth0", 1))).contains("two interfaces \"eth0\""));
        assert!(reason(|r| r.interfaces.push(interface("eth1", 0))).contains("02:6d:61:79:75:00"));
    }

    #[test]
    fn routes_are_checked() {
        let with = |change: &dyn Fn(&mut sandbox::Route)| {
            let mut route = route(&[0; 4]);
            change(&mut route);
            reason(|r| r.routes.push(route))
        };

        assert!(with(&|r| r.destination = None.into()).contains("destination"));
        assert!(with(&|r| r.destination = Some(prefix(&[0; 4], 33)).into()).contains("destination"));
        assert!(with(&|r| r.gateway = vec![1; 3]).contains("gateway is no address"));
        assert!(with(&|r| r.preferred_source = vec![1; 16]).contains("other family"));
        assert!(with(&|r| r.interface = "eth1".into()).contains("no interface \"eth1\""));
        assert!(with(&|r| r.interface = String::new()).contains("it has no interface"));
        assert!(with(&|r| r.table = 255).contains("table"));
        assert!(with(&|r| r.kind = 2).contains("kind"));
        assert!(with(&|r| r.kind = 257).contains("kind is above"));
        assert!(with(&|r| r.scope = 256).contains("scope"));
        assert!(with(&|r| r.protocol = 256).contains("protocol"));
        let mut other_family = route(&[0; 16]);
        other_family.gateway = vec![1; 4];
        assert!(reason(|r| r.routes.push(other_family)).contains("gateway is of the other family"));
    }

    #[test]
    fn neighbours_are_checked() {
        let neighbour = |interface: &str, ip: &[u8], address: &[u8]| sandbox::Neighbour {
            interface: interface.into(),
            ip: ip.into(),
            hardware_address: address.into(),
            ..sandbox::Neighbour::default()
        };

        assert!(reason(|r| r.neighbours = vec![neighbour("eth0", &[1; 3], &[2; 6])]).contains("address"));
        assert!(reason(|r| r.neighbours = vec![neighbour("eth0", &[1; 4], &[])]).contains("six bytes"));
        assert!(reason(|r| r.neighbours = vec![neighbour("lo", &[1; 4], &[2; 6])]).contains("no interface"));
    }

    #[test]
    fn numbers_are_bounded() {
        assert!(reason(|r| r.interfaces = vec![interface("a", 0); 9]).contains("too many interfaces"));
        assert!(reason(|r| r.interfaces[0].addresses = vec![prefix(&[1; 4], 8); 257]).contains("too many"));
        assert!(reason(|r| r.routes = vec![route(&[0; 4]); 4097]).contains("too many routes"));
        assert!(reason(|r| r.neighbours = vec![sandbox::Neighbour::default(); 4097]).contains("too many"));
    }

    #[test]
    fn routes_without_a_gateway_come_first_and_keep_their_order() {
        let mut request = request();
        for (last, gateway) in [(1, true), (2, false), (3, true), (4, false)] {
            let mut route = route(&[10, 0, 0, last]);
            route.gateway = if gateway { vec![10, 0, 0, 1] } else { vec![] };
            request.routes.push(route);
        }

        let plan = Plan::of(&request).unwrap();

        let order: Vec<String> = plan.routes.iter().map(|route| route.destination.ip.to_string()).collect();
        assert_eq!(order, ["10.0.0.2", "10.0.0.4", "10.0.0.1", "10.0.0.3"]);
        assert_eq!(plan.routes[2].to_string(), "route to 10.0.0.1/0 via 10.0.0.1 dev eth0 table 254");
    }
}
