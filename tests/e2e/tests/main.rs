//! End-to-end tests. They need root, containerd, an installed mayu and a KVM: `make e2e` runs them in the lab.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test's way to fail")]

mod basics;
mod check;
mod cleanup;
mod conformance;
mod cri;
mod docker;
mod exec;
mod faults;
mod files;
mod input;
mod intrusion;
mod isolation;
mod jail;
mod lifecycle;
mod network;
mod process;
mod programs;
mod reclaim;
mod resources;
mod rpc;
mod snapshot;
mod stdio;
mod template;
mod terminal;
