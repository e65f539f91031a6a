//! The fs device.

use serde::{Deserialize, Serialize};

/// What the fs device keeps beside its queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {}
