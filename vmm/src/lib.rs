//! The VMM: one KVM microVM per process.

pub mod devices;
pub mod error;
pub mod event_loop;
