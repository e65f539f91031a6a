//! The kernel and its command line, into guest memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::{self, Elf, KernelLoader as _};
use mayu_vmm_api::{TEMPLATE_PARAMETER, VmConfig};
use vm_memory::{Address as _, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion as _};

use crate::arch::layout;
use crate::error::{Error, Result};

/// What every guest is told.
///
/// * The kernel prints errors and panics to the serial port, nothing else: each byte is an exit to this process.
/// * A panic resets the machine at once, by the keyboard controller's reset line, so that a deliberate reset can be
///   told from a triple fault.
/// * The image is the first block device, and the agent is process 1.
/// * The processor's random numbers are taken as entropy; the TSC, which KVM's clock stands on, is not watched.
/// * There are no bounce buffers (64 MiB, from 4 GiB of memory on): virtio reaches all memory.
/// * There is no `dummy0`: a pod's interfaces are those that it was given.
/// * Free memory is reported to the host in pieces of 128 KiB (2^5 pages) and more. By itself the kernel takes pieces of 2 MiB, and
///   reports nothing of a zone of which less than 32 such pieces are free: 64 MiB, which is all that a small pod has grown by.
/// * Whoever waits for a grace period of RCU, as each container's start does some times, has its few processors asked, and does not
///   sleep for some of their ticks (Documentation/admin-guide/kernel-parameters.txt).
const COMMON: &str = "console=ttyS0 quiet reboot=k panic=-1 root=/dev/vda rootfstype=erofs ro \
                      init=/sbin/mayu-agent random.trust_cpu=on tsc=reliable swiotlb=noforce 8250.nr_uarts=1 \
                      dummy.numdummies=0 page_reporting.page_reporting_order=5 rcupdate.rcu_expedited=1";

/// What a guest is told whose memory can grow: memory that was plugged in is used at once, without anybody to say so. It
/// becomes memory of programs alone, which can be moved away and be unplugged again, as long as there is a third as much
/// for the kernel itself, and the kernel's from there on ("auto-movable",
/// Documentation/admin-guide/mm/memory-hotplug.rst). A kernel that grew from little memory to much without getting any of
/// it could not hold its own tables; one that got all of it could never give any back.
const ONLINE_MEMORY: &str = "memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// The kernel's command line: what all guests have in common, `devices` virtio-mmio devices, what follows from the
/// machine's description, and its own words.
///
/// # Errors
/// It gets longer than the kernel takes, or a word has characters other than printable ASCII.
pub fn command_line(config: &VmConfig, devices: usize, is_template: bool) -> Result<Cmdline> {
    let mut line = Cmdline::new(layout::COMMAND_LINE_SIZE).map_err(command_line_error)?;
    line.insert_str(COMMON).map_err(command_line_error)?;
    for index in 0..devices {
        line.add_virtio_mmio_device(
            layout::VIRTIO_MMIO_SIZE,
            GuestAddress(layout::virtio_address(index)),
            layout::virtio_gsi(index),
            None,
        )
        .map_err(command_line_error)?;
    }
    if config.vcpus < config.max_vcpus {
        // The kernel brings up so many; the others are there to be brought up through sysfs.
        line.insert("maxcpus", &config.vcpus.to_string()).map_err(command_line_error)?;
    }
    if config.memory_mib < config.max_memory_mib {
        line.insert_str(ONLINE_MEMORY).map_err(command_line_error)?;
    }
    if is_template {
        line.insert_str(TEMPLATE_PARAMETER).map_err(command_line_error)?;
    }
    if !config.kernel_args.trim().is_empty() {
        line.insert_str(&config.kernel_args).map_err(command_line_error)?;
    }
    Ok(line)
}

fn command_line_error(source: linux_loader::cmdline::Error) -> Error {
    Error::CommandLine { source, limit: layout::COMMAND_LINE_SIZE - 1 }
}

/// Copies the command line to its place and returns its length in bytes, with the final zero.
///
/// # Errors
/// Guest memory is smaller than the least that is allowed.
pub fn load_command_line(memory: &GuestMemoryMmap, line: &Cmdline) -> Result<usize> {
    loader::load_cmdline(memory, layout::COMMAND_LINE, line)
        .map_err(|source| Error::Kernel { problem: source.to_string() })?;
    Ok(line.as_cstring().map_err(command_line_error)?.as_bytes_with_nul().len())
}

/// Copies the segments of an uncompressed 64-bit ELF kernel to where they are linked, and returns its entry.
///
/// # Errors
/// The file cannot be read, is of another kind, is cut short, or does not fit into guest memory.
pub fn load_kernel(memory: &GuestMemoryMmap, mut kernel: File) -> Result<GuestAddress> {
    let problem = |problem: String| Error::Kernel { problem };
    check_header(&kernel)?;
    let loaded = Elf::load(memory, None, &mut kernel, Some(layout::HIGH_RAM))
        .map_err(|source| problem(source.to_string()))?;
    let end = GuestAddress(loaded.kernel_end);
    let low_ram_end = memory.find_region(GuestAddress(0)).map_or(0, |low| low.last_addr().raw_value() + 1);
    if loaded.kernel_end > low_ram_end {
        return Err(problem(format!(
            "it needs memory up to {:#x}, the guest has it up to {low_ram_end:#x}",
            end.raw_value()
        )));
    }
    let entry = loaded.kernel_load;
    if entry < layout::HIGH_RAM || entry >= end {
        return Err(problem(format!("its entry {:#x} lies outside of what it loads", entry.raw_value())));
    }
    Ok(entry)
}

/// Tells the usual mix-ups apart before the loader says "invalid".
fn check_header(kernel: &File) -> Result<()> {
    /// `e_ident` up to the data encoding: ELF, 64 bits, little-endian. `e_machine`: x86-64.
    const IDENT: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
    const EM_X86_64: u16 = 62;
    /// "HdrS" at this offset makes a bzImage (Documentation/arch/x86/boot.rst).
    const BZIMAGE_MAGIC: std::ops::Range<usize> = 0x202..0x206;

    let mut header = [0; 0x206];
    let length = read_start(kernel, &mut header).map_err(Error::ReadKernel)?;
    let problem = if length < 64 {
        "the file is shorter than an ELF header"
    } else if header[..4] != IDENT[..4] && &header[BZIMAGE_MAGIC] == b"HdrS" {
        "it is a compressed bzImage; an uncompressed vmlinux is needed"
    } else if header[..4] != IDENT[..4] {
        "it is no ELF file; an uncompressed vmlinux is needed"
    } else if header[..6] != IDENT || u16::from_le_bytes([header[18], header[19]]) != EM_X86_64 {
        "it is an ELF file, but not for 64-bit x86"
    } else {
        return Ok(());
    };
    Err(Error::Kernel { problem: problem.into() })
}

fn read_start(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read_at(&mut buffer[length..], length as u64)? {
            0 => break,
            count => length += count,
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use mayu_vmm_api::RateLimit;
    use std::io::{Seek as _, Write as _};
    use vm_memory::Bytes as _;

    const LOAD_ADDRESS: u64 = 0x100_0000;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap()
    }

    /// An ELF file with one segment that holds `code` and is followed by `bss` zero bytes.
    fn elf(code: &[u8], bss: u64) -> Vec<u8> {
        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
        file.resize(16, 0);
        file.extend(2u16.to_le_bytes());
        file.extend(62u16.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        for word in [LOAD_ADDRESS, 64, 0] {
            file.extend(word.to_le_bytes());
        }
        file.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 1, 0, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        file.extend(1u32.to_le_bytes());
        file.extend(5u32.to_le_bytes());
        let size = code.len() as u64;
        for word in [120, LOAD_ADDRESS, LOAD_ADDRESS, size, size + bss, 4096] {
            file.extend(word.to_le_bytes());
        }
        file.extend(code);
        file
    }

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.rewind().unwrap();
        file
    }

    fn refusal(content: &[u8]) -> String {
        load_kernel(&memory(), file(content)).unwrap_err().to_string()
    }

    #[test]
    fn a_kernel_is_copied_to_where_it_is_linked() {
        let memory = memory();
        let entry = load_kernel(&memory, file(&elf(b"code", 0))).unwrap();
        assert_eq!(entry, GuestAddress(LOAD_ADDRESS));
        assert_eq!(&memory.read_obj::<[u8; 4]>(entry).unwrap(), b"code");
    }

    #[test]
    fn a_kernel_that_is_none_is_refused_with_what_is_wrong() {
        let mut bzimage = vec![0; 1024];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        let mut arm = elf(b"code", 0);
        arm[18..20].copy_from_slice(&183u16.to_le_bytes());
        let whole = elf(&[0x90; 512], 0);

        assert!(refusal(b"").contains("shorter than an ELF header"));
        assert!(refusal(&[0; 1024]).contains("no ELF file"));
        assert!(refusal(&bzimage).contains("bzImage"));
        assert!(refusal(&arm).contains("not for 64-bit x86"));
        assert!(refusal(&whole[..whole.len() - 1]).contains("read kernel image"));
        assert!(refusal(&whole[..100]).contains("program header"));
    }

    #[test]
    fn a_kernel_does_not_fit_into_memory_that_is_plugged_in_later() {
        let ranges = [(GuestAddress(0), 32 << 20), (GuestAddress(layout::GAP_END), 128 << 20)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let refusal = load_kernel(&memory, file(&elf(b"code", 64 << 20))).unwrap_err().to_string();
        assert!(refusal.contains("needs memory up to"), "{refusal}");
    }

    #[test]
    fn a_kernel_that_does_not_fit_is_refused() {
        assert!(refusal(&elf(b"code", 64 << 20)).contains("needs memory up to"));
    }

    #[test]
    fn an_entry_outside_of_the_kernel_is_refused() {
        let mut low = elf(b"code", 0);
        low[24..32].copy_from_slice(&0x1000u64.to_le_bytes());
        let mut high = elf(b"code", 0);
        high[24..32].copy_from_slice(&(LOAD_ADDRESS + 4).to_le_bytes());
        assert!(refusal(&low).contains("entry"));
        assert!(refusal(&high).contains("entry"));
    }

    fn config(kernel_args: &str) -> VmConfig {
        VmConfig {
            sandbox_id: "test".into(),
            vcpus: 2,
            max_vcpus: 2,
            memory_mib: 64,
            max_memory_mib: 64,
            net_slots: 1,
            guest_cid: 3,
            kernel_args: kernel_args.into(),
            host_ports: vec![],
            uid: 1000,
            net_limit: RateLimit::default(),
            block_limit: RateLimit::default(),
            made_of: BTreeMap::new(),
        }
    }

    fn line(config: &VmConfig, devices: usize) -> Result<String> {
        command_line(config, devices, false).map(|line| line.as_cstring().unwrap().into_string().unwrap())
    }

    #[test]
    fn every_device_is_announced_and_the_caller_s_words_come_last() {
        let line = line(&config(" quiet=no  debug "), 2).unwrap();
        assert!(line.starts_with(COMMON));
        assert!(
            line.ends_with(
                "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 quiet=no  debug"
            ),
            "{line}"
        );
    }

    #[test]
    fn a_command_line_that_is_too_long_or_not_ascii_is_refused() {
        let devices = layout::MAX_VIRTIO_DEVICES;
        let long = line(&config(&"x".repeat(layout::COMMAND_LINE_SIZE)), devices).unwrap_err();
        assert!(long.to_string().contains("2047"), "{long}");
        assert!(line(&config("a\nb"), devices).is_err());
        let longest = VmConfig { max_vcpus: 32, max_memory_mib: 65536, ..config("") };
        assert!(line(&longest, devices).is_ok());
    }

    #[test]
    fn the_kernel_is_told_how_many_vcpus_to_bring_up_if_there_are_more() {
        let more = VmConfig { max_vcpus: 8, ..config("debug") };
        assert!(line(&more, 1).unwrap().ends_with(" maxcpus=2 debug"));
        assert!(!line(&config(""), 1).unwrap().contains("maxcpus"));
    }

    #[test]
    fn the_guest_is_told_that_it_becomes_a_template_and_by_no_other_machine() {
        let of_template = command_line(&config("debug"), 1, true).unwrap().as_cstring().unwrap();
        assert!(of_template.to_str().unwrap().ends_with(" mayu.template debug"));
        assert!(!line(&config("debug"), 1).unwrap().contains("template"));
    }

    #[test]
    fn the_kernel_is_told_what_to_do_with_memory_that_comes_later_if_some_may_come() {
        let more = VmConfig { max_memory_mib: 65, ..config("debug") };
        assert!(line(&more, 1).unwrap().ends_with("=online memory_hotplug.online_policy=auto-movable debug"));
        assert!(!line(&config(""), 1).unwrap().contains("mem"));
    }
}
