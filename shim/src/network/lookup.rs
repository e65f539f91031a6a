//! The BPF program that gives every connection to a loopback address of a namespace to one listening socket, whatever
//! its port (Documentation/bpf/prog_sk_lookup.rst). It needs no netfilter.

use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

use super::bpf::{self, Instruction};

/// The sockets' numbers in the map.
const IPV4: u32 = 0;
const IPV6: u32 = 1;

/// Registers: the result, which is also that of calls; arguments; what calls preserve; the frame.
const RESULT: u8 = 0;
const ARGUMENT_1: u8 = 1;
const ARGUMENT_2: u8 = 2;
const ARGUMENT_3: u8 = 3;
const SCRATCH: u8 = 4;
const CONTEXT: u8 = 6;
const SOCKET: u8 = 7;
const FRAME: u8 = 10;

/// Fields of `struct bpf_sk_lookup` (linux/bpf.h). Addresses are in network order.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];

/// Operation codes of linux/bpf_common.h and linux/bpf.h, composed.
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const LOAD_MAP: u8 = 0x18; // BPF_LD | BPF_IMM | BPF_DW, two instructions long
const STORE_WORD: u8 = 0x62; // BPF_ST | BPF_MEM | BPF_W
const MOVE: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const MOVE_REGISTER: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
const ADD: u8 = 0x07; // BPF_ALU64 | BPF_ADD | BPF_K
const AND: u8 = 0x57; // BPF_ALU64 | BPF_AND | BPF_K
const JUMP: u8 = 0x05; // BPF_JMP | BPF_JA
const JUMP_EQUAL: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_NOT_EQUAL: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const CALL: u8 = 0x85; // BPF_JMP | BPF_CALL
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

/// `BPF_PSEUDO_MAP_FD`: the immediate is a map's descriptor.
const MAP_DESCRIPTOR: u8 = 1;
/// Functions of `enum bpf_func_id`.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
/// `SK_PASS`: go on, with the socket that was assigned or, without one, as if this program were not there.
const PASS: i32 = 1;

/// The attached program; connections reach their sockets as usual when it is dropped.
#[derive(Debug)]
pub(super) struct LoopbackLookup {
    _link: OwnedFd,
}

impl LoopbackLookup {
    /// Gives connections to 127.0.0.0/8 in `namespace` to `ipv4`, those to ::1 to `ipv6`. The sockets belong to the
    /// same namespace.
    ///
    /// # Errors
    /// The operation and the kernel's reason.
    pub(super) fn attach(
        namespace: BorrowedFd<'_>,
        ipv4: &TcpListener,
        ipv6: Option<&TcpListener>,
    ) -> Result<Self, (&'static str, Errno)> {
        let map = bpf::create_socket_map(2).map_err(|errno| ("create a BPF map of sockets for", errno))?;
        for (number, socket) in [(IPV4, Some(ipv4)), (IPV6, ipv6)] {
            if let Some(socket) = socket {
                bpf::put_socket(map.as_fd(), number, socket.as_fd())
                    .map_err(|errno| ("put a socket into the BPF map for", errno))?;
            }
        }
        let program = program(map.as_raw_fd());
        let program = bpf::load_socket_lookup(&program)
            .map_err(|errno| ("load the BPF program (SK_LOOKUP) for", errno))?;
        let link = bpf::attach_socket_lookup(program.as_fd(), namespace)
            .map_err(|errno| ("attach the BPF program (SK_LOOKUP) to", errno))?;
        Ok(Self { _link: link })
    }
}

/// The program. It holds on to the map that `map` describes once it is loaded.
fn program(map: i32) -> Vec<Instruction> {
    // Jumps to the assignment and to the end get their distance when it is known.
    const TO_ASSIGN: i16 = i16::MAX - 1;
    const TO_END: i16 = i16::MAX;
    let key = |number: u32| store(FRAME, -4, number.cast_signed());
    // 127.0.0.0/8, of which the first byte is the lowest in memory.
    let ipv4 = [
        load(SCRATCH, LOCAL_IP4),
        immediate(AND, SCRATCH, i32::from_ne_bytes([0xff, 0, 0, 0])),
        jump(JUMP_NOT_EQUAL, SCRATCH, i32::from_ne_bytes([127, 0, 0, 0]), TO_END),
        key(IPV4),
        jump(JUMP, 0, 0, TO_ASSIGN),
    ];
    let mut program = vec![
        register(MOVE_REGISTER, CONTEXT, ARGUMENT_1),
        load(SCRATCH, PROTOCOL),
        jump(JUMP_NOT_EQUAL, SCRATCH, libc::IPPROTO_TCP, TO_END),
        load(SCRATCH, FAMILY),
        jump(JUMP_EQUAL, SCRATCH, libc::AF_INET6, ipv4.len() as i16),
    ];
    program.extend(ipv4);
    for (field, word) in LOCAL_IP6.into_iter().zip([[0; 4], [0; 4], [0; 4], [0, 0, 0, 1]]) {
        program
            .extend([load(SCRATCH, field), jump(JUMP_NOT_EQUAL, SCRATCH, i32::from_ne_bytes(word), TO_END)]);
    }
    program.push(key(IPV6));
    let assign = program.len();
    program.extend([
        Instruction {
            code: LOAD_MAP,
            registers: MAP_DESCRIPTOR << 4 | ARGUMENT_1,
            offset: 0,
            immediate: map,
        },
        Instruction { code: 0, registers: 0, offset: 0, immediate: 0 },
        register(MOVE_REGISTER, ARGUMENT_2, FRAME),
        immediate(ADD, ARGUMENT_2, -4),
        immediate(CALL, 0, MAP_LOOKUP_ELEM),
        jump(JUMP_EQUAL, RESULT, 0, TO_END),
        register(MOVE_REGISTER, SOCKET, RESULT),
        register(MOVE_REGISTER, ARGUMENT_1, CONTEXT),
        register(MOVE_REGISTER, ARGUMENT_2, SOCKET),
        immediate(MOVE, ARGUMENT_3, 0),
        immediate(CALL, 0, SK_ASSIGN),
        // What the map gave is a reference.
        register(MOVE_REGISTER, ARGUMENT_1, SOCKET),
        immediate(CALL, 0, SK_RELEASE),
    ]);
    let end = program.len();
    program.extend([immediate(MOVE, RESULT, PASS), immediate(EXIT, 0, 0)]);
    for (index, instruction) in program.iter_mut().enumerate() {
        // The whole program is a few dozen instructions.
        match instruction.offset {
            TO_END => instruction.offset = (end - index - 1) as i16,
            TO_ASSIGN => instruction.offset = (assign - index - 1) as i16,
            _ => {}
        }
    }
    program
}

/// Loads a field of the context.
fn load(destination: u8, offset: i16) -> Instruction {
    Instruction { code: LOAD_WORD, registers: CONTEXT << 4 | destination, offset, immediate: 0 }
}

fn store(base: u8, offset: i16, value: i32) -> Instruction {
    Instruction { code: STORE_WORD, registers: base, offset, immediate: value }
}

fn immediate(code: u8, destination: u8, immediate: i32) -> Instruction {
    Instruction { code, registers: destination, offset: 0, immediate }
}

fn register(code: u8, destination: u8, source: u8) -> Instruction {
    Instruction { code, registers: source << 4 | destination, offset: 0, immediate: 0 }
}

fn jump(code: u8, register: u8, value: i32, distance: i16) -> Instruction {
    Instruction { code, registers: register, offset: distance, immediate: value }
}
