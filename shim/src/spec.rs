//! The OCI runtime spec of a container, as containerd wrote it for the host, rewritten for the guest.

mod mounts;

use std::path::{Path, PathBuf};
use std::{fs, io};

use mayu_agent_api::SHARE_DIR;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount, Process, Spec};
use slog::{Logger, info};

use crate::config::{HostProfiles, Security};
use crate::container::{PidNamespace, Role};
use crate::devices::{self, BlockDevice};
use crate::hooks::ContainerHooks;
use crate::{Error, Result, annotations};

/// The name of the spec in a bundle.
const FILE: &str = "config.json";

/// The longest `config.json`, in bytes. It has to fit into one ttrpc message (4 MiB) with room to spare.
const MAX_LEN: u64 = 3 * 1024 * 1024;

/// The annotation by which CRI says to which pod a container belongs.
pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// The annotation by which CRI tells the pod itself, `sandbox`, from its containers.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";

/// A bind mount of the spec: what the shim has to bind under the share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// The path on the host.
    pub source: PathBuf,
    /// Where in the container; only messages name it.
    pub destination: PathBuf,
    /// With everything mounted below it.
    pub recursive: bool,
    /// What of it the guest must not write to.
    pub read_only: ReadOnly,
    /// What the host mounts below the source later appears below the bind as well.
    pub follows: bool,
}

/// How much of a bind mount may not be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOnly {
    /// Nothing of it.
    No,
    /// What is mounted directly there.
    Itself,
    /// That, and everything mounted below.
    AllBelow,
}

/// A file system in the guest's memory, which the pod's containers share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// A file name; the guest has it below [`VOLUME_DIR`].
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// Permissions of its root.
    pub mode: u32,
    /// Owner of its root.
    pub uid: u32,
    /// Group of its root.
    pub gid: u32,
    /// Where this is no file system but a directory of one.
    pub part: Option<Part>,
}

/// A directory of a [`Volume`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The volume's name.
    pub of: String,
    /// Where in it.
    pub path: PathBuf,
}

/// Where a container of the guest comes from, beside its spec.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// containerd's identifier.
    pub id: &'a str,
    /// Where its files are on the share.
    pub place: &'a str,
    /// containerd's directory for it.
    pub bundle: &'a Path,
    /// The PID namespace that it gets; a path of the spec means nothing to the guest.
    pub pid_namespace: &'a PidNamespace,
    /// Files that it gets, on the host, unless it has a mount in their place: their names below `/etc`, and their paths.
    pub files: &'a [(&'static str, PathBuf)],
}

/// The result of [`for_guest`].
#[derive(Debug)]
pub struct GuestSpec {
    /// The rewritten spec.
    pub spec: Spec,
    /// The root filesystem on the host when containerd gives no mounts for it.
    pub root: PathBuf,
    /// What is to be bound under the share, at the index that the rewritten spec names.
    pub binds: Vec<Bind>,
    /// What the guest is to have before the container is created.
    pub volumes: Vec<Volume>,
    /// What has to be in a block slot before the container is created.
    pub devices: Vec<BlockDevice>,
    /// Programs of the host.
    pub hooks: ContainerHooks,
}

/// Reads the bundle's `config.json`.
///
/// # Errors
/// [`Error::Spec`] with the line and column of a syntax error.
pub fn load(bundle: &Path) -> Result<Spec> {
    let path = bundle.join(FILE);
    let wrong = |reason: String| Error::Spec { path: path.clone(), reason };
    let read = || -> io::Result<Vec<u8>> {
        if fs::metadata(&path)?.len() > MAX_LEN {
            return Err(io::Error::other(format!("larger than {MAX_LEN} bytes")));
        }
        fs::read(&path)
    };
    let text = read().map_err(|error| wrong(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))
}

/// The pod that the bundle's container belongs to: its own id unless CRI says otherwise.
///
/// # Errors
/// As [`load`]. A bundle without a spec is fine: the Sandbox API has none for the pod itself.
pub fn sandbox_id(bundle: &Path, id: &str) -> Result<String> {
    if !bundle.join(FILE).exists() {
        return Ok(id.to_string());
    }
    let spec = load(bundle)?;
    Ok(annotation(&spec, SANDBOX_ID).unwrap_or(id).to_string())
}

/// Has the agent know something of a container, which only the shim may tell it.
pub fn tell_agent(spec: &mut Spec, name: &str, value: String) {
    let mut annotations = spec.annotations().clone().unwrap_or_default();
    annotations.insert(name.into(), value);
    spec.set_annotations(Some(annotations));
}

/// What the container is to its pod.
pub fn role(spec: &Spec) -> Role {
    if annotation(spec, CONTAINER_TYPE) == Some("sandbox") { Role::Pod } else { Role::Workload }
}

/// What an annotation says.
pub fn annotation<'a>(spec: &'a Spec, key: &str) -> Option<&'a str> {
    spec.annotations().as_ref()?.get(key).map(String::as_str)
}

/// Whether the container is to share the PID namespace of another one, or of the pod.
pub fn shares_pids(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let shared =
        |namespace: &LinuxNamespace| namespace.typ() == LinuxNamespaceType::Pid && namespace.path().is_some();
    namespaces.is_some_and(|all| all.iter().any(shared))
}

/// Rewrites the spec of a container for the guest.
///
/// # Errors
/// [`Error::Spec`] when something that every container needs is missing.
pub fn for_guest(mut spec: Spec, origin: Origin<'_>, log: &Logger) -> Result<GuestSpec> {
    let missing =
        |what: &str| Error::Spec { path: origin.bundle.join(FILE), reason: format!("{what} is missing") };
    let base = Path::new(SHARE_DIR).join(origin.place);
    let root = spec.root_mut().as_mut().ok_or_else(|| missing("root"))?;
    let host_root = origin.bundle.join(root.path());
    let read_only = root.readonly().unwrap_or_default();
    root.set_path(base.join("rootfs"));
    if spec.linux().is_none() {
        return Err(missing("linux"));
    }
    rewrite_process(spec.process_mut().as_mut().ok_or_else(|| missing("process"))?, log);
    add_files(&mut spec, origin.files, read_only);
    let volumes = mounts::replace_volumes(&mut spec);
    let binds = mounts::rewrite_binds(&mut spec, &base, &volumes)?;
    let devices = rewrite_linux(&mut spec, origin, log)?;
    keep_annotations_of_clients_out(&mut spec);
    let hooks = ContainerHooks::take(&mut spec, origin.id, origin.bundle, log);
    Ok(GuestSpec { spec, root: host_root, binds, volumes, devices, hooks })
}

/// The agent trusts annotations of mayu: they come from the shim alone.
fn keep_annotations_of_clients_out(spec: &mut Spec) {
    if let Some(annotations) = spec.annotations_mut() {
        annotations.retain(|name, _| !name.starts_with(annotations::PREFIX));
    }
}

/// Mounts the pod's files where the spec mounts nothing.
fn add_files(spec: &mut Spec, files: &[(&'static str, PathBuf)], read_only: bool) {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (name, path) in files {
        let destination = Path::new("/etc").join(name);
        if mounts.iter().any(|mount| *mount.destination() == destination) {
            continue;
        }
        let mut mount = Mount::default();
        let access = if read_only { "ro" } else { "rw" };
        mount
            .set_destination(destination)
            .set_typ(Some("bind".into()))
            .set_source(Some(path.clone()))
            .set_options(Some(["rbind", "rprivate", access].map(str::to_owned).to_vec()));
        mounts.push(mount);
    }
    spec.set_mounts(Some(mounts));
}

/// What a process asks of the host's security modules: what it is called, and its name.
fn host_profiles(process: &Process) -> impl Iterator<Item = (&'static str, &String)> {
    let all = [
        ("AppArmor profile", process.apparmor_profile().as_ref()),
        ("SELinux label", process.selinux_label().as_ref()),
    ];
    let asked = |name: &&String| !matches!(name.as_str(), "" | "unconfined");
    all.into_iter().filter_map(move |(what, name)| Some((what, name.filter(asked)?)))
}

/// Refuses a container whose process asks for what only the host has, where the operator wants that.
///
/// # Errors
/// [`Error::InvalidArgument`] with its name.
pub fn check_profiles(spec: &Spec, security: &Security) -> Result<()> {
    if security.host_profiles == HostProfiles::Ignore {
        return Ok(());
    }
    match spec.process().iter().flat_map(host_profiles).next() {
        Some((what, name)) => Err(Error::InvalidArgument(format!(
            "{what} {name:?}: the guest can apply none, and the configuration file's security.host_profiles is \"refuse\""
        ))),
        None => Ok(()),
    }
}

/// Takes out of a process what refers to the host: its security modules.
pub fn rewrite_process(process: &mut Process, log: &Logger) {
    for (what, name) in host_profiles(process) {
        info!(log, "not applied: the guest has neither AppArmor nor SELinux"; "what" => what, "name" => name);
    }
    process.set_apparmor_profile(None).set_selinux_label(None);
}

fn rewrite_linux(spec: &mut Spec, origin: Origin<'_>, log: &Logger) -> Result<Vec<BlockDevice>> {
    let Some(linux) = spec.linux_mut() else { return Ok(Vec::new()) };
    let namespaces = linux.namespaces().iter().flatten();
    let namespaces: Vec<_> =
        namespaces.filter_map(|namespace| guest_namespace(namespace, origin.pid_namespace)).collect();
    let own_hostname = namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Uts);
    linux.set_namespaces(Some(namespaces));
    linux.set_cgroups_path(Some(Path::new("/mayu").join(origin.id)));
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    let devices = devices::select(linux, log)?;
    if let Some(resources) = linux.resources_mut() {
        drop_huge_pages(resources)?;
    }
    if !own_hostname {
        spec.set_hostname(None);
    }
    Ok(devices)
}

/// A kubelet limits huge pages of every size that the host has, to none where the pod asks for none. The guest has none at all.
///
/// # Errors
/// [`Error::InvalidArgument`] for a pod that asks for some.
pub fn drop_huge_pages(resources: &mut LinuxResources) -> Result<()> {
    let wanted = resources.hugepage_limits().iter().flatten().find(|limit| limit.limit() > 0);
    if let Some(limit) = wanted {
        return Err(Error::InvalidArgument(format!(
            "huge pages of {}: the guest has none to give; use memory without them",
            limit.page_size()
        )));
    }
    resources.set_hugepage_limits(None);
    Ok(())
}

/// The guest's network is the pod's, so every container shares it. A path names the namespace of another process of the
/// host: with CRI that of the pod, which for IPC and the host name is the guest's own. Of another kind the container gets
/// a new one.
fn guest_namespace(namespace: &LinuxNamespace, pid: &PidNamespace) -> Option<LinuxNamespace> {
    let shared = match namespace.typ() {
        LinuxNamespaceType::Network => true,
        LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts => namespace.path().is_some(),
        _ => false,
    };
    let mut guest = namespace.clone();
    guest.set_path(match namespace.typ() {
        LinuxNamespaceType::Pid => pid.path(),
        _ => None,
    });
    (!shared).then_some(guest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn log() -> Logger {
        Logger::root(slog::Discard, slog::o!())
    }

    fn rewrite(spec: serde_json::Value) -> Result<GuestSpec> {
        rewrite_with(spec, &PidNamespace::Own, &[])
    }

    fn rewrite_with(
        spec: serde_json::Value,
        pid_namespace: &PidNamespace,
        files: &[(&'static str, PathBuf)],
    ) -> Result<GuestSpec> {
        let origin = Origin { id: "c1", place: "c1", bundle: Path::new("/bundle"), pid_namespace, files };
        for_guest(serde_json::from_value(spec).unwrap(), origin, &log())
    }

    fn minimal(linux: &serde_json::Value, mounts: &serde_json::Value) -> serde_json::Value {
        json!({
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs"},
            "process": {"cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0}},
            "mounts": mounts,
            "linux": linux,
        })
    }

    #[test]
    fn the_root_is_under_the_share_and_the_hosts_is_remembered() {
        let guest = rewrite(minimal(&json!({}), &json!([]))).unwrap();
        assert_eq!(guest.spec.root().as_ref().unwrap().path(), Path::new("/run/mayu/share/c1/rootfs"));
        assert_eq!(guest.root, Path::new("/bundle/rootfs"));
    }

    #[test]
    fn an_absolute_root_stays_absolute() {
        let mut spec = minimal(&json!({}), &json!([]));
        spec["root"]["path"] = json!("/srv/root");
        assert_eq!(rewrite(spec).unwrap().root, Path::new("/srv/root"));
    }

    #[test]
    fn namespaces_are_new_ones_of_the_guest_or_those_of_the_pod() {
        let linux = json!({"namespaces": [
            {"type": "pid", "path": "/proc/1/ns/pid"},
            {"type": "ipc"},
            {"type": "uts", "path": "/var/run/uts"},
            {"type": "mount"},
            {"type": "cgroup"},
            {"type": "network", "path": "/var/run/netns/cni-1"},
        ]});
        let mut spec = minimal(&linux, &json!([]));
        spec["hostname"] = json!("of-the-pod");
        let guest = rewrite(spec).unwrap();
        assert_eq!(guest.spec.hostname(), &None);
        let namespaces = guest.spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
        let types: Vec<_> = namespaces.iter().map(|namespace| namespace.typ().to_string()).collect();
        assert_eq!(types, ["pid", "ipc", "mnt", "cgroup"]);
        assert!(namespaces.iter().all(|namespace| namespace.path().is_none()));
    }

    #[test]
    fn processes_are_shared_where_the_pod_says_so() {
        let linux = json!({"namespaces": [{"type": "pid", "path": "/proc/1/ns/pid"}]});
        let spec = minimal(&linux, &json!([]));
        assert!(shares_pids(&serde_json::from_value(spec.clone()).unwrap()));
        for (namespace, path) in [
            (PidNamespace::Pod, "/run/mayu/namespaces/pid"),
            (PidNamespace::Of("web".into()), "/run/mayu/namespaces/container-pid/web"),
        ] {
            let guest = rewrite_with(spec.clone(), &namespace, &[]).unwrap();
            let namespaces = guest.spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
            assert_eq!(namespaces[0].path().as_deref(), Some(Path::new(path)));
        }
    }

    #[test]
    fn files_of_the_pod_are_mounted_where_nothing_else_is() {
        let mounts =
            json!([{"destination": "/etc/hosts", "type": "bind", "source": "/mine", "options": ["bind"]}]);
        let files = [("hosts", "/pod/hosts".into()), ("hostname", "/pod/hostname".into())];
        let guest = rewrite_with(minimal(&json!({}), &mounts), &PidNamespace::Own, &files).unwrap();
        let sources: Vec<_> =
            guest.binds.iter().map(|bind| (bind.destination.to_str(), bind.source.to_str())).collect();
        assert_eq!(
            sources,
            [(Some("/etc/hosts"), Some("/mine")), (Some("/etc/hostname"), Some("/pod/hostname"))]
        );
    }

    #[test]
    fn bind_mounts_move_under_the_share_and_others_stay() {
        let mounts = json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "rw"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
            {"destination": "/etc/hosts", "source": "/var/hosts", "options": ["bind", "ro"]},
        ]);
        let guest = rewrite(minimal(&json!({}), &mounts)).unwrap();
        let sources: Vec<_> =
            guest.spec.mounts().iter().flatten().map(|mount| mount.source().clone().unwrap()).collect();
        let expected = ["proc", "/run/mayu/share/c1/mounts/0", "cgroup", "/run/mayu/share/c1/mounts/1"]
            .map(PathBuf::from);
        assert_eq!(sources, expected);
        let bind = |source: &str, destination: &str, recursive, read_only| Bind {
            source: source.into(),
            destination: destination.into(),
            recursive,
            read_only,
            follows: false,
        };
        assert_eq!(
            guest.binds,
            [
                bind("/srv/data", "/data", true, ReadOnly::No),
                bind("/var/hosts", "/etc/hosts", false, ReadOnly::Itself)
            ]
        );
    }

    #[test]
    fn a_path_of_the_host_that_looks_like_one_of_the_guest_s_volumes_stays_one_of_the_host() {
        let sources = ["/run/mayu/volumes/shm", "/run/mayu/volumes/../../..", "/run/mayu/volumes"];
        let mounts = sources.map(
            |source| json!({"destination": "/data", "type": "bind", "source": source, "options": ["rbind"]}),
        );
        let guest = rewrite(minimal(&json!({}), &json!(mounts))).unwrap();
        let bound: Vec<_> = guest.binds.iter().map(|bind| bind.source.to_str().unwrap()).collect();
        assert_eq!(bound, sources);
        assert!(guest.spec.mounts().iter().flatten().all(|mount| {
            mount.source().as_ref().is_some_and(|source| source.starts_with("/run/mayu/share/c1/mounts"))
        }));
    }

    #[test]
    fn what_names_the_host_is_dropped() {
        let mut spec = minimal(
            &json!({
                "cgroupsPath": "/default/c1",
                "mountLabel": "system_u",
                "devices": [
                    {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
                    {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
                ],
                "resources": {"devices": [{"allow": false, "access": "rwm"}], "pids": {"limit": 7}},
            }),
            &json!([]),
        );
        spec["annotations"] = json!({"io.mayu.guest.block-devices": "{}", "mine": "x"});
        spec["hooks"] = json!({"prestart": [{"path": "/bin/hook"}]});
        spec["process"]["apparmorProfile"] = json!("docker-default");
        spec["process"]["selinuxLabel"] = json!("svirt");
        let guest = rewrite(spec).unwrap();
        let linux = guest.spec.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/mayu/c1")));
        assert_eq!(linux.mount_label(), &None);
        assert_eq!(linux.devices().as_ref().unwrap().len(), 2);
        assert_eq!(guest.devices[0].number, (8, 0));
        assert_eq!(guest.spec.annotations().as_ref().unwrap().keys().collect::<Vec<_>>(), ["mine"]);
        let resources = linux.resources().as_ref().unwrap();
        assert_eq!(resources.pids().as_ref().unwrap().limit(), 7);
        assert_eq!(resources.devices().as_ref().unwrap().len(), 1);
        assert_eq!(guest.spec.hooks(), &None);
        let process = guest.spec.process().as_ref().unwrap();
        assert_eq!((process.apparmor_profile(), process.selinux_label()), (&None, &None));
    }

    #[test]
    fn profiles_of_the_host_are_refused_where_the_operator_wants_that() {
        let [ignore, refuse] =
            [HostProfiles::Ignore, HostProfiles::Refuse].map(|host_profiles| Security { host_profiles });
        for (key, name, refused) in [
            ("apparmorProfile", "docker-default", true),
            ("selinuxLabel", "svirt", true),
            ("apparmorProfile", "unconfined", false),
            ("selinuxLabel", "", false),
        ] {
            let mut spec = minimal(&json!({}), &json!([]));
            spec["process"][key] = json!(name);
            let spec = serde_json::from_value(spec).unwrap();
            assert!(check_profiles(&spec, &ignore).is_ok(), "{name}");
            let message = check_profiles(&spec, &refuse).err().map(|error| error.to_string());
            assert_eq!(message.is_some(), refused, "{message:?}");
            assert!(
                message.is_none_or(|message| message.contains(name) && message.contains("host_profiles"))
            );
        }
    }

    #[test]
    fn huge_pages_are_refused_where_there_are_to_be_some() {
        let limits = |limit| {
            let resources = json!({"hugepageLimits": [
                {"pageSize": "1GB", "limit": 0}, {"pageSize": "2MB", "limit": limit},
            ]});
            rewrite(minimal(&json!({"resources": resources}), &json!([])))
        };
        let guest = limits(0).unwrap();
        let resources = guest.spec.linux().as_ref().unwrap().resources().clone().unwrap();
        assert_eq!(resources.hugepage_limits(), &None);
        let message = limits(2 << 20).unwrap_err().to_string();
        assert!(message.contains("huge pages of 2MB"), "{message}");
    }

    #[test]
    fn a_missing_part_is_named() {
        for part in ["root", "process", "linux"] {
            let mut spec = minimal(&json!({}), &json!([]));
            spec.as_object_mut().unwrap().remove(part);
            let error = rewrite(spec).unwrap_err();
            assert_eq!(error.to_string(), format!("OCI spec /bundle/config.json: {part} is missing"));
        }
    }

    #[test]
    fn malformed_json_is_located() {
        let bundle = tempfile::tempdir().unwrap();
        fs::write(bundle.path().join("config.json"), "{\n  \"ociVersion\": 7\n}").unwrap();
        let message = load(bundle.path()).unwrap_err().to_string();
        assert!(message.contains("config.json") && message.contains("line 2"), "{message}");
    }

    #[test]
    fn a_container_belongs_to_the_pod_that_cri_names() {
        let bundle = tempfile::tempdir().unwrap();
        let mut spec = minimal(&json!({}), &json!([]));
        fs::write(bundle.path().join("config.json"), spec.to_string()).unwrap();
        assert_eq!(sandbox_id(bundle.path(), "c1").unwrap(), "c1");
        spec["annotations"] = json!({SANDBOX_ID: "pod"});
        fs::write(bundle.path().join("config.json"), spec.to_string()).unwrap();
        assert_eq!(sandbox_id(bundle.path(), "c1").unwrap(), "pod");
    }

    #[test]
    fn the_pod_itself_is_told_from_its_containers() {
        for (annotations, expected) in [
            (json!({}), Role::Workload),
            (json!({CONTAINER_TYPE: "container"}), Role::Workload),
            (json!({CONTAINER_TYPE: "sandbox"}), Role::Pod),
        ] {
            let mut spec = minimal(&json!({}), &json!([]));
            spec["annotations"] = annotations;
            let spec = serde_json::from_value(spec).unwrap();
            assert_eq!(role(&spec), expected);
        }
    }
}
