//! What crosses between the shim and `mayu-vmm`.
//!
//! The two processes share one `SOCK_SEQPACKET` socketpair. A packet is one JSON [`Message`], and the file
//! descriptors that belong to it travel beside it as `SCM_RIGHTS`, so the VMM never has to open a path.
//!
//! ```text
//! shim                                         mayu-vmm
//!  │ spawn, control socket on CONTROL_FD,         │
//!  │        cgroup on CGROUP_FD                   │
//!  │── Build(VmConfig) + kvm, kernel, image, … ──▶│
//!  │ ◀──────────────────── Event::Started {pid} ──│  forked into its cgroup and namespaces
//!  │                                              │  jail, build, vCPUs paused
//!  │ ◀──────────────────────────────────── Ok ────│
//!  │── Resume ───────────────────────────────────▶│  the guest runs
//!  │ ◀──── Event::VsockAccepted {port} + stream ──│  the agent reports in
//!  │── VsockConnect {port} + stream ─────────────▶│
//!  │ ◀──────────────────── Event::Exited {reason}─│
//! ```

mod client;
mod error;
mod frame;
mod message;
mod working_set;

pub use client::{EventStream, VmmClient};
pub use error::{Error, Result};
pub use frame::{MAX_FDS, MAX_FRAME, receive, send};
pub use message::{
    BLOCK_SLOTS, CGROUP_ARGUMENT, CGROUP_FD, CONTROL_FD, Event, ExitReason, MAX_MEMORY_MIB, MAX_NET_SLOTS,
    MAX_VCPUS, MIN_MEMORY_MIB, Message, RateLimit, Reply, Request, Status, TEMPLATE_PARAMETER, VmConfig,
    net_slot_address,
};
pub use working_set::{Pages, WorkingSet};
