//! What crosses between the shim and the guest agent.
//!
//! The agent serves containerd's own Task service (`containerd.task.v3.Task`) and the small [`sandbox`] service
//! on [`RPC_PORT`]. Requests arrive with guest paths; three conventions go with them:
//!
//! * `CreateTaskRequest.options` holds the OCI runtime spec as JSON under [`SPEC_TYPE_URL`], already rewritten for
//!   the guest: `root.path` and every bind source are guest paths. `bundle` and `rootfs` are empty.
//! * The `stdin`, `stdout` and `stderr` of Create and Exec are empty or a [`StreamId`]. After the call has
//!   succeeded the shim connects to [`STREAM_PORT`] once for each, writes the id as eight big-endian bytes, and
//!   the connection is that stream. With `terminal` set stdout carries the terminal's output and stderr is empty.
//! * Exits are reported by `Sandbox.Events`; `Task.Wait` answers as well, but nothing depends on it.
//!
//! At boot the agent connects to the host's [`READY_PORT`], writes one line of JSON ([`Hello`]) and keeps
//! the connection open: its end is the end of the agent. In a machine that is restored from a template all connections are reset,
//! and the agent does so again.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Generated from `proto/sandbox.proto`.
#[allow(
    missing_docs,
    unreachable_pub,
    unsafe_code,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    unused_qualifications
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

pub use generated::{sandbox, sandbox_ttrpc};

/// The host port on which the shim expects the agent's announcement.
pub const READY_PORT: u32 = 1024;

/// The guest port of the Task and Sandbox services.
pub const RPC_PORT: u32 = 1025;

/// The guest port of stdio streams.
pub const STREAM_PORT: u32 = 1026;

/// The guest port through which the shim reaches servers that listen on the guest's own loopback. On each connection the
/// shim writes the TCP port as two big-endian bytes. The agent dials 127.0.0.1, then ::1, and answers with one byte, 0 for a
/// connection or the error number of the last refusal; after a 0 the stream is that connection, half-closes included. A connection
/// that is one too many for the agent, or names no port in time, is closed without an answer.
pub const FORWARD_PORT: u32 = 1027;

/// Below it lie the volumes that `CreateVolume` makes, each under its name.
pub const VOLUME_DIR: &str = "/run/mayu/volumes";

/// The word on the kernel's command line that tells the agent that its machine is going to be saved as a template.
pub const TEMPLATE_PARAMETER: &str = "mayu.template";

/// The annotation of a container's spec that says which of its block devices is which of the guest's: a JSON object from the
/// `major:minor` that the spec has to the serial number of the guest's disk (`/sys/block/*/serial`).
pub const BLOCK_DEVICES: &str = "io.mayu.guest.block-devices";

/// The annotation of a container's spec that, where it is `true`, makes it one that can be suspended: it gets its root under an overlay
/// whose upper layer is in the guest's memory, and [`ENVIRONMENT_FILE`].
pub const WARM: &str = "io.mayu.guest.warm";

/// The annotation of a container's spec that names a suspended container of the guest. Create launches nothing then, but makes that one
/// the container of the request: with its id, its streams and the environment of its process. Start lets it go on.
pub const ADOPT: &str = "io.mayu.guest.adopt";

/// The annotation of an adopted container's spec that names a program in the container. Start runs it to its end once the
/// container goes on, as the spec's process but for its arguments, and fails where it does not end with 0.
pub const HOOK: &str = "io.mayu.guest.hook";

/// Where a container with [`WARM`] finds the environment of its spec's process: a JSON object of the variables. It is there before the
/// process starts, and has been written anew before a suspended one goes on as another.
pub const ENVIRONMENT_FILE: &str = "/run/mayu/environment.json";

/// What a container's spec gives as the path of the pod's own PID namespace. The agent makes the namespace, with a process `/pause`
/// that collects its orphans, for the first container that asks for it, and it stays until the guest ends.
pub const POD_PID_NAMESPACE: &str = "/run/mayu/namespaces/pid";

/// What a container's spec gives as the path of another container's PID namespace: this followed by the id of that container,
/// which has to be running. When its init ends, so do all in the namespace.
pub const CONTAINER_PID_NAMESPACE: &str = "/run/mayu/namespaces/container-pid/";

/// The tag of the virtio-fs device, and the guest directory on which the agent mounts it.
pub const SHARE_TAG: &str = "mayu";

/// Where the pod's share is mounted in the guest. A container's rootfs is `<SHARE_DIR>/<container id>/rootfs`.
pub const SHARE_DIR: &str = "/run/mayu/share";

/// containerd's type URL of an OCI runtime spec in JSON.
pub const SPEC_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// containerd's type URL of an OCI process in JSON, the `spec` of an Exec request.
pub const PROCESS_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// The agent's announcement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The agent's version; it must be the shim's own.
    pub version: String,
    /// Microseconds from the kernel's entry to the agent's `main`, by the guest's monotonic clock. 0 in a restored machine.
    pub kernel_us: u64,
    /// Microseconds from the agent's `main` to this announcement. 0 in a restored machine.
    pub agent_us: u64,
}

/// One stdio stream of one process, unique within the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub u64);

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream:{}", self.0)
    }
}

/// The text is not `stream:<number>`.
#[derive(Debug, PartialEq, Eq)]
pub struct InvalidStreamId;

impl FromStr for StreamId {
    type Err = InvalidStreamId;

    fn from_str(text: &str) -> Result<Self, InvalidStreamId> {
        let number = text.strip_prefix("stream:").ok_or(InvalidStreamId)?;
        number.parse().map(Self).map_err(|_| InvalidStreamId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_id_survives_its_text() {
        let id = StreamId(u64::MAX);
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn anything_else_is_no_stream_id() {
        for text in ["", "stream:", "stream:-1", "stream:18446744073709551616", "/run/fifo", "stream:1 "] {
            assert_eq!(text.parse::<StreamId>(), Err(InvalidStreamId), "{text}");
        }
    }
}
