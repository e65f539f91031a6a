//! The VMM: one KVM microVM per process.

pub mod arch;
pub mod boot;
pub mod builder;
pub mod bus;
pub mod control;
pub mod devices;
pub mod error;
pub mod event_loop;
pub mod jail;
pub mod kvm;
pub mod log;
pub mod machine;
pub mod memory;
mod prefetch;
pub mod seccomp;
pub mod snapshot;
pub mod thread;
pub mod vcpu;
