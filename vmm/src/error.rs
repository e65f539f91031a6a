//! The one error type of the VMM.

use std::io;

/// Why the VMM could not do something. Each variant names the operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A descriptor could not be registered with, changed in or removed from the event loop.
    #[error("cannot watch a descriptor in the event loop: {0}")]
    EventLoop(#[source] io::Error),
    /// An eventfd could not be created, duplicated, read or written.
    #[error("cannot use an eventfd: {0}")]
    EventFd(#[source] io::Error),
    /// A thread could not be started.
    #[error("cannot start thread {name}: {source}")]
    Thread {
        /// The thread's name.
        name: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A device's queue is not usable.
    #[error("virtio-{device}: queue {queue}: {source}")]
    Queue {
        /// The device's name.
        device: &'static str,
        /// The queue's number.
        queue: u16,
        /// What virtio-queue says.
        source: virtio_queue::Error,
    },
    /// The driver enabled a queue that no device could use.
    #[error("virtio device type {device_type}: queue {queue}: {problem}")]
    QueueSetup {
        /// The device's type (virtio 1.2, 5).
        device_type: u32,
        /// The queue's number.
        queue: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A saved state is not one of the device that it is to be restored into.
    #[error("virtio device type {device_type}: cannot restore: {problem}")]
    RestoreDevice {
        /// The device's type (virtio 1.2, 5).
        device_type: u32,
        /// What does not fit.
        problem: &'static str,
    },
    /// A device's backend failed.
    #[error("virtio-{device}: cannot {operation}: {source}")]
    Device {
        /// The device's name.
        device: &'static str,
        /// What it was doing.
        operation: &'static str,
        /// The reason.
        source: io::Error,
    },
}

/// The result of a VMM operation.
pub type Result<T> = std::result::Result<T, Error>;
