//! `mayu policy record`: the tightest policy that still allows a running pod, from the specs that containerd keeps of its
//! containers.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use mayu_policy::{Policy, Size};
use mayu_shim::admission::{Admission, Subject};
use mayu_shim::config::Config;
use mayu_shim::container::Role;
use mayu_shim::pod_spec::{Limits, PodSpec};
use mayu_shim::spec;
use oci_spec::runtime::Spec;
use serde_json::{Value, json};

use super::{Error, Result};

/// Where containerd has the bundles of its containers.
const STATE: &str = "/run/containerd/io.containerd.runtime.v2.task";

/// What every recorded policy says.
const RULES: &str = include_str!("recorded.rego");

/// Options of `mayu policy record`.
#[derive(clap::Args)]
pub struct Args {
    /// The pod's identifier or the beginning of it, as `crictl pods` shows it; for ctr and docker that of the container.
    pod: String,
    /// containerd's namespace.
    #[arg(long, default_value = "k8s.io")]
    namespace: String,
    /// Where containerd has the bundles of its containers, below the name of the namespace.
    #[arg(long, value_name = "DIR", default_value = STATE)]
    state: PathBuf,
}

/// A container of the pod, or what stands for the pod.
struct Member {
    id: String,
    spec: Spec,
}

/// What a recorded policy allows.
#[derive(Default)]
struct Recording {
    size: Size,
    sysctls: BTreeMap<String, String>,
    /// By the names of the containers.
    containers: BTreeMap<String, Value>,
}

/// Prints the policy.
///
/// # Errors
/// No such pod, or one that cannot be described.
pub fn run(args: &Args) -> Result<bool> {
    let members = find(args)?;
    let recording = record(&members, &args.namespace, Config::load()?)?;
    std::io::stdout().lock().write_all(recording.text()?.as_bytes())?;
    Ok(true)
}

/// The containers of the one pod whose identifier begins as it was asked for.
fn find(args: &Args) -> Result<Vec<Member>> {
    let state = args.state.join(&args.namespace);
    let failed = |source| Error::Read { path: state.clone(), source };
    let mut pods: BTreeMap<String, Vec<Member>> = BTreeMap::new();
    for entry in std::fs::read_dir(&state).map_err(failed)? {
        let bundle = entry.map_err(failed)?.path();
        let id = bundle.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // With the Sandbox API the bundle of the pod itself has no spec.
        if !has_spec(&bundle) {
            continue;
        }
        let pod = spec::sandbox_id(&bundle, &id)?;
        if pod.starts_with(&args.pod) {
            pods.entry(pod).or_default().push(Member { id, spec: spec::load(&bundle)? });
        }
    }
    let wrong =
        |reason: &str| Error::Pod { pod: args.pod.clone(), reason: reason.into(), state: state.clone() };
    let (_, members) = pods.pop_first().ok_or_else(|| wrong("there is none"))?;
    if pods.is_empty() { Ok(members) } else { Err(wrong("there are several")) }
}

fn has_spec(bundle: &Path) -> bool {
    bundle.join("config.json").exists()
}

fn record(members: &[Member], namespace: &str, config: Config) -> Result<Recording> {
    let pods = members
        .iter()
        .map(|member| PodSpec::from_oci(&member.spec))
        .collect::<mayu_shim::Result<Vec<_>>>()?;
    let of_pod = members.iter().position(|member| spec::role(&member.spec) == Role::Pod);
    let pod = of_pod.or((!pods.is_empty()).then_some(0)).map(|index| &pods[index]);
    let pod = pod.cloned().unwrap_or_default();
    let admission = Admission::new(config, namespace, &pod)?;
    let workloads = || members.iter().filter(|member| spec::role(&member.spec) == Role::Workload);
    let of_containers =
        workloads().fold(Limits::default(), |sum, member| sum.plus(Limits::of_container(&member.spec)));
    let size = pod.limits.max(of_containers).size(&admission.config.vm);
    let mut recording = Recording { size: size.into(), sysctls: pod.about.sysctls, ..Recording::default() };
    let recorder = Policy::parse(&recording.text()?, Path::new("recorded.rego"))?;
    for Member { id, spec } in workloads() {
        let request = admission.container(&Subject::new(id, spec), spec, size);
        let name = request.container.as_ref().map(|container| container.name.clone()).unwrap_or_default();
        recording.containers.insert(name, recorder.ask("facts", &request)?);
    }
    Ok(recording)
}

impl Recording {
    /// As a policy.
    fn text(&self) -> Result<String> {
        let mut text = String::from(
            "# What one pod was, and nothing else, as `mayu policy record` has found it.\npackage mayu\n",
        );
        let sections = [
            ("size", json!(self.size)),
            ("sysctls", json!(self.sysctls)),
            ("containers", json!(self.containers)),
        ];
        for (name, value) in sections {
            text.push_str(&format!("\n{name} := {}\n", serde_json::to_string_pretty(&value)?));
        }
        Ok(text + RULES)
    }
}
