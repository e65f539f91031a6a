//! Network namespaces to try the network's code in, and what the kernel then says. Each slot is one end of a veth pair. What stands
//! in for the machine is only which interface is which slot, and how a slot disappears: its pair is removed.

use std::collections::HashMap;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;

use futures::TryStreamExt;
use mayu_agent_api::sandbox::{self, ConfigureNetworkRequest};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourState};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteMetric, RouteType};
use rtnetlink::{Handle, LinkUnspec, LinkVeth};

use super::netlink::Link;
use super::plan::{HardwareAddress, LOOPBACK};
use super::{LOOPBACK_INDEX, Network, Slots};
use crate::error::Result;

/// Runs `test` in a new network namespace whose loopback is up.
pub fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let tested = thread::spawn(move || {
        if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
            eprintln!("SKIPPED: needs to make a network namespace: {errno}");
            return;
        }
        kernel(async |handle| {
            let lo = LinkUnspec::new_with_index(LOOPBACK_INDEX).up().build();
            handle.link().change(lo).execute().await.unwrap();
        });
        test();
    });
    if let Err(panic) = tested.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `work` with a connection to the kernel, on a thread of its own, which shares the caller's network namespace.
pub fn kernel<T: Send>(work: impl AsyncFnOnce(&Handle) -> T + Send) -> T {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            tokio::spawn(connection);
            work(&handle).await
        })
    };
    thread::scope(|scope| scope.spawn(run).join()).unwrap()
}

pub fn links() -> Vec<LinkMessage> {
    kernel(async |handle| handle.link().get().execute().try_collect().await.unwrap())
}

pub fn name_of(link: &LinkMessage) -> String {
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    });
    name.unwrap()
}

pub fn names() -> HashMap<u32, String> {
    links().iter().map(|link| (link.header.index, name_of(link))).collect()
}

pub fn index_of(name: &str) -> u32 {
    names().into_iter().find(|(_, known)| known == name).unwrap().0
}

pub fn slot(number: u8) -> HardwareAddress {
    HardwareAddress([2, b'm', b'a', b'y', b'u', number])
}

/// Slots of veth pairs: the name of the other end is `peer` and the slot's number.
#[derive(Default)]
pub struct VethSlots {
    slots: HashMap<u32, HardwareAddress>,
    hidden: Vec<HardwareAddress>,
}

impl VethSlots {
    /// Slots whose interfaces have these names.
    pub fn new(names: &[&str]) -> Self {
        let mut slots = Self::default();
        for (number, name) in (0..).zip(names) {
            slots.add(slot(number), name);
        }
        slots
    }

    fn add(&mut self, slot: HardwareAddress, name: &str) {
        let peer = format!("peer{}", slot.0[5]);
        kernel(async |handle| {
            let pair = LinkVeth::new(name, &peer).address(slot.0.to_vec()).build();
            handle.link().add(pair).execute().await.unwrap();
            let peer = LinkUnspec::new_with_name(&peer).up().build();
            handle.link().change(peer).execute().await.unwrap();
        });
        self.slots.insert(index_of(name), slot);
    }
}

impl Slots for VethSlots {
    fn slot(&self, link: &Link) -> Option<HardwareAddress> {
        self.slots.get(&link.index).copied()
    }

    fn hide(&mut self, slot: HardwareAddress, link: &Link) -> Result<()> {
        kernel(async |handle| handle.link().del(link.index).execute().await.unwrap());
        self.slots.remove(&link.index);
        self.hidden.push(slot);
        Ok(())
    }

    fn show(&mut self, slot: HardwareAddress) -> Result<bool> {
        let Some(position) = self.hidden.iter().position(|hidden| *hidden == slot) else { return Ok(false) };
        self.hidden.remove(position);
        self.add(slot, "shown");
        Ok(true)
    }
}

pub fn ip(text: &str) -> Vec<u8> {
    match text.parse().unwrap() {
        IpAddr::V4(ip) => ip.octets().into(),
        IpAddr::V6(ip) => ip.octets().into(),
    }
}

pub fn prefix(text: &str) -> sandbox::IpPrefix {
    let (address, length) = text.split_once('/').unwrap();
    sandbox::IpPrefix { ip: ip(address), length: length.parse().unwrap(), ..sandbox::IpPrefix::default() }
}

/// An interface of slot `number`.
pub fn interface(number: u8, name: &str, addresses: &[&str]) -> sandbox::Interface {
    sandbox::Interface {
        slot_address: slot(number).0.into(),
        name: name.into(),
        hardware_address: mac(number).into(),
        mtu: 1400,
        addresses: addresses.iter().map(|address| prefix(address)).collect(),
        ..sandbox::Interface::default()
    }
}

/// The hardware address that the interface of slot `number` gets.
pub fn mac(number: u8) -> [u8; 6] {
    [0x0a, 0x58, 10, 0, 0, number]
}

/// A unicast route of the main table in the words of ip-route(8): "TO [via GATEWAY] dev INTERFACE".
pub fn route(text: &str) -> sandbox::Route {
    let words: Vec<&str> = text.split(' ').collect();
    let after = |word: &str| {
        let position = words.iter().position(|known| *known == word)?;
        words.get(position + 1).copied()
    };
    let gateway = after("via").map(ip).unwrap_or_default();
    let v6 = words[0].contains(':');
    sandbox::Route {
        interface: after("dev").unwrap_or_default().into(),
        destination: Some(prefix(words[0])).into(),
        scope: if gateway.is_empty() && !v6 { 253 } else { 0 },
        gateway,
        table: 254,
        kind: 1,
        protocol: 4,
        ..sandbox::Route::default()
    }
}

pub fn request(interfaces: Vec<sandbox::Interface>, routes: Vec<sandbox::Route>) -> ConfigureNetworkRequest {
    ConfigureNetworkRequest { interfaces, routes, ..ConfigureNetworkRequest::default() }
}

/// The addresses of the pod's interfaces, as "INTERFACE ADDRESS/LENGTH". All are to be used at once.
pub fn addresses() -> Vec<String> {
    let names = names();
    let messages =
        kernel(async |handle| handle.address().get().execute().try_collect::<Vec<_>>().await.unwrap());
    let mut lines = Vec::new();
    for message in messages {
        let name = &names[&message.header.index];
        if is_beside(name) {
            continue;
        }
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Address(ip) => {
                    lines.push(format!("{name} {ip}/{}", message.header.prefix_len));
                }
                AddressAttribute::Flags(flags) => {
                    let unusable = AddressFlags::Tentative | AddressFlags::Dadfailed;
                    assert!(!flags.intersects(unusable), "{message:?}");
                }
                _ => {}
            }
        }
    }
    lines.sort();
    lines
}

/// Whether an interface is none of the pod's: loopback, the other end of a slot, a container's bridge.
fn is_beside(name: &str) -> bool {
    name == LOOPBACK || name.starts_with("peer") || name == "br0"
}

/// All routes but those of the local table and of the other ends, one a line.
pub fn routes() -> Vec<String> {
    let names = names();
    let mut lines: Vec<String> = kernel(async |handle| {
        let mut lines = Vec::new();
        for family in [
            rtnetlink::RouteMessageBuilder::<Ipv4Addr>::new().build(),
            rtnetlink::RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ] {
            let found: Vec<_> = handle.route().get(family).execute().try_collect().await.unwrap();
            lines.extend(found.iter().filter_map(|message| route_line(&names, message)));
        }
        lines
    });
    lines.sort();
    lines
}

fn route_line(names: &HashMap<u32, String>, message: &RouteMessage) -> Option<String> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut to = "default".to_owned();
    let [mut via, mut dev, mut src, mut metric, mut mtu] = [const { String::new() }; 5];
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(ip) => {
                to = format!("{}/{}", plain(ip), header.destination_prefix_length);
            }
            RouteAttribute::Gateway(ip) => via = format!(" via {}", plain(ip)),
            RouteAttribute::Via(ip) => via = format!(" via {}", plain(ip)),
            RouteAttribute::Oif(index) => dev = format!(" dev {}", names[index]),
            RouteAttribute::PrefSource(ip) => src = format!(" src {}", plain(ip)),
            RouteAttribute::Priority(number) => metric = format!(" metric {number}"),
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Metrics(metrics) => {
                let size = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(size) => Some(*size),
                    _ => None,
                });
                mtu = size.map(|size| format!(" mtu {size}")).unwrap_or_default();
            }
            _ => {}
        }
    }
    let kind = match header.kind {
        RouteType::Unicast => String::new(),
        kind => format!(" {kind:?}"),
    };
    let of_table = if table == 254 { String::new() } else { format!(" table {table}") };
    let line = format!("{to}{via}{dev}{src}{metric}{mtu}{kind}{of_table}");
    let kernels_own = table == 255 || line.contains(" dev peer") || line.starts_with("::1/128");
    (!kernels_own).then_some(line)
}

/// An address out of the text of the variant that holds it.
fn plain(ip: &impl std::fmt::Debug) -> String {
    let text = format!("{ip:?}");
    text.trim_start_matches("Inet6(").trim_start_matches("Inet(").trim_end_matches(')').to_owned()
}

/// The interfaces but loopback and the other ends: name, hardware address, MTU, and whether each resolves addresses.
pub fn interfaces() -> Vec<String> {
    let mut lines = Vec::new();
    for link in links().iter().filter(|link| !is_beside(&name_of(link))) {
        let (mut mac, mut size) = (String::new(), 0);
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Address(address) => mac = HardwareAddress::read(address).unwrap().to_string(),
                LinkAttribute::Mtu(mtu) => size = *mtu,
                _ => {}
            }
        }
        let flags = link.header.flags;
        let state = if flags.contains(LinkFlags::Up) { "up" } else { "down" };
        let arp = if flags.contains(LinkFlags::Noarp) { " noarp" } else { "" };
        lines.push(format!("{} {mac} mtu {size} {state}{arp}", name_of(link)));
    }
    lines.sort();
    lines
}

/// The address that the kernel chooses for what is sent to `to`.
pub fn source_of(to: &str) -> String {
    let to: IpAddr = to.parse().unwrap();
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    socket.connect((to, 53)).map_or_else(
        |error| error.raw_os_error().unwrap().to_string(),
        |()| socket.local_addr().unwrap().ip().to_string(),
    )
}

/// A thread in a namespace that plays the node, and what makes it answer one packet with its sender's address. The node is set up by
/// the code under test as well.
pub fn other_end() -> (File, impl FnOnce() -> SocketAddr) {
    let (namespace, theirs) = std::sync::mpsc::channel();
    let (go, ready) = std::sync::mpsc::channel::<()>();
    let (address, answer) = std::sync::mpsc::channel();
    thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        namespace.send(File::open("/proc/thread-self/ns/net").unwrap()).unwrap();
        ready.recv().unwrap();
        let mut slots = VethSlots::default();
        slots.slots.insert(index_of("peer0"), slot(1));
        let mut node =
            request(vec![interface(1, "veth0", &["192.0.2.1/32"])], vec![route("10.0.0.7/32 dev veth0")]);
        node.neighbours.push(neighbour("veth0", "10.0.0.7", mac(0)));
        Network::new(slots).configure(&node).unwrap();
        let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
        address.send(socket.local_addr().unwrap()).unwrap();
        let (_, from) = socket.recv_from(&mut [0; 64]).unwrap();
        socket.send_to(from.ip().to_string().as_bytes(), from).unwrap();
    });
    let start = move || {
        go.send(()).unwrap();
        answer.recv().unwrap()
    };
    (theirs.recv().unwrap(), start)
}

pub fn move_link(name: &str, namespace: &File) {
    let descriptor = namespace.as_raw_fd();
    kernel(async |handle| {
        let message = LinkUnspec::new_with_name(name).setns_by_fd(descriptor).build();
        handle.link().change(message).execute().await.unwrap();
    });
}

pub fn neighbour(interface: &str, address: &str, mac: [u8; 6]) -> sandbox::Neighbour {
    sandbox::Neighbour {
        interface: interface.into(),
        ip: ip(address),
        hardware_address: mac.into(),
        ..sandbox::Neighbour::default()
    }
}

/// The permanent neighbours, one a line.
pub fn neighbours() -> Vec<String> {
    let names = names();
    let all =
        kernel(async |handle| handle.neighbours().get().execute().try_collect::<Vec<_>>().await.unwrap());
    let mut lines = Vec::new();
    for message in all.iter().filter(|message| message.header.state == NeighbourState::Permanent) {
        let (mut address, mut mac) = (String::new(), String::new());
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(ip) => address = plain(ip),
                NeighbourAttribute::LinkLayerAddress(bytes) => {
                    mac = HardwareAddress::read(bytes).unwrap().to_string();
                }
                _ => {}
            }
        }
        lines.push(format!("{} {address} {mac}", names[&message.header.ifindex]));
    }
    lines.sort();
    lines
}

pub fn is_bridge(link: &LinkMessage) -> bool {
    let info = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(info) => Some(info),
        _ => None,
    });
    let bridge = rtnetlink::packet_route::link::LinkInfo::Kind(InfoKind::Bridge);
    info.is_some_and(|info| info.contains(&bridge))
}
