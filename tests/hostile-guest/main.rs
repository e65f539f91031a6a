//! A guest that wants to break its machine: it is booted in place of a kernel, has the processor for itself, and does to
//! every virtio device what no driver would. It never ends, and says now and then how far it has come. With the word `diligent` on its
//! command line it is the opposite, see there.
//!
//! There is no operating system below it and nothing of the standard library. It knows of the machine what the boot
//! protocol promises, the first GiB mapped to itself, and where virtio-mmio devices are (`vmm/src/arch/x86_64/layout.rs`).

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::ptr::{read_volatile, write_volatile};

mod diligent;

/// The first device; each has a page.
const DEVICES: u64 = 0xd000_0000;
const DEVICE_SIZE: u64 = 0x1000;

/// More than there can be: some of them are nobody.
const DEVICE_COUNT: u64 = 24;

/// Registers of virtio-mmio (virtio 1.2, 4.2.2).
const DEVICE_ID: u64 = 0x08;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESCRIPTORS: u64 = 0x80;
const QUEUE_AVAILABLE: u64 = 0x90;
const QUEUE_USED: u64 = 0xa0;

/// A device's id, whose requests are pages and nothing in them (virtio 1.2, 5).
const BALLOON: u32 = 5;

/// Bits of the status (virtio 1.2, 2.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// Flags of a descriptor (virtio 1.2, 2.7.5).
const NEXT: u64 = 1;
const WRITE: u64 = 2;
const INDIRECT: u64 = 4;

/// Where the rings of a queue are, well above the program: a page for each of the three parts, 8 queues a device.
const RINGS: u64 = 0x100_0000;
const RING_SIZE: u64 = 3 * 0x1000;
const QUEUES: u64 = 8;

/// Where the bytes of requests are, and how many.
const BUFFERS: u64 = 0x200_0000;
const BUFFERS_SIZE: u64 = 0x100_0000;

/// The serial port with two of its registers, and the keyboard controller, which resets the machine.
const SERIAL: u16 = 0x3f8;
const LINE_CONTROL: u16 = 3;
const MODEM_CONTROL: u16 = 4;
const KEYBOARD: core::ops::RangeInclusive<u64> = 0x60..=0x64;

/// Present, writable; and for two megabytes at once. Devices are not cached.
const TABLE: u64 = 1 | 1 << 1;
const MEMORY_PAGE: u64 = TABLE | 1 << 7;
const DEVICE_PAGE: u64 = MEMORY_PAGE | 1 << 4;

/// A table of 512 entries of a page table (Intel SDM 3A, 4.5).
#[repr(align(4096))]
#[expect(dead_code, reason = "used by its address")]
struct Table([u64; 512]);

/// Maps the first GiB, memory, and the fourth, in which the devices are. The machine's own tables lie where requests at odd
/// addresses would destroy them; these, the program and its stack are where few of those lead.
static mut TABLES: [Table; 4] = [const { Table([0; 512]) }; 4];

#[repr(align(16))]
#[expect(dead_code, reason = "used by its address")]
struct Stack([u8; 0x4000]);

static mut STACK: Stack = Stack([0; 0x4000]);

// SSE is there on every x86-64, but has to be switched on: CR4.OSFXSR and CR4.OSXMMEXCPT.
global_asm!(
    ".globl start",
    "start:",
    "mov rax, cr4",
    "or rax, 0x600",
    "mov cr4, rax",
    "lea rsp, [rip + {stack} + 0x4000]",
    "call {main}",
    stack = sym STACK,
    main = sym main,
);

/// What boots it leaves the address of its parameters in `rsi`, where a second argument is.
extern "C" fn main(_: u64, parameters: u64) -> ! {
    map();
    if is_diligent(parameters) {
        diligent::run();
    }
    let mut intruder = Intruder { random: Random::new(), rounds: 0 };
    loop {
        if intruder.rounds % 100 == 0 {
            intruder.report();
        }
        intruder.attack();
        intruder.rounds += 1;
    }
}

/// Whether the command line has the word (Documentation/arch/x86/boot.rst, `cmd_line_ptr`).
fn is_diligent(parameters: u64) -> bool {
    let line = u64::from(read32(parameters + 0x228));
    let ends = |at: &u64| read8(*at) == 0;
    let length = (line..line + 0x1000).position(|at| ends(&at)).unwrap_or(0) as u64;
    (line..line + length).any(|at| (at..).zip(b"diligent").all(|(at, byte)| read8(at) == *byte))
}

struct Intruder {
    random: Random,
    rounds: u64,
}

impl Intruder {
    fn attack(&mut self) {
        let device = DEVICES + self.random.below(DEVICE_COUNT) * DEVICE_SIZE;
        match self.random.below(16) {
            0 => write32(device + STATUS, 0),
            1 => self.random_registers(device),
            2 => self.ports(),
            3 => self.flood_the_console(),
            4 => self.configuration(device),
            5 => self.set_up(device, false),
            _ => self.misbehave(device),
        }
    }

    fn report(&self) {
        // Whatever was done to it, it is to print what is written to it, and not to itself.
        write_port(SERIAL + LINE_CONTROL, 3);
        write_port(SERIAL + MODEM_CONTROL, 0);
        // The serial port swallows everything.
        let _ = writeln!(Console, "\nhostile: {} rounds", self.rounds);
    }

    /// A driver that does all as it should until its queues run, and then not any more.
    fn misbehave(&mut self, device: u64) {
        self.set_up(device, true);
        for _ in 0..=self.random.below(8) {
            let queue = self.random.below(4);
            self.fill(device, queue);
            for _ in 0..=self.random.below(16) {
                write32(device + QUEUE_NOTIFY, queue as u32);
            }
            if self.random.one_in(4) {
                write32(device + INTERRUPT_ACKNOWLEDGE, u32::MAX);
            }
            if self.random.one_in(8) {
                self.queue(device, queue, false);
            }
            if self.random.one_in(16) {
                write32(device + STATUS, 0);
            }
        }
    }

    fn set_up(&mut self, device: u64, properly: bool) {
        write32(device + STATUS, 0);
        write32(device + STATUS, ACKNOWLEDGE | DRIVER);
        for word in 0..2 {
            write32(device + DEVICE_FEATURES_SELECT, word);
            let mut features = read32(device + DEVICE_FEATURES);
            if self.random.one_in(4) {
                features &= self.random.next() as u32;
            }
            if !properly {
                features ^= 1 << self.random.below(32);
            }
            write32(device + DRIVER_FEATURES_SELECT, word);
            // VIRTIO_F_VERSION_1 is bit 32; without it nothing goes on.
            write32(device + DRIVER_FEATURES, if word == 1 { features | 1 } else { features });
        }
        write32(device + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        for queue in 0..QUEUES {
            self.queue(device, queue, properly);
        }
        write32(device + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn queue(&mut self, device: u64, queue: u64, properly: bool) {
        write32(device + QUEUE_SELECT, queue as u32);
        let largest = read32(device + QUEUE_SIZE_MAX).min(128);
        let ring = ring(device, queue);
        let mut size = largest;
        let mut parts = [ring, ring + 0x1000, ring + 0x2000];
        if !properly {
            size = self.random.number() as u32;
            parts = parts.map(|part| if self.random.one_in(2) { self.random.number() } else { part });
        }
        write32(device + QUEUE_SIZE, size);
        for (register, part) in [QUEUE_DESCRIPTORS, QUEUE_AVAILABLE, QUEUE_USED].into_iter().zip(parts) {
            write32(device + register, part as u32);
            write32(device + register + 4, (part >> 32) as u32);
        }
        write32(device + QUEUE_READY, 1);
    }

    /// Puts requests into a queue, some of which are.
    fn fill(&mut self, device: u64, queue: u64) {
        let ring = ring(device, queue);
        let is_balloon = read32(device + DEVICE_ID) == BALLOON;
        for descriptor in 0..128 {
            let sane = !self.random.one_in(8);
            let address = if sane { self.buffer(device) } else { self.random.number() };
            let length = match sane {
                true if is_balloon => 4096 * (1 + self.random.below(16)),
                true => 16 + self.random.below(4096),
                false => self.random.number(),
            };
            let mut flags = self.random.next() & (NEXT | WRITE);
            if self.random.one_in(16) {
                flags |= INDIRECT;
            }
            let next = if sane { descriptor + 1 } else { self.random.number() };
            let at = ring + descriptor * 16;
            write64(at, address);
            write64(at + 8, length & 0xffff_ffff | flags << 32 | (next & 0xffff) << 48);
        }
        let available = ring + 0x1000;
        for entry in 0..128 {
            let head = if self.random.one_in(16) { self.random.number() } else { self.random.below(128) };
            write16(available + 4 + entry * 2, head as u16);
        }
        write16(available, self.random.below(2) as u16);
        let index = read16(available + 2);
        let more = if self.random.one_in(16) { self.random.number() } else { self.random.below(32) };
        write16(available + 2, index.wrapping_add(more as u16));
    }

    /// Bytes that begin as a request to this kind of device may.
    fn buffer(&mut self, device: u64) -> u64 {
        let at = BUFFERS + self.random.below(BUFFERS_SIZE - 0x2000);
        let (one, two) = (self.random.number(), self.random.number());
        // Their types: virtio 1.2, 5.
        match read32(device + DEVICE_ID) {
            // virtio-net: flags, segmentation, lengths.
            1 => write_words(at, &[one & 0xffff_ffff, two]),
            // virtio-blk: what, and where.
            2 => write_words(at, &[self.random.below(16), one]),
            // The balloon: pages, which are reported as they are.
            BALLOON => return at & !0xfff,
            // vsock: two context ids, two ports, length, type, operation, flags, credit.
            19 => {
                let (from, to) = (self.random.below(4), self.random.below(4));
                let ports = self.random.below(1100) | self.random.below(1100) << 32;
                let operation = 1 << 32 | self.random.below(9) << 48;
                write_words(at, &[from, to, ports, one & 0xffff | operation, two, self.random.number()]);
            }
            // virtio-fs: length, operation, unique, inode, user, group, process.
            26 => {
                let header = 40 + self.random.below(64) | self.random.below(60) << 32;
                write_words(at, &[header, one, self.random.below(8), 0, 0, two, self.random.number()]);
                if self.random.one_in(2) {
                    self.name(at + 40);
                }
            }
            _ => write_words(at, &[one, two]),
        }
        at
    }

    /// A name that leads elsewhere.
    fn name(&mut self, at: u64) {
        let names: [&[u8]; 6] = [b"..\0", b"/etc/shadow\0", b"../../etc\0", b"a\0b\0", b"\0", b"no end"];
        let name = names[self.random.below(6) as usize];
        for (index, byte) in name.iter().enumerate() {
            write8(at + index as u64, *byte);
        }
    }

    fn random_registers(&mut self, device: u64) {
        for _ in 0..32 {
            let at = device + self.random.below(DEVICE_SIZE - 8);
            let value = self.random.number();
            match self.random.below(8) {
                0 => write8(at, value as u8),
                1 => write16(at & !1, value as u16),
                2 | 3 => write32(device + (self.random.below(0x110) & !3), value as u32),
                4 => write64(at & !7, value),
                5 => drop(read8(at)),
                6 => drop((read16(at & !1), read64(at & !7))),
                _ => drop(read32(at & !3)),
            }
        }
    }

    /// The device's own registers.
    fn configuration(&mut self, device: u64) {
        for _ in 0..16 {
            let at = device + 0x100 + (self.random.below(64) & !3);
            write32(at, self.random.number() as u32);
            read32(at);
        }
    }

    fn ports(&mut self) {
        for _ in 0..32 {
            let port = self.random.below(0x1_0000);
            if !KEYBOARD.contains(&port) {
                write_port(port as u16, self.random.next() as u8);
                read_port(port as u16);
            }
        }
    }

    fn flood_the_console(&mut self) {
        for _ in 0..256 {
            write_port(SERIAL + self.random.below(8) as u16, self.random.next() as u8);
        }
    }
}

fn write_words(at: u64, words: &[u64]) {
    for (index, word) in words.iter().enumerate() {
        write64(at + index as u64 * 8, *word);
    }
}

fn ring(device: u64, queue: u64) -> u64 {
    RINGS + ((device - DEVICES) / DEVICE_SIZE * QUEUES + queue) * RING_SIZE
}

/// xorshift64 of Marsaglia, "Xorshift RNGs", Journal of Statistical Software 8 (2003).
struct Random(u64);

impl Random {
    fn new() -> Self {
        let (low, high): (u32, u32);
        // SAFETY: reads a counter.
        unsafe { asm!("rdtsc", out("eax") low, out("edx") high) };
        Self(u64::from(low) | u64::from(high) << 32 | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// One of those at which programs stumble, or any.
    fn number(&mut self) -> u64 {
        let edges = [
            0,
            1,
            2,
            0xfff,
            0xffff,
            0x7fff_ffff,
            0xffff_ffff,
            1 << 32,
            1 << 63,
            u64::MAX,
            0xcfff_ffff,
            DEVICES,
        ];
        match self.below(3) {
            0 => edges[self.below(edges.len() as u64) as usize],
            1 => self.next() >> self.below(64),
            _ => edges[self.below(edges.len() as u64) as usize].wrapping_add(self.below(64)).wrapping_sub(32),
        }
    }
}

fn map() {
    let tables = (&raw const TABLES) as u64;
    let [top, pointers, memory, devices] = [0, 0x1000, 0x2000, 0x3000].map(|offset| tables + offset);
    write64(top, pointers | TABLE);
    write64(pointers, memory | TABLE);
    write64(pointers + 3 * 8, devices | TABLE);
    for index in 0..512 {
        write64(memory + index * 8, index << 21 | MEMORY_PAGE);
        write64(devices + index * 8, (3 << 30) + (index << 21) | DEVICE_PAGE);
    }
    // SAFETY: the program, its stack and its tables stay where they are.
    unsafe { asm!("mov cr3, {0}", in(reg) top) };
}

macro_rules! access {
    ($read:ident, $write:ident, $type:ty) => {
        fn $read(at: u64) -> $type {
            // SAFETY: the address is one of a device or of memory that nothing else uses.
            unsafe { read_volatile(at as *const $type) }
        }

        fn $write(at: u64, value: $type) {
            // SAFETY: as above.
            unsafe { write_volatile(at as *mut $type, value) }
        }
    };
}

access!(read8, write8, u8);
access!(read16, write16, u16);
access!(read32, write32, u32);
access!(read64, write64, u64);

fn write_port(port: u16, value: u8) {
    // SAFETY: what a port does is the machine's affair, which is what is in question.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value) };
}

fn read_port(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value) };
    value
}

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| write_port(SERIAL, byte));
        Ok(())
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {
        halt();
    }
}

/// Waits; the test sees that there is no more.
fn halt() {
    // SAFETY: stops the processor.
    unsafe { asm!("hlt") };
}

/// What the compiler takes for granted.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise, that of C.
    unsafe { asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _) };
    to
}

/// As above.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise, that of C.
    unsafe { asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") byte as u8) };
    to
}

/// Named by `core`, which is made for programs that unwind. This one does not.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
