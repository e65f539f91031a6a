//! What the containers of the pod share.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use slog::Logger;

use crate::events::Events;
use crate::launch::Launcher;
use crate::pid_namespace::PodPidNamespace;
use crate::reaper::Reaper;
use crate::root::Root;
use crate::streams::Streams;

/// What all containers share.
pub struct Runtime {
    /// Starts processes.
    pub launcher: Launcher,
    /// The PID namespace that containers may share.
    pub pid_namespace: Arc<PodPidNamespace>,
    /// How long the shim may take to connect the streams of a process that it starts.
    pub stream_deadline: Duration,
    /// Where bundles, libcontainer's states and sockets are kept.
    pub run_directory: PathBuf,
    /// Collects exits.
    pub reaper: Arc<Reaper>,
    /// What the shim is told.
    pub events: Arc<Events>,
    /// The shim's streams.
    pub streams: Arc<Streams>,
    /// Numbers files, so that two never meet.
    pub counter: AtomicU64,
    /// The agent's log.
    pub log: Logger,
}

impl Runtime {
    /// The directory of container `id`'s bundle.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.run_directory.join("bundles").join(id)
    }

    /// The directory in which libcontainer keeps a directory for each container.
    pub fn state_directory(&self) -> PathBuf {
        self.run_directory.join("state")
    }

    /// The root of container `id` where it may be suspended.
    pub fn root(&self, id: &str) -> Root {
        Root::at(self.run_directory.join("roots").join(id))
    }

    /// A path that nobody has used before.
    pub fn fresh_path(&self) -> PathBuf {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        self.run_directory.join(number.to_string())
    }
}
