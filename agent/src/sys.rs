//! The system calls that neither the standard library nor nix wraps. All `unsafe` of the agent is here.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::io::{self, IoSliceMut};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `RNDADDENTROPY` of linux/random.h: credits entropy to the kernel's pool.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `RNDRESEEDCRNG` of linux/random.h: makes the generator take up what the pool received at once.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
/// The most bytes credited at once; the kernel's pool holds 32.
const MAX_ENTROPY: usize = 512;

/// `bpf(2)`, linux/bpf.h.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;

/// One instruction of the kernel's BPF machine (`struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BpfInstruction {
    /// The operation.
    pub code: u8,
    /// Destination register in the low half, source register in the high half.
    pub registers: u8,
    /// Jump distance or memory offset.
    pub offset: i16,
    /// Immediate value.
    pub immediate: i32,
}

/// The part of `union bpf_attr` that `BPF_PROG_LOAD` reads.
#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

/// The part of `union bpf_attr` that `BPF_PROG_ATTACH` reads.
#[repr(C)]
struct ProgramAttach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

/// `struct rand_pool_info` with room for its bytes.
#[repr(C)]
struct RandomPoolInfo {
    entropy_bits: c_int,
    size: c_int,
    bytes: [u8; MAX_ENTROPY],
}

/// Loads `program`, a filter of device accesses.
///
/// # Errors
///
/// What `bpf(2)` says: EPERM without CAP_BPF, EINVAL where the kernel has no cgroup BPF.
pub fn load_device_filter(program: &[BpfInstruction]) -> Result<OwnedFd, Errno> {
    let load = ProgramLoad {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: `load` has the layout that the kernel reads for this command, its size is given, and the memory
    // its addresses point to outlives the call.
    let loaded = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &load, size_of_val(&load)) };
    let loaded = RawFd::try_from(Errno::result(loaded)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just returned this descriptor and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(loaded) })
}

/// Loads `program` and attaches it to `cgroup` as its filter of device accesses. The attachment keeps the
/// program alive for as long as the cgroup exists.
///
/// # Errors
///
/// Those of [`load_device_filter`].
pub fn attach_device_filter(program: &[BpfInstruction], cgroup: BorrowedFd<'_>) -> Result<(), Errno> {
    let loaded = load_device_filter(program)?;
    let attach = ProgramAttach {
        target: cgroup.as_raw_fd().cast_unsigned(),
        program: loaded.as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        flags: 0,
    };
    // SAFETY: `attach` has the layout that the kernel reads for this command, and its size is given.
    let attached = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &attach, size_of_val(&attach)) };
    Errno::result(attached).map(drop)
}

/// Credits `bytes` as entropy of the kernel's random generator and reseeds it. `random` is /dev/urandom.
///
/// # Errors
///
/// EPERM without CAP_SYS_ADMIN, EINVAL for more than 512 bytes.
pub fn add_entropy(random: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Errno> {
    let mut info = RandomPoolInfo {
        entropy_bits: c_int::try_from(bytes.len() * 8).map_err(|_| Errno::EINVAL)?,
        size: c_int::try_from(bytes.len()).map_err(|_| Errno::EINVAL)?,
        bytes: [0; MAX_ENTROPY],
    };
    info.bytes.get_mut(..bytes.len()).ok_or(Errno::EINVAL)?.copy_from_slice(bytes);
    // SAFETY: `info` starts with the two fields of `struct rand_pool_info` and holds as many bytes as its
    // size says; the kernel only reads it.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) })?;
    // SAFETY: this request takes no argument.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) }).map(drop)
}

/// Sets the size, in characters, of the terminal behind the pty master `terminal`.
///
/// # Errors
///
/// ENOTTY where it is no terminal.
pub fn resize_terminal(terminal: BorrowedFd<'_>, columns: u16, rows: u16) -> Result<(), Errno> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel reads one `struct winsize`.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }).map(drop)
}

/// How many bytes can be read from a pipe or a terminal at once.
///
/// # Errors
///
/// ENOTTY where that cannot be told.
pub fn readable_bytes(descriptor: BorrowedFd<'_>) -> Result<c_int, Errno> {
    let mut count: c_int = 0;
    // SAFETY: the kernel writes one int.
    Errno::result(unsafe { libc::ioctl(descriptor.as_raw_fd(), libc::FIONREAD, &raw mut count) })?;
    Ok(count)
}

/// Opens the other end of the pty master `terminal`, whatever mount namespace its devpts is in.
///
/// # Errors
///
/// ENOTTY where it is no pty master.
pub fn open_terminal_peer(terminal: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the request takes open flags by value.
    let peer = Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the kernel has just returned this descriptor and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(peer) })
}

/// Brings the loopback interface up, which gives it 127.0.0.1/8 and ::1.
///
/// # Errors
///
/// The reason the socket or the request was refused.
pub fn bring_loopback_up(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: `ifreq` is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    // SAFETY: the kernel reads the name in `request` and writes its flags.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) })?;
    // SAFETY: the kernel has filled in the flags, the member of the union that is active.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    // SAFETY: the kernel reads the name and the flags in `request`.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
        .map(drop)
}

/// Gives SIGPIPE its default action again. Rust programs start with it ignored, and programs inherit that.
///
/// # Errors
///
/// None that the kernel documents for this signal.
pub fn restore_sigpipe() -> Result<(), Errno> {
    // SAFETY: no handler function is installed, so none can do what a handler may not.
    unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) }.map(drop)
}

/// Has the kernel collect children of this process as they end, those that it inherits as well (wait(2), SIGCHLD ignored).
///
/// # Errors
///
/// None that the kernel documents for this signal.
pub fn let_kernel_collect_children() -> Result<(), Errno> {
    // SAFETY: no handler function is installed, so none can do what a handler may not.
    unsafe { nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) }.map(drop)
}

/// Collects one child that has ended: its pid and the raw wait status; nothing when none has. nix's wrapper
/// is of no use here: it loses a child that was killed by a real-time signal.
///
/// # Errors
///
/// ECHILD without children, EINTR.
pub fn collect_child() -> Result<Option<(Pid, c_int)>, Errno> {
    let mut status: c_int = 0;
    // SAFETY: the kernel writes one int.
    let pid = Errno::result(unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) })?;
    Ok((pid != 0).then(|| (Pid::from_raw(pid), status)))
}

/// Sends a signal by number; nix's type knows no real-time signals.
///
/// # Errors
///
/// ESRCH where there is no such process, EINVAL for a number that is no signal.
pub fn signal_process(pid: Pid, signal: c_int) -> Result<(), Errno> {
    // SAFETY: the call has no requirements on memory.
    Errno::result(unsafe { libc::kill(pid.as_raw(), signal) }).map(drop)
}

/// The most descriptors that [`receive`] takes from one message.
pub const MAX_DESCRIPTORS: usize = 4;

/// Receives one message into `buffer`, with the descriptors that come with it; nix returns those as numbers.
///
/// # Errors
///
/// What `recvmsg(2)` says: EAGAIN where a non-blocking socket holds nothing.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), Errno> {
    let mut control = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut slices = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel has just installed these descriptors for us and nobody else knows them.
            descriptors.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, descriptors))
}

/// Has the runtime watch `descriptor`.
///
/// # Errors
///
/// EPERM for what cannot be watched, as a regular file.
pub fn watch(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` always yields the same descriptor and keeps it open until it is dropped, which
    // `AsyncFd` does only after it has deregistered it.
    unsafe { AsyncFd::register_with_interest(descriptor, interest) }.map_err(Into::into)
}

/// The calling architecture as seccomp filters see it (linux/audit.h).
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Bit of the syscall numbers of the x32 ABI (asm/unistd.h).
const X32_SYSCALL_BIT: u32 = 0x4000_0000;

/// Has every syscall with a greater number than `newest` fail with ENOSYS from now on, also where an earlier
/// filter chose another error: of equal actions the latest filter's counts (seccomp(2)).
///
/// # Errors
///
/// EACCES without no_new_privs or CAP_SYS_ADMIN.
pub fn refuse_syscalls_after(newest: u32) -> Result<(), Errno> {
    let load = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    let jump_equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let jump_greater = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
    let verdict = (libc::BPF_RET | libc::BPF_K) as u16;
    let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // `struct seccomp_data` holds the number at 0 and the architecture at 4.
    let program = [
        instruction(load, 0, 0, 4),
        instruction(jump_equal, 0, 3, AUDIT_ARCH_X86_64),
        instruction(load, 0, 0, 0),
        instruction(jump_greater, 1, 0, X32_SYSCALL_BIT - 1),
        instruction(jump_greater, 1, 0, newest),
        instruction(verdict, 0, 0, libc::SECCOMP_RET_ALLOW),
        instruction(verdict, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned()),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads the program that `sock_fprog` describes, which lives until the call returns.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    Errno::result(result).map(drop)
}
