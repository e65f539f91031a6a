//! The guest's network: its interfaces, addresses, routes and neighbours as the request has them, which are the pod's as CNI or
//! docker made them on the host.

mod netlink;
mod plan;
mod slots;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use mayu_agent_api::sandbox::ConfigureNetworkRequest;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteType};

use self::netlink::{Link, Netlink};
use self::plan::{HardwareAddress, Interface, LOOPBACK, Plan};
pub use self::slots::{Slots, VirtioSlots};
use crate::error::{Error, Result};

/// The number of the loopback interface in every network namespace: `LOOPBACK_IFINDEX` of the kernel's include/net/flow.h.
const LOOPBACK_INDEX: u32 = 1;
/// Where each interface has its IPv6 parameters.
const IPV6_DIRECTORY: &str = "/proc/sys/net/ipv6/conf";
/// Those that every interface gets.
///
/// What the network announces does not count: the request holds all the addresses and routes that the pod was given. A pod under
/// runc does not listen either, since any other pod on its bridge could announce itself as its router (CVE-2020-10749, for
/// which the CNI plugins turned `accept_ra` off, and CVE-2020-13401, for which docker did).
const IPV6_PARAMETERS: [(&str, &str); 3] = [
    ("accept_ra", "0"),
    ("autoconf", "0"),
    // IN6_ADDR_GEN_MODE_NONE: the link-local address, too, is the request's.
    ("addr_gen_mode", "1"),
];

/// The network of the guest.
pub struct Network<S> {
    slots: Mutex<S>,
}

impl<S: Slots> Network<S> {
    /// A network of these slots.
    pub fn new(slots: S) -> Self {
        Self { slots: Mutex::new(slots) }
    }

    /// Makes the network what the request says, whatever it was. Blocks for as long as the kernel takes, which for a slot that
    /// is taken out of sight is some milliseconds.
    ///
    /// # Errors
    ///
    /// `InvalidRequest` or `TooMany` before anything is changed; `Network` with the step that the kernel refused, after which
    /// what came before it is done, and another request starts anew.
    pub fn configure(&self, request: &ConfigureNetworkRequest) -> Result<()> {
        let plan = Plan::of(request)?;
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(Error::io("start a runtime for the network"))?;
        runtime.block_on(async {
            let netlink = Netlink::connect().map_err(Error::io("connect to the kernel's network"))?;
            configure(&netlink, &mut *slots, &plan).await
        })
    }
}

async fn configure(netlink: &Netlink, slots: &mut impl Slots, plan: &Plan) -> Result<()> {
    let taken = take_slots(netlink, slots, plan).await?;
    clear(netlink, &taken).await?;
    rename(netlink, &taken).await?;
    for (interface, link) in &taken {
        set_up(netlink, interface, link.index).await?;
    }
    let index = |name: &str| {
        let own = taken.iter().find(|(interface, _)| interface.name == name);
        own.map(|(_, link)| link.index).or((name == LOOPBACK).then_some(LOOPBACK_INDEX))
    };
    for route in &plan.routes {
        let result = netlink.add_route(route.interface.as_deref().and_then(index), route).await;
        result.map_err(failed(|| format!("add the {route}")))?;
    }
    for neighbour in &plan.neighbours {
        // The plan has checked that it is on one of its own interfaces.
        let Some(index) = index(&neighbour.interface) else { continue };
        let result = netlink.add_neighbour(index, neighbour).await;
        result.map_err(failed(|| format!("add the {neighbour}")))?;
    }
    Ok(())
}

/// The links that become the plan's interfaces. Those of all other slots are taken out of sight.
async fn take_slots<'a>(
    netlink: &Netlink,
    slots: &mut impl Slots,
    plan: &'a Plan,
) -> Result<Vec<(&'a Interface, Link)>> {
    let mut present = slot_links(netlink, slots).await?;
    let missing = |present: &[(HardwareAddress, Link)]| {
        let is_missing = |interface: &&Interface| !present.iter().any(|(slot, _)| *slot == interface.slot);
        plan.interfaces.iter().filter(is_missing).collect::<Vec<_>>()
    };
    let mut shown = false;
    for interface in missing(&present) {
        shown |= slots.show(interface.slot)?;
    }
    if shown {
        present = slot_links(netlink, slots).await?;
    }
    if let Some(Interface { name, slot, .. }) = missing(&present).first() {
        return Err(Error::InvalidRequest(format!(
            "interface {name:?}: the guest has no network slot {slot}"
        )));
    }
    let mut taken = Vec::new();
    for (slot, link) in present {
        match plan.interfaces.iter().find(|interface| interface.slot == slot) {
            Some(interface) => taken.push((interface, link)),
            None => slots.hide(slot, &link)?,
        }
    }
    Ok(taken)
}

async fn slot_links(netlink: &Netlink, slots: &impl Slots) -> Result<Vec<(HardwareAddress, Link)>> {
    let links = netlink.links().await.map_err(failed(|| "list the interfaces".into()))?;
    Ok(links.into_iter().filter_map(|link| Some((slots.slot(&link)?, link))).collect())
}

/// Takes down the interfaces, with which their routes and neighbours go, and removes their addresses and what is left of the
/// routes.
async fn clear(netlink: &Netlink, taken: &[(&Interface, Link)]) -> Result<()> {
    for (interface, link) in taken {
        let down = netlink.change_link(link.index, |link| link.down()).await;
        down.map_err(failed(|| format!("take interface {:?} down", interface.name)))?;
    }
    let addresses = netlink.addresses().await.map_err(failed(|| "list the addresses".into()))?;
    let is_taken =
        |address: &AddressMessage| taken.iter().any(|(_, link)| link.index == address.header.index);
    for address in addresses.into_iter().filter(is_taken) {
        netlink.remove_address(address).await.map_err(failed(|| "remove an address".into()))?;
    }
    let routes = netlink.routes().await.map_err(failed(|| "list the routes".into()))?;
    for route in routes.into_iter().filter(is_left_over) {
        netlink.remove_route(route).await.map_err(failed(|| "remove a route".into()))?;
    }
    Ok(())
}

/// Whether a route has outlived the interfaces of the request that made it, for it was through none of them, and is not the
/// kernel's own. Routes through what containers made themselves are theirs.
fn is_left_over(route: &RouteMessage) -> bool {
    let through_loopback = || route.attributes.contains(&RouteAttribute::Oif(LOOPBACK_INDEX));
    let of_request = match route.header.kind {
        RouteType::Unicast => through_loopback(),
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw => true,
        _ => false,
    };
    of_request && route.header.protocol != RouteProtocol::Kernel
}

/// Gives the interfaces their names, by way of names that nobody has where one has another's.
async fn rename(netlink: &Netlink, taken: &[(&Interface, Link)]) -> Result<()> {
    let renamed = || taken.iter().filter(|(interface, link)| interface.name != link.name);
    let temporary = |link: &Link| format!("mayu.{}", link.index);
    if renamed().count() > 1 {
        for (interface, link) in renamed() {
            let result = netlink.change_link(link.index, |change| change.name(temporary(link))).await;
            result.map_err(failed(|| format!("rename what becomes interface {:?}", interface.name)))?;
        }
    }
    for (interface, link) in renamed() {
        let result = netlink.change_link(link.index, |change| change.name(&interface.name)).await;
        result.map_err(failed(|| format!("name interface {:?}", interface.name)))?;
    }
    Ok(())
}

/// Sets up one interface that is down and has its name already.
async fn set_up(netlink: &Netlink, interface: &Interface, index: u32) -> Result<()> {
    let Interface { name, hardware_address, mtu, no_arp, .. } = interface;
    let address = hardware_address.0.to_vec();
    let result = netlink.change_link(index, |link| link.address(address)).await;
    result.map_err(failed(|| format!("give interface {name:?} the hardware address {hardware_address}")))?;
    let result = netlink.change_link(index, |link| link.mtu(*mtu)).await;
    result.map_err(failed(|| format!("set the MTU of interface {name:?} to {mtu}")))?;
    let parameters = Path::new(IPV6_DIRECTORY).join(name);
    // A kernel without IPv6 has none of them.
    if parameters.exists() {
        for (parameter, value) in IPV6_PARAMETERS {
            let path = parameters.join(parameter);
            fs::write(&path, value).map_err(Error::file("set the kernel parameter", path))?;
        }
    }
    let result = netlink.change_link(index, |link| link.arp(!no_arp).up()).await;
    result.map_err(failed(|| format!("bring interface {name:?} up")))?;
    for prefix in &interface.addresses {
        let result = netlink.add_address(index, *prefix).await;
        result.map_err(failed(|| format!("give interface {name:?} the address {prefix}")))?;
    }
    Ok(())
}

fn failed(step: impl FnOnce() -> String) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Network { step: step(), source }
}
