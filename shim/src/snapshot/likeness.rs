//! What two pods must have in common for one to go on from where the other was saved: all that the container of the first can have
//! read by then, and whose it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read as _};
use std::path::{Component, Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use containerd_shim_protos::types::mount::Mount;
use mayu_vmm_api::VmConfig;
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::Wish;
use crate::config::Snapshots;
use crate::machine;
use crate::pod_spec::PodSpec;

/// The most that is read of one container's volumes to compare them, in bytes. Kubernetes lets a ConfigMap or a Secret have 1 MiB.
const MAX_CONTENT: u64 = 16 << 20;

/// What clients set to the pod's host name in every container.
const HOSTNAME: &str = "HOSTNAME";

/// Volumes of a kubelet whose content is somebody's configuration, by the directories that it keeps them in.
const CONFIGURATION: [&str; 3] = ["kubernetes.io~configmap", "kubernetes.io~secret", PROJECTED];

/// Where a kubelet keeps what it has put together of several sources, a service account's token among them.
const PROJECTED: &str = "kubernetes.io~projected";

/// Where it binds what containers have a `subPath` of.
const SUBPATHS: &str = "volume-subpaths";

/// The file of a service account's token, which is another one in each pod.
const TOKEN: &str = "token";

/// The length from which on an id was made by a client at random: 32 digits and more.
const RANDOM: usize = 32;

/// Stands for what has another name in each pod.
const ANY: &str = "*";

/// What two pods have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Likeness {
    /// containerd's namespace.
    pub client: String,
    /// Kubernetes' namespace, where it matters.
    pub namespace: Option<String>,
    /// What the tokens in the container say for whom they are, where it matters.
    pub service_accounts: BTreeSet<String>,
    /// What the pod says about its snapshot.
    pub wish: Wish,
    /// The machine.
    pub machine: VmConfig,
    /// The image's layers, from the top.
    pub image: Vec<String>,
    /// The environment. A variable that may differ has no value.
    pub environment: BTreeMap<String, Option<String>>,
    /// Kernel parameters of the pod.
    pub sysctls: BTreeMap<String, String>,
    /// The rest of the container's spec, without what is another thing in every pod: names, paths of the host, annotations.
    pub spec: Value,
}

/// What it is found out from.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// The operator's decisions.
    pub config: &'a Snapshots,
    /// containerd's namespace.
    pub client: &'a str,
    /// The pod.
    pub pod: &'a PodSpec,
    /// Its id.
    pub pod_id: &'a str,
    /// The container's id.
    pub id: &'a str,
    /// The container, as its client describes it.
    pub spec: &'a Spec,
    /// Its root filesystem, as a snapshotter describes it.
    pub rootfs: &'a [Mount],
    /// What it says about its snapshot.
    pub wish: &'a Wish,
    /// The machine that it would have, with what that is made of.
    pub machine: &'a VmConfig,
}

impl Likeness {
    /// Looks at a pod and its container. Where it cannot be told from others, that is the reason why there is no snapshot of it.
    ///
    /// # Errors
    /// The reason.
    pub fn of(parts: Parts<'_>) -> Result<Self, String> {
        let Parts { config, client, pod, spec, wish, machine, .. } = parts;
        let image = image(parts.rootfs)?;
        let mut seen = Seen {
            ids: ids(parts),
            budget: MAX_CONTENT,
            accounts: (!config.across_service_accounts).then(BTreeSet::new),
        };
        let mut rest = serde_json::to_value(spec).map_err(|error| error.to_string())?;
        strip(&mut rest);
        for mount in rest.get_mut("mounts").and_then(Value::as_array_mut).into_iter().flatten() {
            seen.compare(mount)?;
        }
        Ok(Self {
            client: client.into(),
            namespace: (!config.across_namespaces).then(|| pod.about.namespace.clone()),
            service_accounts: seen.accounts.unwrap_or_default(),
            wish: wish.clone(),
            machine: machine.clone(),
            image,
            environment: environment(spec, wish),
            sysctls: pod.sysctls.clone().into_iter().collect(),
            spec: rest,
        })
    }

    /// In what a pod is another one, by JSON pointers (RFC 6901). What it says there stays unsaid: it may be a secret.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        if let (Ok(ours), Ok(theirs)) = (serde_json::to_value(self), serde_json::to_value(other)) {
            collect_differences(&ours, &theirs, String::new(), &mut found);
        }
        found
    }

    /// A file name that no other has.
    pub fn name(&self) -> String {
        // All maps are ordered, so that the same is always written in the same way. It is made of what JSON can say.
        let text = serde_json::to_vec(self).unwrap_or_default();
        hex(&Sha256::digest(text))[..32].into()
    }
}

fn collect_differences(ours: &Value, theirs: &Value, at: String, found: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            let names: BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
            for name in names {
                let [ours, theirs] = [ours, theirs].map(|all| all.get(name).unwrap_or(&Value::Null));
                collect_differences(ours, theirs, format!("{at}/{name}"), found);
            }
        }
        (Value::Array(ours), Value::Array(theirs)) if ours.len() == theirs.len() => {
            for (index, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                collect_differences(ours, theirs, format!("{at}/{index}"), found);
            }
        }
        _ if ours != theirs => found.push(at),
        _ => {}
    }
}

/// The layers of an image, which are a directory each that does not change.
fn image(rootfs: &[Mount]) -> Result<Vec<String>, String> {
    let [overlay] = rootfs else { return Err("its root filesystem is not one overlay of layers".into()) };
    let option = |name: &str| overlay.options.iter().find_map(|option| option.strip_prefix(name));
    let Some(layers) = option("lowerdir=").filter(|_| overlay.type_ == "overlay") else {
        return Err(format!("its root filesystem is of type {:?}, not an overlay of layers", overlay.type_));
    };
    if let Some(upper) = option("upperdir=")
        && !is_empty(Path::new(upper)).map_err(|error| format!("look at {upper}: {error}"))?
    {
        return Err("its root filesystem was changed before it was started".into());
    }
    let identity = |path: &str| machine::identity(fs::metadata(path), Path::new(path));
    layers.split(':').map(|path| identity(path).map_err(|error| error.to_string())).collect()
}

fn is_empty(directory: &Path) -> io::Result<bool> {
    Ok(fs::read_dir(directory)?.next().is_none())
}

fn environment(spec: &Spec, wish: &Wish) -> BTreeMap<String, Option<String>> {
    let variables = spec.process().iter().flat_map(|process| process.env().iter().flatten());
    let variables = variables.map(|variable| variable.split_once('=').unwrap_or((variable, "")));
    let may_differ = |name: &str| name == HOSTNAME || wish.may_differ.iter().any(|other| other == name);
    variables.map(|(name, value)| (name.into(), (!may_differ(name)).then(|| value.into()))).collect()
}

/// The names of a pod that clients have in their paths. A short one was chosen by somebody, and may be the name of something else.
fn ids(Parts { pod, pod_id, id, .. }: Parts<'_>) -> Vec<String> {
    let ids = [pod_id, id, &pod.about.uid].into_iter().filter(|id| id.len() >= RANDOM);
    ids.map(Into::into).collect()
}

/// Takes out of a spec what is another thing in every pod, or what is compared elsewhere.
fn strip(spec: &mut Value) {
    for (parent, name) in [
        ("", "annotations"),
        ("", "hostname"),
        ("/root", "path"),
        ("/process", "env"),
        ("/process", "selinuxLabel"),
        ("/process", "apparmorProfile"),
        ("/linux", "cgroupsPath"),
        ("/linux", "mountLabel"),
    ] {
        if let Some(parent) = spec.pointer_mut(parent).and_then(Value::as_object_mut) {
            parent.remove(name);
        }
    }
    // Sets, which come in any order.
    let capabilities = spec.pointer_mut("/process/capabilities").and_then(Value::as_object_mut);
    for set in capabilities.into_iter().flat_map(|sets| sets.values_mut()).filter_map(Value::as_array_mut) {
        set.sort_by(|one, other| one.as_str().cmp(&other.as_str()));
    }
    let namespaces = spec.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut);
    for namespace in namespaces.into_iter().flatten() {
        // Whether it is one that there is already matters, and not which.
        if let Some(path) = namespace.get_mut("path") {
            *path = ANY.into();
        }
    }
}

/// What has been seen of a container's mounts.
struct Seen {
    ids: Vec<String>,
    /// How much may still be read.
    budget: u64,
    /// For whom tokens are, where that matters.
    accounts: Option<BTreeSet<String>>,
}

impl Seen {
    /// Replaces a bind mount's source by what two pods have in common of it, and adds what is in it, where that is configuration.
    fn compare(&mut self, mount: &mut Value) -> Result<(), String> {
        let options = mount.get("options").and_then(Value::as_array);
        let has = |wanted: &str| options.is_some_and(|all| all.iter().any(|option| option == wanted));
        if !(has("bind") || has("rbind") || mount.get("type").is_some_and(|kind| kind == "bind")) {
            return Ok(());
        }
        let Some(source) = mount.get("source").and_then(Value::as_str).map(PathBuf::from) else {
            return Ok(());
        };
        let content = self.content(&source).map_err(|error| format!("{}: {error}", source.display()))?;
        mount["source"] = self.common(&source).into();
        if let Some(content) = content {
            mount["content"] = content.into();
        }
        Ok(())
    }

    /// A path without the names that only this pod has.
    fn common(&self, path: &Path) -> String {
        let mut common: Vec<String> = Vec::new();
        for component in path.components() {
            let name = component.as_os_str().to_string_lossy();
            let of_this_pod = self.ids.iter().any(|id| *id == name);
            // `pods/UID/containers/NAME/RANDOM`, and a projected volume's name, which ends in something random.
            let (last, before) = (common.last(), common.len().checked_sub(2).map(|index| &common[index]));
            let random = last.is_some_and(|last| last == PROJECTED)
                || (before.is_some_and(|before| before == "containers")
                    && common.iter().any(|name| name == "pods"));
            common.push(if random || of_this_pod { ANY.into() } else { name.into_owned() });
        }
        common.iter().collect::<PathBuf>().display().to_string()
    }

    /// The checksum of what a container reads as its configuration, if it is that.
    fn content(&mut self, source: &Path) -> io::Result<Option<String>> {
        let of_a_kubelet = |names: &[&str]| {
            let is_one = |component: Component<'_>| names.iter().any(|name| component.as_os_str() == *name);
            source.components().any(is_one)
        };
        let is_part = of_a_kubelet(&[SUBPATHS]) && source.is_file();
        if !is_part && !of_a_kubelet(&CONFIGURATION) {
            return Ok(None);
        }
        let mut digest = Sha256::new();
        self.digest(source, &mut digest, of_a_kubelet(&[PROJECTED]))?;
        Ok(Some(hex(&digest.finalize())))
    }

    /// Files by their content, directories by what is in them, links by where they lead. What a kubelet has written last is behind its
    /// link `..data`, and the names beside that are links into it.
    fn digest(&mut self, path: &Path, digest: &mut Sha256, projected: bool) -> io::Result<()> {
        let data = path.join("..data");
        let path = if data.is_dir() { data.canonicalize()? } else { path.into() };
        let kind = fs::symlink_metadata(&path)?.file_type();
        if kind.is_dir() {
            let names = fs::read_dir(&path)?.map(|entry| entry.map(|entry| entry.file_name()));
            for name in names.collect::<io::Result<BTreeSet<_>>>()? {
                self.add(name.as_encoded_bytes(), digest)?;
                self.digest(&path.join(&name), digest, projected)?;
            }
            return Ok(());
        }
        if kind.is_symlink() {
            return self.add(fs::read_link(&path)?.as_os_str().as_encoded_bytes(), digest);
        }
        if !kind.is_file() {
            return Err(io::Error::other(format!("{} is no file", path.display())));
        }
        let mut content = Vec::new();
        fs::File::open(&path)?.take(self.budget + 1).read_to_end(&mut content)?;
        if projected
            && path.file_name().is_some_and(|name| name == TOKEN)
            && let Some(account) = service_account(&content)
        {
            content.clear();
            if let Some(accounts) = &mut self.accounts {
                content.extend(account.as_bytes());
                accounts.insert(account);
            }
        }
        self.add(&content, digest)
    }

    fn add(&mut self, bytes: &[u8], digest: &mut Sha256) -> io::Result<()> {
        let length = bytes.len() as u64;
        self.budget = self.budget.checked_sub(length + 1).ok_or_else(|| {
            io::Error::other(format!("its configuration is more than {} MiB", MAX_CONTENT >> 20))
        })?;
        digest.update(length.to_le_bytes());
        digest.update(bytes);
        Ok(())
    }
}

/// For whom a token is: the subject of a JWT (RFC 7519, 4.1.2). None where it is no such token.
fn service_account(token: &[u8]) -> Option<String> {
    let claims = std::str::from_utf8(token).ok()?.trim().split('.').nth(1)?;
    let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
    Some(claims.get("sub")?.as_str()?.to_owned())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
