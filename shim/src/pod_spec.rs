//! What a pod is to be, from whichever of containerd's two descriptions there is: the OCI spec of its first container, or
//! the Kubernetes pod that comes with the Sandbox API.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use mayu_vmm_api::{MAX_MEMORY_MIB, MAX_VCPUS};
use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Spec};
use protobuf::Message;

use crate::annotations::{self, Annotations};
use crate::config::Vm;
use crate::container::Role;
use crate::cri::{DNSConfig, NamespaceMode, NamespaceOption, PodSandboxConfig};
use crate::spec::{SANDBOX_ID, annotation, role};
use crate::state_dir::StateDir;
use crate::{Error, Result};

/// The type under which containerd hands over a Kubernetes pod.
const CRI_POD: &str = "runtime.v1.PodSandboxConfig";

/// CPU time per [`DEFAULT_PERIOD`] that the pod's containers may use together, and its period, both in microseconds.
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// The sum of the containers' memory limits, in bytes.
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// What the pod is called in Kubernetes.
const SANDBOX_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
const SANDBOX_NAME: &str = "io.kubernetes.cri.sandbox-name";
const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";

/// The kernel's period of CPU bandwidth control, in microseconds.
const DEFAULT_PERIOD: i64 = 100_000;

/// What a pod is to be.
#[derive(Clone, Debug, Default)]
pub struct PodSpec {
    /// The guest's host name.
    pub hostname: Option<String>,
    /// Where the pod belongs in the host's cgroup hierarchy, as the spec says it.
    pub cgroups_path: Option<PathBuf>,
    /// Kernel parameters. Those of a container that is more than the pod are set in its own namespaces.
    pub sysctls: HashMap<String, String>,
    /// The pod's network namespace. Where there is none the VMM's own becomes it: somebody may set it up later, as docker
    /// does between Create and Start.
    pub network: Option<PathBuf>,
    /// What its containers may use together.
    pub limits: Limits,
    /// What it asks for itself.
    pub annotations: Annotations,
    /// What a policy sees of it.
    pub about: mayu_policy::Pod,
    /// Files that a client which does not write them itself leaves to the shim.
    pub files: Vec<PodFile>,
}

/// What containers may use together. Nothing said is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Thousandths of a CPU.
    pub cpu_millis: Option<u64>,
    /// Bytes.
    pub memory: Option<u64>,
}

/// How large a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// vCPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
}

impl Size {
    /// What a VM that starts like this may grow to.
    pub fn largest(self, vm: &Vm) -> Self {
        Self { vcpus: self.vcpus.max(vm.max_vcpus), memory_mib: self.memory_mib.max(vm.max_memory_mib) }
    }
}

impl From<Size> for mayu_policy::Size {
    fn from(Size { vcpus, memory_mib }: Size) -> Self {
        Self { vcpus, memory_mib }
    }
}

/// A small file that every container of the pod gets unless it has a mount there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFile {
    /// Where in a container, below `/etc`.
    pub name: &'static str,
    /// What it says.
    pub text: String,
}

impl PodSpec {
    /// From the spec of the pod's first container.
    ///
    /// # Errors
    /// [`Error::HostNamespace`] or [`Error::UserNamespace`] for a container that wants what a VM cannot share.
    pub fn from_oci(spec: &Spec) -> Result<Self> {
        refuse_host_namespaces(spec)?;
        let linux = spec.linux().as_ref();
        let network = linux
            .and_then(|linux| linux.namespaces().as_ref())
            .and_then(|all| all.iter().find(|namespace| namespace.typ() == LinuxNamespaceType::Network))
            .and_then(|namespace| namespace.path().clone());
        let sysctls = linux
            .filter(|_| role(spec) == Role::Pod)
            .and_then(|linux| linux.sysctl().clone())
            .unwrap_or_default();
        Ok(Self {
            about: about(spec, &sysctls),
            hostname: spec.hostname().clone().filter(|name| !name.is_empty()),
            cgroups_path: linux.and_then(|linux| linux.cgroups_path().clone()),
            sysctls,
            network,
            annotations: annotations::ours(spec.annotations().iter().flatten()),
            limits: match role(spec) {
                Role::Pod => annotated_limits(spec),
                Role::Workload => Limits::of_container(spec),
            },
            files: Vec::new(),
        })
    }

    /// Where its files are, once they are written: their names below `/etc`, and their paths.
    pub fn paths_of_files(&self, dir: &StateDir) -> Vec<(&'static str, PathBuf)> {
        self.files.iter().map(|file| (file.name, dir.files().join(file.name))).collect()
    }

    /// From a request of the Sandbox API. Without a Kubernetes pod in it the defaults hold.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another description, one that cannot be read, or one that wants the host's namespaces.
    pub fn from_request(request: &CreateSandboxRequest) -> Result<Self> {
        let network = Some(&request.netns_path).filter(|path| !path.is_empty()).map(PathBuf::from);
        let Some(options) = request.options.as_ref().filter(|any| !any.type_url.is_empty()) else {
            return Ok(Self { network, ..Self::default() });
        };
        if options.type_url.rsplit('/').next() != Some(CRI_POD) {
            return Err(Error::InvalidArgument(format!(
                "sandbox options of type {:?}: only {CRI_POD} is known",
                options.type_url
            )));
        }
        let config = PodSandboxConfig::parse_from_bytes(&options.value)
            .map_err(|error| Error::InvalidArgument(format!("sandbox options: {error}")))?;
        Self::from_cri(&request.sandbox_id, config, network)
    }

    fn from_cri(id: &str, config: PodSandboxConfig, network: Option<PathBuf>) -> Result<Self> {
        let linux = config.linux.unwrap_or_default();
        let security = linux.security_context.unwrap_or_default();
        refuse_host_options(&security.namespace_options)?;
        let resources = linux.resources.unwrap_or_default();
        let memory = resources.memory_limit_in_bytes;
        let metadata = config.metadata.unwrap_or_default();
        Ok(Self {
            about: mayu_policy::Pod {
                id: id.into(),
                namespace: metadata.namespace,
                name: metadata.name,
                uid: metadata.uid,
                annotations: sorted(&config.annotations),
                labels: sorted(&config.labels),
                sysctls: sorted(&linux.sysctls),
            },
            files: pod_files(&config.hostname, config.dns_config.as_ref()),
            annotations: annotations::ours(&config.annotations),
            hostname: Some(config.hostname).filter(|name| !name.is_empty()),
            cgroups_path: cgroups_path(&linux.cgroup_parent, id),
            sysctls: linux.sysctls,
            network,
            limits: Limits {
                cpu_millis: cpu_millis(resources.cpu_quota, resources.cpu_period),
                memory: u64::try_from(memory).ok().filter(|memory| *memory > 0),
            },
        })
    }
}

impl Limits {
    /// What one container may use.
    pub fn of_container(spec: &Spec) -> Self {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        resources.map(Self::of_resources).unwrap_or_default()
    }

    fn of_resources(resources: &LinuxResources) -> Self {
        let (cpu, memory) = (resources.cpu().as_ref(), resources.memory().as_ref());
        Self {
            cpu_millis: cpu.and_then(|cpu| {
                let period = cpu.period().and_then(|period| i64::try_from(period).ok()).unwrap_or_default();
                cpu_millis(cpu.quota().unwrap_or_default(), period)
            }),
            memory: memory
                .and_then(|memory| memory.limit())
                .and_then(|limit| u64::try_from(limit).ok())
                .filter(|limit| *limit > 0),
        }
    }

    /// What a container with these limits may use after a change, which leaves alone what it does not name.
    pub fn updated(self, resources: &LinuxResources) -> Self {
        let changed = Self::of_resources(resources);
        let names_cpu = resources.cpu().as_ref().is_some_and(|cpu| cpu.quota().is_some());
        let names_memory = resources.memory().as_ref().is_some_and(|memory| memory.limit().is_some());
        Self {
            cpu_millis: if names_cpu { changed.cpu_millis } else { self.cpu_millis },
            memory: if names_memory { changed.memory } else { self.memory },
        }
    }

    /// The sum of two; what has no limit does not count, as in Kubernetes.
    pub fn plus(self, other: Self) -> Self {
        let sum = |one: Option<u64>, other: Option<u64>| match (one, other) {
            (Some(one), Some(other)) => Some(one.saturating_add(other)),
            (one, other) => one.or(other),
        };
        Self { cpu_millis: sum(self.cpu_millis, other.cpu_millis), memory: sum(self.memory, other.memory) }
    }

    /// The larger of two, each way.
    pub fn max(self, other: Self) -> Self {
        Self { cpu_millis: self.cpu_millis.max(other.cpu_millis), memory: self.memory.max(other.memory) }
    }

    /// The VM for containers with these limits: the configured memory on top, for the guest itself and for containers
    /// without a limit; as many CPUs as the limit fills, and no less than configured.
    pub fn size(self, vm: &Vm) -> Size {
        let vcpus = self.cpu_millis.unwrap_or_default().div_ceil(1000);
        let memory_mib = self.memory.unwrap_or_default().div_ceil(1 << 20);
        Size {
            vcpus: u8::try_from(vcpus).unwrap_or(MAX_VCPUS).clamp(vm.vcpus, MAX_VCPUS.max(vm.vcpus)),
            memory_mib: u32::try_from(memory_mib)
                .unwrap_or(MAX_MEMORY_MIB)
                .saturating_add(vm.memory_mib)
                .min(MAX_MEMORY_MIB),
        }
    }
}

/// Refuses a container that wants what a VM cannot share with its host. A namespace that is not named is the host's.
///
/// # Errors
/// [`Error::HostNamespace`] or [`Error::UserNamespace`].
fn refuse_host_namespaces(spec: &Spec) -> Result<()> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let named = |kind| namespaces.is_some_and(|all| all.iter().any(|namespace| namespace.typ() == kind));
    for (kind, what, field) in [
        (LinuxNamespaceType::Network, "network", "hostNetwork"),
        (LinuxNamespaceType::Pid, "processes", "hostPID"),
        (LinuxNamespaceType::Ipc, "IPC objects", "hostIPC"),
    ] {
        if !named(kind) {
            return Err(Error::HostNamespace { what, field });
        }
    }
    if named(LinuxNamespaceType::User) {
        return Err(Error::UserNamespace);
    }
    Ok(())
}

fn refuse_host_options(options: &NamespaceOption) -> Result<()> {
    for (mode, what, field) in [
        (options.network, "network", "hostNetwork"),
        (options.pid, "processes", "hostPID"),
        (options.ipc, "IPC objects", "hostIPC"),
    ] {
        if mode.enum_value() == Ok(NamespaceMode::NODE) {
            return Err(Error::HostNamespace { what, field });
        }
    }
    // Not the host's is the pod's own.
    if options.userns_options.as_ref().is_some_and(|users| users.mode.enum_value() == Ok(NamespaceMode::POD))
    {
        return Err(Error::UserNamespace);
    }
    Ok(())
}

/// What a policy sees of the pod of a container.
fn about(spec: &Spec, sysctls: &HashMap<String, String>) -> mayu_policy::Pod {
    let text = |key| annotation(spec, key).unwrap_or_default().to_owned();
    mayu_policy::Pod {
        id: text(SANDBOX_ID),
        namespace: text(SANDBOX_NAMESPACE),
        name: text(SANDBOX_NAME),
        uid: text(SANDBOX_UID),
        annotations: spec.annotations().as_ref().map(sorted).unwrap_or_default(),
        labels: BTreeMap::new(),
        sysctls: sorted(sysctls),
    }
}

fn sorted(map: &HashMap<String, String>) -> BTreeMap<String, String> {
    map.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
}

fn annotated_limits(spec: &Spec) -> Limits {
    let number = |key| annotation(spec, key).and_then(|text| text.parse::<i64>().ok()).unwrap_or_default();
    Limits {
        cpu_millis: cpu_millis(number(CPU_QUOTA), number(CPU_PERIOD)),
        memory: u64::try_from(number(MEMORY)).ok().filter(|memory| *memory > 0),
    }
}

/// No quota, or a negative one, is no limit.
fn cpu_millis(quota: i64, period: i64) -> Option<u64> {
    let period = if period > 0 { period } else { DEFAULT_PERIOD };
    let millis = i128::from(quota) * 1000 / i128::from(period);
    u64::try_from(millis).ok().filter(|millis| *millis > 0)
}

/// The form that an OCI spec would have: a path, or systemd's `slice:prefix:name`.
fn cgroups_path(parent: &str, id: &str) -> Option<PathBuf> {
    let name = Path::new(parent).file_name()?.to_str()?;
    Some(if name.ends_with(".slice") {
        format!("{name}:cri-containerd:{id}").into()
    } else {
        Path::new(parent).join(id)
    })
}

/// What containerd writes for the pods that it runs with a pause container, and leaves to the shim of others.
fn pod_files(hostname: &str, dns: Option<&DNSConfig>) -> Vec<PodFile> {
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
    let resolv_conf = match dns.map(resolv_conf) {
        Some(text) if !text.is_empty() => text,
        _ => std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
    };
    vec![
        PodFile { name: "hostname", text: format!("{hostname}\n") },
        PodFile { name: "hosts", text: hosts },
        PodFile { name: "resolv.conf", text: resolv_conf },
    ]
}

/// resolv.conf(5).
fn resolv_conf(dns: &DNSConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::MessageField;
    use protobuf::well_known_types::any::Any;
    use serde_json::json;

    fn spec(value: serde_json::Value) -> Spec {
        serde_json::from_value(value).unwrap()
    }

    fn namespaces(kinds: &[&str]) -> serde_json::Value {
        kinds.iter().map(|kind| json!({"type": kind})).collect()
    }

    const ALL: [&str; 4] = ["pid", "ipc", "network", "mount"];

    fn request(config: &PodSandboxConfig) -> CreateSandboxRequest {
        let value = config.write_to_bytes().unwrap();
        CreateSandboxRequest {
            sandbox_id: "p1".into(),
            netns_path: "/var/run/netns/cni-1".into(),
            options: MessageField::some(Any { type_url: CRI_POD.into(), value, ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn what_a_vm_cannot_share_with_its_host_is_refused_by_the_name_that_kubernetes_has_for_it() {
        for (missing, field) in [("network", "hostNetwork"), ("pid", "hostPID"), ("ipc", "hostIPC")] {
            let kinds: Vec<_> = ALL.into_iter().filter(|kind| *kind != missing).collect();
            let spec = spec(json!({"ociVersion": "1.1.0", "linux": {"namespaces": namespaces(&kinds)}}));
            let message = PodSpec::from_oci(&spec).unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
        for (place, field) in [(0, "hostNetwork"), (1, "hostPID"), (2, "hostIPC")] {
            let mut config = PodSandboxConfig::new();
            let options = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            let options = options.namespace_options.mut_or_insert_default();
            *[&mut options.network, &mut options.pid, &mut options.ipc][place] = NamespaceMode::NODE.into();
            let message = PodSpec::from_request(&request(&config)).unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
    }

    #[test]
    fn a_user_namespace_is_refused() {
        let spec = spec(
            json!({"ociVersion": "1.1.0", "linux": {"namespaces": namespaces(&["pid", "ipc", "network", "user"])}}),
        );
        let message = PodSpec::from_oci(&spec).unwrap_err().to_string();
        assert!(message.contains("hostUsers") && message.contains("user namespace"), "{message}");
        let mut config = PodSandboxConfig::new();
        let options = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        options.namespace_options.mut_or_insert_default().userns_options.mut_or_insert_default();
        assert!(matches!(PodSpec::from_request(&request(&config)), Err(Error::UserNamespace)));
    }

    #[test]
    fn the_network_namespace_is_the_one_that_is_named() {
        let mut all = namespaces(&ALL);
        let make = |all: &serde_json::Value| {
            PodSpec::from_oci(&spec(json!({"ociVersion": "1.1.0", "linux": {"namespaces": all}}))).unwrap()
        };
        assert_eq!(make(&all).network, None);
        all[2]["path"] = json!("/var/run/netns/x");
        assert_eq!(make(&all).network, Some("/var/run/netns/x".into()));
    }

    #[test]
    fn a_pod_of_kubernetes_is_read_from_its_message() {
        let mut config = PodSandboxConfig::new();
        config.hostname = "web-0".into();
        let metadata = config.metadata.mut_or_insert_default();
        (metadata.namespace, metadata.name, metadata.uid) = ("shop".into(), "web-0".into(), "u7".into());
        config.labels.insert("app".into(), "web".into());
        config.dns_config = MessageField::some(DNSConfig {
            servers: vec!["10.96.0.10".into()],
            searches: vec!["svc.cluster.local".into(), "cluster.local".into()],
            options: vec!["ndots:5".into()],
            ..Default::default()
        });
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = "/kubepods/pod7".into();
        linux.sysctls.insert("net.core.somaxconn".into(), "1".into());
        let resources = linux.resources.mut_or_insert_default();
        (resources.cpu_quota, resources.cpu_period) = (250_000, 100_000);
        resources.memory_limit_in_bytes = 64 << 20;

        let pod = PodSpec::from_request(&request(&config)).unwrap();

        assert_eq!(pod.hostname.as_deref(), Some("web-0"));
        let expected = mayu_policy::Pod {
            id: "p1".into(),
            namespace: "shop".into(),
            name: "web-0".into(),
            uid: "u7".into(),
            annotations: BTreeMap::new(),
            labels: BTreeMap::from([("app".into(), "web".into())]),
            sysctls: BTreeMap::from([("net.core.somaxconn".into(), "1".into())]),
        };
        assert_eq!(pod.about, expected);
        assert_eq!(pod.network, Some("/var/run/netns/cni-1".into()));
        assert_eq!(pod.cgroups_path, Some("/kubepods/pod7/p1".into()));
        assert_eq!(pod.sysctls["net.core.somaxconn"], "1");
        assert_eq!(pod.limits, Limits { cpu_millis: Some(2500), memory: Some(64 << 20) });
        let file = |name| &pod.files.iter().find(|file| file.name == name).unwrap().text;
        assert_eq!(file("hostname"), "web-0\n");
        assert_eq!(
            file("resolv.conf"),
            "search svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"
        );
    }

    #[test]
    fn options_of_another_type_or_that_are_broken_are_refused() {
        let mut request = request(&PodSandboxConfig::new());
        request.options.mut_or_insert_default().value = vec![0xff];
        assert!(PodSpec::from_request(&request).is_err());
        request.options.mut_or_insert_default().type_url = "types.example/Other".into();
        let message = PodSpec::from_request(&request).unwrap_err().to_string();
        assert!(message.contains("types.example/Other"), "{message}");
    }

    #[test]
    fn a_slice_of_systemd_makes_a_scope() {
        let parent = "/kubepods.slice/kubepods-pod7.slice";
        assert_eq!(cgroups_path(parent, "p1"), Some("kubepods-pod7.slice:cri-containerd:p1".into()));
        assert_eq!(cgroups_path("", "p1"), None);
    }

    #[test]
    fn a_vm_is_as_large_as_its_limits_and_the_base_and_no_larger_than_vms_can_be() {
        let vm = Vm { vcpus: 1, memory_mib: 256, ..Vm::default() };
        let size = |cpu_millis, memory| {
            let Size { vcpus, memory_mib } = Limits { cpu_millis, memory }.size(&vm);
            (vcpus, memory_mib)
        };
        assert_eq!(size(None, None), (1, 256));
        assert_eq!(size(Some(100), Some(1)), (1, 257));
        assert_eq!(size(Some(2001), Some(512 << 20)), (3, 768));
        assert_eq!(size(Some(u64::MAX), Some(u64::MAX)), (MAX_VCPUS, MAX_MEMORY_MIB));
    }

    #[test]
    fn limits_of_a_pod_come_from_the_annotations_and_those_of_a_container_from_its_resources() {
        let linux = json!({
            "namespaces": namespaces(&ALL),
            "resources": {"cpu": {"quota": 150_000, "period": 50_000}, "memory": {"limit": 4096}},
        });
        let container = spec(json!({"ociVersion": "1.1.0", "linux": linux}));
        let expected = Limits { cpu_millis: Some(3000), memory: Some(4096) };
        assert_eq!(PodSpec::from_oci(&container).unwrap().limits, expected);
        let pod = spec(json!({
            "ociVersion": "1.1.0",
            "linux": linux,
            "annotations": {
                "io.kubernetes.cri.container-type": "sandbox",
                CPU_QUOTA: "50000", CPU_PERIOD: "100000", MEMORY: "8192",
            },
        }));
        let expected = Limits { cpu_millis: Some(500), memory: Some(8192) };
        assert_eq!(PodSpec::from_oci(&pod).unwrap().limits, expected);
    }

    #[test]
    fn a_change_leaves_alone_what_it_does_not_name() {
        let before = Limits { cpu_millis: Some(500), memory: Some(4096) };
        let resources = |value| serde_json::from_value::<LinuxResources>(value).unwrap();
        let memory = resources(json!({"memory": {"limit": 8192}}));
        assert_eq!(before.updated(&memory), Limits { cpu_millis: Some(500), memory: Some(8192) });
        let unlimited = resources(json!({"cpu": {"quota": -1}, "memory": {}}));
        assert_eq!(before.updated(&unlimited), Limits { cpu_millis: None, memory: Some(4096) });
    }

    #[test]
    fn sums_leave_out_what_has_no_limit() {
        let one = Limits { cpu_millis: Some(500), memory: None };
        let other = Limits { cpu_millis: Some(700), memory: Some(3) };
        assert_eq!(one.plus(other), Limits { cpu_millis: Some(1200), memory: Some(3) });
        assert_eq!(one.max(other), other);
    }

    #[test]
    fn a_quota_of_nothing_is_no_limit() {
        assert_eq!(cpu_millis(0, 100_000), None);
        assert_eq!(cpu_millis(-1, 100_000), None);
        assert_eq!(cpu_millis(100_000, 0), Some(1000));
    }
}
