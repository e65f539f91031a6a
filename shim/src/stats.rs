//! What a pod uses, by the host's account of its VMM.

use containerd_shim::cgroup::{collect_metrics_v2, get_cgroup};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

use crate::sandbox::Sandbox;
use crate::{Error, Result};

/// containerd's type of the figures.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// The figures of the cgroup that the VMM is in, which holds nothing else when the pod has one of its own.
///
/// # Errors
/// [`Error::Stats`].
pub fn of_pod(sandbox: &Sandbox) -> Result<Any> {
    let failed = |reason: String| Error::Stats { pid: sandbox.pid(), reason };
    let metrics = get_cgroup(sandbox.pid())
        .and_then(|cgroup| collect_metrics_v2(&cgroup))
        .map_err(|error| failed(error.to_string()))?;
    let value = metrics.write_to_bytes().map_err(|error| failed(error.to_string()))?;
    Ok(Any { type_url: TYPE_URL.into(), value, ..Default::default() })
}
