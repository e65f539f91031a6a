//! Are the guest's kernel and image, and mayu's own programs, there and fit?

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use elf::ElfStream;
use elf::abi::{EM_X86_64, ET_EXEC, PT_LOAD};
use elf::endian::AnyEndian;
use elf::file::Class;
use mayu_shim::config::Config;

use super::Fact;

/// What a kernel must have been built with (docs/guest-kernel.md gives the reasons).
const REQUIRED: &[&str] = &[
    "64BIT",
    "BINFMT_ELF",
    "BPF_SYSCALL",
    "CGROUPS",
    "CGROUP_BPF",
    "CGROUP_FREEZER",
    "CGROUP_PIDS",
    "CPUSETS",
    "DEVTMPFS",
    "EROFS_FS",
    "FUSE_FS",
    "INOTIFY_USER",
    "IPC_NS",
    "KVM_GUEST",
    "MEMCG",
    "NET_NS",
    "OVERLAY_FS",
    "PID_NS",
    "POSIX_MQUEUE",
    "SECCOMP_FILTER",
    "SERIAL_8250_CONSOLE",
    "TMPFS",
    "UNIX98_PTYS",
    "USER_NS",
    "UTS_NS",
    "VIRTIO_BLK",
    "VIRTIO_FS",
    "VIRTIO_MMIO",
    "VIRTIO_MMIO_CMDLINE_DEVICES",
    "VIRTIO_VSOCKETS",
    "X86_MPPARSE",
];

/// The largest kernel file that is read.
const MAX_KERNEL: u64 = 512 << 20;

/// EROFS superblock offset and magic (kernel: fs/erofs/erofs_fs.h).
const EROFS_SUPER_OFFSET: u64 = 1024;
const EROFS_SUPER_MAGIC: u32 = 0xE0F5_E1E2;

/// The guest kernel, the guest image and the VMM.
pub fn facts(config: &Config, kernel: Option<&Path>) -> Vec<Fact> {
    vec![
        kernel_fact(kernel.unwrap_or(&config.vm.kernel)),
        image_fact(&config.vm.image),
        program_fact("vmm", &config.vm.vmm),
    ]
}

fn kernel_fact(path: &Path) -> Fact {
    const NAME: &str = "guest-kernel";
    let found = |text: &str| format!("{}: {text}", path.display());
    match inspect_kernel(path) {
        Ok(None) => {
            Fact::good(NAME, found("64-bit ELF; its configuration is not embedded, so it is not verified"))
        }
        Ok(Some(missing)) if missing.is_empty() => {
            Fact::good(NAME, found(&format!("64-bit ELF with all {} options", REQUIRED.len())))
        }
        Ok(Some(missing)) => {
            let options: Vec<_> = missing.iter().map(|option| format!("CONFIG_{option}")).collect();
            Fact::bad(
                NAME,
                found("built without what a pod needs"),
                format!("build it with {}", options.join(", ")),
            )
        }
        Err(reason) => Fact::bad(
            NAME,
            found(&reason),
            "build one with `make guest`, or set vm.kernel in the configuration",
        ),
    }
}

/// Checks that the VMM can load the file. Returns the missing options, or nothing where it does not tell them.
fn inspect_kernel(path: &Path) -> Result<Option<Vec<&'static str>>, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let size = file.metadata().map_err(|error| error.to_string())?.len();
    if size > MAX_KERNEL {
        return Err(format!("{size} bytes is no kernel"));
    }
    let mut bytes = Vec::new();
    (&file).take(MAX_KERNEL).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    let kernel = ElfStream::<AnyEndian, _>::open_stream(file)
        .map_err(|error| format!("not an uncompressed ELF kernel (vmlinux): {error}"))?;
    let header = kernel.ehdr;
    if (header.class, header.e_machine, header.e_type) != (Class::ELF64, EM_X86_64, ET_EXEC) {
        return Err("not a 64-bit x86 executable".to_owned());
    }
    let mut loadable = kernel.segments().iter().filter(|segment| segment.p_type == PT_LOAD).peekable();
    if loadable.peek().is_none() {
        return Err("nothing in it is to be loaded".to_owned());
    }
    if loadable.any(|segment| segment.p_offset.saturating_add(segment.p_filesz) > size) {
        return Err("truncated: a segment ends beyond the file".to_owned());
    }
    Ok(embedded_config(&bytes).map(|config| missing_options(&config)))
}

fn missing_options(config: &str) -> Vec<&'static str> {
    let set: std::collections::HashSet<_> =
        config.lines().filter_map(|line| line.strip_prefix("CONFIG_")?.strip_suffix("=y")).collect();
    REQUIRED.iter().copied().filter(|option| !set.contains(option)).collect()
}

/// The gzipped configuration that CONFIG_IKCONFIG puts between two markers (kernel: kernel/configs.c).
fn embedded_config(kernel: &[u8]) -> Option<String> {
    const MAX_CONFIG: u64 = 4 << 20;
    let start = kernel.windows(8).position(|window| window == b"IKCFG_ST")? + 8;
    let length = kernel[start..].windows(8).position(|window| window == b"IKCFG_ED")?;
    let mut text = String::new();
    let gzip = flate2::read::GzDecoder::new(&kernel[start..start + length]);
    gzip.take(MAX_CONFIG).read_to_string(&mut text).ok()?;
    Some(text)
}

fn image_fact(path: &Path) -> Fact {
    const NAME: &str = "guest-image";
    let found = |text: &str| format!("{}: {text}", path.display());
    match erofs_magic(path) {
        Ok(EROFS_SUPER_MAGIC) => Fact::good(NAME, found("EROFS")),
        Ok(_) => Fact::bad(NAME, found("not an EROFS image"), "build one with `make guest`"),
        Err(error) => Fact::bad(
            NAME,
            found(&error.to_string()),
            "build one with `make guest`, or set vm.image in the configuration",
        ),
    }
}

fn erofs_magic(path: &Path) -> std::io::Result<u32> {
    let mut file = File::open(path)?;
    let mut magic = [0; 4];
    file.seek(SeekFrom::Start(EROFS_SUPER_OFFSET))?;
    file.read_exact(&mut magic)?;
    Ok(u32::from_le_bytes(magic))
}

/// Whether an executable file is there.
pub fn program_fact(name: &'static str, path: &Path) -> Fact {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 => {
            Fact::good(name, path.display().to_string())
        }
        Ok(_) => {
            Fact::bad(name, format!("{} is not an executable file", path.display()), "install mayu again")
        }
        Err(error) => {
            Fact::bad(name, format!("{}: {error}", path.display()), "install mayu with `make install`")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file_with(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn the_embedded_configuration_is_found_and_read() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(b"CONFIG_FUSE_FS=y\n# CONFIG_MEMCG is not set\nCONFIG_EROFS_FS=m\n").unwrap();
        let kernel = [b"code IKCFG_ST", gzip.finish().unwrap().as_slice(), b"IKCFG_ED more"].concat();

        let missing = missing_options(&embedded_config(&kernel).unwrap());

        assert!(!missing.contains(&"FUSE_FS"));
        assert!(missing.contains(&"MEMCG"));
        assert!(missing.contains(&"EROFS_FS"), "a module is of no use: the guest image has none");
    }

    #[test]
    fn a_kernel_without_embedded_configuration_tells_nothing() {
        assert_eq!(embedded_config(b"IKCFG_ST but no end"), None);
    }

    #[test]
    fn a_compressed_kernel_is_named_as_such() {
        let fact = kernel_fact(
            file_with(b"MZ\0\0 a bzImage, say, with more bytes than a header has in it....").path(),
        );
        assert!(!fact.ok);
        assert!(fact.found.contains("not an uncompressed ELF kernel"), "{}", fact.found);
    }

    #[test]
    fn a_missing_kernel_comes_with_a_remedy() {
        let fact = kernel_fact(Path::new("/nonexistent/vmlinux"));
        assert!(!fact.ok);
        assert!(fact.remedy.unwrap().contains("make guest"));
    }

    #[test]
    fn an_image_is_told_by_its_magic() {
        let mut image = vec![0; 4096];
        assert!(!image_fact(file_with(&image).path()).ok);
        image[1024..1028].copy_from_slice(&EROFS_SUPER_MAGIC.to_le_bytes());
        assert!(image_fact(file_with(&image).path()).ok);
    }

    #[test]
    fn a_program_must_be_executable() {
        let file = file_with(b"#!");
        std::fs::set_permissions(file.path(), PermissionsExt::from_mode(0o644)).unwrap();
        assert!(!program_fact("vmm", file.path()).ok);
        std::fs::set_permissions(file.path(), PermissionsExt::from_mode(0o755)).unwrap();
        assert!(program_fact("vmm", file.path()).ok);
    }
}
