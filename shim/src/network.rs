//! The host side of a pod's network.
//!
//! CNI, or docker, has made interfaces in the pod's network namespace, as for any container. Here each gets a TAP
//! device beside it, tc redirects every frame from one to the other, and the guest gets an interface with the same
//! name, hardware address, addresses, routes and neighbours. To everyone outside, the guest is the pod; the addresses
//! in the namespace stay where they are, but its IP stack sees no frame any more.
//!
//! ```text
//!      host             the pod's network namespace                 VMM                guest
//!  ┌───────────┐   ┌──────────────────────────────────┐   ┌───────────────────┐   ┌────────────┐
//!  │ bridge,   │   │  eth0                     mayu0  │   │  queues of the    │   │            │
//!  │ routes, … ├───┤  veth, macvlan, …           TAP  ├───┤  virtio-net       ├───┤    eth0    │
//!  └───────────┘   │   ingress ──── mirred ───▶ out   │   │  device in slot 0 │   └────────────┘
//!                  │   out ◀─────── mirred ── ingress │   └───────────────────┘
//!                  │                                  │
//!                  │  lo ── SK_LOOKUP ──▶ shim ─ ─ ─ ─│─ ─ ─ vsock ─ ─ ─▶ agent ──▶ the guest's own lo
//!                  └──────────────────────────────────┘
//! ```
//!
//! * A frame for the pod arrives at the ingress hook of `eth0`, before any protocol. The filter there matches
//!   everything and sends it out of `mayu0`, that is, to the descriptor that the VMM reads (`redirect`). A frame of
//!   the guest is written to that descriptor, arrives at the ingress hook of `mayu0`, and is sent out of `eth0`.
//! * Segmentation and checksum offloads need no care here: the frame goes out through `dev_queue_xmit()`, which cuts
//!   and completes it in software where the TAP has not been told (TUNSETOFFLOAD) that its reader can.
//! * The only traffic that the namespace's own stack still sees is that of its loopback interface, where containerd
//!   dials for `kubectl port-forward` ([`forward`]).
//!
//! The guest does without policy rules, routes over interfaces that are down, and what router advertisements brought, to
//! which it does not listen; the pod's log says so. netfilter rules inside the namespace see no frame. A macvlan
//! interface passes on no multicast group that only a process of the guest has joined.

pub mod forward;

mod bpf;
mod links;
mod lookup;
mod mirror;
mod namespace;
mod redirect;
mod routes;
mod sys;
mod tap;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use forward::PortForwarding;
pub use mirror::Network;
pub use namespace::NetworkNamespace;
