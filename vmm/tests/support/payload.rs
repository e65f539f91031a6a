//! Guests of a few hand-assembled instructions.

use std::fs::File;
use std::io::{Seek as _, Write as _};

use mayu_vmm::arch::layout::{PDPT, VIRTIO_MMIO, virtio_address};

/// Where the code is linked: at the least address that a kernel may have.
const LOAD_ADDRESS: u64 = 0x10_0000;

/// `mov edx, 0x3f8`, and for each byte `mov al, byte; out dx, al`.
pub fn print(text: &str) -> Vec<u8> {
    let mut code = vec![0xba, 0xf8, 0x03, 0, 0];
    code.extend(text.bytes().flat_map(|byte| [0xb0, byte, 0xee]));
    code
}

/// `mov al, 0xfe; out 0x64, al`.
pub const RESET: [u8; 4] = [0xb0, 0xfe, 0xe6, 0x64];

/// `inc rbx; jmp` to the former.
pub const COUNT_FOREVER: [u8; 5] = [0x48, 0xff, 0xc3, 0xeb, 0xfb];

/// `inc qword [0x20000]`: writes to memory.
pub const COUNT: [u8; 8] = [0x48, 0xff, 0x04, 0x25, 0, 0, 0x02, 0];

/// Waits until block slot 0 has a disk of less than 2 TiB, and counts meanwhile: until the first word of its device's configuration,
/// its capacity, is not zero. It maps the devices' registers first, which the tables that a kernel begins with do not.
pub fn wait_for_disk() -> Vec<u8> {
    // A page directory of its own, in memory that is zero, for the fourth GiB; in it the 2 MiB of the devices.
    const DIRECTORY: u32 = 0x1_0000;
    const FOURTH_GIB: u32 = PDPT.0 as u32 + 3 * 8;
    const DEVICES: u32 = DIRECTORY + ((VIRTIO_MMIO as u32) - 0xc000_0000) / (2 << 20) * 8;
    const CAPACITY: u64 = virtio_address(1) + 0x100;
    let mut code = Vec::new();
    // Present, writable; and for the second a large page that is not cached.
    for (address, entry) in [(FOURTH_GIB, DIRECTORY | 0x3), (DEVICES, VIRTIO_MMIO as u32 | 0x93)] {
        // `mov eax, entry; mov [address], rax`
        code.extend([&[0xb8], entry.to_le_bytes().as_slice()].concat());
        code.extend([&[0x48, 0x89, 0x04, 0x25], address.to_le_bytes().as_slice()].concat());
    }
    code.extend(COUNT);
    // `mov eax, [CAPACITY]; test eax, eax; jz` to where it counts.
    code.extend([&[0xa1], CAPACITY.to_le_bytes().as_slice(), &[0x85, 0xc0, 0x74, 0xeb]].concat());
    code
}

/// An ELF file that is one segment of code.
pub fn elf(code: &[u8]) -> File {
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    file.resize(16, 0);
    // ET_EXEC, EM_X86_64, version; entry, program headers, section headers; flags; sizes and counts.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend([LOAD_ADDRESS, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    file.extend([0; 4]);
    file.extend([64u16, 56, 1, 0, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    // PT_LOAD, readable and executable; offset, addresses, sizes, alignment.
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    let size = code.len() as u64;
    file.extend(
        [120, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 4096].iter().flat_map(|word| word.to_le_bytes()),
    );
    file.extend(code);
    let mut elf = tempfile::tempfile().unwrap();
    elf.write_all(&file).unwrap();
    elf.rewind().unwrap();
    elf
}
