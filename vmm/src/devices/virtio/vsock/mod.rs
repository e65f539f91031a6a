//! The socket device.

use serde::{Deserialize, Serialize};

/// What the socket device keeps beside its queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {}
