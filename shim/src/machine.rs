//! What a pod's machine is like, before it is any pod's.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use mayu_agent_api::READY_PORT;
use mayu_vmm_api::{RateLimit, VmConfig};

use crate::Result;
use crate::config::Vm;
use crate::error::file;
use crate::pod_spec::Size;
use crate::vmm_process::HostFiles;

/// The guest's vsock context id. It need not differ from pod to pod: each VMM has a vsock of its own.
const GUEST_CID: u32 = 3;

/// A machine that starts with `first` and may grow as far as the configuration lets it. It has no name, no uid and no limits yet.
pub fn machine(vm: &Vm, first: Size, net_slots: u8) -> VmConfig {
    let largest = first.largest(vm);
    VmConfig {
        sandbox_id: String::new(),
        vcpus: first.vcpus,
        max_vcpus: largest.vcpus,
        memory_mib: first.memory_mib,
        max_memory_mib: largest.memory_mib,
        net_slots,
        guest_cid: GUEST_CID,
        kernel_args: vm.kernel_args.clone(),
        host_ports: vec![READY_PORT],
        uid: 0,
        net_limit: RateLimit::default(),
        block_limit: RateLimit::default(),
        made_of: BTreeMap::new(),
    }
}

/// What has to be the same where a saved machine is to go on.
///
/// # Errors
/// [`crate::Error::File`]: one of it cannot be looked at.
pub fn made_of(vm: &Vm, files: &HostFiles) -> Result<BTreeMap<String, String>> {
    let host = nix::sys::utsname::uname().map_err(crate::error::system("ask for the host's kernel"))?;
    let of_host = format!("{} {}", host.release().to_string_lossy(), host.version().to_string_lossy());
    let made_of = [
        ("guest kernel", identity(files.kernel.metadata(), &vm.kernel)?),
        ("guest image", identity(files.image.metadata(), &vm.image)?),
        ("mayu-vmm", identity(fs::metadata(&vm.vmm), &vm.vmm)?),
        ("host kernel", of_host),
    ];
    Ok(made_of.map(|(name, identity)| (name.to_owned(), identity)).into())
}

/// A file whose content changes gets another one, and so does a directory. Reading all of it would take longer than a pod has to start.
///
/// # Errors
/// [`crate::Error::File`].
pub fn identity(metadata: io::Result<Metadata>, path: &Path) -> Result<String> {
    let metadata = metadata.map_err(file("look at", path))?;
    Ok(format!(
        "{} (inode {} on {}, {} bytes, changed at {}.{:09})",
        path.display(),
        metadata.ino(),
        metadata.dev(),
        metadata.len(),
        metadata.ctime(),
        metadata.ctime_nsec()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_replaced_is_another_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kernel");
        let identity = || identity(fs::metadata(&path), &path).unwrap();
        fs::write(&path, "one").unwrap();
        let first = identity();
        assert_eq!(identity(), first);
        fs::write(directory.path().join("new"), "two").unwrap();
        fs::rename(directory.path().join("new"), &path).unwrap();
        assert_ne!(identity(), first);
    }
}
