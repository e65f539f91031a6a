//! TAP devices beside the pod's interfaces.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use futures::TryStreamExt;
use nix::errno::Errno;
use nix::libc;
use rtnetlink::LinkUnspec;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkMessage,
};
use slog::info;

use super::links::{self, Link};
use super::namespace::{Inside, io_error, is_one_of};
use super::redirect::{self, Port};
use super::sys;
use crate::Result;

/// What the devices are called, before the number of their slot.
const PREFIX: &str = "mayu";

/// The device that makes TAP devices.
const TUN: &str = "/dev/net/tun";

/// The largest MTU that a TAP device takes (`MAX_MTU` less `ETH_HLEN`, drivers/net/tun.c). It limits nothing that is
/// redirected to it.
const MAX_MTU: u32 = 65535 - 14;

/// Whether an interface is a TAP device of this module.
pub(super) fn is_ours(name: &str, kind: Option<&InfoKind>) -> bool {
    let slot = name.strip_prefix(PREFIX).is_some_and(|slot| slot.parse::<u8>().is_ok());
    slot && kind == Some(&InfoKind::Tun)
}

/// Makes a TAP device for each of `links` and redirects frames both ways.
pub(super) async fn connect(inside: &Inside, links: &[Link]) -> Result<Vec<OwnedFd>> {
    remove_old(inside).await?;
    let mut taps = Vec::new();
    for (slot, link) in links.iter().enumerate() {
        match add(inside, slot, link).await {
            Ok(tap) => taps.push(tap),
            Err(error) => {
                for link in &links[..=slot] {
                    // The devices go with their descriptors. Of two errors, the first is the one that tells.
                    let _ = redirect::remove(inside, &port(link)).await;
                }
                return Err(error);
            }
        }
    }
    let names: Vec<_> = links.iter().map(|link| link.name.as_str()).collect();
    info!(inside.log, "the pod's network is connected"; "interfaces" => names.join(" "));
    Ok(taps)
}

/// Frames are let through once everything is in its place.
async fn add(inside: &Inside, slot: usize, link: &Link) -> Result<OwnedFd> {
    let name = format!("{PREFIX}{slot}");
    let tap = make(inside, &name)?;
    let index = index(inside, &name).await?;
    keep_quiet(inside, index, &name).await?;
    let device = Port { index, name };
    let settle = LinkUnspec::new_with_index(index).mtu(link.mtu.min(MAX_MTU)).arp(false).build();
    set(inside, "configure", &device, settle).await?;
    // To an interface without an address, the guest's frames are addressed as the host's are: to nobody.
    let no_address = link.address.is_none();
    redirect::add(inside, &device, &port(link), no_address.then_some([0; 6])).await?;
    set(inside, "bring up", &device, LinkUnspec::new_with_index(index).up().build()).await?;
    let slot_address = no_address.then(|| mayu_vmm_api::net_slot_address(slot as u8));
    redirect::add(inside, &port(link), &device, slot_address).await?;
    Ok(tap)
}

fn port(link: &Link) -> Port {
    Port { index: link.index, name: link.name.clone() }
}

fn make(inside: &Inside, name: &str) -> Result<OwnedFd> {
    let failed = |source: io::Error| {
        let missing = is_one_of(&[Errno::ENOENT, Errno::ENODEV, Errno::ENXIO], &source);
        let hint = if missing { "; is the kernel module tun there (CONFIG_TUN)?" } else { "" };
        inside.refused("make the TAP device", name, source, hint)
    };
    let tun =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN).map_err(failed)?;
    sys::make_tap(&tun, name).map_err(|errno| failed(errno.into()))?;
    Ok(tun.into())
}

async fn index(inside: &Inside, name: &str) -> Result<u32> {
    let found = inside.netlink.link().get().match_name(name).execute().try_next().await;
    let message = found.map_err(inside.failed("find the TAP device", name))?;
    let gone = || inside.refused("find the TAP device", name, Errno::ENODEV, "");
    message.map(|message| message.header.index).ok_or_else(gone)
}

/// No IPv6 address of its own, so that it neither looks for duplicates nor for routers. IPv4 sends nothing before it
/// has an address.
pub(super) async fn keep_quiet(inside: &Inside, index: u32, name: &str) -> Result<()> {
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let attribute = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]);
    let message = LinkUnspec::new_with_index(index).append_extra_attribute(attribute).build();
    match inside.netlink.link().set(message).execute().await.map_err(io_error) {
        Ok(()) => Ok(()),
        // The host does without IPv6.
        Err(error) if is_one_of(&[Errno::EAFNOSUPPORT], &error) => Ok(()),
        Err(error) => Err(inside.refused("stop IPv6 from addressing", name, error, "")),
    }
}

async fn set(inside: &Inside, operation: &'static str, device: &Port, message: LinkMessage) -> Result<()> {
    inside.netlink.link().set(message).execute().await.map_err(inside.failed(operation, &device.name))
}

/// Removes the devices of a call that went before. Whoever still holds a descriptor of one reads and writes nothing
/// any more.
async fn remove_old(inside: &Inside) -> Result<()> {
    let dump = inside.netlink.link().get().execute();
    let ours = |message: LinkMessage| {
        let name = links::name(&message);
        is_ours(name, links::kind(&message)).then(|| (message.header.index, name.to_string()))
    };
    for (index, name) in inside.dump("interfaces", links::MAX_LINKS, dump, ours).await? {
        match inside.netlink.link().del(index).execute().await.map_err(io_error) {
            Ok(()) => {}
            // Its last descriptor has just been closed.
            Err(error) if is_one_of(&[Errno::ENODEV], &error) => {}
            Err(error) => return Err(inside.refused("remove the old TAP device", &name, error, "")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tap_devices_with_a_slots_name_are_ours() {
        let tun = Some(&InfoKind::Tun);
        assert!(is_ours("mayu0", tun) && is_ours("mayu7", tun));
        assert!(!is_ours("mayu0", Some(&InfoKind::Veth)) && !is_ours("mayu0", None));
        assert!(!is_ours("mayu", tun) && !is_ours("mayu-cni0", tun) && !is_ours("tap0", tun));
    }
}
