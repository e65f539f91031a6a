//! Files that describe a request.

use std::path::Path;

use mayu_policy::Request;
use mayu_shim::admission::{Admission, Subject};
use mayu_shim::config::Config;
use mayu_shim::container::Role;
use mayu_shim::pod_spec::PodSpec;
use mayu_shim::spec::role;
use oci_spec::runtime::Spec;
use serde_json::Value;

use super::{Error, Result};

/// Reads a request as a policy sees it, or a bundle's `config.json`: then it is what the shim would ask for it, in this
/// namespace of containerd's.
///
/// # Errors
/// [`Error::Read`], [`Error::Document`], or what the shim refuses without any policy.
pub fn read(path: &Path, namespace: &str, config: &Config) -> Result<Request> {
    let text = std::fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let wrong = |error: serde_json::Error| Error::Document { path: path.into(), reason: error.to_string() };
    let value: Value = serde_json::from_slice(&text).map_err(wrong)?;
    if value.get("request").is_some() {
        return serde_json::from_value(value).map_err(wrong);
    }
    if value.get("ociVersion").is_none() {
        let reason = "neither a request, with a key request, nor an OCI runtime spec, with a key ociVersion";
        return Err(Error::Document { path: path.into(), reason: reason.into() });
    }
    let spec: Spec = serde_json::from_value(value).map_err(wrong)?;
    let pod = PodSpec::from_oci(&spec)?;
    let admission = Admission::new(config.clone(), namespace, &pod)?;
    let size = pod.limits.size(&admission.config.vm);
    Ok(match role(&spec) {
        Role::Pod => admission.pod(size),
        Role::Workload => admission.container(&Subject::new("", &spec), &spec, size),
    })
}
