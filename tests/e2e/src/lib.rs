//! What the end-to-end tests drive containerd with: its own `ctr`, as a person would.
//!
//! The tests run as root on a host with containerd, mayu and a KVM, which is what the lab is. Nothing here talks to
//! mayu except through containerd, save [`shim`], which looks at the return codes that `ctr` hides. [`cri`] is what a
//! kubelet would be.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test's way to fail")]

mod command;
pub mod configuration;
mod container;
pub mod cri;
pub mod host;
pub mod image;
pub mod intruder;
pub mod mount;
pub mod shim;
pub mod snapshot;
pub mod spec;
pub mod template;
pub mod trace;

pub use command::{Outcome, run, run_with_input};
pub use container::{Container, ctr};

/// The runtime under test: mayu, unless `MAYU_E2E_RUNTIME` names another to hold the tests themselves against.
pub fn runtime() -> String {
    std::env::var("MAYU_E2E_RUNTIME").unwrap_or_else(|_| "io.containerd.mayu.v2".to_owned())
}

/// Debian's static busybox and nothing else.
pub const BUSYBOX: &str = "docker.io/mayu/busybox:test";

/// What containerd runs as the pod itself, where the pod is not a VM.
pub const PAUSE: &str = "docker.io/mayu/pause:test";

/// Debian with python3.
pub const PYTHON: &str = "docker.io/mayu/python3:test";

/// Debian with redis-server and redis-benchmark.
pub const REDIS: &str = "docker.io/mayu/redis:test";

/// Debian with nginx.
pub const NGINX: &str = "docker.io/mayu/nginx:test";

/// How long anything may take before a test gives up on it. The lab's processor is software.
pub const PATIENCE: std::time::Duration = std::time::Duration::from_secs(180);

/// How many of something a test tries: what the environment says, or else so many.
///
/// # Panics
/// The environment says something else than a number.
pub fn how_many<T: std::str::FromStr>(variable: &str, otherwise: T) -> T {
    let number = |text: String| text.parse().ok().expect("a number");
    std::env::var(variable).map_or(otherwise, number)
}

/// The numbers below `count`. Says after each hundred how far it is, for what takes a while.
pub fn counted(count: i32, what: &str) -> impl Iterator<Item = i32> {
    (0..count).inspect(move |number| {
        if *number > 0 && number % 100 == 0 {
            println!("{number} of {count} {what}");
        }
    })
}
