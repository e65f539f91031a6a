//! A saved machine: everything but its memory, as a file.
//!
//! ```text
//! offset  size
//!      0     8  "mayu-vm" and a zero byte
//!      8     4  version of what follows, little-endian as all numbers here
//!     12     8  length of the snapshot, in bytes
//!     20     4  CRC-32 of the snapshot (ISO 3309)
//!     24        the snapshot, in postcard's format (<https://postcard.jamesmunns.com/wire-format>)
//! ```
//!
//! Whoever can write such a file can make the VMM do what the VMM may do in its jail, as the guest that has taken it over. The one that
//! has saved a machine which has run a pod may be such a VMM. The checksum is there to find damage.

use std::fs::File;
use std::io::{Read as _, Write as _};

use mayu_vmm_api::{VmConfig, WorkingSet};
use serde::{Deserialize, Serialize};
use slog::{Logger, warn};

use crate::arch::state::{VcpuState, VmState};
use crate::devices::serial::SerialState;
use crate::devices::virtio::transport::TransportState;
use crate::error::{Error, Result};

const MAGIC: [u8; 8] = *b"mayu-vm\0";

/// Of everything behind the version. To be raised when a part of [`Snapshot`] changes.
const VERSION: u32 = 3;

/// Some twenty times what a machine with the most vCPUs needs. A guest that knows files needs some hundred bytes more for each.
const MAX_LENGTH: u64 = 16 << 20;

/// Everything that a machine built with the same resources and the same memory needs to go on from here.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// The vCPUs, by index.
    pub vcpus: Vec<VcpuState>,
    /// What KVM emulates for all of them.
    pub vm: VmState,
    /// The serial port.
    pub serial: SerialState,
    /// The virtio devices, in the order of their addresses.
    pub devices: Vec<TransportState>,
}

/// A machine's state, and what it is the state of.
#[derive(Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// The machine's description.
    pub config: VmConfig,
    /// The host's processor, as KVM offers it to guests.
    pub processor: String,
    /// The version of the VMM.
    pub vmm: String,
    /// Its state.
    pub machine: MachineState,
}

impl Snapshot {
    /// Of a machine that this program has saved.
    pub fn new(config: VmConfig, processor: String, machine: MachineState) -> Self {
        Self { config, processor, vmm: env!("CARGO_PKG_VERSION").into(), machine }
    }

    /// Writes it to an empty file.
    ///
    /// # Errors
    /// [`Error::SnapshotFile`], or [`Error::SnapshotSize`]: nothing is written then.
    pub fn write(&self, mut file: File) -> Result<()> {
        let failed = |source| Error::SnapshotFile { operation: "write", source };
        let body = postcard::to_stdvec(self).map_err(|error| failed(std::io::Error::other(error)))?;
        let mut whole = MAGIC.to_vec();
        whole.extend(VERSION.to_le_bytes());
        whole.extend((body.len() as u64).to_le_bytes());
        whole.extend(crc32fast::hash(&body).to_le_bytes());
        whole.extend(body);
        if whole.len() as u64 > MAX_LENGTH {
            return Err(Error::SnapshotSize { length: whole.len(), limit: MAX_LENGTH });
        }
        file.write_all(&whole).map_err(failed)
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`Error::DamagedSnapshot`] if it is not exactly what [`Snapshot::write`] of the same version has written.
    pub fn read(file: File) -> Result<Self> {
        let damaged = |problem: String| Error::DamagedSnapshot { problem };
        let mut whole = Vec::new();
        file.take(MAX_LENGTH)
            .read_to_end(&mut whole)
            .map_err(|source| Error::SnapshotFile { operation: "read", source })?;
        let mut body = whole.as_slice();
        let Some(Header { magic, version, length, checksum }) = Header::take(&mut body) else {
            return Err(damaged(format!("{} bytes are too few", whole.len())));
        };
        if magic != MAGIC {
            return Err(damaged("it does not begin as one".into()));
        }
        if version != VERSION {
            return Err(damaged(format!("it has version {version}, and this program writes {VERSION}")));
        }
        if length != body.len() as u64 {
            return Err(damaged(format!("{length} bytes are announced, and {} are there", body.len())));
        }
        if checksum != crc32fast::hash(body) {
            return Err(damaged("its checksum is wrong".into()));
        }
        postcard::from_bytes(body).map_err(|error| damaged(error.to_string()))
    }

    /// Whether a machine with this description can go on from here.
    ///
    /// # Errors
    /// [`Error::OtherSnapshot`], which names what is not the same.
    pub fn check(&self, config: &VmConfig) -> Result<()> {
        let (saved, here) = (&self.config, config);
        same("version of mayu-vmm", &self.vmm, env!("CARGO_PKG_VERSION"))?;
        for (what, saved, here) in [
            ("number of vCPUs at boot", u32::from(saved.vcpus), u32::from(here.vcpus)),
            ("number of vCPUs", u32::from(saved.max_vcpus), u32::from(here.max_vcpus)),
            ("size of memory at boot, in MiB", saved.memory_mib, here.memory_mib),
            ("size of memory, in MiB", saved.max_memory_mib, here.max_memory_mib),
            ("number of network slots", u32::from(saved.net_slots), u32::from(here.net_slots)),
            ("vsock context id", saved.guest_cid, here.guest_cid),
        ] {
            same(what, &saved.to_string(), &here.to_string())?;
        }
        same("kernel command line", &saved.kernel_args, &here.kernel_args)?;
        let nothing = String::new();
        for name in saved.made_of.keys().chain(here.made_of.keys()) {
            let of = |config: &VmConfig| config.made_of.get(name).unwrap_or(&nothing).clone();
            same(name, &of(saved), &of(here))?;
        }
        Ok(())
    }

    /// Whether it can go on on this processor.
    ///
    /// # Errors
    /// [`Error::OtherSnapshot`].
    pub fn check_processor(&self, processor: &str) -> Result<()> {
        same("processor", &self.processor, processor)
    }
}

/// Reads what a machine like this has touched. It is only for speed, so that none is as good as one that cannot be read.
pub fn read_working_set(file: File, log: &Logger) -> Option<WorkingSet> {
    let mut bytes = Vec::new();
    let read = file.take(MAX_LENGTH).read_to_end(&mut bytes);
    match read.and_then(|_| WorkingSet::from_bytes(&bytes)) {
        Ok(working_set) => Some(working_set),
        Err(error) => {
            warn!(log, "a template's working set is of no use"; "error" => error.to_string());
            None
        }
    }
}

fn same(what: &str, saved: &str, here: &str) -> Result<()> {
    match saved == here {
        true => Ok(()),
        false => Err(Error::OtherSnapshot { what: what.into(), saved: saved.into(), here: here.into() }),
    }
}

/// What comes before a snapshot.
struct Header {
    magic: [u8; 8],
    version: u32,
    length: u64,
    checksum: u32,
}

impl Header {
    /// Takes it off the front, if it is there.
    fn take(bytes: &mut &[u8]) -> Option<Self> {
        Some(Self {
            magic: take(bytes)?,
            version: u32::from_le_bytes(take(bytes)?),
            length: u64::from_le_bytes(take(bytes)?),
            checksum: u32::from_le_bytes(take(bytes)?),
        })
    }
}

fn take<const LENGTH: usize>(bytes: &mut &[u8]) -> Option<[u8; LENGTH]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}
