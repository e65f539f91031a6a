//! Devices that a container's spec asks for. Block devices of the host become the VM's own disks; nothing else of the host
//! reaches the guest.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use mayu_vmm_api::BLOCK_SLOTS;
use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};
use slog::{Logger, info};

use crate::error::file;
use crate::{Error, Result};

/// Character devices that the guest has itself, by the numbers that Linux gives them everywhere
/// (Documentation/admin-guide/devices.txt): null, zero, full, random, urandom, tty, console, ptmx, net/tun, fuse.
const GUEST_DEVICES: [(i64, i64); 10] =
    [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (10, 200), (10, 229)];

/// A block device of the host that a container gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// Its path in the container; only messages name it.
    pub path: PathBuf,
    /// Major and minor number on the host.
    pub number: (i64, i64),
    /// The container may only read it.
    pub read_only: bool,
}

/// Takes out of a spec what is not in the guest, and says which block devices have to come to it.
///
/// # Errors
/// [`Error::Device`] for a character device of the host, unless the container is privileged: clients give such a container
/// every device that the host has, and here that means every device of the guest.
pub fn select(linux: &mut Linux, log: &Logger) -> Result<Vec<BlockDevice>> {
    let rules =
        linux.resources().as_ref().and_then(|resources| resources.devices().clone()).unwrap_or_default();
    let privileged = rules.iter().any(allows_everything);
    let mut wanted = Vec::new();
    let mut kept = Vec::new();
    for device in linux.devices().iter().flatten() {
        let number = (device.major(), device.minor());
        match device.typ() {
            LinuxDeviceType::P => kept.push(device.clone()),
            LinuxDeviceType::C | LinuxDeviceType::U if GUEST_DEVICES.contains(&number) => {
                kept.push(device.clone());
            }
            _ if privileged => {
                info!(log, "a device of the host is not in the guest"; "path" => device.path().display().to_string());
            }
            LinuxDeviceType::B => {
                wanted.push(block_device(device, &rules));
                kept.push(device.clone());
            }
            _ => {
                return Err(Error::Device {
                    path: device.path().clone(),
                    reason: format!(
                        "the host's character device {}:{} cannot be had in a VM; only block devices can",
                        number.0, number.1
                    ),
                });
            }
        }
    }
    if linux.devices().is_some() {
        linux.set_devices(Some(kept));
    }
    Ok(wanted)
}

fn allows_everything(rule: &LinuxDeviceCgroup) -> bool {
    let any_type = matches!(rule.typ(), None | Some(LinuxDeviceType::A));
    rule.allow() && any_type && rule.major().is_none_or(|major| major < 0)
}

fn block_device(device: &LinuxDevice, rules: &[LinuxDeviceCgroup]) -> BlockDevice {
    let number = (device.major(), device.minor());
    let writes = |rule: &LinuxDeviceCgroup| rule.access().as_ref().is_none_or(|access| access.contains('w'));
    let is_its = |rule: &&LinuxDeviceCgroup| {
        rule.allow() && (rule.major(), rule.minor()) == (Some(number.0), Some(number.1))
    };
    let read_only = rules.iter().rfind(is_its).is_some_and(|rule| !writes(rule));
    BlockDevice { path: device.path().clone(), number, read_only }
}

impl BlockDevice {
    /// Opens it on the host, whatever its name there is.
    ///
    /// # Errors
    /// [`Error::Device`] when the host has none with this number.
    pub fn open(&self) -> Result<File> {
        let (major, minor) = self.number;
        let unknown = |reason: String| Error::Device { path: self.path.clone(), reason };
        let uevent = format!("/sys/dev/block/{major}:{minor}/uevent");
        let text = fs::read_to_string(&uevent)
            .map_err(|error| unknown(format!("the host has no block device {major}:{minor}: {error}")))?;
        // The kernel's name below /dev (Documentation/ABI/testing/sysfs-uevent and drivers/base/core.c).
        let name = text
            .lines()
            .find_map(|line| line.strip_prefix("DEVNAME="))
            .ok_or_else(|| unknown(format!("{uevent} has no DEVNAME")))?;
        let path = Path::new("/dev").join(name);
        OpenOptions::new()
            .read(true)
            .write(!self.read_only)
            .open(&path)
            .map_err(file("open the block device", path))
    }
}

/// Which device is in which of the VM's block slots, and which containers use it.
#[derive(Debug, Default)]
pub struct Slots {
    slots: [Option<Occupied>; BLOCK_SLOTS as usize],
}

#[derive(Debug)]
struct Occupied {
    number: (i64, i64),
    read_only: bool,
    containers: Vec<String>,
}

/// What a container's wish for a device comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// It is in this slot already.
    There(u8),
    /// It is to be put into this slot.
    Empty(u8),
}

impl Slots {
    /// Notes that a container uses a device.
    ///
    /// # Errors
    /// [`Error::Device`] when all slots are taken, or the device is there for reading only.
    pub fn take(&mut self, device: &BlockDevice, container: &str) -> Result<Place> {
        let refused = |reason: String| Err(Error::Device { path: device.path.clone(), reason });
        for (slot, place) in (0..).zip(&mut self.slots) {
            if let Some(occupied) = place.as_mut().filter(|occupied| occupied.number == device.number) {
                if occupied.read_only && !device.read_only {
                    return refused("another container of the pod has it for reading only".into());
                }
                occupied.containers.push(container.into());
                return Ok(Place::There(slot));
            }
        }
        let Some((slot, place)) = (0..).zip(&mut self.slots).find(|(_, place)| place.is_none()) else {
            return refused(format!("a pod has no more than {BLOCK_SLOTS} block devices"));
        };
        let (number, read_only) = (device.number, device.read_only);
        *place = Some(Occupied { number, read_only, containers: vec![container.into()] });
        Ok(Place::Empty(slot))
    }

    /// Notes that a container uses nothing any more; gives the slots that nobody uses now.
    pub fn release(&mut self, container: &str) -> Vec<u8> {
        let mut empty = Vec::new();
        for (slot, place) in (0..).zip(&mut self.slots) {
            if let Some(occupied) = place {
                let used = !occupied.containers.is_empty();
                occupied.containers.retain(|user| user != container);
                if used && occupied.containers.is_empty() {
                    *place = None;
                    empty.push(slot);
                }
            }
        }
        empty
    }
}

/// Where the guest has each device of the host: what the agent reads from [`mayu_agent_api::BLOCK_DEVICES`].
pub fn annotation(places: &[((i64, i64), u8)]) -> String {
    let map: HashMap<String, String> = places
        .iter()
        .map(|((major, minor), slot)| (format!("{major}:{minor}"), format!("slot{slot}")))
        .collect();
    serde_json::Value::from_iter(map).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn log() -> Logger {
        Logger::root(slog::Discard, slog::o!())
    }

    fn linux(devices: &serde_json::Value, rules: &serde_json::Value) -> Linux {
        serde_json::from_value(json!({"devices": devices, "resources": {"devices": rules}})).unwrap()
    }

    fn disk(number: (i64, i64), read_only: bool) -> BlockDevice {
        BlockDevice { path: "/dev/xvda".into(), number, read_only }
    }

    #[test]
    fn block_devices_are_wanted_as_the_rules_allow_them() {
        let devices = json!([
            {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
            {"path": "/dev/xvda", "type": "b", "major": 7, "minor": 0},
            {"path": "/dev/xvdb", "type": "b", "major": 7, "minor": 1},
        ]);
        let rules = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 7, "minor": 0, "access": "rw"},
            {"allow": true, "type": "b", "major": 7, "minor": 1, "access": "r"},
        ]);
        let mut linux = linux(&devices, &rules);
        let wanted = select(&mut linux, &log()).unwrap();
        let summary: Vec<_> = wanted.iter().map(|device| (device.number, device.read_only)).collect();
        assert_eq!(summary, [((7, 0), false), ((7, 1), true)]);
        assert_eq!(linux.devices().as_ref().unwrap().len(), 3);
    }

    #[test]
    fn a_character_device_of_the_host_is_refused_unless_everything_is_wanted() {
        let devices = json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]);
        let mut unprivileged = linux(&devices, &json!([{"allow": false, "access": "rwm"}]));
        let message = select(&mut unprivileged, &log()).unwrap_err().to_string();
        assert!(message.contains("/dev/kvm") && message.contains("10:232"), "{message}");
        let mut privileged = linux(&devices, &json!([{"allow": true, "access": "rwm"}]));
        assert!(select(&mut privileged, &log()).unwrap().is_empty());
        assert!(privileged.devices().as_ref().unwrap().is_empty());
    }

    #[test]
    fn containers_share_a_slot_and_the_last_one_empties_it() {
        let mut slots = Slots::default();
        assert_eq!(slots.take(&disk((7, 0), false), "a").unwrap(), Place::Empty(0));
        assert_eq!(slots.take(&disk((7, 0), true), "b").unwrap(), Place::There(0));
        assert_eq!(slots.take(&disk((7, 1), true), "b").unwrap(), Place::Empty(1));
        assert!(slots.take(&disk((7, 1), false), "a").is_err());
        assert_eq!(slots.release("a"), Vec::<u8>::new());
        assert_eq!(slots.release("b"), [0, 1]);
        assert_eq!(slots.release("b"), Vec::<u8>::new());
    }

    #[test]
    fn there_are_only_so_many_slots() {
        let mut slots = Slots::default();
        for minor in 0..i64::from(BLOCK_SLOTS) {
            slots.take(&disk((7, minor), false), "a").unwrap();
        }
        let message = slots.take(&disk((8, 0), false), "a").unwrap_err().to_string();
        assert!(message.contains("no more than 4"), "{message}");
    }

    #[test]
    fn a_device_that_the_host_does_not_have_is_named() {
        let message = disk((4095, 1_048_575), true).open().unwrap_err().to_string();
        assert!(message.contains("4095:1048575") && message.contains("/dev/xvda"), "{message}");
    }

    #[test]
    fn the_agent_is_told_where_to_look() {
        assert_eq!(annotation(&[((7, 0), 2)]), r#"{"7:0":"slot2"}"#);
    }
}
