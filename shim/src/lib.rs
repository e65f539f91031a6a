//! The shim of mayu: one process per pod, between containerd and the pod's microVM.
//!
//! containerd runs `containerd-shim-mayu-v2 start`, which forks the server and prints its address ([`start`]).
//! The server ([`serve`]) answers containerd's Task service ([`task`]). What the operator's policy has nothing against
//! ([`admission`]) is done. The first Create boots the pod's VM
//! ([`sandbox`]), or has it go on from where one was saved ([`template`]): the VMM is spawned with file descriptors only
//! ([`vmm_process`]), and what the pod may see of the host's files is bound under one shared directory ([`storage`]). The guest's agent ([`agent`]) speaks the
//! same Task service; requests reach it with their paths rewritten ([`spec`]). What happens inside comes back as
//! the agent's events ([`exits`]) and goes out as containerd's ([`events`]). When everything else is dead,
//! `containerd-shim-mayu-v2 delete` cleans up ([`delete`]).

pub mod admission;
pub mod agent;
pub mod annotations;
pub mod cgroup;
pub mod config;
pub mod console;
pub mod container;
pub mod cri;
pub mod delete;
pub mod devices;
pub mod error;
pub mod events;
pub mod exits;
pub mod hooks;
pub mod id;
pub mod info;
pub mod log;
pub mod machine;
mod mount_attr;
pub mod network;
pub mod pidfd;
pub mod pod;
pub mod pod_spec;
pub mod privileges;
pub mod process;
pub mod rates;
pub mod sandbox;
pub mod sandbox_service;
pub mod saved;
pub mod serve;
pub mod snapshot;
pub mod spec;
pub mod start;
pub mod state_dir;
pub mod stats;
pub mod stdio;
pub mod storage;
pub mod task;
pub mod template;
mod touched;
pub mod uids;
pub mod vmm_process;

pub use error::{Error, Result};

/// containerd's name of this runtime.
pub const RUNTIME: &str = "io.containerd.mayu.v2";
