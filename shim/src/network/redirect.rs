//! tc rules that send every frame which arrives at one interface out of another (tc-mirred(8), tc-u32(8)).
//!
//! The classifier is u32 with no key, which matches everything. Kata Containers asks the same of a host; matchall, made
//! for this, is an option that smaller kernels leave out.

use futures::StreamExt;
use nix::errno::Errno;
use nix::libc;
use rtnetlink::packet_core::{
    DefaultNla, Emitable, NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcU32Selector, TcU32SelectorFlags,
};
use slog::warn;

use super::links::HardwareAddress;
use super::namespace::{Inside, io_error, is_one_of};
use crate::Result;

/// The priority of the filters here: the lowest, so that what a CNI plugin has put there comes first.
const PRIORITY: u16 = u16::MAX;

/// Frames of every protocol, in network order (linux/if_ether.h).
const PROTOCOL: u16 = (libc::ETH_P_ALL as u16).to_be();

/// The most filters of an interface that are looked at.
const MAX_FILTERS: usize = 1024;

/// How the kernel answers where it has no such discipline, classifier or action.
const MISSING: [Errno; 2] = [Errno::ENOENT, Errno::EOPNOTSUPP];

/// `TCA_SKBMOD_PARMS`, `TCA_SKBMOD_DMAC` and the bytes of `struct tc_skbmod` (linux/tc_act/tc_skbmod.h): `tc_gen`,
/// padding, and 64 flags, of which the attributes set what is needed.
const SKBMOD_PARAMETERS: u16 = 2;
const SKBMOD_DESTINATION: u16 = 3;
const SKBMOD_BYTES: usize = 32;

const NO_INGRESS: &str =
    "; is the kernel module sch_ingress there (CONFIG_NET_SCHED, CONFIG_NET_SCH_INGRESS)?";
const NO_FILTER: &str = "; are the kernel modules cls_u32 and act_mirred there (CONFIG_NET_CLS_U32, \
                         CONFIG_NET_ACT_MIRRED)?";
const NO_FILTER_OR_SKBMOD: &str = "; are the kernel modules cls_u32, act_mirred and act_skbmod there \
                                   (CONFIG_NET_CLS_U32, CONFIG_NET_ACT_MIRRED, CONFIG_NET_ACT_SKBMOD)? An interface \
                                   with a hardware address, such as netkit in mode l2, does without the last";

/// One end of a redirection.
#[derive(Clone, Debug)]
pub(super) struct Port {
    pub index: u32,
    pub name: String,
}

/// Sends every frame that arrives at `from` out of `to`, addressed to `destination` where there is one. What is there
/// already stays and comes first.
pub(super) async fn add(
    inside: &Inside,
    from: &Port,
    to: &Port,
    destination: Option<HardwareAddress>,
) -> Result<()> {
    match inside.netlink.qdisc().add(signed(from)).ingress().execute().await.map_err(io_error) {
        Ok(()) => {}
        // ingress, or clsact, which takes the same filters.
        Err(error) if is_one_of(&[Errno::EEXIST], &error) => remove(inside, from).await?,
        Err(error) => {
            let hint = if is_one_of(&MISSING, &error) { NO_INGRESS } else { "" };
            return Err(inside.refused("add the ingress discipline to", &from.name, error, hint));
        }
    }
    let options =
        [TcFilterU32Option::Selector(everything()), TcFilterU32Option::Action(actions(to, destination))];
    let filter = inside.netlink.traffic_filter(signed(from)).add();
    let filter = filter.ingress().priority(PRIORITY).protocol(PROTOCOL).u32(&options);
    let operation = "redirect the frames of";
    let filter = filter.map_err(inside.failed(operation, &from.name))?;
    filter.execute().await.map_err(io_error).map_err(|error| {
        let hint = match destination {
            _ if !is_one_of(&MISSING, &error) => "",
            None => NO_FILTER,
            Some(_) => NO_FILTER_OR_SKBMOD,
        };
        inside.refused(operation, &from.name, error, hint)
    })
}

/// Takes the filter of an earlier call away from `port`, and tells of filters that others have put there. Fine where
/// there is none.
pub(super) async fn remove(inside: &Inside, port: &Port) -> Result<()> {
    let dump = inside.netlink.traffic_filter(signed(port)).get().ingress().execute();
    let filters = inside.dump("filters", MAX_FILTERS, dump, |message| Some(is_ours(&message))).await?;
    if filters.contains(&false) {
        warn!(inside.log, "an interface has tc filters, which come before the redirection to the guest";
            "interface" => &port.name);
    }
    if !filters.contains(&true) {
        return Ok(());
    }
    let mut message = TcMessage::with_index(signed(port));
    message.header.parent = TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS };
    message.header.info = info();
    message.attributes.push(TcAttribute::Kind(TcFilterU32::KIND.into()));
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::DelTrafficFilter(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let operation = "remove the old redirection of";
    let mut answers =
        inside.netlink.clone().request(request).map_err(inside.failed(operation, &port.name))?;
    while let Some(answer) = answers.next().await {
        match answer.payload {
            NetlinkPayload::Error(error) if error.code.is_some() => {
                return Err(inside.refused(operation, &port.name, error.to_io(), ""));
            }
            _ => {}
        }
    }
    Ok(())
}

fn is_ours(message: &TcMessage) -> bool {
    let kind = TcAttribute::Kind(TcFilterU32::KIND.into());
    message.header.info == info() && message.attributes.contains(&kind)
}

/// `tcm_info` of the filters here: priority and protocol.
fn info() -> u32 {
    TcHandle { major: PRIORITY, minor: PROTOCOL }.into()
}

/// A selector without a key, at which the search ends.
fn everything() -> TcU32Selector {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector
}

fn actions(to: &Port, destination: Option<HardwareAddress>) -> Vec<TcAction> {
    let mut actions = Vec::new();
    if let Some(address) = destination {
        let mut parameters = generic(TcActionType::Pipe);
        parameters.resize(SKBMOD_BYTES, 0);
        let options = vec![
            TcActionOption::Other(DefaultNla::new(SKBMOD_PARAMETERS, parameters)),
            TcActionOption::Other(DefaultNla::new(SKBMOD_DESTINATION, address.into())),
        ];
        actions.push(action("skbmod", options));
    }
    let mut mirred = TcMirror::default();
    mirred.generic.action = TcActionType::Stolen;
    mirred.eaction = TcMirrorActionType::EgressRedir;
    mirred.ifindex = to.index;
    let options = vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirred))];
    actions.push(action(TcActionMirror::KIND, options));
    for (number, action) in (1..).zip(&mut actions) {
        action.tab = number;
    }
    actions
}

fn action(kind: &str, options: Vec<TcActionOption>) -> TcAction {
    let mut action = TcAction::default();
    action.attributes = vec![TcActionAttribute::Kind(kind.into()), TcActionAttribute::Options(options)];
    action
}

/// `tc_gen` with what happens next.
fn generic(next: TcActionType) -> Vec<u8> {
    let mut generic = TcActionGeneric::default();
    generic.action = next;
    let mut bytes = vec![0; generic.buffer_len()];
    generic.emit(&mut bytes);
    bytes
}

fn signed(port: &Port) -> i32 {
    port.index.cast_signed()
}
