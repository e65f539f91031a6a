//! What the shim may do on the host: what its work needs, and what it hands to the VMM for its way into the jail.

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, remove_capability_from_bounding_set, set_capabilities,
};

use crate::Result;
use crate::error::system;

/// Everything else is given up (capabilities(7)).
const NEEDED: CapabilitySet = CapabilitySet::empty()
    // Mounts, namespaces, BPF.
    .union(CapabilitySet::SYS_ADMIN)
    // TAP devices, addresses and routes, redirection.
    .union(CapabilitySet::NET_ADMIN)
    // The namespaces of a VMM, which nobody may look at who does not have it.
    .union(CapabilitySet::SYS_PTRACE)
    // The end of a VMM, which runs as another user.
    .union(CapabilitySet::KILL)
    // More descriptors than containerd was given.
    .union(CapabilitySet::SYS_RESOURCE)
    // The jail: its root directory, its user and groups, the bounds of its privileges.
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP)
    // Files of any user, on the share and for the jail's threads that serve it.
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Gives up every capability that is not needed, also for programs that are started later: the calling thread, and the threads
/// that it starts.
///
/// # Errors
/// [`crate::Error::System`]: the kernel refuses.
pub fn drop_unneeded() -> Result<()> {
    for capability in NEEDED.complement().iter() {
        match remove_capability_from_bounding_set(capability) {
            // The kernel does not know this one.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(errno) => return Err(system("bound its capabilities")(errno)),
        }
    }
    let CapabilitySets { effective, permitted, inheritable } =
        capabilities(None).map_err(system("ask for its capabilities"))?;
    let kept = CapabilitySets {
        effective: effective & NEEDED,
        permitted: permitted & NEEDED,
        inheritable: inheritable & NEEDED,
    };
    set_capabilities(None, kept).map_err(system("drop capabilities"))
}
