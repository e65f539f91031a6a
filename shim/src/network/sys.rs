//! The ioctls of namespaces (ioctl_ns(2)) and of TAP devices (Documentation/networking/tuntap.rst).
#![allow(unsafe_code)]

use std::fs::File;
use std::mem;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc::{self, c_int};
use nix::{ioctl_none_bad, ioctl_write_ptr_bad, request_code_none, request_code_write};

/// The longest name of an interface, in bytes (`IFNAMSIZ` without its zero).
pub(super) const MAX_NAME: usize = libc::IFNAMSIZ - 1;

// linux/nsfs.h.
ioctl_none_bad!(ns_get_nstype, request_code_none!(0xb7, 0x3));
// linux/if_tun.h: `_IOW('T', 202, int)`, although what it points to is a `struct ifreq`.
ioctl_write_ptr_bad!(tunsetiff, request_code_write!(b'T', 202, size_of::<c_int>()), libc::ifreq);

/// Whether `file` is a network namespace.
pub(super) fn is_network_namespace(file: &File) -> bool {
    // SAFETY: the request takes no argument. A file of another kind answers ENOTTY, or with a number of its own.
    let kind = unsafe { ns_get_nstype(file.as_raw_fd()) };
    kind == Ok(libc::CLONE_NEWNET)
}

/// Makes a TAP device called `name` in the calling thread's network namespace, which lives as long as `tun`, an open
/// `/dev/net/tun`. Frames come without `struct tun_pi` and with `struct virtio_net_hdr`.
///
/// # Errors
/// EINVAL for a name that is too long, EBUSY for one that is taken, EPERM.
pub(super) fn make_tap(tun: &File, name: &str) -> Result<(), Errno> {
    if name.len() > MAX_NAME {
        return Err(Errno::EINVAL);
    }
    // SAFETY: `ifreq` is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the kernel reads one `struct ifreq`, whose name ends with a zero and whose flags are set.
    unsafe { tunsetiff(tun.as_raw_fd(), &raw const request) }.map(drop)
}
