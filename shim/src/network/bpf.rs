//! The commands of bpf(2) that connect a loopback interface to a socket. The structures are the parts of
//! `union bpf_attr` (linux/bpf.h) that the kernel reads for each command.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

/// One instruction of the kernel's BPF machine (`struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    /// The operation.
    pub code: u8,
    /// Destination register in the low half, source register in the high half.
    pub registers: u8,
    /// Jump distance or memory offset.
    pub offset: i16,
    /// Immediate value.
    pub immediate: i32,
}

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

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
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// A map that holds `entries` sockets by their number.
///
/// # Errors
/// What `bpf(2)` says: EPERM without CAP_BPF and CAP_NET_ADMIN, EINVAL where the kernel has no such maps.
pub(super) fn create_socket_map(entries: u32) -> Result<OwnedFd, Errno> {
    let attributes = MapCreate {
        map_type: BPF_MAP_TYPE_SOCKMAP,
        key_size: size_of::<u32>() as u32,
        value_size: size_of::<u32>() as u32,
        max_entries: entries,
        map_flags: 0,
    };
    // SAFETY: the structure has the layout that the kernel reads for this command and holds no address; on success
    // the command returns a new descriptor.
    unsafe { returning_descriptor(BPF_MAP_CREATE, &attributes) }
}

/// Puts `socket` into a map of sockets under `number`.
///
/// # Errors
/// EOPNOTSUPP for a socket that neither listens nor is connected, E2BIG for a number beyond the map.
pub(super) fn put_socket(map: BorrowedFd<'_>, number: u32, socket: BorrowedFd<'_>) -> Result<(), Errno> {
    let socket = socket.as_raw_fd().cast_unsigned();
    let attributes = MapUpdate {
        map: map.as_raw_fd().cast_unsigned(),
        padding: 0,
        key: &raw const number as u64,
        value: &raw const socket as u64,
        flags: 0,
    };
    // SAFETY: the structure has the layout that the kernel reads for this command; the key and the value that it
    // points to have the sizes that `create_socket_map` gave the map, and outlive the call.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attributes) }.map(drop)
}

/// Loads a program that chooses the socket of a new connection (`BPF_PROG_TYPE_SK_LOOKUP`, Linux 5.9).
///
/// # Errors
/// What `bpf(2)` says: EPERM, EINVAL where the kernel has no such programs, EACCES where its verifier refuses this one.
pub(super) fn load_socket_lookup(program: &[Instruction]) -> Result<OwnedFd, Errno> {
    let attributes = ProgramLoad {
        program_type: BPF_PROG_TYPE_SK_LOOKUP,
        instruction_count: u32::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"mayu_forward\0\0\0\0",
        interface: 0,
        expected_attach_type: BPF_SK_LOOKUP,
    };
    // SAFETY: the structure has the layout that the kernel reads for this command; the instructions, as many as it
    // says, and the licence, which ends with a zero, outlive the call; on success it returns a new descriptor.
    unsafe { returning_descriptor(BPF_PROG_LOAD, &attributes) }
}

/// Has `program` asked in the network namespace `namespace` until the returned descriptor is closed.
///
/// # Errors
/// EINVAL where `namespace` is none, E2BIG where 64 programs are asked there already.
pub(super) fn attach_socket_lookup(
    program: BorrowedFd<'_>,
    namespace: BorrowedFd<'_>,
) -> Result<OwnedFd, Errno> {
    let attributes = LinkCreate {
        program: program.as_raw_fd().cast_unsigned(),
        target: namespace.as_raw_fd().cast_unsigned(),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: the structure has the layout that the kernel reads for this command and holds no address; on success
    // the command returns a new descriptor.
    unsafe { returning_descriptor(BPF_LINK_CREATE, &attributes) }
}

/// # Safety
/// `attributes` is what the kernel reads for `command`, and every address in it is valid for that.
unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> Result<libc::c_long, Errno> {
    // SAFETY: the kernel reads as many bytes as it is told; the caller vouches for what they mean.
    Errno::result(unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) })
}

/// # Safety
/// As for [`bpf`]; and `command` returns a new descriptor.
unsafe fn returning_descriptor<T>(command: libc::c_long, attributes: &T) -> Result<OwnedFd, Errno> {
    // SAFETY: the caller vouches for it.
    let descriptor = unsafe { bpf(command, attributes) }?;
    let descriptor = RawFd::try_from(descriptor).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just returned this descriptor and nobody else owns it. bpf(2) sets close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
