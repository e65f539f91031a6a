//! The block devices of a container. Its spec has the host's numbers for them; here they are disks of the virtual machine,
//! which the shim names by their serial numbers.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mayu_agent_api::BLOCK_DEVICES;
use oci_spec::runtime::{LinuxDeviceType, Spec};
use tokio::time::{Instant, sleep};

use crate::error::{Error, Result};

/// Where Linux lists the disks.
pub const DISKS: &str = "/sys/block";
/// How long the driver may take to see that a disk has been put in.
const DEADLINE: Duration = Duration::from_secs(10);
/// sysfs does not tell when a size changes, and it changes within moments.
const INTERVAL: Duration = Duration::from_millis(1);

type Number = (i64, i64);

/// Gives the devices and device rules of a spec the guest's numbers, once the disks are there.
///
/// # Errors
///
/// `InvalidSpec` where the annotation is malformed or names a disk that the machine does not have, `File` where sysfs cannot
/// be read.
pub async fn translate(spec: &mut Spec, disks: &Path) -> Result<()> {
    let Some(text) = spec.annotations().as_ref().and_then(|all| all.get(BLOCK_DEVICES)) else {
        return Ok(());
    };
    let named: HashMap<String, String> = serde_json::from_str(text)
        .map_err(|error| Error::InvalidSpec(format!("annotation {BLOCK_DEVICES}: {error}")))?;
    let mut numbers = HashMap::new();
    for (host, serial) in named {
        let disk = find(disks, &serial)?;
        wait_for_size(&disk).await?;
        numbers.insert(number(&host)?, number(&read(&disk.join("dev"))?)?);
    }
    renumber(spec, &numbers);
    Ok(())
}

fn find(disks: &Path, serial: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(disks).map_err(Error::file("read", disks))?;
    let mut paths = entries.flatten().map(|entry| entry.path());
    paths
        .find(|path| fs::read_to_string(path.join("serial")).is_ok_and(|text| text.trim() == serial))
        .ok_or_else(|| Error::InvalidSpec(format!("the guest has no disk with the serial number {serial:?}")))
}

async fn wait_for_size(disk: &Path) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    let path = disk.join("size");
    while read(&path)? == "0" {
        if Instant::now() > deadline {
            return Err(Error::InvalidSpec(format!("the disk {} is empty", disk.display())));
        }
        sleep(INTERVAL).await;
    }
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    Ok(fs::read_to_string(path).map_err(Error::file("read", path))?.trim().to_owned())
}

/// `major:minor`.
fn number(text: &str) -> Result<Number> {
    let parse = || {
        let (major, minor) = text.split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    parse().ok_or_else(|| Error::InvalidSpec(format!("{text:?} is no device number")))
}

fn renumber(spec: &mut Spec, numbers: &HashMap<Number, Number>) {
    let Some(linux) = spec.linux_mut() else { return };
    for device in linux.devices_mut().iter_mut().flatten() {
        let guest = numbers.get(&(device.major(), device.minor()));
        if let Some((major, minor)) = guest.filter(|_| device.typ() == LinuxDeviceType::B) {
            device.set_major(*major).set_minor(*minor);
        }
    }
    let Some(resources) = linux.resources_mut() else { return };
    for rule in resources.devices_mut().iter_mut().flatten() {
        let (Some(major), Some(minor)) = (rule.major(), rule.minor()) else { continue };
        let is_block = rule.typ() == Some(LinuxDeviceType::B);
        if let Some((major, minor)) = numbers.get(&(major, minor)).filter(|_| is_block) {
            rule.set_major(Some(*major)).set_minor(Some(*minor));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn disks() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, serial, number) in [("vda", "image", "254:0"), ("vdb", "slot0", "254:16")] {
            let disk = folder.path().join(name);
            fs::create_dir(&disk).unwrap();
            fs::write(disk.join("serial"), format!("{serial}\n")).unwrap();
            fs::write(disk.join("dev"), format!("{number}\n")).unwrap();
            fs::write(disk.join("size"), "0\n").unwrap();
        }
        folder
    }

    fn spec(annotation: &str) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.1.0",
            "annotations": {BLOCK_DEVICES: annotation},
            "linux": {
                "devices": [
                    {"path": "/dev/xvda", "type": "b", "major": 7, "minor": 3},
                    {"path": "/dev/char", "type": "c", "major": 7, "minor": 3},
                ],
                "resources": {"devices": [
                    {"allow": true, "type": "b", "major": 7, "minor": 3, "access": "rw"},
                    {"allow": true, "type": "c", "major": 7, "minor": 3, "access": "rw"},
                ]},
            },
        }))
        .unwrap()
    }

    #[tokio::test]
    async fn devices_and_rules_get_the_guests_numbers_when_the_disk_is_there() {
        let disks = disks();
        let mut spec = spec(r#"{"7:3": "slot0"}"#);
        let size = disks.path().join("vdb/size");
        let (translated, ()) = tokio::join!(translate(&mut spec, disks.path()), async {
            tokio::task::yield_now().await;
            fs::write(size, "2048\n").unwrap();
        });
        translated.unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let devices = linux.devices().as_ref().unwrap();
        let numbers: Vec<_> = devices.iter().map(|device| (device.major(), device.minor())).collect();
        assert_eq!(numbers, [(254, 16), (7, 3)]);
        let rules = linux.resources().as_ref().unwrap().devices().as_ref().unwrap();
        let numbers: Vec<_> = rules.iter().map(|rule| (rule.major(), rule.minor())).collect();
        assert_eq!(numbers, [(Some(254), Some(16)), (Some(7), Some(3))]);
    }

    #[tokio::test]
    async fn a_spec_without_disks_stays_as_it_is_and_a_wrong_one_is_refused() {
        let disks = disks();
        let mut plain = spec("{}");
        translate(&mut plain, disks.path()).await.unwrap();
        for (annotation, words) in [
            ("[]", "invalid type"),
            (r#"{"7:3": "slot9"}"#, "slot9"),
            (r#"{"7": "image"}"#, "no device number"),
        ] {
            fs::write(disks.path().join("vda/size"), "8\n").unwrap();
            let message = translate(&mut spec(annotation), disks.path()).await.unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
