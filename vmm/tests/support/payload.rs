//! Guests of a few hand-assembled instructions.

use std::fs::File;
use std::io::{Seek as _, Write as _};

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
