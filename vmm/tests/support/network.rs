//! A network of the host's, with one interface in it: a TAP device.

#![allow(unsafe_code)]

use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, unshare};

use super::skip;

/// The local experimental EtherType 1 (IEEE 802), of which no kernel knows anything.
const EXPERIMENTAL: u16 = 0x88b5;

/// The two ends of a cable.
pub struct Cable {
    /// For the machine, opened as the shim does.
    pub tap: File,
    /// A packet socket on the interface, by which frames of [`EXPERIMENTAL`] are read and written.
    pub host: File,
}

/// Whether no TAP device can be made here, which it says then.
pub fn no_tap() -> bool {
    let lacks = !Path::new("/dev/net/tun").exists();
    if lacks {
        skip("needs /dev/net/tun");
    }
    lacks
}

/// Makes an interface in a network namespace of its own, as the shim does in the pod's, and brings it up. It goes with its ends.
pub fn cable() -> Cable {
    // Another thread, so that this one stays in its namespace.
    let made = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        // Nobody but the test sends frames.
        let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        let tap = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        // SAFETY: all-zero bytes are a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        // SAFETY: the kernel reads and writes an `ifreq` at the address.
        check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) });
        request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
        Cable { tap, host: packet_socket(&request) }
    });
    made.join().unwrap()
}

/// Sets an interface's flags, and makes a socket for its experimental frames. It hears nothing of those that it has sent itself.
fn packet_socket(interface: &libc::ifreq) -> File {
    // SAFETY: a new descriptor that nobody else knows of. The protocol comes with the address.
    let socket = unsafe {
        File::from_raw_fd(check(libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0)))
    };
    // Before it is bound: it would be told that the interface is down.
    // SAFETY: the kernel reads an `ifreq` at the address.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const *interface) });
    // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = EXPERIMENTAL.to_be();
    // SAFETY: the kernel has filled in the name, which ends with a zero.
    address.sll_ifindex = unsafe { libc::if_nametoindex(interface.ifr_name.as_ptr()) }.cast_signed();
    let length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the kernel reads an address of that length.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) });
    socket
}

fn check(result: i32) -> i32 {
    assert!(result >= 0, "{}", std::io::Error::last_os_error());
    result
}
