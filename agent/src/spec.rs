//! Reads the OCI documents of requests, and adapts them to the guest.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use mayu_agent_api::{PROCESS_TYPE_URL, SPEC_TYPE_URL};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;
use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Process, Spec};
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

/// What the agent itself needs to know of a container's spec.
pub struct Summary {
    /// The user of the init process.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Columns and rows of its terminal, if the spec says.
    pub console_size: Option<(u16, u16)>,
    /// Whether the container has a pid namespace of its own, which dies with its init.
    pub own_pid_namespace: bool,
}

/// Checks the spec of container `id` and makes it one that libcontainer can carry out in the guest. The
/// sysctls of the network are taken out and returned: the container shares the guest's network, so that they
/// are the guest's to set, and libcontainer refuses them.
///
/// # Errors
///
/// `InvalidSpec` naming the field.
pub fn adapt_spec(spec: &mut Spec, id: &str, terminal: bool) -> Result<(Summary, Vec<(String, String)>)> {
    let root = spec.root().as_ref().ok_or_else(|| missing("root"))?.path().clone();
    if !root.is_absolute() || !root.is_dir() {
        return Err(Error::InvalidSpec(format!(
            "root.path {} is not a directory of the guest",
            root.display()
        )));
    }
    check_mounts(spec)?;
    let mut process = spec.process().clone().ok_or_else(|| missing("process"))?;
    let console_size = adapt_process(&mut process, &root, terminal)?;
    let (uid, gid) = (process.user().uid(), process.user().gid());
    spec.set_process(Some(process));

    let linux = spec.linux_mut().as_mut().ok_or_else(|| missing("linux"))?;
    linux.set_cgroups_path(Some(Cgroup::spec_path(id)));
    let mut own_pid_namespace = false;
    for namespace in linux.namespaces().iter().flatten() {
        if let Some(path) = namespace.path().as_ref().filter(|path| !path.exists()) {
            return Err(Error::InvalidSpec(format!(
                "namespace {:?} is {}, which does not exist in the guest",
                namespace.typ(),
                path.display()
            )));
        }
        own_pid_namespace |= namespace.typ() == LinuxNamespaceType::Pid && namespace.path().is_none();
    }
    let own_network =
        linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::Network);
    let mut network_sysctls = Vec::new();
    if !own_network && let Some(sysctls) = linux.sysctl_mut() {
        network_sysctls =
            sysctls.extract_if(|key, _| key.starts_with("net.") || key.starts_with("net/")).collect();
    }
    Ok((Summary { uid, gid, console_size, own_pid_namespace }, network_sysctls))
}

/// Checks a process and adapts it to the guest; returns the size of its terminal, if it says. `root` is the
/// root directory of its container.
///
/// # Errors
///
/// `InvalidSpec` naming the field.
pub fn adapt_process(process: &mut Process, root: &Path, terminal: bool) -> Result<Option<(u16, u16)>> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(missing("process.args"));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::InvalidSpec(format!("process.cwd {} is not absolute", process.cwd().display())));
    }
    process.set_terminal(Some(terminal));
    // libcontainer takes any value for a wish, so that seccomp would be set up without the privilege for it.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
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
    Ok(size.filter(|(columns, rows)| *columns > 0 && *rows > 0))
}

fn check_mounts(spec: &Spec) -> Result<()> {
    for mount in spec.mounts().iter().flatten() {
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

fn missing(field: &str) -> Error {
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

    type Adapted = (Spec, Summary, Vec<(String, String)>);

    fn adapt(document: &Value) -> Result<Adapted> {
        let mut spec = read_spec(Some(&any(SPEC_TYPE_URL, document)))?;
        let (summary, sysctls) = adapt_spec(&mut spec, "c", false)?;
        Ok((spec, summary, sysctls))
    }

    fn reason(document: &Value) -> String {
        match adapt(document) {
            Err(Error::InvalidSpec(reason)) => reason,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("accepted"),
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

        let (spec, summary, _) = adapt(&document(root.path())).unwrap();

        let path = spec.linux().as_ref().unwrap().cgroups_path().clone();
        assert_eq!(path, Some("/mayu/c".into()));
        assert_eq!((summary.uid, summary.gid, summary.own_pid_namespace), (33, 34, true));
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
    fn sysctls_of_a_shared_network_are_the_guests() {
        let root = tempfile::tempdir().unwrap();
        let mut document = document(root.path());
        document["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "kernel.shmmax": "2"});

        let (spec, _, sysctls) = adapt(&document).unwrap();

        assert_eq!(sysctls, [("net.ipv4.ip_forward".to_owned(), "1".to_owned())]);
        let left = spec.linux().as_ref().unwrap().sysctl().clone().unwrap();
        assert_eq!(left.keys().collect::<Vec<_>>(), ["kernel.shmmax"]);
    }

    #[test]
    fn home_is_looked_up_inside_the_container() {
        let root = tempfile::tempdir().unwrap();
        let home = |uid: u32| {
            let mut document = document(root.path());
            document["process"]["user"]["uid"] = json!(uid);
            let (spec, ..) = adapt(&document).unwrap();
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
            "args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["HOME=/mine"],
            "noNewPrivileges": false, "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "x",
            "consoleSize": {"width": 80, "height": 25},
        }))
        .unwrap();

        let size = adapt_process(&mut process, root.path(), true).unwrap();

        assert_eq!(size, Some((80, 25)));
        assert_eq!(process.terminal(), Some(true));
        assert_eq!(process.no_new_privileges(), None);
        assert_eq!(process.apparmor_profile(), &None);
        assert_eq!(process.selinux_label(), &None);
        assert_eq!(process.env().as_deref(), Some(&["HOME=/mine".to_owned()][..]));
    }
}
