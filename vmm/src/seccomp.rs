//! Which system calls each kind of thread may make, and why. Any other ends the process.
//!
//! A thread enters its filter before it has to do with anything that the guest controls. Filters are inherited: the event
//! loop starts the threads of block and network devices, and of vCPUs that come later, while the guest runs, so that those pass its
//! filter first, and then one of their own, which allows less.
//!
//! A machine that is to be saved has lines more for that, and no other machine has them: [`Kind::saving`].
//!
//! The tables below are all that there is to it. [`Kind::table`] and [`Kind::saving`] give them to the test that runs pods and looks
//! whether a line is still needed.

use std::fmt;
use std::sync::Arc;

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_list,
    kvm_msrs, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use libc::*;
use seccompiler::{BpfProgram, apply_filter};

use crate::error::{Error, Result};

mod filter;

/// What a thread does, which decides what it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The process's first thread: the event loop, with the devices that have no thread of their own.
    EventLoop,
    /// Runs the guest's code on one vCPU.
    Vcpu,
    /// Serves files.
    Fs,
    /// Serves a block device.
    Block,
    /// Carries packets.
    Net,
}

/// One system call that a kind of thread may make.
#[derive(Clone, Copy)]
pub struct Allowed {
    /// Its number.
    pub number: i64,
    /// Its name, with `SYS_` before it.
    pub name: &'static str,
    /// What its arguments have to be like, all of them.
    pub arguments: &'static [Argument],
    /// What for.
    pub reason: &'static str,
}

/// What an argument has to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Its number, from 0.
    pub index: u8,
    /// Which of its bits count.
    pub mask: u64,
    /// What they have to be.
    pub value: u64,
}

impl Argument {
    /// Whether these arguments of a system call are such.
    pub fn fits(&self, arguments: &[u64; 6]) -> bool {
        arguments.get(usize::from(self.index)).is_some_and(|argument| argument & self.mask == self.value)
    }
}

/// An argument of 32 bits that is this.
const fn equal(index: u8, value: u64) -> Argument {
    Argument { index, mask: 0xffff_ffff, value }
}

/// An argument that has none of these bits.
const fn without(index: u8, bits: u64) -> Argument {
    Argument { index, mask: bits, value: 0 }
}

macro_rules! allow {
    ($name:ident, $reason:literal $(, $argument:expr)*) => {
        Allowed { number: $name, name: stringify!($name), arguments: &[$($argument),*], reason: $reason }
    };
}

/// What any thread may do: allocate memory, wait, wake others, end the process. Not every kind does all of it.
const EVERY: &[Allowed] = &[
    allow!(SYS_futex, "locks, channels, and waiting for a thread's end"),
    allow!(SYS_read, "eventfds, streams, packets"),
    allow!(SYS_write, "eventfds, streams, and lines for the log and the console"),
    allow!(SYS_close, "what is done with"),
    allow!(SYS_brk, "the allocator's heap"),
    allow!(SYS_mmap, "the allocator's larger pieces, stacks", without(2, PROT_EXEC as u64)),
    allow!(SYS_mprotect, "the allocator's heaps, guard pages", without(2, PROT_EXEC as u64)),
    allow!(SYS_munmap, "the allocator's larger pieces, stacks"),
    allow!(
        SYS_madvise,
        "what the guest gives back of its memory, and the allocator of a heap; stacks",
        equal(2, MADV_DONTNEED as u64)
    ),
    allow!(SYS_epoll_wait, "what happens next"),
    allow!(SYS_epoll_create1, "what a device waits for, from its activation on"),
    allow!(SYS_epoll_ctl, "what a device waits for, from its activation to its reset"),
    allow!(SYS_getrandom, "the guest's entropy, and seeds of hash tables"),
    allow!(
        SYS_rt_sigprocmask,
        "no signal while a thread starts or ends; with glibc 2.41, while it gets random numbers"
    ),
    allow!(SYS_exit_group, "the end of the process"),
    #[cfg(debug_assertions)]
    allow!(SYS_fcntl, "Rust's check of what is closed, in debug builds", equal(1, F_GETFD as u64)),
];

/// What any thread may come to do by the host's doing or by chance, so that no test can have it done.
const SELDOM: &[Allowed] = &[
    allow!(
        SYS_clock_gettime,
        "the time, where the host's clock is one that the vDSO cannot read: hpet, acpi_pm"
    ),
    allow!(SYS_sched_yield, "a channel whose other end is writing at this moment"),
    allow!(SYS_restart_syscall, "a wait with an end, after the process was stopped or frozen in it"),
];

/// What any thread is told that there is none of (ENOSYS), instead of ending the process.
const REFUSED: &[Allowed] = &[
    allow!(SYS_clone3, "glibc asks for it first, and then for clone, whose arguments can be looked at"),
    allow!(SYS_mremap, "glibc asks for it where a large buffer grows, and then copies"),
];

/// What a thread does at its end.
const ENDING: &[Allowed] = &[
    allow!(SYS_sigaltstack, "the stack on which an overflow of the other one is told"),
    allow!(SYS_exit, "its end"),
];

/// What a thread does whose device goes on later when it has done enough for now.
const LIMITED: &[Allowed] = &[allow!(
    SYS_timerfd_settime,
    "a limit on the guest's entropy, on what it reads and writes, on its packets"
)];

/// What the event loop does, beside what the threads do that it starts.
const EVENT_LOOP: &[Allowed] = &[
    allow!(SYS_recvmsg, "the shim's requests, with descriptors"),
    allow!(SYS_sendmsg, "answers and events for the shim"),
    allow!(SYS_sendto, "bytes of a stream that have waited for its reader", equal(3, MSG_NOSIGNAL as u64)),
    allow!(SYS_poll, "whether a stream was closed; the shim's last look"),
    allow!(SYS_socketpair, "a stream for a connection from the guest", equal(0, AF_UNIX as u64)),
    allow!(SYS_shutdown, "one direction of a stream"),
    allow!(SYS_ioctl, "a stream that does not block", equal(1, FIONBIO)),
    allow!(SYS_ioctl, "whether a descriptor is a TAP", equal(1, TUNGETIFF)),
    allow!(SYS_ioctl, "the header before a TAP's packets", equal(1, TUNSETVNETHDRSZ)),
    allow!(SYS_fcntl, "a TAP that does not block", equal(1, F_GETFL as u64)),
    allow!(SYS_fcntl, "a TAP that does not block", equal(1, F_SETFL as u64)),
    allow!(SYS_lseek, "the size of a disk"),
    allow!(SYS_sysinfo, "whether the host has the memory that the guest is to get"),
    allow!(SYS_clone, "a thread of a device or a vCPU, and no process", equal(0, THREAD)),
    allow!(SYS_madvise, "what the first container will write", equal(2, MADV_POPULATE_WRITE as u64)),
    allow!(SYS_ioctl, "what the first container will touch, for the guest", equal(1, KVM_PRE_FAULT_MEMORY)),
    allow!(SYS_set_robust_list, "the start of a thread"),
    allow!(SYS_rseq, "the start of a thread"),
    allow!(SYS_sched_getaffinity, "the start of a thread: where its stack ends"),
    allow!(SYS_gettid, "the start of a thread"),
    allow!(SYS_getpid, "a vCPU that is to stop"),
    allow!(SYS_tgkill, "a vCPU that is to stop"),
    allow!(SYS_prctl, "a thread's name", equal(0, PR_SET_NAME as u64)),
    allow!(SYS_prctl, "a thread's filter", equal(0, PR_SET_NO_NEW_PRIVS as u64), equal(1, 1)),
    allow!(SYS_seccomp, "a thread's filter", equal(0, SECCOMP_SET_MODE_FILTER as u64)),
];

/// What glibc's `pthread_create` asks `clone` for (its `sysdeps/unix/sysv/linux/createthread.c`).
const THREAD: u64 = (CLONE_VM
    | CLONE_FS
    | CLONE_FILES
    | CLONE_SYSVSEM
    | CLONE_SIGHAND
    | CLONE_THREAD
    | CLONE_SETTLS
    | CLONE_PARENT_SETTID
    | CLONE_CHILD_CLEARTID) as u64;

/// `_IO(KVMIO, 0x80)` of Linux's `include/uapi/linux/kvm.h`.
const KVM_RUN: u64 = 0xae80;

/// `_IO(KVMIO, 0xad)`.
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;

/// `_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)`.
const KVM_PRE_FAULT_MEMORY: u64 = 0xc040_aed5;

/// `_IOC(direction, KVMIO, number, size)` of Linux's `include/uapi/asm-generic/ioctl.h`.
const fn kvm(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | number
}

/// `_IOR`.
const fn kvm_read<T>(number: u64) -> u64 {
    kvm(2, number, size_of::<T>())
}

/// `_IOWR`.
const fn kvm_exchange<T>(number: u64) -> u64 {
    kvm(3, number, size_of::<T>())
}

/// What saves one vCPU: in its thread or, if it has none, in the event loop.
const SAVE_VCPU: &[Allowed] = &[
    allow!(SYS_ioctl, "save: KVM_GET_MP_STATE", equal(1, kvm_read::<kvm_mp_state>(0x98))),
    allow!(SYS_ioctl, "save: KVM_GET_CPUID2", equal(1, kvm_exchange::<kvm_cpuid2>(0x91))),
    allow!(SYS_ioctl, "save: KVM_GET_TSC_KHZ", equal(1, kvm(0, 0xa3, 0))),
    allow!(SYS_ioctl, "save: KVM_GET_REGS", equal(1, kvm_read::<kvm_regs>(0x81))),
    allow!(SYS_ioctl, "save: KVM_GET_SREGS", equal(1, kvm_read::<kvm_sregs>(0x83))),
    allow!(SYS_ioctl, "save: KVM_GET_XSAVE", equal(1, kvm_read::<kvm_xsave>(0xa4))),
    allow!(SYS_ioctl, "save: KVM_GET_XCRS", equal(1, kvm_read::<kvm_xcrs>(0xa6))),
    allow!(SYS_ioctl, "save: KVM_GET_DEBUGREGS", equal(1, kvm_read::<kvm_debugregs>(0xa1))),
    allow!(SYS_ioctl, "save: KVM_GET_LAPIC", equal(1, kvm_read::<kvm_lapic_state>(0x8e))),
    allow!(SYS_ioctl, "save: KVM_GET_MSRS", equal(1, kvm_exchange::<kvm_msrs>(0x88))),
    allow!(SYS_ioctl, "save: KVM_GET_VCPU_EVENTS", equal(1, kvm_read::<kvm_vcpu_events>(0x9f))),
];

/// What saves all that is no single vCPU's. It is written, and the memory mapped anew, by calls that the event loop makes anyway.
const SAVE_MACHINE: &[Allowed] = &[
    allow!(SYS_ioctl, "save: KVM_GET_MSR_INDEX_LIST", equal(1, kvm_exchange::<kvm_msr_list>(0x02))),
    allow!(SYS_ioctl, "save: KVM_GET_SUPPORTED_CPUID", equal(1, kvm_exchange::<kvm_cpuid2>(0x05))),
    allow!(SYS_ioctl, "save: KVM_GET_IRQCHIP", equal(1, kvm_exchange::<kvm_irqchip>(0x62))),
    allow!(SYS_ioctl, "save: KVM_GET_CLOCK", equal(1, kvm_read::<kvm_clock_data>(0x7c))),
    allow!(SYS_dup3, "save: the file of the memory, which can only be read from then on"),
];

/// What a vCPU's thread does: it runs the guest, and what the guest does to a device's registers happens there.
const VCPU: &[Allowed] = &[
    allow!(SYS_ioctl, "the guest's code", equal(1, KVM_RUN)),
    allow!(SYS_ioctl, "a clock that has stood still for a while", equal(1, KVM_KVMCLOCK_CTRL)),
    allow!(SYS_eventfd2, "a network device that the driver activates"),
    allow!(SYS_timerfd_create, "the entropy device that the driver activates"),
    allow!(SYS_fcntl, "a descriptor for a device's thread", equal(1, F_DUPFD_CLOEXEC as u64)),
    allow!(SYS_ioctl, "what packets the guest can take", equal(1, TUNSETOFFLOAD)),
    allow!(SYS_rt_sigreturn, "the signal that ends KVM_RUN"),
];

/// What the threads of virtio-fs do for the guest, on files of the share.
const FS: &[Allowed] = &[
    allow!(SYS_openat, "lookup, open, create, opendir"),
    allow!(SYS_statx, "getattr, and whatever is answered with attributes"),
    allow!(SYS_readlinkat, "readlink"),
    allow!(SYS_symlinkat, "symlink"),
    allow!(SYS_mknodat, "mknod"),
    allow!(SYS_mkdirat, "mkdir"),
    allow!(SYS_unlinkat, "unlink, rmdir"),
    allow!(SYS_renameat2, "rename"),
    allow!(SYS_linkat, "link"),
    allow!(SYS_fchmodat, "setattr: the mode"),
    allow!(SYS_fchownat, "setattr: the owner"),
    allow!(SYS_utimensat, "setattr: times"),
    allow!(SYS_ftruncate, "setattr: the size"),
    allow!(SYS_preadv2, "read"),
    allow!(SYS_pwritev2, "write"),
    allow!(SYS_fstatfs, "statfs"),
    allow!(SYS_fsync, "fsync"),
    allow!(SYS_fdatasync, "fsync"),
    allow!(SYS_fallocate, "fallocate"),
    allow!(SYS_lseek, "lseek, and where readdir goes on"),
    allow!(SYS_getdents64, "readdir"),
    allow!(SYS_fcntl, "flush: the end of a duplicate", equal(1, F_DUPFD_CLOEXEC as u64)),
    allow!(SYS_getxattr, "getxattr"),
    allow!(SYS_setxattr, "setxattr"),
    allow!(SYS_listxattr, "listxattr"),
    allow!(SYS_removexattr, "removexattr"),
    allow!(SYS_setfsuid, "the user for whom the guest asks"),
    allow!(SYS_setfsgid, "the group for which the guest asks"),
    allow!(SYS_umask, "the umask with which the guest creates"),
    allow!(SYS_capget, "set-user-id is lost when others write"),
    allow!(SYS_capset, "set-user-id is lost when others write"),
];

/// What the thread of a block device does.
const BLOCK: &[Allowed] =
    &[allow!(SYS_preadv, "read"), allow!(SYS_pwritev, "write"), allow!(SYS_fdatasync, "flush")];

/// What the thread of a network device does.
const NET: &[Allowed] =
    &[allow!(SYS_readv, "packets to the guest"), allow!(SYS_writev, "packets from the guest")];

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::EventLoop, Self::Vcpu, Self::Fs, Self::Block, Self::Net];

    /// The system calls of such a thread, in parts. The event loop's have those of the threads that inherit its filter.
    pub fn table(self) -> &'static [&'static [Allowed]] {
        match self {
            Self::EventLoop => &[EVERY, SELDOM, REFUSED, EVENT_LOOP, ENDING, LIMITED, BLOCK, NET, VCPU],
            Self::Vcpu => &[EVERY, SELDOM, REFUSED, VCPU],
            Self::Fs => &[EVERY, SELDOM, REFUSED, ENDING, FS],
            Self::Block => &[EVERY, SELDOM, REFUSED, ENDING, LIMITED, BLOCK],
            Self::Net => &[EVERY, SELDOM, REFUSED, ENDING, LIMITED, NET],
        }
    }

    /// What such a thread may do beside its table in a machine that is to be saved, in parts.
    pub fn saving(self) -> &'static [&'static [Allowed]] {
        match self {
            Self::EventLoop => &[SAVE_MACHINE, SAVE_VCPU],
            Self::Vcpu => &[SAVE_VCPU],
            Self::Fs | Self::Block | Self::Net => &[],
        }
    }

    /// Whether such a call is not made, for the caller is told that there is none.
    pub fn refuses(line: &Allowed) -> bool {
        REFUSED.iter().any(|refused| refused.number == line.number)
    }

    /// Whether such a call may be made, and no test has it made.
    pub fn is_seldom(line: &Allowed) -> bool {
        SELDOM.iter().any(|seldom| seldom.number == line.number)
    }

    /// Whether this line is one of its own, also if only in a machine that is to be saved.
    pub fn allows(self, line: &Allowed) -> bool {
        let same = |other: &Allowed| (other.number, other.arguments) == (line.number, line.arguments);
        self.lines(Purpose::Save).any(same)
    }

    fn lines(self, purpose: Purpose) -> impl Iterator<Item = &'static Allowed> {
        let saving = match purpose {
            Purpose::Run => &[],
            Purpose::Save => self.saving(),
        };
        self.table().iter().chain(saving).copied().flatten()
    }

    fn compile(self, purpose: Purpose) -> Result<BpfProgram> {
        filter::compile(self.lines(purpose))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EventLoop => "event loop",
            Self::Vcpu => "vCPU",
            Self::Fs => "virtio-fs",
            Self::Block => "virtio-block",
            Self::Net => "virtio-net",
        })
    }
}

/// What a machine is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To run.
    Run,
    /// To run, and to be saved.
    Save,
}

/// The filters that threads enter.
#[derive(Clone)]
pub struct Confinement(Option<Arc<[(Kind, BpfProgram); 5]>>);

impl Confinement {
    /// Every thread enters its filter.
    ///
    /// # Errors
    /// A table is none that a filter can be made from.
    pub fn seccomp(purpose: Purpose) -> Result<Self> {
        let [event_loop, vcpu, fs, block, net] = Kind::ALL;
        let program = |kind: Kind| Ok((kind, kind.compile(purpose)?));
        let programs = [program(event_loop)?, program(vcpu)?, program(fs)?, program(block)?, program(net)?];
        Ok(Self(Some(Arc::new(programs))))
    }

    /// None, for the threads of a test, which has other things to do as well.
    #[cfg(any(test, feature = "testing"))]
    pub fn none() -> Self {
        Self(None)
    }

    /// Confines the calling thread, and those that it starts, for good.
    ///
    /// # Errors
    /// The kernel has no seccomp filters.
    pub fn enter(&self, kind: Kind) -> Result<()> {
        let programs = self.0.iter().flat_map(|programs| programs.iter());
        for (_, program) in programs.filter(|(of, _)| *of == kind) {
            apply_filter(program).map_err(|source| Error::Seccomp { kind, source })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Confinement").field(&self.0.is_some()).finish()
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use std::collections::BTreeSet;
    use std::io;
    use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
    use std::process::Command;

    use seccompiler::sock_filter;

    use super::*;

    /// Of linux/audit.h.
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

    const PURPOSES: [Purpose; 2] = [Purpose::Run, Purpose::Save];

    /// All that such a thread may do in some machine.
    fn lines(kind: Kind) -> impl Iterator<Item = &'static Allowed> {
        kind.lines(Purpose::Save)
    }

    #[test]
    fn every_table_makes_a_filter() {
        assert!(PURPOSES.iter().all(|purpose| Confinement::seccomp(*purpose).is_ok()));
    }

    /// Those that `include/uapi/linux/kvm.h` makes on x86-64.
    #[test]
    fn requests_to_kvm_have_their_numbers() {
        let numbers = |lines: &[Allowed]| {
            let requests = lines.iter().filter(|line| line.number == SYS_ioctl);
            requests.map(|line| line.arguments[0].value).collect::<Vec<_>>()
        };
        assert_eq!(
            numbers(SAVE_VCPU),
            [
                0x8004_ae98,
                0xc008_ae91,
                0xaea3,
                0x8090_ae81,
                0x8138_ae83,
                0x9000_aea4,
                0x8188_aea6,
                0x8080_aea1,
                0x8400_ae8e,
                0xc008_ae88,
                0x8040_ae9f
            ]
        );
        assert_eq!(numbers(SAVE_MACHINE), [0xc004_ae02, 0xc008_ae05, 0xc208_ae62, 0x8030_ae7c]);
    }

    /// A filter would allow a call with any arguments that is also there with some.
    #[test]
    fn a_call_is_there_once_or_with_different_arguments() {
        for kind in Kind::ALL {
            for (index, line) in lines(kind).enumerate() {
                let others = lines(kind).skip(index + 1).filter(|other| other.number == line.number);
                for other in others {
                    assert_ne!(line.arguments, other.arguments, "{kind}: {}", line.name);
                    assert!(
                        !line.arguments.is_empty() && !other.arguments.is_empty(),
                        "{kind}: {}",
                        line.name
                    );
                }
            }
        }
    }

    #[test]
    fn what_a_thread_does_its_parent_may_do() {
        for child in [Kind::Block, Kind::Net, Kind::Vcpu] {
            for line in lines(child) {
                assert!(Kind::EventLoop.allows(line), "{child}: {}", line.name);
            }
        }
    }

    /// What the kernel's interpreter of classic BPF would answer (Documentation/networking/filter.rst).
    fn verdict(program: &[sock_filter], architecture: u32, number: i64, arguments: &[u64; 6]) -> u32 {
        let mut data = vec![number as u32, architecture, 0, 0];
        data.extend(arguments.iter().flat_map(|argument| [*argument as u32, (argument >> 32) as u32]));
        let (mut next, mut register) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[next];
            next += 1;
            let to = |condition: bool| usize::from(if condition { jt } else { jf });
            match u32::from(code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => register = data[k as usize / 4],
                code if code == BPF_ALU | BPF_AND | BPF_K => register &= k,
                code if code == BPF_JMP | BPF_JEQ | BPF_K => next += to(register == k),
                code if code == BPF_JMP | BPF_JGE | BPF_K => next += to(register >= k),
                code if code == BPF_JMP | BPF_JA => next += k as usize,
                code if code == BPF_RET | BPF_K => return k,
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    #[test]
    fn the_filters_say_what_the_tables_say() {
        for (kind, purpose) in Kind::ALL.into_iter().flat_map(|kind| PURPOSES.map(|purpose| (kind, purpose)))
        {
            let program = kind.compile(purpose).unwrap();
            for number in 0..512 {
                let of_this: Vec<_> = kind.lines(purpose).filter(|line| line.number == number).collect();
                let mut tried = vec![[0; 6], [u64::MAX; 6]];
                tried.extend(lines(kind).filter(|line| line.number == number).map(|line| {
                    let mut arguments = [0; 6];
                    line.arguments.iter().for_each(|it| arguments[usize::from(it.index)] = it.value);
                    arguments
                }));
                for arguments in tried {
                    let line =
                        of_this.iter().find(|line| line.arguments.iter().all(|it| it.fits(&arguments)));
                    let expected = match line {
                        Some(line) if Kind::refuses(line) => SECCOMP_RET_ERRNO | ENOSYS as u32,
                        Some(_) => SECCOMP_RET_ALLOW,
                        None => SECCOMP_RET_KILL_PROCESS,
                    };
                    assert_eq!(
                        verdict(&program, AUDIT_ARCH_X86_64, number, &arguments),
                        expected,
                        "{kind} to {purpose:?}: {number} {arguments:x?}"
                    );
                }
            }
        }
    }

    /// 32-bit programs count their calls otherwise, and those of x32 have a bit more (`__X32_SYSCALL_BIT`).
    #[test]
    fn a_call_of_another_architecture_ends_the_process() {
        const AUDIT_ARCH_I386: u32 = 0x4000_0003;
        for kind in Kind::ALL {
            let program = kind.compile(Purpose::Save).unwrap();
            for number in 0..512 {
                let foreign = verdict(&program, AUDIT_ARCH_I386, number, &[0; 6]);
                let x32 = verdict(&program, AUDIT_ARCH_X86_64, number | 1 << 30, &[0; 6]);
                assert_eq!([foreign, x32], [SECCOMP_RET_KILL_PROCESS; 2], "{kind}: {number}");
            }
        }
    }

    #[test]
    fn what_is_not_listed_ends_the_process() {
        let confinement = Confinement::seccomp(Purpose::Save).unwrap();
        for kind in Kind::ALL {
            let confinement = confinement.clone();
            let mut command = Command::new("/bin/true");
            // SAFETY: what runs between fork and exec makes two system calls and allocates nothing.
            unsafe {
                command.pre_exec(move || confinement.enter(kind).map_err(|_| io::ErrorKind::Other.into()))
            };
            // The child becomes no other program: execve is what is not listed.
            let status = command.status().unwrap();
            assert_eq!(status.signal(), Some(SIGSYS), "{kind}: {status}");
        }
    }

    #[test]
    fn the_specification_says_how_many_there_are() {
        let page = include_str!("../../docs/specification.md");
        for kind in Kind::ALL {
            let released = kind
                .lines(Purpose::Run)
                .filter(|line| !Kind::refuses(line) && !line.reason.contains("debug builds"));
            let calls: BTreeSet<_> = released.map(|line| line.number).collect();
            let row = format!("| {kind} | {} |", calls.len());
            assert!(page.contains(&row), "docs/specification.md has no row {row:?}");
        }
    }

    #[test]
    fn what_is_refused_is_an_error_and_no_end() {
        let confinement = Confinement::seccomp(Purpose::Save).unwrap();
        let mut command = Command::new("/bin/true");
        // SAFETY: what runs between fork and the child's end makes system calls and allocates nothing; the one that is refused
        // does nothing.
        unsafe {
            command.pre_exec(move || {
                confinement.enter(Kind::Vcpu).map_err(|_| io::ErrorKind::Other)?;
                let answer = syscall(SYS_mremap, 0, 0, 0, 0, 0);
                _exit(i32::from(answer != -1 || io::Error::last_os_error().raw_os_error() != Some(ENOSYS)))
            })
        };
        assert!(command.status().unwrap().success());
    }

    #[test]
    fn no_thread_opens_a_way_out() {
        let never = [
            SYS_execve,
            SYS_execveat,
            SYS_fork,
            SYS_vfork,
            SYS_ptrace,
            SYS_socket,
            SYS_connect,
            SYS_mount,
            SYS_setns,
            SYS_unshare,
            SYS_bpf,
            SYS_keyctl,
            SYS_io_uring_setup,
            SYS_userfaultfd,
            SYS_perf_event_open,
            SYS_kill,
        ];
        for kind in Kind::ALL {
            let allowed = lines(kind).find(|line| never.contains(&line.number)).map(|line| line.name);
            assert_eq!(allowed, None, "{kind}");
        }
    }
}
