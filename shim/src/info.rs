//! The `-info` flag: what containerd may know about the runtime before there is any pod.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use oci_spec::runtime::{
    Apparmor, Cgroup, Features, IDMap, LinuxFeature, LinuxNamespaceType, MountExtensions, Seccomp, Selinux,
};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::{Error, RUNTIME, Result};

/// The name under which containerd registers the OCI runtime spec's `Features`, in JSON (its `client/client.go`).
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Those that the shim runs, on the host.
const HOOKS: [&str; 4] = ["prestart", "createRuntime", "poststart", "poststop"];

/// Options of mounts that are not the file system's own. From `rro` containerd concludes that a volume can be read-only
/// with all that is mounted below it; a kubelet lets no pod ask for that otherwise.
const MOUNT_OPTIONS: &str = "async atime bind defaults dev diratime dirsync exec noatime nodev nodiratime noexec \
    norelatime nostrictatime nosuid private rbind relatime ro rprivate rro rslave rw slave strictatime suid";

/// Encodes a `RuntimeInfo`. `input` is what containerd writes to standard input: the runtime's options or nothing.
///
/// # Errors
/// [`Error::Protocol`] when the options are no protobuf message.
pub fn encode(input: &[u8]) -> Result<Vec<u8>> {
    let wrong = |error: protobuf::Error| Error::Protocol(format!("runtime options: {error}"));
    let options = if input.is_empty() {
        MessageField::none()
    } else {
        MessageField::some(Any::parse_from_bytes(input).map_err(wrong)?)
    };
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() };
    let features =
        serde_json::to_vec(&features()).map_err(|error| Error::Protocol(format!("features: {error}")))?;
    let features = Any { type_url: FEATURES.into(), value: features, ..Default::default() };
    RuntimeInfo {
        name: RUNTIME.into(),
        version: MessageField::some(version),
        options,
        features: MessageField::some(features),
        ..Default::default()
    }
    .write_to_bytes()
    .map_err(wrong)
}

/// What of the OCI runtime spec a container can ask for (its `features.md` and `features-linux.md`).
fn features() -> Features {
    use LinuxNamespaceType::{Cgroup as CgroupNamespace, Ipc, Mount, Network, Pid, Uts};

    let mut cgroup = Cgroup::default();
    cgroup.set_v1(Some(false)).set_v2(Some(true)).set_systemd(Some(true));
    let mut seccomp = Seccomp::default();
    seccomp.set_enabled(Some(true));
    let mut apparmor = Apparmor::default();
    apparmor.set_enabled(Some(false));
    let mut selinux = Selinux::default();
    selinux.set_enabled(Some(false));
    let mut idmap = IDMap::default();
    idmap.set_enabled(Some(false));
    let mut mount_extensions = MountExtensions::default();
    mount_extensions.set_idmap(Some(idmap));
    let mut linux = LinuxFeature::default();
    linux
        .set_namespaces(Some(vec![CgroupNamespace, Ipc, Mount, Network, Pid, Uts]))
        .set_cgroup(Some(cgroup))
        .set_seccomp(Some(seccomp))
        .set_apparmor(Some(apparmor))
        .set_selinux(Some(selinux))
        .set_mount_extensions(Some(mount_extensions));
    let mut features = Features::default();
    features
        .set_oci_version_min("1.0.0".into())
        .set_oci_version_max("1.2.0".into())
        .set_hooks(Some(HOOKS.map(Into::into).into()))
        .set_mount_options(Some(MOUNT_OPTIONS.split(' ').map(Into::into).collect()))
        .set_linux(Some(linux));
    features
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_names_itself_its_version_and_the_options_it_got() {
        let options = Any { type_url: "x".into(), value: vec![1], ..Default::default() };
        let info = encode(&options.write_to_bytes().unwrap()).unwrap();
        let info = RuntimeInfo::parse_from_bytes(&info).unwrap();
        assert_eq!((info.name.as_str(), info.version.version.as_str()), (RUNTIME, env!("CARGO_PKG_VERSION")));
        assert_eq!(info.options.type_url, "x");
        assert!(encode(&[]).is_ok());
        assert!(encode(&[0xff]).is_err());
    }

    /// What containerd reads of it (`introspectRuntimeFeatures` and `supportsCRIUserns` of its CRI).
    #[test]
    fn read_only_all_the_way_down_is_offered_and_users_of_its_own_are_not() {
        let info = RuntimeInfo::parse_from_bytes(&encode(&[]).unwrap()).unwrap();
        assert_eq!(info.features.type_url, FEATURES);
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert!(features["mountOptions"].as_array().unwrap().contains(&"rro".into()));
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], false);
        assert!(!features["linux"]["namespaces"].as_array().unwrap().contains(&"user".into()));
    }
}
