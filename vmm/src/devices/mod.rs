//! The machine's devices.

pub mod serial;
pub mod virtio;
