//! Which device answers when a vCPU touches a port or an address outside of RAM.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::{I8042Device, Trigger};

use crate::arch::layout;
use crate::devices::serial::Serial;
use crate::devices::virtio::transport::MmioTransport;

/// A virtio device as the vCPUs and the event loop share it.
pub type SharedTransport = Arc<Mutex<MmioTransport>>;

/// The first serial port's registers.
const SERIAL: u16 = 0x3f8;
const SERIAL_LAST: u16 = SERIAL + 7;

/// The keyboard controller's ports. Only its reset line is there.
const I8042: u16 = 0x60;
const I8042_LAST: u16 = 0x64;

/// What a port that is not there reads as.
const NOBODY: u8 = 0xff;

/// All devices that a vCPU reaches directly. Nothing the guest does here fails.
pub struct Bus {
    serial: Mutex<Serial>,
    i8042: Mutex<I8042Device<ResetLine>>,
    virtio: Vec<SharedTransport>,
}

/// Remembers that the guest pulled the reset line.
#[derive(Default)]
struct ResetLine(AtomicBool);

impl Trigger for ResetLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.store(true, Ordering::SeqCst);
        Ok(())
    }
}

/// What a vCPU does after it wrote to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterWrite {
    /// It goes on.
    Continue,
    /// The machine has reset itself.
    Reset,
}

impl Bus {
    /// Puts the serial port and the virtio devices, in the order of their addresses, on the bus.
    pub fn new(serial: Serial, virtio: Vec<SharedTransport>) -> Self {
        Self { serial: Mutex::new(serial), i8042: Mutex::new(I8042Device::new(ResetLine::default())), virtio }
    }

    /// The serial port.
    pub fn serial(&self) -> MutexGuard<'_, Serial> {
        lock(&self.serial)
    }

    /// The virtio devices, in the order of their addresses.
    pub fn virtio(&self) -> &[SharedTransport] {
        &self.virtio
    }

    /// A read from guest physical memory where no RAM is.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => lock(device).read(offset, data),
            None => data.fill(NOBODY),
        }
    }

    /// A write to guest physical memory where no RAM is.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            lock(device).write(offset, data);
        }
    }

    /// A read from a port. A string instruction reads the same port several times.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        for byte in data {
            *byte = match port {
                SERIAL..=SERIAL_LAST => self.serial().read((port - SERIAL) as u8),
                I8042..=I8042_LAST => lock(&self.i8042).read((port - I8042) as u8),
                _ => NOBODY,
            };
        }
    }

    /// A write to a port. A string instruction writes to the same port several times.
    pub fn write_port(&self, port: u16, data: &[u8]) -> AfterWrite {
        for byte in data {
            // Neither device can fail: the console swallows everything, and the line's eventfd would have to overflow.
            match port {
                SERIAL..=SERIAL_LAST => drop(self.serial().write((port - SERIAL) as u8, *byte)),
                I8042..=I8042_LAST => drop(lock(&self.i8042).write((port - I8042) as u8, *byte)),
                _ => {}
            }
        }
        if lock(&self.i8042).reset_evt().0.load(Ordering::SeqCst) {
            AfterWrite::Reset
        } else {
            AfterWrite::Continue
        }
    }

    /// The device whose page `address` lies in, and the offset in it.
    fn find(&self, address: u64) -> Option<(&SharedTransport, u64)> {
        let offset = address.checked_sub(layout::VIRTIO_MMIO)?;
        let index = usize::try_from(offset / layout::VIRTIO_MMIO_SIZE).ok()?;
        Some((self.virtio.get(index)?, offset % layout::VIRTIO_MMIO_SIZE))
    }
}

/// A device is in order whatever happened to the thread that last held it: this process ends when one panics.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::serial::serial;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EventFd;

    fn bus() -> Bus {
        let (_, console) = nix::unistd::pipe().unwrap();
        Bus::new(serial(EventFd::new(libc::EFD_NONBLOCK).unwrap(), console).unwrap(), vec![])
    }

    #[test]
    fn the_reset_command_resets_and_nothing_else_does() {
        let bus = bus();
        assert_eq!(bus.write_port(0x64, &[0x20]), AfterWrite::Continue);
        assert_eq!(bus.write_port(0x60, &[0xfe]), AfterWrite::Continue);
        assert_eq!(bus.write_port(0x80, &[0xfe]), AfterWrite::Continue);
        assert_eq!(bus.write_port(0x64, &[0xfe]), AfterWrite::Reset);
    }

    #[test]
    fn the_keyboard_controller_is_never_busy() {
        let mut status = [0xff];
        bus().read_port(0x64, &mut status);
        assert_eq!(status, [0]);
    }

    #[test]
    fn the_serial_port_keeps_its_scratch_register() {
        let bus = bus();
        let mut scratch = [0];
        bus.write_port(0x3ff, &[0x5a]);
        bus.read_port(0x3ff, &mut scratch);
        assert_eq!(scratch, [0x5a]);
    }

    #[test]
    fn what_is_not_there_reads_as_ones_and_swallows_writes() {
        let bus = bus();
        let mut data = [0; 4];
        for address in [0, layout::VIRTIO_MMIO - 1, layout::VIRTIO_MMIO, layout::GAP_END - 1, u64::MAX] {
            bus.write_memory(address, &data);
            bus.read_memory(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
        }
        let mut port = [0; 2];
        bus.read_port(0xcf8, &mut port);
        assert_eq!(port, [0xff; 2]);
    }

    proptest! {
        #[test]
        fn whatever_a_guest_does_with_ports_only_the_reset_command_resets(
            accesses in vec((any::<bool>(), 0x50u16..0x410, vec(any::<u8>(), 1..9)), 1..200)
        ) {
            let bus = bus();
            let mut reset = false;
            for (write, port, mut data) in accesses {
                if write {
                    reset |= port == 0x64 && data.contains(&0xfe);
                    let after = bus.write_port(port, &data);
                    prop_assert_eq!(after == AfterWrite::Reset, reset);
                } else {
                    bus.read_port(port, &mut data);
                }
            }
        }
    }
}
