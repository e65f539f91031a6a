//! `cri-times ROUNDS HANDLER…`: how long RunPodSandbox, and creating and starting a container in the pod, take with each
//! runtime handler, in turn. Prints a line for each: handler, request, microseconds.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a measurement that fails is to stop")]

use std::time::Instant;

use k8s_cri::v1::LinuxPodSandboxConfig;
use mayu_e2e::BUSYBOX;
use mayu_e2e::cri::{Cri, container, pod_config};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let rounds: u32 = arguments.next().expect("a number of rounds").parse().expect("a number");
    let handlers: Vec<String> = arguments.collect();
    // The first of each fills caches and makes directories.
    for round in 0..=rounds {
        for handler in &handlers {
            let times = measure(handler);
            if round > 0 {
                for (request, microseconds) in times {
                    println!("{handler} {request} {microseconds}");
                }
            }
        }
    }
}

fn measure(handler: &str) -> [(&'static str, u128); 2] {
    let cri = Cri::connect(&[BUSYBOX]);
    let started = Instant::now();
    let mut pod = cri.run_as(pod_config(LinuxPodSandboxConfig::default()), handler).expect("a pod");
    let pod_ready = started.elapsed().as_micros();
    let started = Instant::now();
    pod.run_container(container("one", BUSYBOX, &["sleep", "infinity"])).expect("a container");
    let container_started = started.elapsed().as_micros();
    pod.remove().expect("the pod is removed");
    [("RunPodSandbox", pod_ready), ("StartContainer", container_started)]
}
