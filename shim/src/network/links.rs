//! The interfaces that a guest gets.

use mayu_vmm_api::MAX_NET_SLOTS;
use rtnetlink::packet_route::link::{
    InfoData, InfoIpVlan, InfoKind, IpVlanMode, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType,
    LinkMessage,
};
use slog::info;

use super::namespace::Inside;
use super::tap;
use crate::Result;

/// The most interfaces that a namespace may have, of whatever kind.
pub(super) const MAX_LINKS: usize = 1024;

/// The loopback interface's index in every namespace (`LOOPBACK_IFINDEX`, net/flow.h).
pub(super) const LOOPBACK: u32 = 1;

/// What a virtio network device takes (`MAX_MTU`, drivers/net/virtio_net.c).
const MAX_MTU: u32 = 65535;

/// A hardware address (`ETH_ALEN`).
pub(super) type HardwareAddress = [u8; 6];

/// One interface of the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub index: u32,
    pub name: String,
    /// None where it has none of its own: netkit in mode l3 hands over Ethernet frames that are addressed to nobody.
    pub address: Option<HardwareAddress>,
    pub mtu: u32,
    pub no_arp: bool,
}

/// What becomes of an interface.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Mirror,
    /// The guest does without it, and nothing is lost.
    Pass,
    /// The guest does without it, for a reason that its owner may want to know.
    LeaveOut(&'static str),
    Refuse(String),
}

/// The pod's interfaces, in the order of their index.
///
/// # Errors
/// There are more than a machine has slots for, or one of a kind that cannot be redirected.
pub(super) async fn read(inside: &Inside) -> Result<Vec<Link>> {
    let dump = inside.netlink.link().get().execute();
    let messages = inside.dump("interfaces", MAX_LINKS, dump, Some).await?;
    let mut links = Vec::new();
    for message in &messages {
        let name = name(message);
        match judge(message) {
            Verdict::Mirror => links.push(link(message)),
            Verdict::Pass => {}
            Verdict::LeaveOut(reason) => {
                info!(inside.log, "an interface stays outside the guest"; "interface" => name, "reason" => reason);
            }
            Verdict::Refuse(reason) => return Err(inside.unusable(format!("interface {name}: {reason}"))),
        }
    }
    links.sort_by_key(|link| link.index);
    if let Some((upper, lower)) = messages.iter().find_map(|message| stacked(message, &links)) {
        let reason = format!("interface {upper} is made on {lower}, whose frames all go to the guest");
        return Err(inside.unusable(reason));
    }
    if links.len() > usize::from(MAX_NET_SLOTS) {
        let names: Vec<_> = links.iter().map(|link| link.name.as_str()).collect();
        let reason = format!(
            "it has {} interfaces ({}), and a machine has slots for {MAX_NET_SLOTS}",
            links.len(),
            names.join(", ")
        );
        return Err(inside.unusable(reason));
    }
    Ok(links)
}

fn judge(message: &LinkMessage) -> Verdict {
    let flags = message.header.flags;
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    if flags.contains(LinkFlags::Loopback) || tap::is_ours(name(message), kind(message)) {
        return Verdict::Pass;
    }
    if !flags.contains(LinkFlags::Up) {
        // Tunnel modules put an interface into every namespace that is down until somebody wants it.
        return if ethernet { Verdict::LeaveOut("it is down") } else { Verdict::Pass };
    }
    if !ethernet {
        let kind = kind(message).map_or_else(|| "unknown".to_string(), InfoKind::to_string);
        let layer = message.header.link_layer_type;
        return Verdict::Refuse(format!(
            "a guest cannot have one of type {layer} (kind {kind}): only Ethernet frames can be redirected to it"
        ));
    }
    if attribute(message, |attribute| matches!(attribute, LinkAttribute::Controller(_)).then_some(()))
        .is_some()
    {
        return Verdict::LeaveOut("it belongs to another interface, such as a bond or a bridge");
    }
    if ipvlan_mode(message) == Some(IpVlanMode::L3S) {
        // Its packets change devices in the IP stack (ipvlan_l3s.c), behind the ingress hook.
        let reason = "ipvlan in mode l3s hands over no frames that could be redirected; use mode l2 or l3";
        return Verdict::Refuse(reason.into());
    }
    Verdict::Mirror
}

fn link(message: &LinkMessage) -> Link {
    let address = attribute(message, |attribute| match attribute {
        LinkAttribute::Address(address) => HardwareAddress::try_from(address.as_slice()).ok(),
        _ => None,
    });
    let address = address.filter(|address| *address != HardwareAddress::default());
    let mtu = attribute(message, |attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    Link {
        index: message.header.index,
        name: name(message).into(),
        address,
        mtu: mtu.unwrap_or_default().min(MAX_MTU),
        no_arp: message.header.flags.contains(LinkFlags::Noarp) || address.is_none(),
    }
}

/// An interface of `links` that is made on another one of them, such as a VLAN, and that other one.
fn stacked<'a>(message: &LinkMessage, links: &'a [Link]) -> Option<(&'a str, &'a str)> {
    let elsewhere =
        |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::LinkNetNsId(_)).then_some(());
    // The two ends of a veth pair name each other.
    if kind(message) == Some(&InfoKind::Veth) || attribute(message, elsewhere).is_some() {
        return None;
    }
    let lower = attribute(message, |attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    })?;
    let upper = links.iter().find(|link| link.index == message.header.index)?;
    let lower = links.iter().find(|link| link.index == lower && link.index != upper.index)?;
    Some((&upper.name, &lower.name))
}

/// The name, as far as the kernel told it.
pub(super) fn name(message: &LinkMessage) -> &str {
    let name = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    });
    name.unwrap_or_default()
}

/// `IFLA_INFO_KIND`; physical interfaces have none.
pub(super) fn kind(message: &LinkMessage) -> Option<&InfoKind> {
    infos(message).find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    })
}

fn ipvlan_mode(message: &LinkMessage) -> Option<IpVlanMode> {
    let data = infos(message).find_map(|info| match info {
        LinkInfo::Data(InfoData::IpVlan(data)) => Some(data),
        _ => None,
    })?;
    data.iter().find_map(|info| match info {
        InfoIpVlan::Mode(mode) => Some(*mode),
        _ => None,
    })
}

fn infos(message: &LinkMessage) -> impl Iterator<Item = &LinkInfo> {
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos.as_slice()),
        _ => None,
    });
    infos.unwrap_or_default().iter()
}

fn attribute<T>(message: &LinkMessage, pick: impl Fn(&LinkAttribute) -> Option<T>) -> Option<T> {
    message.attributes.iter().find_map(pick)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(name: &str, attributes: impl IntoIterator<Item = LinkAttribute>) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = 2;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.header.flags = LinkFlags::Up;
        message.attributes = vec![LinkAttribute::IfName(name.into())];
        message.attributes.extend(attributes);
        message
    }

    fn of_kind(kind: InfoKind) -> LinkAttribute {
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])
    }

    fn ipvlan(mode: IpVlanMode) -> LinkMessage {
        let data = InfoData::IpVlan(vec![InfoIpVlan::Mode(mode)]);
        message(
            "eth0",
            [LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::IpVlan), LinkInfo::Data(data)])],
        )
    }

    #[test]
    fn ethernet_interfaces_that_are_up_are_mirrored() {
        assert_eq!(judge(&message("eth0", [of_kind(InfoKind::Veth)])), Verdict::Mirror);
        assert_eq!(judge(&message("ens5", [])), Verdict::Mirror);
        assert_eq!(judge(&ipvlan(IpVlanMode::L2)), Verdict::Mirror);
        assert_eq!(judge(&ipvlan(IpVlanMode::L3)), Verdict::Mirror);
    }

    #[test]
    fn what_is_down_or_belongs_to_another_is_left_out() {
        let mut down = message("eth0", []);
        down.header.flags = LinkFlags::empty();
        assert!(matches!(judge(&down), Verdict::LeaveOut(_)));
        assert!(matches!(judge(&message("eth1", [LinkAttribute::Controller(7)])), Verdict::LeaveOut(_)));
        down.header.link_layer_type = LinkLayerType::Tunnel;
        assert_eq!(judge(&down), Verdict::Pass);
    }

    #[test]
    fn loopback_and_our_own_devices_are_passed_over() {
        let mut loopback = message("lo", []);
        loopback.header.flags |= LinkFlags::Loopback;
        loopback.header.link_layer_type = LinkLayerType::Loopback;
        assert_eq!(judge(&loopback), Verdict::Pass);
        assert_eq!(judge(&message("mayu0", [of_kind(InfoKind::Tun)])), Verdict::Pass);
    }

    #[test]
    fn what_cannot_be_redirected_is_refused_with_its_type() {
        let mut wireguard = message("wg0", [of_kind(InfoKind::Wireguard)]);
        wireguard.header.link_layer_type = LinkLayerType::None;
        let Verdict::Refuse(reason) = judge(&wireguard) else { panic!() };
        assert!(reason.contains("of type NONE (kind wireguard)"), "{reason}");
        let Verdict::Refuse(reason) = judge(&ipvlan(IpVlanMode::L3S)) else { panic!() };
        assert!(reason.contains("use mode l2 or l3"), "{reason}");
    }

    #[test]
    fn an_interface_without_an_address_resolves_none() {
        let netkit = link(&message("eth0", [LinkAttribute::Address(vec![0; 6])]));
        assert_eq!((netkit.address, netkit.no_arp), (None, true));
        let veth = link(&message("eth0", [LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1])]));
        assert_eq!((veth.address, veth.no_arp), (Some([2, 0, 0, 0, 0, 1]), false));
    }

    #[test]
    fn an_interface_on_another_one_of_the_pod_is_found() {
        let lower = link(&message("eth0", []));
        let upper = |attributes: Vec<LinkAttribute>| {
            let mut upper = message("eth0.5", attributes);
            upper.header.index = 3;
            upper
        };
        let vlan = upper(vec![LinkAttribute::Link(2), of_kind(InfoKind::Vlan)]);
        let links = [lower, link(&vlan)];
        assert_eq!(stacked(&vlan, &links), Some(("eth0.5", "eth0")));
        let elsewhere = [LinkAttribute::Link(2), of_kind(InfoKind::Vlan), LinkAttribute::LinkNetNsId(0)];
        assert_eq!(stacked(&upper(elsewhere.into()), &links), None);
        assert_eq!(stacked(&upper(vec![LinkAttribute::Link(2), of_kind(InfoKind::Veth)]), &links), None);
    }
}
