//! The guest agent: PID 1 of the virtual machine, which runs the pod's containers.
//!
//! It serves containerd's own Task service and the small Sandbox service of [`mayu_agent_api`]. The library is
//! the agent without its boot, so that tests can run it on a host with cgroup v2.

mod block_devices;
mod blocking;
mod cgroup;
pub mod console;
mod container;
mod cpus;
mod device_filter;
mod error;
mod events;
mod forward;
pub mod init;
pub mod launch;
mod network;
pub mod pause;
mod pid_namespace;
mod process;
pub mod reaper;
mod root;
mod runtime;
mod sandbox;
pub mod server;
mod spec;
mod state;
mod stats;
mod stdio;
mod streams;
mod suspend;
mod sys;
mod sysctl;
mod task;
mod tcp;
mod template;
mod volumes;

pub use error::{Error, Result};
