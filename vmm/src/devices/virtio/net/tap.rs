//! A TAP device of the host: packets, each behind a `struct virtio_net_hdr` (Linux's `include/uapi/linux/if_tun.h`).

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd, RawFd};

use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile as _;
use libc::{
    IFF_NO_PI, IFF_TAP, IFF_TUN, IFF_VNET_HDR, TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUNGETIFF,
    TUNSETOFFLOAD, TUNSETVNETHDRSZ,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};
use vmm_sys_util::epoll::EventSet;

use super::{HEADER_SIZE, device_error};
use crate::error::{Error, Result};

/// More packets than wait in any TAP: its queue is as long as the interface's, by default 500 (`TUN_READQ_SIZE`).
const MAX_QUEUED: usize = 10_000;

nix::ioctl_read_bad!(
    /// Asks for the interface's name and flags.
    tun_get_interface, TUNGETIFF, libc::ifreq
);
nix::ioctl_write_ptr_bad!(
    /// Sets the length of the header before each packet.
    tun_set_header_size, TUNSETVNETHDRSZ, libc::c_int
);
nix::ioctl_write_int_bad!(
    /// Sets what the reader of packets can cope with.
    tun_set_offloads, TUNSETOFFLOAD
);

/// One end of a cable whose other end is a network interface of the host.
pub(super) struct Tap {
    file: File,
    /// Another descriptor that keeps the boundaries of packets.
    #[cfg(any(test, feature = "testing"))]
    stand_in: bool,
}

impl Tap {
    /// Takes a TAP that was opened with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`, and makes it ready: it does not block,
    /// and its header is the one of virtio 1. Takes no privilege.
    ///
    /// # Errors
    /// The file is something else.
    pub(super) fn new(file: File) -> Result<Self> {
        check(&file)?;
        let failed = |source: nix::Error| device_error("set up the TAP device", source.into());
        let size = HEADER_SIZE as libc::c_int;
        // SAFETY: the kernel reads an int at the address, which is that of a local variable.
        unsafe { tun_set_header_size(file.as_raw_fd(), &raw const size) }.map_err(failed)?;
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).map_err(failed)?);
        fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map_err(failed)?;
        Ok(Self {
            file,
            #[cfg(any(test, feature = "testing"))]
            stand_in: false,
        })
    }

    /// Another handle of the same TAP.
    ///
    /// # Errors
    /// There is no descriptor to be had.
    pub(super) fn try_clone(&self) -> Result<Self> {
        let file =
            self.file.try_clone().map_err(|source| device_error("duplicate the TAP device", source))?;
        Ok(Self {
            file,
            #[cfg(any(test, feature = "testing"))]
            stand_in: self.stand_in,
        })
    }

    /// Has the host hand over only such packets as a driver with these features can take: with partial checksums, or
    /// larger than the wire has them, or neither. What the driver may send does not depend on it.
    ///
    /// # Errors
    /// The interface is gone.
    pub(super) fn set_offloads(&self, features: u64) -> Result<()> {
        #[cfg(any(test, feature = "testing"))]
        if self.stand_in {
            return Ok(());
        }
        let offloads = libc::c_int::try_from(offloads(features)).unwrap_or_default();
        // SAFETY: the argument is a number.
        unsafe { tun_set_offloads(self.file.as_raw_fd(), offloads) }
            .map(drop)
            .map_err(|errno| device_error("set the offloads of the TAP device", errno.into()))
    }

    /// The driver is gone, and the next one may be able to take less: what is queued for this one is dropped, and what
    /// comes meanwhile is such that any driver can take it.
    pub(super) fn forget_driver(&mut self) {
        // Fails for an interface that is gone, which then has no packets either.
        let _ = self.set_offloads(0);
        for _ in 0..MAX_QUEUED {
            if self.read_into(&mut [0; HEADER_SIZE]).is_err() {
                break;
            }
        }
    }

    /// Reads one packet with its header into the buffers, and returns its length. What does not fit is lost.
    ///
    /// # Errors
    /// There is none (`WouldBlock`), or the interface is gone; see [`is_gone`].
    pub(super) fn read(&mut self, buffers: &[FileVolatileSlice<'_>]) -> io::Result<usize> {
        self.file.read_vectored_volatile(buffers)
    }

    /// The same, into memory of this process.
    ///
    /// # Errors
    /// As for [`Tap::read`].
    pub(super) fn read_into(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }

    /// Writes one packet with its header. The kernel checks the header.
    ///
    /// # Errors
    /// The interface takes no more for now (`WouldBlock`), refuses the packet, or is gone; see [`is_gone`].
    pub(super) fn write(&mut self, buffers: &[FileVolatileSlice<'_>]) -> io::Result<usize> {
        self.file.write_vectored_volatile(buffers)
    }

    /// What behaves like a TAP as far as packets go, for those who may not have one.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn stand_in(file: File) -> Self {
        Self { file, stand_in: true }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// What epoll says of a TAP once its interface is deleted (`tun_chr_poll` in Linux's `drivers/net/tun.c`), and of nothing
/// else.
pub(super) const GONE: EventSet = EventSet::ERROR.union(EventSet::HANG_UP);

/// Whether a TAP answers so once its interface is deleted (`tun_get` there finds none).
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADFD)
}

/// Refuses what was not opened as the device needs it.
fn check(file: &File) -> Result<()> {
    let problem = |problem| Error::NoTap { problem };
    // SAFETY: all-zero bytes are a valid `ifreq`, which consists of integers and a union of such.
    let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes an `ifreq` at the address, which is that of a local variable.
    match unsafe { tun_get_interface(file.as_raw_fd(), &raw mut interface) } {
        Ok(_) => {}
        Err(nix::Error::EBADFD) => return Err(problem("no interface belongs to it")),
        Err(_) => return Err(problem("it is no descriptor of /dev/net/tun")),
    }
    // SAFETY: the call above has filled in this member of the union.
    check_flags(i32::from(unsafe { interface.ifr_ifru.ifru_flags })).map_err(problem)
}

/// Refuses flags of an interface whose packets the device does not understand.
fn check_flags(flags: i32) -> std::result::Result<(), &'static str> {
    match flags {
        _ if flags & (IFF_TAP | IFF_TUN) != IFF_TAP => Err("its packets are no Ethernet frames (IFF_TAP)"),
        _ if flags & IFF_NO_PI == 0 => Err("its packets begin with protocol information (no IFF_NO_PI)"),
        _ if flags & IFF_VNET_HDR == 0 => Err("its packets begin without a virtio header (no IFF_VNET_HDR)"),
        _ => Ok(()),
    }
}

/// What TUNSETOFFLOAD takes for a driver with these features. The kernel wants segmentation only with checksums.
fn offloads(features: u64) -> u32 {
    if features & 1 << VIRTIO_NET_F_GUEST_CSUM == 0 {
        return 0;
    }
    let mut offloads = TUN_F_CSUM;
    for (feature, offload) in [(VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4), (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6)] {
        if features & 1 << feature != 0 {
            offloads |= offload;
        }
    }
    if offloads != TUN_F_CSUM && features & 1 << VIRTIO_NET_F_GUEST_ECN != 0 {
        offloads |= TUN_F_TSO_ECN;
    }
    offloads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_flags_that_the_device_relies_on_decide() {
        let good = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        assert_eq!(check_flags(good), Ok(()));
        assert_eq!(check_flags(good | libc::IFF_MULTI_QUEUE | libc::IFF_PERSIST), Ok(()));
        for (missing, named) in
            [(IFF_TAP, "IFF_TAP"), (IFF_NO_PI, "no IFF_NO_PI"), (IFF_VNET_HDR, "no IFF_VNET_HDR")]
        {
            assert!(check_flags(good & !missing).unwrap_err().contains(named));
        }
        assert!(check_flags(IFF_TUN | IFF_NO_PI | IFF_VNET_HDR).is_err());
    }

    #[test]
    fn offloads_are_those_that_the_driver_accepted_and_the_kernel_takes() {
        let (csum, tso4, tso6, ecn) = (
            1 << VIRTIO_NET_F_GUEST_CSUM,
            1 << VIRTIO_NET_F_GUEST_TSO4,
            1 << VIRTIO_NET_F_GUEST_TSO6,
            1 << VIRTIO_NET_F_GUEST_ECN,
        );
        for (features, expected) in [
            (0, 0),
            (csum, TUN_F_CSUM),
            (tso4 | tso6 | ecn, 0),
            (csum | ecn, TUN_F_CSUM),
            (csum | tso6, TUN_F_CSUM | TUN_F_TSO6),
            (csum | tso4 | tso6 | ecn, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN),
        ] {
            assert_eq!(offloads(features), expected, "{features:#x}");
        }
    }
}
