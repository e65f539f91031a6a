//! Which interface is which network slot of the machine, and what takes a slot out of sight.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use super::netlink::Link;
use super::plan::HardwareAddress;
use crate::error::{Error, Result};

/// The driver of the slots.
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_net";
/// The bus that they are on.
const BUS: &str = "virtio";

/// The machine's network slots.
pub trait Slots {
    /// The slot behind `link`, by the address that it has in every machine; nothing for any other interface.
    fn slot(&self, link: &Link) -> Option<HardwareAddress>;

    /// Takes the interface of `slot`, which is `link`, away.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    fn hide(&mut self, slot: HardwareAddress, link: &Link) -> Result<()>;

    /// Brings the interface of `slot` back, under whatever name and address; false where it was not hidden.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    fn show(&mut self, slot: HardwareAddress) -> Result<bool>;
}

/// Slots that are virtio devices.
///
/// An interface has the slot's address only until it is given the pod's. What stays is the address that the driver read from the
/// device (`IFLA_PERM_ADDRESS`, which the kernel keeps where the driver does not say that the address was made up, as virtio_net
/// does not), and nobody in the guest can change it. That the device is one on the virtio bus keeps apart from the slots what a
/// container made and gave the same address.
pub struct VirtioSlots {
    driver: PathBuf,
    /// Names on the bus of the devices that have no driver.
    hidden: HashMap<HardwareAddress, String>,
}

impl VirtioSlots {
    /// The slots of this machine.
    pub fn new() -> Self {
        Self { driver: DRIVER.into(), hidden: HashMap::new() }
    }

    fn tell_driver(&self, file: &str, device: &str) -> Result<()> {
        let path = self.driver.join(file);
        fs::write(&path, device).map_err(Error::file("write", path))
    }
}

impl Slots for VirtioSlots {
    fn slot(&self, link: &Link) -> Option<HardwareAddress> {
        link.device.as_ref().filter(|(bus, _)| bus == BUS).and(link.permanent_address)
    }

    fn hide(&mut self, slot: HardwareAddress, link: &Link) -> Result<()> {
        let Some((_, device)) = &link.device else { return Ok(()) };
        self.tell_driver("unbind", device)?;
        self.hidden.insert(slot, device.clone());
        Ok(())
    }

    fn show(&mut self, slot: HardwareAddress) -> Result<bool> {
        let Some(device) = self.hidden.get(&slot) else { return Ok(false) };
        self.tell_driver("bind", device)?;
        self.hidden.remove(&slot);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: HardwareAddress = HardwareAddress([2, b'm', b'a', b'y', b'u', 0]);

    fn link(bus: &str) -> Link {
        Link {
            index: 2,
            name: "eth0".into(),
            up: false,
            permanent_address: Some(SLOT),
            device: Some((bus.into(), "virtio3".into())),
        }
    }

    #[test]
    fn a_slot_is_a_virtio_device_whatever_its_interface_is_called() {
        let slots = VirtioSlots::new();

        assert_eq!(slots.slot(&Link { name: "renamed".into(), ..link("virtio") }), Some(SLOT));
        assert_eq!(slots.slot(&link("pci")), None);
        assert_eq!(slots.slot(&Link { device: None, ..link("virtio") }), None);
        assert_eq!(slots.slot(&Link { permanent_address: None, ..link("virtio") }), None);
    }

    #[test]
    fn a_hidden_slot_has_no_driver_until_it_is_shown() {
        let driver = tempfile::tempdir().unwrap();
        let mut slots = VirtioSlots { driver: driver.path().into(), hidden: HashMap::new() };
        let told = |file: &str| fs::read_to_string(driver.path().join(file)).ok();
        assert!(!slots.show(SLOT).unwrap());

        slots.hide(SLOT, &link("virtio")).unwrap();
        assert_eq!((told("unbind"), told("bind")), (Some("virtio3".into()), None));

        assert!(slots.show(SLOT).unwrap());
        assert_eq!(told("bind"), Some("virtio3".into()));
        assert!(!slots.show(SLOT).unwrap());
    }

    #[test]
    fn what_the_driver_refuses_can_be_tried_again() {
        let driver = tempfile::tempdir().unwrap();
        let mut slots = VirtioSlots { driver: driver.path().join("gone"), hidden: HashMap::new() };

        let error = slots.hide(SLOT, &link("virtio")).unwrap_err();

        assert!(error.to_string().contains("unbind"), "{error}");
        slots.hidden.insert(SLOT, "virtio3".into());
        assert!(slots.show(SLOT).is_err());
        assert!(slots.hidden.contains_key(&SLOT));
    }
}
