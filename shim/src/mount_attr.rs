//! mount_setattr(2), which neither `nix` nor `rustix` has.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::libc::{
    AT_EMPTY_PATH, AT_RECURSIVE, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY,
    MS_PRIVATE, MS_SLAVE, SYS_mount_setattr, c_uint, mount_attr, syscall,
};

/// What is mounted where something else is, later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// Stays there.
    None,
    /// Comes here as well; what is mounted here does not go there.
    FromSource,
}

/// How far a change goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// The mount alone.
    Itself,
    /// With those below it.
    AllBelow,
}

/// Sets the propagation of a mount and of those below it.
///
/// # Errors
/// The kernel's.
pub fn set_propagation(tree: &impl AsFd, propagation: Propagation) -> io::Result<()> {
    let propagation = match propagation {
        Propagation::None => MS_PRIVATE,
        Propagation::FromSource => MS_SLAVE,
    };
    set(tree, Depth::AllBelow, &mount_attr { attr_set: 0, attr_clr: 0, propagation, userns_fd: 0 })
}

/// Makes a mount one for reading only.
///
/// # Errors
/// The kernel's.
pub fn set_read_only(tree: &impl AsFd, depth: Depth) -> io::Result<()> {
    let attributes = mount_attr { attr_set: MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    set(tree, depth, &attributes)
}

/// Makes a mount and those below it harmless to whoever serves them to a guest: there are no devices on it, and programs are
/// not executed. What the guest does with its files is not touched by that.
///
/// # Errors
/// The kernel's.
pub fn set_inert(tree: &impl AsFd) -> io::Result<()> {
    let inert = MOUNT_ATTR_NODEV | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC;
    set(tree, Depth::AllBelow, &mount_attr { attr_set: inert, attr_clr: 0, propagation: 0, userns_fd: 0 })
}

fn set(tree: &impl AsFd, depth: Depth, attributes: &mount_attr) -> io::Result<()> {
    let recursion = if depth == Depth::AllBelow { AT_RECURSIVE } else { 0 };
    let flags = (AT_EMPTY_PATH | recursion) as c_uint;
    // SAFETY: the descriptor is open for the call, the path is an empty C string, and the kernel only reads the
    // structure, whose size it is told.
    let result = unsafe {
        syscall(
            SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
