use std::collections::BTreeMap;
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

/// The descriptor number on which `mayu-vmm` finds its end of the control socket.
pub const CONTROL_FD: i32 = 3;

/// The descriptor number on which `mayu-vmm` finds the directory of the machine's cgroup, if it is started with
/// [`CGROUP_ARGUMENT`].
pub const CGROUP_FD: i32 = 4;

/// Has `mayu-vmm` put the machine's process into a cgroup. Without it, the process stays where its parent is.
pub const CGROUP_ARGUMENT: &str = "--cgroup";

/// The most vCPUs that a machine may have.
pub const MAX_VCPUS: u8 = 32;

/// The least memory that a guest boots in, in MiB.
pub const MIN_MEMORY_MIB: u32 = 64;

/// The most memory that a machine may have, in MiB.
pub const MAX_MEMORY_MIB: u32 = 64 * 1024;

/// Block slots that every machine has beside the guest image. They start empty.
pub const BLOCK_SLOTS: u8 = 4;

/// The most network slots that a machine may have. Every machine has at least one; they start empty.
pub const MAX_NET_SLOTS: u8 = 8;

/// The hardware address under which the guest finds network slot `slot` before it gives the interface its real one:
/// locally administered, and the same in every machine.
pub fn net_slot_address(slot: u8) -> [u8; 6] {
    [0x02, b'm', b'a', b'y', b'u', slot]
}

/// The description of one machine.
///
/// [`Request::Build`] carries it with five descriptors, in this order: `/dev/kvm`, the guest kernel, the guest
/// image (both read-only), the directory that virtio-fs shares (`O_PATH`), and the console (write end of a pipe).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The sandbox this machine belongs to, for the log.
    pub sandbox_id: String,
    /// vCPUs that the guest's kernel brings up when it boots, 1 to [`VmConfig::max_vcpus`].
    pub vcpus: u8,
    /// vCPUs that the machine has, up to [`MAX_VCPUS`]. The guest can bring those up later that its kernel does not, once
    /// [`Request::StartVcpus`] lets it; until then none of them has a thread.
    pub max_vcpus: u8,
    /// Memory that the guest boots with, in MiB, [`MIN_MEMORY_MIB`] to [`VmConfig::max_memory_mib`].
    pub memory_mib: u32,
    /// The most memory that the guest may have, in MiB, up to [`MAX_MEMORY_MIB`]. If it is more than
    /// [`VmConfig::memory_mib`], the machine has a memory device, and [`Request::ResizeMemory`] asks the guest to use
    /// part of the difference. What it does not use costs nothing.
    pub max_memory_mib: u32,
    /// Network slots, 1 to [`MAX_NET_SLOTS`].
    pub net_slots: u8,
    /// The guest's vsock context id, 3 or more.
    pub guest_cid: u32,
    /// Words added to the end of the kernel command line.
    pub kernel_args: String,
    /// vsock ports of the host that the guest may connect to. Anything else is refused by the device.
    pub host_ports: Vec<u32>,
    /// The host uid and gid that the VMM runs as.
    pub uid: u32,
    /// What each network slot may carry, in each direction.
    pub net_limit: RateLimit,
    /// What each block slot may read and write together. The guest image has no limit.
    pub block_limit: RateLimit,
    /// What the machine is made of, by name: the identity of its kernel, of its image, ... Nothing is done with it but this:
    /// [`Request::Restore`] refuses a machine that was made of something else, and names that.
    pub made_of: BTreeMap<String, String>,
}

/// What may go through a device in a second. The default is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes a second.
    pub bandwidth: Option<NonZeroU64>,
    /// Packets or requests a second.
    pub operations: Option<NonZeroU64>,
    /// How much may go at once after a time of less, in milliseconds' worth of both rates.
    pub burst_ms: u32,
}

/// The word on the kernel's command line of a machine that is built to be saved, so that what runs in it can prepare for that.
pub const TEMPLATE_PARAMETER: &str = "mayu.template";

/// What the shim asks of the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Confine the process and build the machine with its vCPUs paused. Legal once.
    Build(VmConfig),
    /// As [`Request::Build`], to be saved. The guest's memory is that of a sixth descriptor, a file of
    /// [`VmConfig::memory_mib`] that can be written. Its process is confined as any other, and may make the system calls for saving
    /// that no other may make. On its kernel's command line is the word [`TEMPLATE_PARAMETER`](crate::TEMPLATE_PARAMETER).
    BuildTemplate(VmConfig),
    /// As [`Request::Build`], where a machine with the same description was saved. Its descriptors are `/dev/kvm`, the file that
    /// [`Request::Save`] has written, the memory of that machine, image, share and console, and, where it is known, a file with the
    /// [`WorkingSet`](crate::WorkingSet) of such a machine. Any number of machines can be restored at once: none of them writes to any of
    /// the files. What the guest held of its share is opened again by path when the machine is resumed first: files may come to the
    /// share until then.
    Restore(VmConfig),
    /// Write the state of a machine that was built to be saved and is paused, all but its memory, to the first attached file, which is
    /// empty. The second one is the file of its memory, opened to be read: that file stays as it is from now on, whatever the machine does
    /// when it goes on, and the VMM keeps no descriptor by which it could be changed. So a machine is saved once only.
    /// Refused, with the obstacle's name, while memory is plugged in, a block slot is filled, or the guest has a file of its share open that
    /// it may write to or that is not there any more. The machine can go on then, too.
    Save,
    /// Let the vCPUs run. Refused, with its path, while a file is not there that the guest of a restored machine has open.
    Resume,
    /// Stop the vCPUs at an instruction boundary and the devices between two requests.
    Pause,
    /// Connect the attached stream socket to a vsock port of the guest. Answered when the guest has
    /// accepted or refused.
    VsockConnect {
        /// The port inside the guest.
        port: u32,
    },
    /// Put the attached file behind an empty block slot and tell the guest.
    AttachBlock {
        /// 0 to [`BLOCK_SLOTS`] - 1.
        slot: u8,
        /// Whether writes by the guest are refused.
        read_only: bool,
    },
    /// Take the file of a block slot away again.
    DetachBlock {
        /// 0 to [`BLOCK_SLOTS`] - 1.
        slot: u8,
    },
    /// Put the attached TAP device behind an empty network slot and tell the guest that the link is up. It was opened
    /// with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`, in any network namespace. A slot keeps its TAP; the link goes
    /// down when the TAP's interface is deleted.
    AttachNet {
        /// 0 to [`VmConfig::net_slots`] - 1.
        slot: u8,
    },
    /// Map what the first container of a restored guest will touch, if it is known. Answered at once; it happens meanwhile.
    Prefetch,
    /// Let the guest bring up its first vCPUs, so many in all. It keeps those that it has had.
    StartVcpus {
        /// Up to [`VmConfig::max_vcpus`].
        vcpus: u8,
    },
    /// Ask the guest to have so much memory in all, in whole steps of 2 MiB. Answered once it was asked;
    /// [`Status::plugged_mib`] tells how far it has come, which may take a while, or forever if it cannot give up memory
    /// that is in use.
    ResizeMemory {
        /// [`VmConfig::memory_mib`] to [`VmConfig::max_memory_mib`].
        memory_mib: u32,
    },
    /// Ask for counters and the state of the machine.
    Status,
    /// Stop the vCPUs and end the process.
    Shutdown,
}

impl Request {
    /// The operation's name, for error messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Build(_) => "build the machine",
            Self::BuildTemplate(_) => "build a template",
            Self::Restore(_) => "restore the machine",
            Self::Save => "save the machine",
            Self::Resume => "resume the vCPUs",
            Self::Pause => "pause the vCPUs",
            Self::VsockConnect { .. } => "connect to a vsock port of the guest",
            Self::AttachBlock { .. } => "attach a block device",
            Self::DetachBlock { .. } => "detach a block device",
            Self::AttachNet { .. } => "attach a network device",
            Self::Prefetch => "prefetch memory",
            Self::StartVcpus { .. } => "start vCPUs",
            Self::ResizeMemory { .. } => "resize the guest's memory",
            Self::Status => "report status",
            Self::Shutdown => "shut down",
        }
    }
}

/// The VMM's answer to the request with the same number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Reply {
    /// Done.
    Ok,
    /// The answer to [`Request::Status`].
    Status(Status),
    /// Not done, and why.
    Error {
        /// One line for the user.
        reason: String,
    },
}

/// Counters of a running machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether the vCPUs run.
    pub running: bool,
    /// Microseconds from the start of the process until the first guest instruction, once it has run.
    pub guest_entry_us: Option<u64>,
    /// Memory that the guest uses beyond what it has booted with, in MiB.
    pub plugged_mib: u32,
    /// Memory that the guest has reported as free and the host has taken back, in MiB. What was so more than once counts each time.
    pub reported_mib: u64,
    /// Requests that a device refused because the driver broke the protocol, per device name.
    pub device_errors: BTreeMap<String, u64>,
}

/// What the VMM tells without being asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Event {
    /// The process that holds the machine has this pid in the host's namespace; the one that was spawned ends.
    Started {
        /// A child of the shim, once its own parent has ended.
        pid: i32,
    },
    /// The guest connected to an allowed host port; the stream socket is attached.
    VsockAccepted {
        /// The host port.
        port: u32,
    },
    /// The guest is gone, and this process is about to be.
    Exited(ExitReason),
}

/// Why a guest stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", content = "detail", rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest reset or halted the machine: a shutdown by the agent or, after a panic, by the kernel.
    GuestReset,
    /// The shim asked for it.
    Requested,
    /// KVM or a device failed.
    Failed(String),
}

/// One packet of the control socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Message {
    /// Shim to VMM.
    Request {
        /// Chosen by the shim; the reply repeats it.
        id: u64,
        /// What is asked.
        body: Request,
    },
    /// VMM to shim.
    Reply {
        /// The number of the request.
        id: u64,
        /// The answer.
        body: Reply,
    },
    /// VMM to shim.
    Event {
        /// What happened.
        body: Event,
    },
}
