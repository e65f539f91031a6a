//! The one error type of the VMM.

use std::io;

use crate::seccomp::Kind;

/// Why the VMM could not do something. Each variant names the operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A descriptor could not be registered with, changed in or removed from the event loop.
    #[error("cannot watch a descriptor in the event loop: {0}")]
    EventLoop(#[source] io::Error),
    /// An eventfd could not be created, duplicated, read or written.
    #[error("cannot use an eventfd: {0}")]
    EventFd(#[source] io::Error),
    /// A timer for a limit could not be made.
    #[error("cannot make a timer for a rate limit: {0}")]
    RateLimit(#[source] io::Error),
    /// A thread could not be started.
    #[error("cannot start a thread ({kind}): {source}")]
    Thread {
        /// What it was to do.
        kind: Kind,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A thread could not be confined.
    #[error("cannot confine a thread ({kind}): {source}; the host's kernel needs CONFIG_SECCOMP_FILTER")]
    Seccomp {
        /// What it does.
        kind: Kind,
        /// What seccompiler says.
        source: seccompiler::Error,
    },
    /// No filter can be made of a table of system calls.
    #[error("cannot make a seccomp filter: a jump of it leads too far")]
    SeccompTable,
    /// A device's queue is not usable.
    #[error("virtio-{device}: queue {queue}: {source}")]
    Queue {
        /// The device's name.
        device: &'static str,
        /// The queue's number.
        queue: u16,
        /// What virtio-queue says.
        source: virtio_queue::Error,
    },
    /// The driver enabled a queue that no device could use.
    #[error("virtio device type {device_type}: queue {queue}: {problem}")]
    QueueSetup {
        /// The device's type (virtio 1.2, 5).
        device_type: u32,
        /// The queue's number.
        queue: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A saved state is not one of the device that it is to be restored into.
    #[error("virtio device type {device_type}: cannot restore: {problem}")]
    RestoreDevice {
        /// The device's type (virtio 1.2, 5).
        device_type: u32,
        /// What does not fit.
        problem: &'static str,
    },
    /// A device's backend failed.
    #[error("virtio-{device}: cannot {operation}: {source}")]
    Device {
        /// The device's name.
        device: &'static str,
        /// What it was doing.
        operation: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// KVM refused an operation.
    #[error("KVM: cannot {operation}: {source}")]
    Kvm {
        /// What it was asked for.
        operation: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The host's KVM is not the one whose interface has been stable since 2007, or the descriptor is not `/dev/kvm`.
    #[error("KVM: the API version is {version}, not 12; is the descriptor /dev/kvm?")]
    KvmVersion {
        /// What it says.
        version: i32,
    },
    /// The host's KVM lacks something.
    #[error("KVM: the host's kernel lacks {name}")]
    KvmCapability {
        /// Its name in the KVM API documentation.
        name: &'static str,
    },
    /// KVM would not set a model-specific register.
    #[error("KVM: cannot set MSR {index:#x} of a vCPU")]
    Msr {
        /// Its number.
        index: u32,
    },
    /// KVM lists more of something than this program can hold.
    #[error("KVM: too many {what}")]
    TooMany {
        /// CPUID entries or MSRs.
        what: &'static str,
    },
    /// The guest's memory has a size that no machine may have.
    #[error(
        "{mib} MiB of guest memory are not possible: at least {} and at most {} MiB are",
        mayu_vmm_api::MIN_MEMORY_MIB,
        mayu_vmm_api::MAX_MEMORY_MIB
    )]
    MemorySize {
        /// What was asked for.
        mib: u32,
    },
    /// The guest's memory cannot grow to such a size.
    #[error(
        "a guest that boots with {mib} MiB of memory cannot end up with {max_mib}: {mib} to {} MiB are possible",
        mayu_vmm_api::MAX_MEMORY_MIB
    )]
    MaxMemory {
        /// With which it is to boot.
        mib: u32,
        /// What was asked for.
        max_mib: u32,
    },
    /// There is no thread for mapping memory.
    #[error("start a thread that maps memory: {0}")]
    PrefetchThread(#[source] io::Error),
    /// A vCPU cannot be used by two threads.
    #[error("duplicate a vCPU's descriptor: {0}")]
    DuplicateVcpu(#[source] io::Error),
    /// The guest is to bring up vCPUs that the machine does not have.
    #[error("the guest cannot have {count} vCPUs: the machine has {vcpus}")]
    StartVcpus {
        /// What was asked for.
        count: u8,
        /// All that it may have.
        vcpus: u8,
    },
    /// This machine's memory cannot have such a size.
    #[error("this machine cannot have {mib} MiB of memory, but {least} to {most} MiB")]
    ResizeMemory {
        /// What was asked for.
        mib: u32,
        /// With which it has booted.
        least: u32,
        /// All that it may have.
        most: u32,
    },
    /// The memory device cannot have so much plugged.
    #[error("{bytes} bytes cannot be plugged in, but at most {limit}")]
    PluggedMemory {
        /// What was asked for.
        bytes: u64,
        /// What is possible.
        limit: u64,
    },
    /// The guest's memory would exceed the host's.
    #[error("{mib} MiB of guest memory are more than the host's {host_mib} MiB")]
    MemoryBeyondHost {
        /// What was asked for.
        mib: u32,
        /// All that the host has.
        host_mib: u64,
    },
    /// The host would not say how much memory it has.
    #[error("cannot ask for the host's memory size: {0}")]
    HostMemory(#[source] io::Error),
    /// Guest memory could not be mapped.
    #[error("cannot map {mib} MiB of guest memory: {source}")]
    MapMemory {
        /// What was asked for.
        mib: u32,
        /// The reason.
        source: vm_memory::mmap::FromRangesError,
    },
    /// The file that guest memory is to come from could not be used.
    #[error("cannot use the file of the guest's memory: {0}")]
    MemoryFile(#[source] io::Error),
    /// Guest memory could not be parted from its file.
    #[error("cannot part the guest's memory from its file: {0}")]
    PartMemory(#[source] io::Error),
    /// The file that guest memory is to come from is not as large as that.
    #[error("the file of the guest's memory has {found} bytes, not {expected}")]
    MemoryFileSize {
        /// How many it has.
        found: u64,
        /// How many the guest has.
        expected: u64,
    },
    /// Something could not be written to guest memory.
    #[error("cannot write to guest memory: {0}")]
    WriteGuest(#[source] vm_memory::GuestMemoryError),
    /// The kernel file could not be read.
    #[error("cannot read the guest kernel: {0}")]
    ReadKernel(#[source] io::Error),
    /// The kernel file is not what it should be.
    #[error("cannot load the guest kernel: {problem}")]
    Kernel {
        /// What is wrong with it.
        problem: String,
    },
    /// The kernel command line cannot be made.
    #[error("kernel command line: {source} (at most {limit} characters)")]
    CommandLine {
        /// What is wrong with it.
        source: linux_loader::cmdline::Error,
        /// The most characters it may have.
        limit: usize,
    },
    /// The console's pipe could not be set up.
    #[error("cannot use the console's descriptor: {0}")]
    Console(#[source] io::Error),
    /// A vCPU was told something that is not legal in its state.
    #[error("cannot {command} vCPU {id}: it is {state:?}")]
    VcpuCommand {
        /// Its index.
        id: u8,
        /// What it was told.
        command: String,
        /// Where it is in its life.
        state: crate::vcpu::State,
    },
    /// A vCPU does not obey.
    #[error("vCPU {id} does not answer within {seconds} s")]
    VcpuStuck {
        /// Its index.
        id: u8,
        /// How long it had.
        seconds: u64,
    },
    /// A vCPU's thread has ended.
    #[error("the thread of vCPU {id} has ended")]
    VcpuGone {
        /// Its index.
        id: u8,
    },
    /// A step into the jail failed.
    #[error("jail: cannot {operation}: {source}")]
    Jail {
        /// The step.
        operation: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The shim has not left what it is to leave.
    #[error("cannot use descriptor {number}, which the shim leaves open when it starts mayu-vmm: {source}")]
    Inherited {
        /// The descriptor's number.
        number: i32,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The control socket cannot be set up.
    #[error("cannot use the control socket: {0}")]
    ControlSocket(#[source] io::Error),
    /// The shim has ended or breaks the protocol.
    #[error(transparent)]
    Control(mayu_vmm_api::Error),
    /// The machine's description did not come first.
    #[error("the shim's first message does not describe the machine")]
    FirstRequest,
    /// The shim sent a reply or an event.
    #[error("the shim sent something that is not a request")]
    NotARequest,
    /// A request came without its descriptors, or with others.
    #[error("cannot {operation}: the request carries {received} descriptors, not {expected}")]
    Descriptors {
        /// The request.
        operation: &'static str,
        /// How many it has.
        expected: usize,
        /// How many came.
        received: usize,
    },
    /// A second description came.
    #[error("the machine is built already")]
    BuiltTwice,
    /// There is no such slot.
    #[error("there is no {kind} slot {slot}, only {slots} of them from 0 on")]
    NoSuchSlot {
        /// Whether it is one for a block device or for a network.
        kind: &'static str,
        /// What was asked for.
        slot: u8,
        /// How many there are.
        slots: usize,
    },
    /// A network slot keeps its TAP for good.
    #[error("network slot {slot} has a TAP device already")]
    NetSlotTaken {
        /// Which one.
        slot: u8,
    },
    /// A descriptor is not what a network slot needs.
    #[error("the descriptor is not of a usable TAP device: {problem}")]
    NoTap {
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The machine would have too many network slots, or none.
    #[error("{slots} network slots are not possible: 1 to {} are", mayu_vmm_api::MAX_NET_SLOTS)]
    NetSlots {
        /// What was asked for.
        slots: u8,
    },
    /// The vCPUs run although they should not, or do not although they should.
    #[error("the vCPUs {} running", if *.0 { "are" } else { "are not" })]
    Running(bool),
    /// No guest may have this vsock context id.
    #[error("{cid} is not a guest's vsock context id: 3 to 4294967294 are")]
    GuestCid {
        /// What was asked for.
        cid: u32,
    },
    /// A saved state is not one of a machine that can be built here.
    #[error("cannot restore a machine: the state of {vcpus} vCPUs and {devices} devices does not fit it")]
    RestoreMachine {
        /// vCPUs in the state.
        vcpus: usize,
        /// virtio devices in the state.
        devices: usize,
    },
    /// The file of a saved machine could not be read or written.
    #[error("cannot {operation} the state of a machine: {source}")]
    SnapshotFile {
        /// What was being done with it.
        operation: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// The file of a saved machine is damaged, or was never one.
    #[error("the state of a machine cannot be used: {problem}")]
    DamagedSnapshot {
        /// What is wrong with it.
        problem: String,
    },
    /// A machine was saved that is another one.
    #[error("the machine was saved with another {what}: {saved}, not {here}")]
    OtherSnapshot {
        /// What differs.
        what: String,
        /// What it was when the machine was saved.
        saved: String,
        /// What it is now.
        here: String,
    },
    /// The machine is one that runs pods.
    #[error("only a machine that was built as a template can be saved")]
    NotATemplate,
    /// The machine's memory is no file's any more.
    #[error("the machine was saved already")]
    SavedAlready,
    /// Something of the machine is not in its state.
    #[error("the machine cannot be saved while {obstacle}")]
    NotNow {
        /// What it is.
        obstacle: String,
    },
    /// A saved machine would be too large to be read again.
    #[error("the state of the machine has {length} bytes; at most {limit} are possible")]
    SnapshotSize {
        /// How many it has.
        length: usize,
        /// How many it may have.
        limit: u64,
    },
    /// A file that the guest has open is not there any more.
    #[error("virtio-fs: cannot open {path:?} again, which the guest has open: {source}")]
    Reopen {
        /// Where it was, below the share.
        path: std::path::PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The machine would have too many vCPUs, or none.
    #[error("{vcpus} vCPUs are not possible: 1 to {} are", mayu_vmm_api::MAX_VCPUS)]
    VcpuCount {
        /// What was asked for.
        vcpus: u8,
    },
    /// The guest would boot with more vCPUs than it may ever have.
    #[error("a guest cannot boot with {vcpus} vCPUs in a machine that has {max_vcpus}")]
    BootVcpus {
        /// With which it is to boot.
        vcpus: u8,
        /// All that there are.
        max_vcpus: u8,
    },
}

impl Error {
    /// Says which operation KVM refused.
    pub fn kvm(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { operation, source: source.into() }
    }

    /// Says what there is too much of.
    pub fn too_many(what: &'static str) -> impl FnOnce(vmm_sys_util::fam::Error) -> Self {
        move |_| Self::TooMany { what }
    }
}

/// The result of a VMM operation.
pub type Result<T> = std::result::Result<T, Error>;
