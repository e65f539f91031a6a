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
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use fuse_backend_rs::api::server::Server;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::QueueState;

use super::{Activation, DeviceEvent, DeviceState, VirtioDevice, read_config_from};
use crate::error::{Error, Result};
use crate::seccomp::Confinement;
use gate::Gate;
use share::Share;
use table::{Budget, lock};

mod attributes;
mod filesystem;
mod gate;
mod held;
mod identity;
mod raw;
mod request;
mod session;
mod share;
mod table;
#[cfg(test)]
mod tests;
mod walk;
mod worker;

pub use self::held::FsState;

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
    handle: FsHandle,
    workers: Vec<JoinHandle<()>>,
}

/// Has a restored device open again what its driver held.
#[derive(Clone)]
pub struct FsHandle {
    share: Arc<Share>,
    gate: Arc<Gate>,
    /// What the driver held when it was saved, until that is open again.
    saved: Arc<Mutex<Option<FsState>>>,
}

impl FsHandle {
    /// Opens it, once: what lies in the share may come there until then. Legal while the device is paused. The workers do it, who may
    /// open what the guest may.
    ///
    /// # Errors
    /// Something that the guest has open is not there. This can be tried once more.
    pub fn recover(&self) -> Result<()> {
        let mut saved = lock(&self.saved);
        if let Some(state) = saved.clone() {
            let share = Arc::clone(&self.share);
            self.gate.run(move || share.recover(&state))??;
            *saved = None;
        }
        Ok(())
    }

    fn restore(&self, state: &FsState) {
        self.share.begin_session(state.options());
        match state.is_empty() {
            true => self.share.number_from(state),
            false => *lock(&self.saved) = Some(state.clone()),
        }
    }

    fn save(&self) -> Result<FsState> {
        if let Some(state) = &*lock(&self.saved) {
            return Ok(state.clone());
        }
        let share = Arc::clone(&self.share);
        self.gate.run(move || share.save())?
    }
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
        let handle = FsHandle { share, gate: Arc::new(Gate::new()?), saved: Arc::default() };
        let mut fs = Self { config, handle, workers: Vec::with_capacity(WORKERS) };
        for _ in 0..WORKERS {
            fs.workers.push(worker::spawn(&fs.handle.gate, &server, confinement)?);
        }
        Ok(fs)
    }

    /// What the machine has of it.
    pub fn handle(&self) -> FsHandle {
        self.handle.clone()
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
        self.handle.gate.open(activation)
    }

    fn process(&mut self, _event: DeviceEvent) -> Result<()> {
        // The workers wait for kicks themselves.
        Ok(())
    }

    fn reset(&mut self) {
        self.handle.gate.reset();
        self.handle.share.end_session();
        *lock(&self.handle.saved) = None;
    }

    fn pause(&mut self) {
        self.handle.gate.pause();
    }

    fn resume(&mut self) {
        self.handle.gate.resume();
    }

    fn save(&self) -> Result<DeviceState> {
        Ok(DeviceState::Fs(self.handle.save()?))
    }

    /// What the driver held is opened by [`FsHandle::recover`].
    fn restore(&mut self, state: &DeviceState) -> Result<()> {
        let problem = match state {
            DeviceState::Fs(state) => state.problem(),
            _ => Some("the state is another device's"),
        };
        if let Some(problem) = problem {
            return Err(Error::RestoreDevice { device_type: VIRTIO_ID_FS, problem });
        }
        if let DeviceState::Fs(state) = state {
            self.handle.restore(state);
        }
        Ok(())
    }

    fn queue_states(&self) -> Vec<QueueState> {
        self.handle.gate.queue_states()
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.handle.gate.close();
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
