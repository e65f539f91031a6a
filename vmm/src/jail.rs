//! Where the process goes before it has anything to do with the guest.
//!
//! It ends up in namespaces of its own, in a root directory that holds the pod's share and nothing else, as an
//! unprivileged user. Its user namespace maps every id to itself, which makes capabilities mean what they say on
//! the files of the share and nothing anywhere else: `docs/adr/0002-user-namespace-for-file-ownership.md`.
//!
//! ```text
//! spawned process                          the machine's process
//! fork into the pod's cgroup and a new ──▶ mounts, IPC, host name and network of its own
//! PID namespace                            root: /share and /proc
//! Event::Started
//! write its id maps ◀───────────────────── user namespace
//! exit                                     unprivileged uid, file capabilities for the fs device's threads
//!                                          Landlock: the share, where the kernel has it
//!                                          drop_capabilities(): none for the rest
//! ```

#![allow(unsafe_code)]

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use ::landlock::RulesetStatus;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{ForkResult, Pid};
use rustix::fs::{Mode, OFlags, fstat, open, stat};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change,
    mount_remount, unmount,
};
use rustix::process::{
    DumpableBehavior, PidfdFlags, Resource, Rlimit, Signal, chdir, getpid, getrlimit, pidfd_open, pivot_root,
    set_dumpable_behavior, set_parent_process_death_signal, setrlimit,
};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid, remove_capability_from_bounding_set,
    set_capabilities, set_capabilities_secure_bits, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use crate::error::{Error, Result};

mod landlock;

/// How many descriptors the process may have: the kernel's default `fs.nr_open`.
const DESCRIPTORS: u64 = 1 << 20;

/// For how many there is room from the start: those of the devices, and of the files that a guest with some programs knows.
const DESCRIPTOR_TABLE: u64 = 4096;

/// What the process may have mapped beyond the guest's memory: the stacks of all threads, the allocator's arenas, the program.
/// Much of that is address space only.
const OWN_MEMORY: u64 = 1 << 30;

/// Has clone3(2) put the new process into a cgroup: include/uapi/linux/sched.h. The constant of the `libc` crate has too few bits.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Where the pod's share is mounted inside the jail.
pub const SHARE: &str = "/share";

/// What the fs device needs to act for the guest's users on the files of the share.
const FILE_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

/// Every user and group is itself.
const IDENTITY_MAP: &str = "0 0 4294967295";

/// Where the new root is put together: a directory that every host has, and that this process has no further use for.
const STAGING: &str = "/proc";

/// Which of the two processes this is after [`enter`].
pub enum Side {
    /// The one that was spawned. It has done its part and is to exit at once.
    Outside,
    /// The one in the jail.
    Inside {
        /// How much of the rules about files the kernel enforces.
        landlock: RulesetStatus,
    },
}

/// Forks the process into the jail, and into `cgroup` if there is one. `announce` tells the shim the pid of the one inside;
/// it is called outside. Must be called while the process has one thread. The capabilities that remain inside are for the fs device's
/// threads: [`drop_capabilities`] is to be called once they run.
///
/// # Errors
/// A step failed; what was made of the jail ends with the process.
pub fn enter(
    share: OwnedFd,
    cgroup: Option<OwnedFd>,
    uid: u32,
    announce: impl FnOnce(Pid) -> Result<()>,
) -> Result<Side> {
    allow_descriptors();
    bound_arenas();
    let (outside, inside) = UnixStream::pair().map_err(failed("make a socket pair"))?;
    let parent = pidfd_open(getpid(), PidfdFlags::empty()).map_err(failed("open its pidfd"))?;
    let forked = fork(cgroup.as_ref());
    // A directory of the old root, in both processes.
    drop(cgroup);
    match forked.map_err(failed("fork into the pod's cgroup and a PID namespace"))? {
        ForkResult::Parent { child } => {
            drop(inside);
            announce(child)?;
            serve_id_maps(outside, child)?;
            Ok(Side::Outside)
        }
        ForkResult::Child => {
            drop(outside);
            enlarge_descriptor_table(&inside);
            build_root(share)?;
            request_id_maps(inside)?;
            become_unprivileged(uid)?;
            let landlock = restrict_files()?;
            die_with_the_shim(&parent)?;
            Ok(Side::Inside { landlock })
        }
    }
}

/// Forks the process into a new PID namespace, and into `cgroup`. To be put there by the kernel costs a process nothing; to be moved there
/// later, by writing to `cgroup.procs`, has it wait for a grace period of RCU: `cgroup_css_set_fork` and
/// `cgroup_attach_lock` in the kernel's kernel/cgroup/cgroup.c. Must be called while the process has one thread.
fn fork(cgroup: Option<&OwnedFd>) -> io::Result<ForkResult> {
    let namespace = libc::CLONE_NEWPID as u64;
    // SAFETY: all fields are integers, and zero means that nothing is asked for.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.flags = match cgroup {
        Some(directory) => {
            arguments.cgroup = directory.as_raw_fd() as u64;
            namespace | CLONE_INTO_CGROUP
        }
        None => namespace,
    };
    // SAFETY: without CLONE_VM this is fork(2): the child goes on with a copy of everything. The process has a single thread, so no
    // lock is held by one that the child lacks. The C library's fork would also note the child's thread id, which it reads
    // for mutexes that know their owner. This thread keeps the one that it has outside; those that it starts are counted from 2.
    match unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(ForkResult::Child),
        pid => Ok(ForkResult::Parent { child: Pid::from_raw(pid as i32) }),
    }
}

/// Lets the fs device hold as many files as it may, whatever containerd was started with. Inside nobody could any more.
fn allow_descriptors() {
    let wanted = Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) };
    if getrlimit(Resource::Nofile).maximum.is_some_and(|maximum| maximum < DESCRIPTORS) {
        // Where `fs.nr_open` is less, what is allowed has to do: the device keeps to it.
        let _ = setrlimit(Resource::Nofile, wanted);
    }
}

/// Has the kernel make the table of descriptors larger, to which `any` belongs, while the process has a single thread. When threads share
/// a table that grows, the kernel waits for a grace period of RCU, which takes some milliseconds: `expand_fdtable` in its fs/file.c.
fn enlarge_descriptor_table(any: &UnixStream) {
    let allowed = getrlimit(Resource::Nofile).current.unwrap_or(DESCRIPTORS);
    if let Ok(last) = i32::try_from(allowed.min(DESCRIPTOR_TABLE).saturating_sub(1)) {
        // The copy is closed at once. Without room for it the table grows when it has to.
        let _ = fcntl_dupfd_cloexec(any, last);
    }
}

/// Lets the allocator have two arenas for all threads. It would else count the processors once there are some, in `/sys`,
/// which is not in the jail and nothing that a thread may open; and each arena costs memory.
fn bound_arenas() {
    // SAFETY: sets a number, while the process has a single thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
}

/// Bounds what the process may have mapped, whoever is in command of it, with a guest of at most so much memory.
///
/// # Errors
/// The kernel refuses.
pub fn bound_memory(guest_mib: u32) -> Result<()> {
    let bytes = Some((u64::from(guest_mib) << 20) + OWN_MEMORY);
    setrlimit(Resource::As, Rlimit { current: bytes, maximum: bytes }).map_err(failed("bound its memory"))
}

/// Takes every capability from the calling thread and from those that it starts.
///
/// # Errors
/// The kernel refuses.
pub fn drop_capabilities() -> Result<()> {
    hold_capabilities(CapabilitySet::empty())
}

/// Gives the process a root directory with the share and its own `/proc`, in new namespaces.
fn build_root(share: OwnedFd) -> Result<()> {
    let path =
        fs::read_link(format!("/proc/self/fd/{}", share.as_raw_fd())).map_err(failed("find the share"))?;
    let identity = fstat(&share).map_err(failed("look at the share"))?;
    // A directory of the old root would be a way back to it.
    drop(share);
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWNET,
    )
    .map_err(failed("make namespaces"))?;
    // What is mounted outside appears here, not the other way round.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(failed("make mounts its own"))?;
    let bare = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", STAGING, "tmpfs", bare, c"size=16k,nr_inodes=8,mode=755")
        .map_err(failed("mount a tmpfs"))?;
    chdir(STAGING).map_err(failed("enter the new root"))?;
    for directory in ["share", "proc"] {
        fs::create_dir(directory).map_err(failed("make a directory"))?;
    }
    // In the new mount namespace the share can be reached by its path only. What the shim mounts there meanwhile is
    // not lost: it comes to this namespace from its beginning, and binding copies and attaches in one step.
    mount_bind_recursive(&path, "share").map_err(failed("mount the share"))?;
    let bound = stat("share").map_err(failed("look at the share"))?;
    if (bound.st_dev, bound.st_ino) != (identity.st_dev, identity.st_ino) {
        return Err(failed("find the share: its path leads elsewhere")(Errno::STALE));
    }
    mount("proc", "proc", "proc", bare | MountFlags::RDONLY, c"subset=pid")
        .map_err(failed("mount proc with subset=pid (Linux 5.8)"))?;
    // Puts the old root on top of the new one, from where it is taken away: pivot_root(2), NOTES.
    pivot_root(".", ".").map_err(failed("change the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("leave the old root"))?;
    chdir("/").map_err(failed("enter the new root"))?;
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY | bare, "")
        .map_err(failed("make the root read-only"))
}

/// Makes the user namespace and waits until the process outside has written its maps.
fn request_id_maps(mut outside: UnixStream) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER)
        .map_err(failed("make a user namespace (see the sysctl user.max_user_namespaces)"))?;
    let mut reply = [0; 4];
    outside
        .write_all(&[0])
        .and_then(|()| outside.read_exact(&mut reply))
        .map_err(failed("ask for its id maps"))?;
    match i32::from_le_bytes(reply) {
        0 => Ok(()),
        errno => Err(failed("write its id maps")(io::Error::from_raw_os_error(errno))),
    }
}

/// The other end of [`request_id_maps`]: only a process outside may map ids other than its own.
fn serve_id_maps(mut inside: UnixStream, child: Pid) -> Result<()> {
    let mut request = [0];
    if inside.read_exact(&mut request).is_err() {
        // It has failed, and says so itself.
        return Ok(());
    }
    let written = ["uid_map", "gid_map"]
        .iter()
        .try_for_each(|map| fs::write(format!("/proc/{child}/{map}"), IDENTITY_MAP));
    let errno = written.err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO));
    inside.write_all(&errno.to_le_bytes()).map_err(failed("answer about the id maps"))
}

/// Changes to `uid`, and keeps of all capabilities those that act on files.
fn become_unprivileged(uid: u32) -> Result<()> {
    if uid == 0 || uid == u32::MAX {
        return Err(failed("change its user")(Errno::INVAL));
    }
    // A core dump would hold the guest's memory.
    let nothing = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, nothing).map_err(failed("switch core dumps off"))?;
    // Changing the user gives and takes no capabilities, and neither does executing a program.
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED,
    )
    .map_err(failed("lock its secure bits"))?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    set_thread_groups(&[]).map_err(failed("give up its groups"))?;
    set_thread_res_gid(group, group, group).map_err(failed("change its group"))?;
    set_thread_res_uid(user, user, user).map_err(failed("change its user"))?;
    for capability in FILE_CAPABILITIES.complement().iter() {
        match remove_capability_from_bounding_set(capability) {
            // The kernel does not know this one.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => return Err(failed("bound its capabilities")(error)),
        }
    }
    hold_capabilities(FILE_CAPABILITIES)?;
    set_no_new_privs(true).map_err(failed("forbid new privileges"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("forbid being traced"))
}

fn hold_capabilities(set: CapabilitySet) -> Result<()> {
    let sets = CapabilitySets { effective: set, permitted: set, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(failed("drop capabilities"))
}

fn restrict_files() -> Result<RulesetStatus> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let share = open(SHARE, flags, Mode::empty()).map_err(failed("open the share"))?;
    landlock::restrict(share)
        .map_err(|error| failed("restrict itself with Landlock")(io::Error::other(error)))
}

/// Has the kernel kill this process when the shim ends. The shim becomes its parent when `parent` ends, so that has
/// to happen first. A shim that ends before this takes effect has closed the control socket, which ends the event loop.
fn die_with_the_shim(parent: &OwnedFd) -> Result<()> {
    let mut exited = [PollFd::new(parent.as_fd(), PollFlags::POLLIN)];
    while let Err(errno) = poll(&mut exited, PollTimeout::NONE) {
        if errno != nix::errno::Errno::EINTR {
            return Err(failed("wait for the process outside")(errno));
        }
    }
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed("ask to die with the shim"))
}

fn failed<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Jail { operation, source: source.into() }
}
