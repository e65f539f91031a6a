//! The mounts of a container: what comes from the host's files, and what is the guest's own memory.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use mayu_agent_api::VOLUME_DIR;
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use rustix::fs::{StatFs, statfs};

use super::{Bind, Part, ReadOnly, Volume};
use crate::{Error, Result};

/// The file system type of tmpfs in statfs(2).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// The pod's `/dev/shm`.
const SHM: &str = "/dev/shm";

/// What Kubernetes and docker give a pod without a word about it, in bytes.
const SHM_SIZE: u64 = 64 << 20;

/// The directory in which a kubelet keeps a pod's `emptyDir` volumes.
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";

/// The directory in which it binds what containers have a `subPath` of.
const SUBPATHS: &str = "volume-subpaths";

/// Points every bind mount but those of `volumes` at its place under the share, and says what has to be bound there.
///
/// # Errors
/// [`Error::InvalidArgument`] for a mount whose own mounts are to appear on the host.
pub(super) fn rewrite_binds(spec: &mut Spec, base: &Path, volumes: &[Volume]) -> Result<Vec<Bind>> {
    let mut binds = Vec::new();
    let of_the_guest: Vec<_> =
        volumes.iter().map(|volume| Path::new(VOLUME_DIR).join(&volume.name)).collect();
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let Some(source) = bind_source(mount) else {
            continue;
        };
        if of_the_guest.contains(&source) {
            continue;
        }
        mount.set_source(Some(base.join("mounts").join(binds.len().to_string())));
        binds.push(Bind {
            source,
            destination: mount.destination().clone(),
            recursive: has(mount, "rbind"),
            read_only: match (has(mount, "rro"), has(mount, "ro")) {
                (true, _) => ReadOnly::AllBelow,
                (false, true) => ReadOnly::Itself,
                (false, false) => ReadOnly::No,
            },
            follows: follows_host(mount)?,
        });
    }
    Ok(binds)
}

/// Whether what the host mounts below the source later appears in the container as well (mount_namespaces(7)).
fn follows_host(mount: &Mount) -> Result<bool> {
    if has(mount, "rshared") || has(mount, "shared") {
        return Err(Error::InvalidArgument(format!(
            "mount on {}: mounts made inside a VM cannot appear on the host (mountPropagation: Bidirectional)",
            mount.destination().display()
        )));
    }
    Ok(has(mount, "rslave") || has(mount, "slave"))
}

/// Takes from the host's memory what is meant to be memory of the pod: its `/dev/shm`, where its containers share that, and
/// `emptyDir` volumes in memory. In the guest they count towards the pod's limit and need no way through the VMM.
pub(super) fn replace_volumes(spec: &mut Spec) -> Vec<Volume> {
    let shared_ipc = shares_ipc(spec);
    let mut volumes = Vec::new();
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let used = if shared_ipc && mount.destination() == Path::new(SHM) {
            let volume = shm(mount);
            let access = if is_read_only(mount) { "ro" } else { "rw" };
            let options = ["rbind", "rprivate", "nosuid", "noexec", "nodev", access].map(str::to_owned);
            // Those of a tmpfs would mean nothing to a bind mount.
            mount.set_typ(Some("bind".into())).set_options(Some(options.to_vec()));
            vec![volume]
        } else if let Some(source) = bind_source(mount) {
            match memory_volume(&source) {
                Some(volume) => vec![volume],
                None => part_of_memory_volume(&source).map(Vec::from).unwrap_or_default(),
            }
        } else {
            continue;
        };
        if let Some(volume) = used.last() {
            mount.set_source(Some(Path::new(VOLUME_DIR).join(&volume.name)));
        }
        volumes.extend(used);
    }
    volumes
}

fn is_read_only(mount: &Mount) -> bool {
    has(mount, "ro") || has(mount, "rro")
}

fn has(mount: &Mount, option: &str) -> bool {
    mount.options().iter().flatten().any(|other| other == option)
}

fn bind_source(mount: &Mount) -> Option<PathBuf> {
    let is_bind = has(mount, "bind") || has(mount, "rbind") || mount.typ().as_deref() == Some("bind");
    mount.source().clone().filter(|_| is_bind)
}

/// A path of the namespace means that of the pod.
fn shares_ipc(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.is_some_and(|all| {
        all.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Ipc && namespace.path().is_some())
    })
}

/// containerd either binds a tmpfs that it has made for the pod, or asks for one.
fn shm(mount: &Mount) -> Volume {
    let asked = mount.options().iter().flatten().find_map(|option| bytes(option.strip_prefix("size=")?));
    let made = bind_source(mount).and_then(|source| tmpfs(&source)).map(|tmpfs| size(&tmpfs));
    let size = asked.or(made).unwrap_or(SHM_SIZE);
    Volume { name: "shm".into(), size, mode: 0o1777, uid: 0, gid: 0, part: None }
}

/// The volume behind a path of the host, if it is an `emptyDir` in memory: what a kubelet has mounted a tmpfs on.
fn memory_volume(source: &Path) -> Option<Volume> {
    let name = source.file_name()?.to_str()?;
    if source.parent()?.file_name()? != EMPTY_DIR {
        return None;
    }
    let tmpfs = tmpfs(source)?;
    let metadata = fs::metadata(source).ok()?;
    Some(Volume {
        name: format!("empty-dir-{name}"),
        size: size(&tmpfs),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        part: None,
    })
}

/// The volume and the directory of it behind a path of the host, if that is where a kubelet has bound a `subPath` of an `emptyDir`
/// in memory: `POD/volume-subpaths/VOLUME/CONTAINER/NUMBER`.
fn part_of_memory_volume(source: &Path) -> Option<[Volume; 2]> {
    let mut up = source.ancestors().skip(1);
    let (container, volume, subpaths, pod) = (up.next()?, up.next()?, up.next()?, up.next()?);
    if subpaths.file_name()? != SUBPATHS {
        return None;
    }
    let whole_path = pod.join("volumes").join(EMPTY_DIR).join(volume.file_name()?);
    let whole = memory_volume(&whole_path)?;
    let metadata = fs::metadata(source).ok().filter(fs::Metadata::is_dir)?;
    if metadata.dev() != fs::metadata(&whole_path).ok()?.dev() {
        return None;
    }
    let names = [container, source].map(|path| path.file_name().and_then(OsStr::to_str));
    let [Some(container), Some(number)] = names else { return None };
    let part = Volume {
        // Names in Kubernetes have no dots.
        name: format!("{}.{container}.{number}", whole.name),
        size: 0,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        part: Some(Part { of: whole.name.clone(), path: root_of_mount(source)? }),
    };
    Some([whole, part])
}

/// What of its file system a mount shows. None where nothing is mounted there, or where a name would have to be decoded.
fn root_of_mount(point: &Path) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    // The fourth and the fifth field, proc_pid_mountinfo(5); the mount that counts is the last one.
    let fields = mounts.lines().map(|line| line.split(' ').skip(3));
    let (root, _) = fields
        .filter_map(|mut fields| Some((fields.next()?, fields.next()?)))
        .rfind(|(_, there)| Path::new(there) == point)?;
    let path = Path::new(root).strip_prefix("/").ok()?;
    (!root.contains('\\') && !root.ends_with("//deleted")).then(|| path.into())
}

fn tmpfs(path: &Path) -> Option<StatFs> {
    statfs(path).ok().filter(|stat| u64::try_from(stat.f_type) == Ok(TMPFS_MAGIC))
}

fn size(stat: &StatFs) -> u64 {
    stat.f_blocks.saturating_mul(u64::try_from(stat.f_bsize).unwrap_or_default())
}

/// A number as tmpfs(5) takes it, with an optional unit.
fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 10),
        b'm' | b'M' => (&text[..text.len() - 1], 20),
        b'g' | b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use serde_json::json;

    fn spec(ipc: &serde_json::Value, mount: &serde_json::Value) -> Spec {
        let value = json!({
            "ociVersion": "1.1.0",
            "mounts": [mount],
            "linux": {"namespaces": [ipc]},
        });
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn shared_memory_is_the_pods_when_ipc_is_and_else_the_containers() {
        let mount = json!({
            "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=128m"],
        });
        let mut shared = spec(&json!({"type": "ipc", "path": "/proc/7/ns/ipc"}), &mount);
        let volumes = replace_volumes(&mut shared);
        let expected =
            Volume { name: "shm".into(), size: 128 << 20, mode: 0o1777, uid: 0, gid: 0, part: None };
        assert_eq!(volumes, [expected]);
        assert!(rewrite_binds(&mut shared, Path::new("/share"), &volumes).unwrap().is_empty());
        let source = shared.mounts().as_ref().unwrap()[0].source().clone().unwrap();
        assert_eq!(source, Path::new(VOLUME_DIR).join("shm"));

        let mut own = spec(&json!({"type": "ipc"}), &mount);
        assert!(replace_volumes(&mut own).is_empty());
        assert_eq!(own.mounts().as_ref().unwrap()[0].typ().as_deref(), Some("tmpfs"));
    }

    #[test]
    fn an_empty_dir_is_memory_of_the_guest_only_when_it_is_memory_of_the_host() {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let source = folder.path().join("volumes").join(EMPTY_DIR).join("cache");
        fs::create_dir_all(&source).unwrap();
        assert_eq!(memory_volume(&source), None);
        let options = Some("size=1m,mode=2770,gid=2000");
        if mount(Some("tmpfs"), &source, Some("tmpfs"), MsFlags::empty(), options).is_err() {
            eprintln!("SKIPPED: needs root: mounts");
            return;
        }
        let volume = memory_volume(&source);
        let elsewhere = memory_volume(folder.path());
        let below = folder.path().join(SUBPATHS).join("cache/web/0");
        fs::create_dir_all(&below).unwrap();
        fs::create_dir_all(source.join("a/b")).unwrap();
        let unbound = part_of_memory_volume(&below);
        mount(Some(&source.join("a/b")), &below, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        let part = part_of_memory_volume(&below);
        for point in [&below, &source] {
            umount2(point, MntFlags::MNT_DETACH).unwrap();
        }
        let expected = Volume {
            name: "empty-dir-cache".into(),
            size: 1 << 20,
            mode: 0o2770,
            uid: 0,
            gid: 2000,
            part: None,
        };
        assert_eq!(volume.as_ref(), Some(&expected));
        assert_eq!((elsewhere, unbound), (None, None));
        let [whole, part] = part.unwrap();
        assert_eq!((whole, part.name.as_str()), (expected, "empty-dir-cache.web.0"));
        assert_eq!(part.part, Some(Part { of: "empty-dir-cache".into(), path: "a/b".into() }));
    }

    #[test]
    fn mounts_of_the_host_follow_where_the_mount_says_so_and_never_the_other_way() {
        let table =
            [("rprivate", Some(false)), ("rslave", Some(true)), ("rw", Some(false)), ("rshared", None)];
        for (option, expected) in table {
            let mount = json!({
                "destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", option],
            });
            let binds = rewrite_binds(&mut spec(&json!({"type": "ipc"}), &mount), Path::new("/share"), &[]);
            assert_eq!(binds.ok().map(|binds| binds[0].follows), expected, "{option}");
        }
    }

    #[test]
    fn sizes_have_the_units_of_tmpfs() {
        let table =
            [("65536k", Some(64 << 20)), ("1G", Some(1 << 30)), ("7", Some(7)), ("m", None), ("", None)];
        for (text, expected) in table {
            assert_eq!(bytes(text), expected, "{text}");
        }
        assert_eq!(bytes("99999999999999999999g"), None);
    }
}
