//! On whose behalf a worker thread touches files.
//!
//! The kernel keeps credentials, capabilities and (after `unshare`) the umask per thread; libc's `setresuid` and
//! its like spread them over the whole process, so they are not used here. Only the file-system ids change: the
//! thread's real and effective ids, which count for everything that is no file, stay those of the VMM.

use std::io;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::fs::Mode;
use rustix::process::umask;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// The file-system ids of this thread.
pub(super) struct Identity {
    uid: u32,
    gid: u32,
}

impl Identity {
    /// Makes this thread fit to act for others: its umask becomes its own, and empty.
    ///
    /// # Errors
    /// The kernel refuses to part the thread's umask from the process's.
    pub(super) fn of_this_thread() -> io::Result<Self> {
        unshare(CloneFlags::CLONE_FS)?;
        umask(Mode::empty());
        Ok(Self { uid: current_uid(), gid: current_gid() })
    }

    /// Acts for `uid` and `gid` from now on: what is created belongs to them. Where the thread may not do that, as
    /// in a VMM that was not started by root, its own ids remain.
    ///
    /// Capabilities stay as they are in the jail, whose securebits have SECBIT_NO_SETUID_FIXUP. It is for the guest's
    /// kernel to judge what a process may do, since only it knows the supplementary groups; the host's then obeys.
    pub(super) fn assume(&mut self, uid: u32, gid: u32) {
        if self.gid != gid {
            setfsgid(Gid::from_raw(gid));
            self.gid = current_gid();
        }
        if self.uid != uid {
            setfsuid(Uid::from_raw(uid));
            self.uid = current_uid();
        }
    }
}

/// Asking for an impossible id changes nothing and tells the one in force (setfsuid(2)).
fn current_uid() -> u32 {
    setfsuid(Uid::from_raw(u32::MAX)).as_raw()
}

fn current_gid() -> u32 {
    setfsgid(Gid::from_raw(u32::MAX)).as_raw()
}

/// Gives this thread another umask until it is dropped.
pub(super) struct ScopedUmask(Mode);

impl ScopedUmask {
    pub(super) fn new(mask: u32) -> Self {
        Self(umask(Mode::from_bits_retain(mask & 0o777)))
    }
}

impl Drop for ScopedUmask {
    fn drop(&mut self) {
        umask(self.0);
    }
}

/// Takes CAP_FSETID from this thread until it is dropped: the kernel then clears set-user-id and set-group-id
/// where it would for an ordinary user.
pub(super) struct WithoutFsetid(CapabilitySets);

impl WithoutFsetid {
    /// # Errors
    /// The kernel refuses to change the thread's capabilities.
    pub(super) fn new() -> io::Result<Self> {
        let all = capabilities(None)?;
        let effective = all.effective.difference(CapabilitySet::FSETID);
        set_capabilities(None, CapabilitySets { effective, ..all })?;
        Ok(Self(all))
    }
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        // Cannot fail: every capability in the set is still permitted. Were it to, files would lose set-user-id
        // bits that root may keep, which is the safe side.
        let _ = set_capabilities(None, self.0);
    }
}
