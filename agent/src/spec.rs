//! Reads the OCI documents of requests, and adapts them to the guest.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use mayu_agent_api::{PROCESS_TYPE_URL, SPEC_TYPE_URL, WARM};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;
use oci_spec::runtime::{
    Linux, LinuxCapabilities, LinuxNamespaceType, LinuxResources, LinuxSeccomp, Process, Spec,
};
use protobuf::well_known_types::any::Any;
use serde::de::DeserializeOwned;

use crate::cgroup::Cgroup;
use crate::error::{Error, Result};

/// The longest id: containerd's own limit.
const MAX_ID: usize = 76;
/// containerd's type URL of a change of limits, in JSON.
const RESOURCES_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
/// How much of a container's /etc/passwd is looked at, in bytes.
const MAX_PASSWD: u64 = 1024 * 1024;

/// Checks a container's or exec's id by containerd's rule (`pkg/identifiers`): letters and digits, separated
/// by single dots, dashes or underscores. It becomes a part of paths.
///
/// # Errors
///
/// `InvalidId`.
pub fn check_id(id: &str) -> Result<()> {
    let invalid = |reason| Err(Error::InvalidId { id: id.chars().take(MAX_ID).collect(), reason });
    if id.is_empty() {
        return invalid("it is empty");
    }
    if id.len() > MAX_ID {
        return invalid("it is longer than 76 characters");
    }
    let word = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if !id.split(['.', '-', '_']).all(word) {
        return invalid("it is not letters and digits separated by single dots, dashes or underscores");
    }
    Ok(())
}

/// The OCI runtime spec in `options` of a Create request.
///
/// # Errors
///
/// `InvalidSpec`.
pub fn read_spec(any: Option<&Any>) -> Result<Spec> {
    read(any, SPEC_TYPE_URL)
}

/// The OCI process in `spec` of an Exec request.
///
/// # Errors
///
/// `InvalidSpec`.
pub fn read_process(any: Option<&Any>) -> Result<Process> {
    read(any, PROCESS_TYPE_URL)
}

/// The OCI resources in an Update request.
///
/// # Errors
///
/// `InvalidSpec`.
pub fn read_resources(any: Option<&Any>) -> Result<LinuxResources> {
    read(any, RESOURCES_TYPE_URL)
}

fn read<T: DeserializeOwned>(any: Option<&Any>, type_url: &str) -> Result<T> {
    let any = any.ok_or_else(|| Error::InvalidSpec(format!("the request holds no {type_url}")))?;
    if any.type_url != type_url {
        return Err(Error::InvalidSpec(format!(
            "its type is {:?} where {type_url:?} is expected",
            any.type_url
        )));
    }
    serde_json::from_slice(&any.value).map_err(|error| Error::InvalidSpec(error.to_string()))
}

/// What the shim says in an annotation of `spec`.
pub fn annotation<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    spec.annotations().as_ref()?.get(name).map(String::as_str)
}

/// What the agent itself carries out of a container's spec.
#[derive(Clone)]
pub struct ContainerPlan {
    /// For the init process.
    pub process: ProcessPlan,
    /// Whether the container has a pid namespace of its own, which dies with its init.
    pub own_pid_namespace: bool,
    /// Whether the container has a host name of its own.
    pub own_uts_namespace: bool,
    /// Whether the container may be suspended.
    pub warm: bool,
    /// The variables of its process as the spec has them.
    pub environment: Vec<String>,
    /// The filter of all its processes.
    pub seccomp: Option<LinuxSeccomp>,
    /// Sysctls of the guest's network, which the container shares.
    pub network_sysctls: Vec<(String, String)>,
}

/// What the agent itself carries out of a process's spec.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessPlan {
    /// User and group.
    pub user: (u32, u32),
    /// Columns and rows of its terminal, if the spec says.
    pub console_size: Option<(u16, u16)>,
    /// The capabilities to keep, where a seccomp filter has to be installed before the others are given up.
    pub capabilities: Option<LinuxCapabilities>,
}

/// Checks the spec of container `id` and takes out of it what libcontainer shall not carry out in the guest:
/// its place among the cgroups, which is the agent's choice; seccomp, which libcontainer would not apply to
/// execs; sysctls of the network, which it refuses where the container shares the guest's network.
///
/// # Errors
///
/// `InvalidSpec` naming the field.
pub fn adapt_spec(spec: &mut Spec, id: &str, terminal: bool) -> Result<ContainerPlan> {
    let root = spec.root().as_ref().ok_or_else(|| missing("root"))?.path().clone();
    if !root.is_absolute() || !root.is_dir() {
        return Err(Error::InvalidSpec(format!(
            "root.path {} is not a directory of the guest",
            root.display()
        )));
    }
    check_mounts(spec)?;
    let warm = annotation(spec, WARM) == Some("true");
    let mut process = spec.process().clone().ok_or_else(|| missing("process"))?;
    let environment = process.env().clone().unwrap_or_default();
    let linux = spec.linux_mut().as_mut().ok_or_else(|| missing("linux"))?;
    refuse_user_namespace(linux)?;
    linux.set_cgroups_path(Some(Cgroup::spec_path(id)));
    rename_propagation(linux);
    let seccomp = linux.seccomp().clone();
    linux.set_seccomp(None);

    let namespaces = linux.namespaces().clone().unwrap_or_default();
    for namespace in &namespaces {
        if let Some(path) = namespace.path().as_ref().filter(|path| !path.exists()) {
            return Err(Error::InvalidSpec(format!(
                "namespace {:?} is {}, which does not exist in the guest",
                namespace.typ(),
                path.display()
            )));
        }
    }
    let namespace = |kind| namespaces.iter().find(|namespace| namespace.typ() == kind);
    let owns = |kind| namespace(kind).is_some_and(|namespace| namespace.path().is_none());
    let own_pid_namespace = owns(LinuxNamespaceType::Pid);
    let own_uts_namespace = owns(LinuxNamespaceType::Uts);
    let mut network_sysctls = Vec::new();
    if namespace(LinuxNamespaceType::Network).is_none()
        && let Some(sysctls) = linux.sysctl_mut()
    {
        let of_network = |key: &str| key.starts_with("net.") || key.starts_with("net/");
        network_sysctls = sysctls.extract_if(|key, _| of_network(key)).collect();
    }
    let plan = adapt_process(&mut process, &root, terminal, seccomp.is_some())?;
    spec.set_process(Some(process));
    Ok(ContainerPlan {
        process: plan,
        own_pid_namespace,
        own_uts_namespace,
        warm,
        environment,
        seccomp,
        network_sysctls,
    })
}

/// Checks a process and adapts it to the guest. `root` is the root directory of its container, `seccomp` tells
/// whether that has a filter.
///
/// # Errors
///
/// `InvalidSpec` naming the field.
pub fn adapt_process(
    process: &mut Process,
    root: &Path,
    terminal: bool,
    seccomp: bool,
) -> Result<ProcessPlan> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(missing("process.args"));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::InvalidSpec(format!("process.cwd {} is not absolute", process.cwd().display())));
    }
    process.set_terminal(Some(terminal));
    let mut plan =
        ProcessPlan { user: (process.user().uid(), process.user().gid()), ..ProcessPlan::default() };
    if seccomp && process.no_new_privileges() != Some(true) {
        plan.capabilities = process.capabilities().clone();
        process.set_capabilities(None);
    }
    // The guest has neither AppArmor nor SELinux; the profiles are the host's, and the VM stands in for them.
    process.set_apparmor_profile(None).set_selinux_label(None);
    let mut environment = process.env().clone().unwrap_or_default();
    if !environment.iter().any(|entry| entry.strip_prefix("HOME=").is_some_and(|home| !home.is_empty())) {
        environment.retain(|entry| !entry.starts_with("HOME="));
        let home = home_directory(root, process.user().uid()).unwrap_or_else(|| "/".into());
        environment.push(format!("HOME={home}"));
    }
    process.set_env(Some(environment));
    let size = process
        .console_size()
        .as_ref()
        .and_then(|size| Some((u16::try_from(size.width()).ok()?, u16::try_from(size.height()).ok()?)));
    plan.console_size = size.filter(|(columns, rows)| *columns > 0 && *rows > 0);
    Ok(plan)
}

/// Refuses what Kubernetes calls `hostUsers: false`. Mapped ids need mounts that map them back, which virtio-fs has not; libcontainer
/// leaves execs in the user namespace of the agent, and would put the container under a systemd that is not there.
fn refuse_user_namespace(linux: &Linux) -> Result<()> {
    let refuse = |field| {
        let reason =
            "a user namespace of the container's own (Kubernetes: hostUsers: false) is not supported";
        Err(Error::InvalidSpec(format!("{field}: {reason}")))
    };
    let namespaces = linux.namespaces().iter().flatten();
    if namespaces.into_iter().any(|namespace| namespace.typ() == LinuxNamespaceType::User) {
        return refuse("linux.namespaces");
    }
    if linux.uid_mappings().as_ref().is_some_and(|mappings| !mappings.is_empty()) {
        return refuse("linux.uidMappings");
    }
    if linux.gid_mappings().as_ref().is_some_and(|mappings| !mappings.is_empty()) {
        return refuse("linux.gidMappings");
    }
    Ok(())
}

/// containerd names the propagation of a container's root as mount(8) does, with an `r` for all mounts below. libcontainer knows
/// the names of the runtime spec alone, and always means all.
fn rename_propagation(linux: &mut Linux) {
    let name = linux.rootfs_propagation().as_deref().and_then(|name| name.strip_prefix('r'));
    if let Some(name) = name.map(str::to_owned) {
        linux.set_rootfs_propagation(Some(name));
    }
}

fn check_mounts(spec: &Spec) -> Result<()> {
    for mount in spec.mounts().iter().flatten() {
        let mappings = [("uidMappings", mount.uid_mappings()), ("gidMappings", mount.gid_mappings())];
        if let Some((field, _)) = mappings.iter().find(|(_, mappings)| mappings.is_some()) {
            return Err(Error::InvalidSpec(format!(
                "mount {}: {field}: mounts that map users are not supported",
                mount.destination().display()
            )));
        }
        let options = mount.options().as_deref().unwrap_or_default();
        let bind = mount.typ().as_deref() == Some("bind")
            || options.iter().any(|option| option == "bind" || option == "rbind");
        let Some(source) = mount.source().as_ref().filter(|_| bind) else { continue };
        if let Err(error) = std::fs::metadata(source) {
            return Err(Error::InvalidSpec(format!(
                "mount source {} of {}: {error}",
                source.display(),
                mount.destination().display()
            )));
        }
    }
    Ok(())
}

/// The home directory of `uid` by the container's own /etc/passwd. Looked up here and not by libcontainer,
/// which asks the C library, which loads what the container's /etc/nsswitch.conf names.
fn home_directory(root: &Path, uid: u32) -> Option<String> {
    let root = open(root, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let passwd = File::from(openat2(&root, "etc/passwd", how).ok()?);
    let mut text = Vec::new();
    passwd.take(MAX_PASSWD).read_to_end(&mut text).ok()?;
    // name:password:uid:gid:comment:home:shell, passwd(5).
    String::from_utf8_lossy(&text).lines().find_map(|line| {
        let mut fields = line.split(':');
        let matches = fields.nth(2)?.parse() == Ok(uid);
        let home = fields.nth(2)?;
        (matches && !home.is_empty()).then(|| home.to_owned())
    })
}

/// The error for a spec without `field`.
pub fn missing(field: &str) -> Error {
    Error::InvalidSpec(format!("{field} is missing"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn any(type_url: &str, value: &Value) -> Any {
        Any { type_url: type_url.into(), value: serde_json::to_vec(value).unwrap(), ..Any::default() }
    }

    fn document(root: &Path) -> Value {
        json!({
            "ociVersion": "1.2.0",
            "root": {"path": root},
            "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 33, "gid": 34}, "env": ["A=1"]},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}], "cgroupsPath": "/../../etc"},
        })
    }

    fn adapt(document: &Value) -> Result<(Spec, ContainerPlan)> {
        let mut spec = read_spec(Some(&any(SPEC_TYPE_URL, document)))?;
        let plan = adapt_spec(&mut spec, "c", false)?;
        Ok((spec, plan))
    }

    fn reason(document: &Value) -> String {
        match adapt(document) {
            Err(Error::InvalidSpec(reason)) => reason,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("accepted"),
        }
    }

    #[test]
    fn what_can_be_suspended_is_known_by_its_annotation() {
        let root = tempfile::tempdir().unwrap();
        let mut document = document(root.path());
        document["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "uts"}));
        assert!(!adapt(&document).unwrap().1.warm);
        for (value, warm) in [("true", true), ("false", false), ("", false)] {
            document["annotations"] = json!({WARM: value});
            let (_, plan) = adapt(&document).unwrap();
            assert_eq!((plan.warm, plan.own_uts_namespace), (warm, true), "{value:?}");
            // Without what is added for the process.
            assert_eq!(plan.environment, ["A=1"]);
        }
        document["linux"]["namespaces"] = json!([{"type": "uts", "path": "/proc/self/ns/uts"}]);
        assert!(!adapt(&document).unwrap().1.own_uts_namespace);
    }

    #[test]
    fn propagation_has_the_names_of_the_runtime_spec() {
        let root = tempfile::tempdir().unwrap();
        for (given, expected) in [("rslave", "slave"), ("rprivate", "private"), ("slave", "slave")] {
            let mut document = document(root.path());
            document["linux"]["rootfsPropagation"] = json!(given);
            let (spec, _) = adapt(&document).unwrap();
            let linux = spec.linux().as_ref().unwrap();
            assert_eq!(linux.rootfs_propagation().as_deref(), Some(expected));
        }
    }

    #[test]
    fn ids_are_containerds() {
        for id in ["a", "A-b_c.d", "0123456789abcdef", &"x".repeat(76)] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in
            ["", ".", "..", "../x", "a/b", "a b", "-a", "a-", "a..b", "a-_b", "ä", "a\n", &"x".repeat(77)]
        {
            assert!(check_id(id).is_err(), "{id}");
        }
    }

    #[test]
    fn documents_of_another_type_are_refused() {
        let process = any(PROCESS_TYPE_URL, &json!({}));

        assert!(
            matches!(read_spec(Some(&process)), Err(Error::InvalidSpec(text)) if text.contains("Process"))
        );
        assert!(matches!(read_spec(None), Err(Error::InvalidSpec(_))));
        assert!(matches!(read_process(Some(&any(PROCESS_TYPE_URL, &json!(1)))), Err(Error::InvalidSpec(_))));
        assert!(read_resources(Some(&any(RESOURCES_TYPE_URL, &json!({"pids": {"limit": 5}})))).is_ok());
    }

    #[test]
    fn the_container_gets_its_own_cgroup_whatever_it_asks_for() {
        let root = tempfile::tempdir().unwrap();

        let (spec, plan) = adapt(&document(root.path())).unwrap();

        let path = spec.linux().as_ref().unwrap().cgroups_path().clone();
        assert_eq!(path, Some("/mayu/c".into()));
        assert_eq!((plan.process.user, plan.own_pid_namespace), ((33, 34), true));
    }

    #[test]
    fn what_the_guest_lacks_is_named() {
        let root = tempfile::tempdir().unwrap();
        let with = |change: &dyn Fn(&mut Value)| {
            let mut document = document(root.path());
            change(&mut document);
            reason(&document)
        };

        assert!(with(&|d| d["root"]["path"] = json!("/no/root")).contains("/no/root"));
        assert!(with(&|d| d["root"]["path"] = json!("relative")).contains("relative"));
        assert!(with(&|d| drop(d.as_object_mut().unwrap().remove("root"))).contains("root"));
        assert!(with(&|d| drop(d.as_object_mut().unwrap().remove("linux"))).contains("linux"));
        assert!(with(&|d| d["process"]["args"] = json!([])).contains("process.args"));
        assert!(with(&|d| d["process"]["cwd"] = json!("here")).contains("process.cwd"));
        let bind = json!([{"destination": "/m", "source": "/no/source", "options": ["rbind"]}]);
        assert!(with(&|d| d["mounts"] = bind.clone()).contains("/no/source"));
        let namespace = json!([{"type": "ipc", "path": "/no/namespace"}]);
        assert!(with(&|d| d["linux"]["namespaces"] = namespace.clone()).contains("/no/namespace"));
    }

    #[test]
    fn users_of_a_containers_own_are_refused_by_the_field_that_asks_for_them() {
        let root = tempfile::tempdir().unwrap();
        let with = |change: &dyn Fn(&mut Value)| {
            let mut document = document(root.path());
            change(&mut document);
            reason(&document)
        };
        let mappings = json!([{"containerID": 0, "hostID": 65536, "size": 65536}]);
        let mount =
            |field: &str| json!([{"destination": "/m", "source": "/", "options": ["bind"], field: mappings}]);

        assert!(
            with(&|d| d["linux"]["namespaces"][0]["type"] = json!("user")).starts_with("linux.namespaces:")
        );
        assert!(with(&|d| d["linux"]["uidMappings"] = mappings.clone()).starts_with("linux.uidMappings:"));
        assert!(with(&|d| d["linux"]["gidMappings"] = mappings.clone()).starts_with("linux.gidMappings:"));
        assert!(with(&|d| d["mounts"] = mount("uidMappings")).starts_with("mount /m: uidMappings:"));
        assert!(with(&|d| d["mounts"] = mount("gidMappings")).starts_with("mount /m: gidMappings:"));
        let mut none = document(root.path());
        none["linux"]["uidMappings"] = json!([]);
        assert!(adapt(&none).is_ok());
    }

    #[test]
    fn sysctls_of_a_shared_network_are_the_guests() {
        let root = tempfile::tempdir().unwrap();
        let mut document = document(root.path());
        document["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "kernel.shmmax": "2"});

        let (spec, plan) = adapt(&document).unwrap();

        assert_eq!(plan.network_sysctls, [("net.ipv4.ip_forward".to_owned(), "1".to_owned())]);
        let left = spec.linux().as_ref().unwrap().sysctl().clone().unwrap();
        assert_eq!(left.keys().collect::<Vec<_>>(), ["kernel.shmmax"]);
    }

    #[test]
    fn home_is_looked_up_inside_the_container() {
        let root = tempfile::tempdir().unwrap();
        let home = |uid: u32| {
            let mut document = document(root.path());
            document["process"]["user"]["uid"] = json!(uid);
            let (spec, _) = adapt(&document).unwrap();
            spec.process().as_ref().unwrap().env().clone().unwrap()
        };
        assert_eq!(home(33), ["A=1", "HOME=/"]);

        std::fs::create_dir(root.path().join("etc")).unwrap();
        let passwd = root.path().join("etc/passwd");
        std::fs::write(&passwd, "nonsense\nroot:x:0:0::/root:/bin/sh\nwww:x:33:33::/var/www:/bin/sh\n")
            .unwrap();
        assert_eq!(home(33), ["A=1", "HOME=/var/www"]);
        assert_eq!(home(4), ["A=1", "HOME=/"]);

        // A link out of the container leads nowhere.
        std::fs::remove_file(&passwd).unwrap();
        std::os::unix::fs::symlink("/proc/self/environ", &passwd).unwrap();
        assert_eq!(home(33), ["A=1", "HOME=/"]);
    }

    #[test]
    fn a_process_is_adapted_to_the_guest() {
        let root = tempfile::tempdir().unwrap();
        let mut process: Process = serde_json::from_value(json!({
            "args": ["sh"], "cwd": "/", "user": {"uid": 1, "gid": 2}, "env": ["HOME=/mine"],
            "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "x",
            "consoleSize": {"width": 80, "height": 25},
        }))
        .unwrap();

        let plan = adapt_process(&mut process, root.path(), true, false).unwrap();

        let expected = ProcessPlan { user: (1, 2), console_size: Some((80, 25)), capabilities: None };
        assert_eq!(plan, expected);
        assert_eq!(process.terminal(), Some(true));
        assert_eq!(process.apparmor_profile(), &None);
        assert_eq!(process.selinux_label(), &None);
        assert_eq!(process.env().as_deref(), Some(&["HOME=/mine".to_owned()][..]));
    }

    #[test]
    fn capabilities_are_kept_back_where_a_filter_needs_privilege() {
        let root = tempfile::tempdir().unwrap();
        let kept_back = |no_new_privileges: Value, seccomp| {
            let mut process: Process = serde_json::from_value(json!({
                "args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0},
                "capabilities": {"bounding": ["CAP_KILL"]}, "noNewPrivileges": no_new_privileges,
            }))
            .unwrap();
            let plan = adapt_process(&mut process, root.path(), false, seccomp).unwrap();
            assert_eq!(plan.capabilities.is_some(), process.capabilities().is_none());
            plan.capabilities.is_some()
        };

        assert!(kept_back(json!(null), true));
        assert!(kept_back(json!(false), true));
        assert!(!kept_back(json!(true), true));
        assert!(!kept_back(json!(false), false));
    }
}
