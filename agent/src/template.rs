//! What a machine that becomes a template has done before it is saved. Each of its pods would do it otherwise, and have memory of its own
//! for what is the same in all of them.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::device_filter;
use crate::error::{Error, Result};
use crate::sys;

/// What is to be kept for as long as pods are to share what was prepared.
#[derive(Debug)]
pub struct Prepared {
    /// The kernel takes 2 MiB for the machine code of all BPF programs when it has the first one, and gives them back after the last
    /// (`bpf_prog_pack_alloc` of its kernel/bpf/core.c). It fills them with traps, which is to write all of that memory.
    _filter: OwnedFd,
}

/// Prepares the machine, whose agent is `program`.
///
/// # Errors
///
/// The program cannot be read, or no BPF program loaded.
pub fn prepare(program: &Path) -> Result<Prepared> {
    // What the guest's kernel has of it in its page cache is not read again: the first container has much of it executed.
    File::open(program)
        .and_then(|mut program| io::copy(&mut program, &mut io::sink()))
        .map_err(Error::file("read", program))?;
    let filter = device_filter::compile(&[])?;
    let filter = sys::load_device_filter(&filter).map_err(Error::system("load a BPF program"))?;
    Ok(Prepared { _filter: filter })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = prepare(Path::new("/no/agent")).unwrap_err();
        assert!(error.to_string().contains("/no/agent"), "{error}");
    }
}
