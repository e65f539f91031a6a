//! Hooks of the OCI runtime spec (config.md, "POSIX-platform Hooks"): programs of the host that a client has run at points of a
//! container's life. docker and nerdctl set up networks with them. Those that would have to run inside the container are not
//! run: the guest does not have the host's programs.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use oci_spec::runtime::{Hook, Hooks, Spec};
use serde_json::json;
use slog::{Logger, debug, warn};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use crate::{Error, Result};

/// How long a hook may take that does not say so itself.
const PATIENCE: Duration = Duration::from_secs(60);

/// The most of a hook's standard error that goes into an error, in bytes.
const MAX_OUTPUT: usize = 1024;

/// The hooks of one container and what they are told.
#[derive(Clone, Debug, Default)]
pub struct ContainerHooks {
    hooks: Hooks,
    id: String,
    bundle: PathBuf,
    version: String,
}

/// A point of a container's life, and the word for the container's state there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// The container's VM is there, its processes are not.
    Created,
    /// It has been started.
    Started,
    /// It has been deleted.
    Deleted,
}

impl ContainerHooks {
    /// Takes the hooks out of a spec.
    pub fn take(spec: &mut Spec, id: &str, bundle: &Path, log: &Logger) -> Self {
        let hooks = spec.hooks().clone().unwrap_or_default();
        spec.set_hooks(None);
        for (kind, hooks) in
            [("createContainer", hooks.create_container()), ("startContainer", hooks.start_container())]
        {
            if hooks.as_ref().is_some_and(|hooks| !hooks.is_empty()) {
                warn!(log, "hooks are not run: they would need the host's programs in the guest"; "hooks" => kind);
            }
        }
        Self { hooks, id: id.into(), bundle: bundle.into(), version: spec.version().clone() }
    }

    /// Runs the hooks of a point in order; `pid` stands for the container on the host.
    ///
    /// # Errors
    /// [`Error::Hook`] for the first that fails. After the start and the end the others are run all the same, and the failure
    /// is only logged, as the specification has it.
    pub async fn run(&self, point: Point, pid: u32, log: &Logger) -> Result<()> {
        let (lists, status) = match point {
            Point::Created => (vec![prestart(&self.hooks), self.hooks.create_runtime()], "created"),
            Point::Started => (vec![self.hooks.poststart()], "running"),
            Point::Deleted => (vec![self.hooks.poststop()], "stopped"),
        };
        let state = json!({
            "ociVersion": self.version, "id": self.id, "status": status, "pid": pid, "bundle": self.bundle,
        });
        for hook in lists.into_iter().flatten().flatten() {
            match run(hook, &state.to_string(), &self.bundle).await {
                Ok(()) => debug!(log, "hook run"; "path" => hook.path().display().to_string()),
                Err(error) if point == Point::Created => return Err(error),
                Err(error) => warn!(log, "hook failed"; "error" => error.to_string()),
            }
        }
        Ok(())
    }
}

/// Deprecated, and what docker uses up to version 26.
#[allow(deprecated)]
fn prestart(hooks: &Hooks) -> &Option<Vec<Hook>> {
    hooks.prestart()
}

async fn run(hook: &Hook, state: &str, bundle: &Path) -> Result<()> {
    let failed = |reason: String| Error::Hook { path: hook.path().clone(), reason };
    // The first argument is the program's name for itself (execv(3)).
    let arguments = hook.args().clone().unwrap_or_default();
    let mut command = Command::new(hook.path());
    if let Some(name) = arguments.first() {
        command.arg0(name);
    }
    let environment = hook.env().iter().flatten().filter_map(|pair| pair.split_once('='));
    let mut child = command
        .args(arguments.iter().skip(1))
        .env_clear()
        .envs(environment)
        .current_dir(bundle)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read it does not need it.
        let _ = stdin.write_all(state.as_bytes()).await;
    }
    let seconds =
        hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
    let patience = seconds.map_or(PATIENCE, Duration::from_secs);
    let output = timeout(patience, child.wait_with_output())
        .await
        .map_err(|_| failed(format!("it did not end within {} s", patience.as_secs())))?
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr[..output.stderr.len().min(MAX_OUTPUT)]).into_owned();
    Err(failed(format!("{}: {}", output.status, text.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn log() -> Logger {
        Logger::root(slog::Discard, slog::o!())
    }

    fn hooks(hooks: &Value, bundle: &Path) -> ContainerHooks {
        let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.1.0", "hooks": hooks})).unwrap();
        let taken = ContainerHooks::take(&mut spec, "c1", bundle, &log());
        assert_eq!(spec.hooks(), &None);
        taken
    }

    fn shell(script: &str) -> Value {
        json!({"path": "/bin/sh", "args": ["hook", "-c", script], "env": ["PATH=/bin:/usr/bin"]})
    }

    #[tokio::test]
    async fn a_hook_is_told_the_state_and_runs_with_its_own_environment_alone() {
        let bundle = tempfile::tempdir().unwrap();
        let hooks = hooks(
            &json!({"prestart": [shell("cat > state")], "createRuntime": [shell("env > environment")]}),
            bundle.path(),
        );
        hooks.run(Point::Created, 42, &log()).await.unwrap();
        let state = std::fs::read_to_string(bundle.path().join("state")).unwrap();
        let state: Value = serde_json::from_str(&state).unwrap();
        assert_eq!(
            (&state["id"], &state["pid"], &state["status"]),
            (&json!("c1"), &json!(42), &json!("created"))
        );
        assert_eq!(state["bundle"], json!(bundle.path()));
        let environment = std::fs::read_to_string(bundle.path().join("environment")).unwrap();
        assert!(!environment.contains("CARGO"), "{environment}");
    }

    #[tokio::test]
    async fn a_hook_that_fails_stops_a_creation_and_nothing_else() {
        let bundle = tempfile::tempdir().unwrap();
        let failing = shell("echo no network >&2; exit 3");
        let hooks = hooks(
            &json!({
                "createRuntime": [failing, shell("touch never")],
                "poststop": [failing, shell("touch always")],
            }),
            bundle.path(),
        );
        let message = hooks.run(Point::Created, 1, &log()).await.unwrap_err().to_string();
        assert!(message.contains("/bin/sh") && message.contains("no network"), "{message}");
        assert!(!bundle.path().join("never").exists());
        hooks.run(Point::Deleted, 1, &log()).await.unwrap();
        assert!(bundle.path().join("always").exists());
    }

    #[tokio::test]
    async fn a_hook_that_takes_too_long_is_ended() {
        let bundle = tempfile::tempdir().unwrap();
        let slow = json!({"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1});
        let hooks = hooks(&json!({"createRuntime": [slow]}), bundle.path());
        let message = hooks.run(Point::Created, 1, &log()).await.unwrap_err().to_string();
        assert!(message.contains("within 1 s"), "{message}");
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let bundle = tempfile::tempdir().unwrap();
        let hooks = hooks(&json!({"createRuntime": [{"path": "/no/such/hook"}]}), bundle.path());
        let message = hooks.run(Point::Created, 1, &log()).await.unwrap_err().to_string();
        assert!(message.contains("/no/such/hook"), "{message}");
    }
}
