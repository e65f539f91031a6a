//! What a policy sees: `input`.

use std::collections::BTreeMap;

use oci_spec::runtime::{LinuxResources, Process, Spec};
use serde::{Deserialize, Serialize};

/// A request that a policy decides on, before anything of it is done. What does not belong to its kind is not there at all.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// What is asked for.
    pub request: Kind,
    /// containerd's namespace: `k8s.io` for those of Kubernetes.
    #[serde(default)]
    pub namespace: String,
    /// The pod that it belongs to.
    #[serde(default)]
    pub pod: Pod,
    /// The container; not for a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<Container>,
    /// The container's image as its client names it, and empty where containerd does not tell; not for a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The container's OCI runtime spec as containerd has written it for the host; for a container alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<Spec>,
    /// The process that is to run beside the container's first, as the OCI runtime spec describes processes; for an exec alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
    /// The container's new limits, as the OCI runtime spec describes resources; for a resize alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<LinuxResources>,
    /// How large the VM is to be.
    #[serde(default)]
    pub size: Size,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A pod, and with it a VM. Asked once in a pod's life, and first.
    #[default]
    Pod,
    /// A container in the pod.
    Container,
    /// One more process in a container: `kubectl exec`, and probes and hooks that run a command.
    Exec,
    /// Other limits for a container.
    Resize,
}

/// A pod. What its client does not tell is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pod {
    /// containerd's identifier.
    pub id: String,
    /// Its namespace in Kubernetes.
    pub namespace: String,
    /// Its name in Kubernetes.
    pub name: String,
    /// Its uid in Kubernetes.
    pub uid: String,
    /// Its annotations, as far as containerd hands them over (`pod_annotations` of the runtime in its configuration), and
    /// containerd's own.
    pub annotations: BTreeMap<String, String>,
    /// Its labels. containerd hands them over with the Sandbox API alone.
    pub labels: BTreeMap<String, String>,
    /// Kernel parameters that it wants set.
    pub sysctls: BTreeMap<String, String>,
}

/// A container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Container {
    /// containerd's identifier.
    pub id: String,
    /// Its name in the pod, or the identifier where it has none.
    pub name: String,
}

/// How large a VM is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// vCPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
}
