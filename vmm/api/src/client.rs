//! The shim's side of the control socket.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use crate::frame;
use crate::{Error, Event, Message, Reply, Request, Result, Status};

type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Reply>>>>;

/// Asks a VMM for things. Requests may overlap; each waits for its own reply.
pub struct VmmClient {
    socket: Arc<AsyncFd<OwnedFd>>,
    pending: Pending,
    next_id: AtomicU64,
    deadline: Duration,
}

impl std::fmt::Debug for VmmClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmmClient").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

/// What the VMM tells without being asked, in order, with the descriptors that came along.
/// It ends when the VMM does.
pub type EventStream = mpsc::Receiver<(Event, Vec<OwnedFd>)>;

/// Events that may wait for the shim before connections are refused, and the VMM's socket is left unread for other events.
const EVENT_BACKLOG: usize = 64;

impl VmmClient {
    /// Takes the shim's end of the socketpair. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking or cannot be registered with the runtime.
    pub fn new(socket: OwnedFd, deadline: Duration) -> Result<(Self, EventStream)> {
        fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|errno| Error::Receive(errno.into()))?;
        let socket = Arc::new(register(socket)?);
        let pending = Pending::default();
        let (events, stream) = mpsc::channel(EVENT_BACKLOG);
        tokio::spawn(read_messages(socket.clone(), pending.clone(), events));
        let client = Self { socket, pending, next_id: AtomicU64::new(1), deadline };
        Ok((client, stream))
    }

    /// Sends a request with its descriptors and waits for `Reply::Ok`.
    ///
    /// # Errors
    /// [`Error::Refused`] with the VMM's reason, [`Error::Timeout`], or [`Error::Closed`] when the VMM has ended.
    pub async fn request(&self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let operation = request.name();
        match self.exchange(request, fds).await? {
            Reply::Ok => Ok(()),
            reply => Err(refused(operation, reply)),
        }
    }

    /// Asks for the machine's counters.
    ///
    /// # Errors
    /// As [`VmmClient::request`].
    pub async fn status(&self) -> Result<Status> {
        match self.exchange(Request::Status, &[]).await? {
            Reply::Status(status) => Ok(status),
            reply => Err(refused(Request::Status.name(), reply)),
        }
    }

    async fn exchange(&self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<Reply> {
        let operation = request.name();
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, reply) = oneshot::channel();
        lock(&self.pending).insert(id, sender);
        let message = Message::Request { id, body: request };
        let answer = tokio::time::timeout(self.deadline, async {
            self.send(&message, fds).await?;
            reply.await.map_err(|_| Error::Closed)
        })
        .await;
        lock(&self.pending).remove(&id);
        answer.unwrap_or(Err(Error::Timeout { operation, seconds: self.deadline.as_secs() }))
    }

    async fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<()> {
        loop {
            let mut ready = self.socket.ready(Interest::WRITABLE).await.map_err(Error::Send)?;
            match frame::send(self.socket.as_fd(), message, fds) {
                Err(Error::Send(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    ready.clear_ready();
                }
                result => return result,
            }
        }
    }
}

#[allow(unsafe_code)]
fn register(socket: OwnedFd) -> Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` always names the same open description, and `AsyncFd` owns it from here on.
    unsafe { AsyncFd::register(socket) }.map_err(|error| Error::Receive(error.into()))
}

fn refused(operation: &'static str, reply: Reply) -> Error {
    let reason = match reply {
        Reply::Error { reason } => reason,
        other => format!("unexpected reply {other:?}"),
    };
    Error::Refused { operation, reason }
}

fn lock(pending: &Pending) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Reply>>> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands replies to their requests and events to the stream until the VMM ends or breaks the protocol.
/// Dropping the waiting requests then is what makes them fail with [`Error::Closed`].
async fn read_messages(
    socket: Arc<AsyncFd<OwnedFd>>,
    pending: Pending,
    events: mpsc::Sender<(Event, Vec<OwnedFd>)>,
) {
    while let Ok((message, fds)) = receive(&socket).await {
        match message {
            Message::Reply { id, body } => {
                if let Some(sender) = lock(&pending).remove(&id) {
                    // A request that gave up has dropped its receiver; its reply is of no use to anyone.
                    let _ = sender.send(body);
                }
            }
            // A guest may connect as often as it wants. What nobody has taken yet is enough, and replies are not to wait for it.
            Message::Event { body: body @ Event::VsockAccepted { .. } } => {
                if let Err(TrySendError::Closed(_)) = events.try_send((body, fds)) {
                    break;
                }
            }
            Message::Event { body } => {
                if events.send((body, fds)).await.is_err() {
                    break;
                }
            }
            Message::Request { .. } => break,
        }
    }
    lock(&pending).clear();
}

async fn receive(socket: &AsyncFd<OwnedFd>) -> Result<(Message, Vec<OwnedFd>)> {
    loop {
        let mut ready = socket.readable().await.map_err(Error::Receive)?;
        match frame::receive(socket.as_fd()) {
            Err(Error::Receive(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                ready.clear_ready();
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    fn connect() -> (VmmClient, EventStream, OwnedFd) {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let (client, events) = VmmClient::new(ours, Duration::from_millis(200)).unwrap();
        (client, events, theirs)
    }

    fn answer(vmm: &OwnedFd, body: Reply) {
        let (message, _) = frame::receive(vmm).unwrap();
        let Message::Request { id, .. } = message else { panic!("not a request") };
        frame::send(vmm, &Message::Reply { id, body }, &[]).unwrap();
    }

    #[tokio::test]
    async fn a_refusal_carries_the_reason_and_the_operation() {
        let (client, _events, vmm) = connect();
        let server = std::thread::spawn(move || {
            answer(&vmm, Reply::Error { reason: "no such slot".into() });
        });
        let error = client.request(Request::DetachBlock { slot: 9 }, &[]).await.unwrap_err();
        server.join().unwrap();
        assert_eq!(error.to_string(), "VMM: detach a block device: no such slot");
    }

    #[tokio::test]
    async fn a_silent_vmm_costs_one_deadline_and_leaves_nothing_pending() {
        let (client, _events, _vmm) = connect();
        let error = client.request(Request::Resume, &[]).await.unwrap_err();
        assert!(matches!(error, Error::Timeout { operation: "resume the vCPUs", .. }));
        assert!(lock(&client.pending).is_empty());
    }

    #[tokio::test]
    async fn the_end_of_the_vmm_fails_requests_and_ends_the_events() {
        let (client, mut events, vmm) = connect();
        let request = client.request(Request::Pause, &[]);
        drop(vmm);
        assert!(request.await.is_err());
        assert!(events.recv().await.is_none());
    }

    #[tokio::test]
    async fn connections_that_nobody_takes_keep_no_reply_from_arriving() {
        let (client, _events, vmm) = connect();
        let accepted = || Message::Event { body: Event::VsockAccepted { port: 1 } };
        let server = std::thread::spawn(move || {
            for _ in 0..10 * EVENT_BACKLOG {
                frame::send(&vmm, &accepted(), &[vmm.as_fd()]).unwrap();
            }
            answer(&vmm, Reply::Ok);
        });
        client.request(Request::Resume, &[]).await.unwrap();
        server.join().unwrap();
    }

    #[tokio::test]
    async fn events_arrive_in_order() {
        let (_client, mut events, vmm) = connect();
        for pid in [1, 2] {
            frame::send(&vmm, &Message::Event { body: Event::Started { pid } }, &[]).unwrap();
        }
        assert_eq!(events.recv().await.unwrap().0, Event::Started { pid: 1 });
        assert_eq!(events.recv().await.unwrap().0, Event::Started { pid: 2 });
    }
}
