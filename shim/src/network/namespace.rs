//! The pod's network namespace. The shim's own threads never enter it: each piece of work there gets a thread that
//! does, and ends with it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::thread;

use futures::{Stream, StreamExt};
use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, setns};
use rtnetlink::Handle;
use slog::Logger;
use tokio::sync::oneshot;

use super::mirror::Network;
use super::{sys, tap};
use crate::error::{file, system};
use crate::{Error, Result};

/// The network namespace of the calling thread (namespaces(7)).
const OWN: &str = "/proc/thread-self/ns/net";

/// Stack of a thread that works in the namespace, in bytes.
const STACK: usize = 512 * 1024;

/// The pod's network namespace, held open. It exists for as long as this does, whatever becomes of its path, so let go
/// of it when the pod ends.
#[derive(Debug)]
pub struct NetworkNamespace {
    file: File,
    path: PathBuf,
    pub(super) log: Logger,
}

impl NetworkNamespace {
    /// Opens the namespace at `path`, such as `/var/run/netns/cni-…` or `/proc/PID/ns/net`. `log` gets a line for what
    /// the guest will not have.
    ///
    /// # Errors
    /// [`Error::NetworkNamespace`]: there is none, or it is the one that the shim runs in.
    pub fn open(path: &Path, log: &Logger) -> Result<Self> {
        let unusable = |reason: String| Error::NetworkNamespace { path: path.into(), reason };
        // A path that names something else, such as a FIFO, must not block.
        let options = libc::O_NONBLOCK | libc::O_NOCTTY;
        let opened = OpenOptions::new().read(true).custom_flags(options).open(path);
        let file = opened.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => unusable("it is gone: nothing is there".into()),
            _ => unusable(error.to_string()),
        })?;
        if !sys::is_network_namespace(&file) {
            // What is left of a bind mount that was taken away is an empty file.
            return Err(unusable("it is gone, or never was: what is there is no network namespace".into()));
        }
        let own = fs::metadata(OWN).map_err(crate::error::file("read", OWN))?;
        let this = file.metadata().map_err(crate::error::file("read", path))?;
        if (own.dev(), own.ino()) == (this.dev(), this.ino()) {
            let reason = "it is the host's own, which a virtual machine cannot share (hostNetwork: true)";
            return Err(unusable(reason.into()));
        }
        Ok(Self { file, path: path.into(), log: log.clone() })
    }

    /// Reads what CNI has made: interfaces in the order of their index, addresses, routes, permanent neighbours.
    ///
    /// # Errors
    /// [`Error::NetworkNamespace`] for what a guest cannot be given, [`Error::Network`] for what cannot be read.
    pub async fn network(&self) -> Result<Network> {
        self.inside(|inside| async move { Network::read(&inside).await }).await
    }

    /// Makes a TAP device for each interface of `network`, in that order, with frames redirected both ways. Each
    /// lives as long as its descriptor. What an earlier call has left is replaced.
    ///
    /// # Errors
    /// [`Error::Network`], with what the kernel lacks where that is known; then there is no device.
    pub async fn connect(&self, network: &Network) -> Result<Vec<OwnedFd>> {
        let links = network.links.clone();
        self.inside(|inside| async move { tap::connect(&inside, &links).await }).await
    }

    /// Runs `work` in a thread that has entered the namespace, on a runtime of its own.
    pub(super) async fn inside<T, W, F>(&self, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(Inside) -> F + Send + 'static,
        F: Future<Output = Result<T>>,
    {
        let namespace = self.file.try_clone().map_err(file("duplicate", &self.path))?;
        let (path, log) = (self.path.clone(), self.log.clone());
        let (answer, answered) = oneshot::channel();
        let run = move || {
            // Nobody waits for the answer any more where the caller was cancelled.
            let _ = answer.send(enter(namespace, path, log, work));
        };
        let thread = thread::Builder::new().name("netns".into()).stack_size(STACK);
        thread
            .spawn(run)
            .map_err(|source| Error::Spawn { what: "a thread in the network namespace".into(), source })?;
        answered.await.unwrap_or_else(|_| {
            let reason = "the thread that worked in it ended early".into();
            Err(Error::NetworkNamespace { path: self.path.clone(), reason })
        })
    }
}

fn enter<T, F>(namespace: File, path: PathBuf, log: Logger, work: impl FnOnce(Inside) -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(|errno| Error::NetworkNamespace {
        path: path.clone(),
        reason: format!("enter it: {errno}"),
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(system("start a runtime in the network namespace"))?;
    runtime.block_on(async {
        let (connection, netlink, _) =
            rtnetlink::new_connection().map_err(system("open a netlink socket in the network namespace"))?;
        tokio::spawn(connection);
        work(Inside { netlink, namespace, log, path }).await
    })
}

/// What a thread inside the namespace works with.
pub(super) struct Inside {
    /// rtnetlink(7) of the namespace.
    pub netlink: Handle,
    /// The namespace.
    pub namespace: File,
    /// Lines name the pod.
    pub log: Logger,
    path: PathBuf,
}

impl Inside {
    /// Names the operation and what it was done to; for `map_err`.
    pub fn failed(&self, operation: &'static str, subject: &str) -> impl FnOnce(rtnetlink::Error) -> Error {
        move |error| self.refused(operation, subject, io_error(error), "")
    }

    /// The same for an error of a system call, with what may help.
    pub fn refused(
        &self,
        operation: &'static str,
        subject: &str,
        source: impl Into<io::Error>,
        hint: &'static str,
    ) -> Error {
        let (subject, namespace) = (subject.to_string(), self.path.clone());
        Error::Network { operation, subject, namespace, source: source.into(), hint }
    }

    /// That the pod's network is one that no guest can have.
    pub fn unusable(&self, reason: String) -> Error {
        Error::NetworkNamespace { path: self.path.clone(), reason }
    }

    /// What `keep` makes of the messages of a dump, in their order.
    ///
    /// # Errors
    /// The dump failed, or there is more than `most`.
    pub async fn dump<T, U>(
        &self,
        what: &str,
        most: usize,
        messages: impl Stream<Item = std::result::Result<T, rtnetlink::Error>>,
        mut keep: impl FnMut(T) -> Option<U>,
    ) -> Result<Vec<U>> {
        let mut messages = pin!(messages);
        let mut kept = Vec::new();
        while let Some(message) = messages.next().await {
            let Some(item) = keep(message.map_err(self.failed("read", what))?) else { continue };
            if kept.len() == most {
                return Err(self.unusable(format!("it has more than {most} {what}")));
            }
            kept.push(item);
        }
        Ok(kept)
    }
}

/// Whether the kernel's reason is one of `errnos`.
pub(super) fn is_one_of(errnos: &[Errno], error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|errno| errnos.contains(&Errno::from_raw(errno)))
}

/// The kernel's reason.
pub(super) fn io_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use slog::o;

    use super::super::testing::TestNamespace;
    use super::*;

    fn refused(path: &Path) -> String {
        NetworkNamespace::open(path, &Logger::root(slog::Discard, o!())).unwrap_err().to_string()
    }

    #[test]
    fn the_hosts_own_namespace_is_refused() {
        let message = refused(Path::new("/proc/self/ns/net"));
        assert!(
            message.starts_with("network namespace /proc/self/ns/net: it is the host's own"),
            "{message}"
        );
    }

    #[test]
    fn a_namespace_that_has_vanished_is_named() {
        let message = refused(Path::new("/run/netns/cni-1"));
        assert_eq!(message, "network namespace /run/netns/cni-1: it is gone: nothing is there");
        let left_over = tempfile::NamedTempFile::new().unwrap();
        let message = refused(left_over.path());
        assert!(message.ends_with("what is there is no network namespace"), "{message}");
    }

    #[test]
    fn a_namespace_of_another_kind_is_refused() {
        let message = refused(Path::new("/proc/self/ns/mnt"));
        assert!(message.ends_with("what is there is no network namespace"), "{message}");
    }

    #[test]
    fn a_fifo_does_not_hold_anyone_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(refused(&path).ends_with("what is there is no network namespace"));
    }

    #[tokio::test]
    async fn the_thread_that_asks_stays_where_it_is() {
        let Some(pod) = TestNamespace::new() else { return };
        let before = fs::read_link(OWN).unwrap();
        let inside = pod.inside(|_| async { Ok(fs::read_link(OWN).unwrap()) }).await;
        assert_ne!(inside, before);
        assert_eq!(fs::read_link(OWN).unwrap(), before);
    }

    #[tokio::test]
    async fn work_that_panics_is_an_error() {
        let Some(pod) = TestNamespace::new() else { return };
        let result =
            pod.namespace.inside(|_| async { if true { panic!("on purpose") } else { Ok(()) } }).await;
        assert!(result.unwrap_err().to_string().ends_with("ended early"));
    }
}
