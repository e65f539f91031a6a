//! The block device.

use serde::{Deserialize, Serialize};

/// What the block device keeps beside its queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {}
