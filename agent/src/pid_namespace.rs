//! The PID namespaces that containers do not have to themselves: the pod's, and those of other containers.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use mayu_agent_api::{CONTAINER_PID_NAMESPACE, POD_PID_NAMESPACE};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use slog::{Logger, warn};

use crate::error::Result;
use crate::launch::Launcher;
use crate::pause::Pause;
use crate::reaper::Reaper;
use crate::spec::check_id;

/// A PID namespace by the name that the shim has for it.
#[derive(Debug, PartialEq, Eq)]
pub enum Shared {
    /// The pod's.
    Pod,
    /// That of the container of this id.
    Container(String),
}

/// The pod's own PID namespace. It is made when it is first asked for.
pub struct PodPidNamespace {
    pause: Mutex<Option<Pause>>,
    launcher: Launcher,
    reaper: Arc<Reaper>,
    log: Logger,
}

impl PodPidNamespace {
    /// A namespace that is not there yet.
    pub fn new(launcher: Launcher, reaper: Arc<Reaper>, log: Logger) -> Self {
        Self { pause: Mutex::default(), launcher, reaper, log }
    }

    /// Where the namespace is to be found. Blocks while it is being made: the first time, and again where its first process has
    /// died, as one may in a guest without memory, and all the containers in it with that.
    ///
    /// # Errors
    ///
    /// Those of [`Pause::start`].
    pub fn path(&self) -> Result<PathBuf> {
        let mut pause = self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pause) = &mut *pause {
            if pause.lives() {
                return Ok(pause.namespace());
            }
            warn!(self.log, "the pod's PID namespace has died and is made anew");
        }
        let started = Pause::start(&self.launcher.program, self.launcher.deadline, &self.reaper)?;
        Ok(pause.insert(started).namespace())
    }
}

/// The PID namespace that `spec` asks for, if it is one of those that the shim names.
///
/// # Errors
///
/// `InvalidId` for what is no container's id.
pub fn shared(spec: &Spec) -> Result<Option<Shared>> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let namespace = namespaces.into_iter().flatten().find(is_pid_namespace);
    let path = namespace.and_then(|namespace| namespace.path().as_ref()?.to_str()).unwrap_or_default();
    if path == POD_PID_NAMESPACE {
        return Ok(Some(Shared::Pod));
    }
    let Some(id) = path.strip_prefix(CONTAINER_PID_NAMESPACE) else { return Ok(None) };
    check_id(id)?;
    Ok(Some(Shared::Container(id.to_owned())))
}

/// Has `spec` join the PID namespace at `path`.
pub fn join(spec: &mut Spec, path: PathBuf) {
    let namespaces = spec.linux_mut().as_mut().and_then(|linux| linux.namespaces_mut().as_mut());
    let namespace = namespaces.into_iter().flatten().find(|namespace| is_pid_namespace(&&**namespace));
    if let Some(namespace) = namespace {
        namespace.set_path(Some(path));
    }
}

fn is_pid_namespace(namespace: &&LinuxNamespace) -> bool {
    namespace.typ() == LinuxNamespaceType::Pid
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::error::Error;

    fn spec(namespaces: &Value) -> Spec {
        let document =
            json!({"ociVersion": "1.2.0", "root": {"path": "/"}, "linux": {"namespaces": namespaces}});
        serde_json::from_value(document).unwrap()
    }

    fn of(path: &str) -> Result<Option<Shared>> {
        shared(&spec(&json!([{"type": "ipc", "path": POD_PID_NAMESPACE}, {"type": "pid", "path": path}])))
    }

    #[test]
    fn a_shared_namespace_is_known_by_its_name() {
        assert_eq!(of(POD_PID_NAMESPACE).unwrap(), Some(Shared::Pod));
        let target = of(&format!("{CONTAINER_PID_NAMESPACE}web-1")).unwrap();
        assert_eq!(target, Some(Shared::Container("web-1".into())));
        for path in ["/proc/7/ns/pid", "/run/mayu/namespaces/pids", "/run/mayu/namespaces", ""] {
            assert_eq!(of(path).unwrap(), None, "{path}");
        }
        assert_eq!(shared(&spec(&json!([{"type": "pid"}]))).unwrap(), None);
        assert_eq!(shared(&spec(&json!([]))).unwrap(), None);
        for id in ["", "..", "a/../b"] {
            let path = format!("{CONTAINER_PID_NAMESPACE}{id}");
            assert!(matches!(of(&path), Err(Error::InvalidId { .. })), "{id}");
        }
    }

    #[test]
    fn the_spec_joins_the_namespace_and_keeps_its_others() {
        let mut spec = spec(&json!([{"type": "mount"}, {"type": "pid", "path": POD_PID_NAMESPACE}]));

        join(&mut spec, "/proc/7/ns/pid".into());

        let namespaces = serde_json::to_value(spec.linux().as_ref().unwrap().namespaces()).unwrap();
        assert_eq!(namespaces, json!([{"type": "mount"}, {"type": "pid", "path": "/proc/7/ns/pid"}]));
    }
}
