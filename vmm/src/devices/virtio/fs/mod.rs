//! The file system device (virtio 1.2, 5.11): a directory of the host, served inside the VMM.
//!
//! ```text
//!  driver ──kick──▶ worker ──▶ request ──▶ Server (fuse-backend-rs) ──▶ share ──▶ host kernel
//!                  2 threads    limits      FUSE decoding                names, inodes, handles
//! ```
//!
//! Files block, so that the device has threads of its own: a slow disk stalls neither the other devices nor, as
//! long as one worker is left, other containers. They are started before the VMM gives up its capabilities, since
//! they are the only ones who need some; see `identity`.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use fuse_backend_rs::api::server::Server;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::QueueState;

use super::{Activation, DeviceEvent, DeviceState, VirtioDevice, read_config_from};
use crate::error::{Error, Result};
use crate::seccomp::Confinement;
use gate::Gate;
use share::Share;
use table::Budget;

mod attributes;
mod filesystem;
mod gate;
mod identity;
mod raw;
mod request;
mod session;
mod share;
mod table;
#[cfg(test)]
mod tests;
mod worker;

/// The longest name of a share, in bytes (virtio 1.2, 5.11.4).
const MAX_TAG: usize = 36;

/// `num_request_queues`. All workers share the one queue.
const REQUEST_QUEUES: u32 = 1;

/// Descriptors of the longest chain. Linux puts each page of a request into a descriptor of its own, so that 1 MiB
/// and headers fit thrice.
const QUEUE_SIZE: u16 = 1024;

/// The high-priority queue, in which the driver forgets inodes, and the request queue.
const QUEUE_SIZES: [u16; 2] = [128, QUEUE_SIZE];

/// One that may wait for a disk, and one to go on meanwhile. More would cost memory in every pod.
const WORKERS: usize = 2;

/// A virtio-fs device.
pub struct Fs {
    /// `struct virtio_fs_config` (virtio 1.2, 5.11.4).
    config: [u8; MAX_TAG + 4],
    share: Arc<Share>,
    gate: Arc<Gate>,
    workers: Vec<JoinHandle<()>>,
}

/// What the fs device keeps beside its queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// What driver and device have agreed on in FUSE's INIT; zero before it.
    options: u64,
    /// Files and directories that the driver held, beside the root.
    held: usize,
}

impl Fs {
    /// A device that shares `root` under the name `tag`. Starts its threads, which keep the capabilities that the
    /// calling thread has now, and raises the process's soft limit of open files to the hard one.
    ///
    /// # Errors
    /// The name is empty or longer than 36 bytes, the directory cannot be opened, or a thread cannot be started.
    pub fn new(tag: &str, root: &Path, confinement: &Confinement) -> Result<Self> {
        Self::with_budget(tag, root, confinement, Budget::from_limits())
    }

    fn with_budget(tag: &str, root: &Path, confinement: &Confinement, budget: Arc<Budget>) -> Result<Self> {
        let config =
            config(tag).ok_or_else(|| failed("name the share", io::ErrorKind::InvalidInput.into()))?;
        let share = Share::new(root, budget).map_err(|error| failed("open the shared directory", error))?;
        let share = Arc::new(share);
        let server = Arc::new(Server::new(Arc::clone(&share)));
        let mut fs =
            Self { config, share, gate: Arc::new(Gate::new()?), workers: Vec::with_capacity(WORKERS) };
        for _ in 0..WORKERS {
            fs.workers.push(worker::spawn(&fs.gate, &server, confinement)?);
        }
        Ok(fs)
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, out: &mut [u8]) {
        read_config_from(&self.config, offset, out);
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        self.gate.open(activation)
    }

    fn process(&mut self, _event: DeviceEvent) -> Result<()> {
        // The workers wait for kicks themselves.
        Ok(())
    }

    fn reset(&mut self) {
        self.gate.reset();
        self.share.end_session();
    }

    fn pause(&mut self) {
        self.gate.pause();
    }

    fn resume(&mut self) {
        self.gate.resume();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Fs(FsState { options: self.share.options(), held: self.share.held() })
    }

    /// A driver that held files cannot be served here: their descriptors stayed behind. A template is therefore
    /// made before the guest has touched anything in the share.
    fn restore(&mut self, state: &DeviceState) -> Result<()> {
        let problem = match state {
            DeviceState::Fs(FsState { options, held: 0 }) => {
                self.share.begin_session(*options);
                return Ok(());
            }
            DeviceState::Fs(_) => "the guest held files of the share",
            _ => "the state is another device's",
        };
        Err(Error::RestoreDevice { device_type: VIRTIO_ID_FS, problem })
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.gate.queue_states()
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.gate.close();
        for worker in self.workers.drain(..) {
            // A worker that panicked has nothing left to be told.
            let _ = worker.join();
        }
    }
}

fn config(tag: &str) -> Option<[u8; MAX_TAG + 4]> {
    let mut config = [0; MAX_TAG + 4];
    let (name, queues) = config.split_at_mut(MAX_TAG);
    if tag.is_empty() {
        return None;
    }
    name.get_mut(..tag.len())?.copy_from_slice(tag.as_bytes());
    queues.copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
    Some(config)
}

fn failed(operation: &'static str, source: io::Error) -> Error {
    Error::Device { device: "fs", operation, source }
}
