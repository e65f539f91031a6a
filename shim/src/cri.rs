//! Kubernetes' description of a pod, generated from `proto/cri.proto`.

#[allow(
    missing_docs,
    unreachable_pub,
    unsafe_code,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    unused_qualifications
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

pub use generated::cri::{DNSConfig, NamespaceMode, NamespaceOption, PodSandboxConfig};
