//! The state of a whole machine but its memory.

use serde::{Deserialize, Serialize};

use crate::arch::state::{VcpuState, VmState};
use crate::devices::serial::SerialState;
use crate::devices::virtio::transport::TransportState;

/// Everything that a machine built with the same resources and the same memory needs to go on from here.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// The vCPUs, by index.
    pub vcpus: Vec<VcpuState>,
    /// What KVM emulates for all of them.
    pub vm: VmState,
    /// The serial port.
    pub serial: SerialState,
    /// The virtio devices, in the order of their addresses.
    pub devices: Vec<TransportState>,
}
