//! Matches the shim's stream connections to the streams that processes are waiting for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use mayu_agent_api::StreamId;
use slog::{Logger, warn};
use tokio::io::AsyncReadExt;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;
use ttrpc::asynchronous::transport::{Listener, Socket};

use crate::error::{Error, Result};

/// How many streams may be awaited at once.
const MAX_EXPECTED: usize = 16 * 1024;
/// How many connections may be without a name at once.
const MAX_UNNAMED: usize = 64;
/// How long a connection may take to say which stream it is.
const NAME_DEADLINE: Duration = Duration::from_secs(30);

/// The streams that processes are waiting for.
#[derive(Default)]
pub struct Streams {
    expected: Mutex<HashMap<StreamId, oneshot::Sender<Socket>>>,
}

/// One awaited stream; dropping it ends the wait, and a later connection is turned away.
pub struct Expected {
    id: StreamId,
    socket: oneshot::Receiver<Socket>,
    streams: Arc<Streams>,
}

impl Streams {
    /// Announces that the shim is going to connect stream `id`.
    ///
    /// # Errors
    ///
    /// `InvalidRequest` for an id that is awaited already, `TooMany`.
    pub fn expect(self: &Arc<Self>, id: StreamId) -> Result<Expected> {
        let (sender, socket) = oneshot::channel();
        let mut expected = self.expected();
        if expected.len() >= MAX_EXPECTED {
            return Err(Error::TooMany { what: "streams", limit: MAX_EXPECTED });
        }
        if expected.contains_key(&id) {
            return Err(Error::InvalidRequest(format!("{id} is in use by another process")));
        }
        expected.insert(id, sender);
        Ok(Expected { id, socket, streams: Arc::clone(self) })
    }

    /// Hands every connection to the process that awaits it, until the listener ends.
    pub async fn serve(self: Arc<Self>, mut listener: Listener, log: Logger) {
        let unnamed = Arc::new(Semaphore::new(MAX_UNNAMED));
        while let Some(accepted) = listener.next().await {
            let socket = match accepted {
                Ok(socket) => socket,
                Err(error) => {
                    warn!(log, "cannot accept a stream"; "error" => %error);
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&unnamed).acquire_owned().await else { return };
            let streams = Arc::clone(&self);
            let log = log.clone();
            tokio::spawn(async move {
                streams.deliver(socket, &log).await;
                drop(permit);
            });
        }
    }

    async fn deliver(&self, mut socket: Socket, log: &Logger) {
        let id = match timeout(NAME_DEADLINE, socket.read_u64()).await {
            Ok(Ok(id)) => StreamId(id),
            Ok(Err(error)) => {
                warn!(log, "a stream ended before it had a name"; "error" => %error);
                return;
            }
            Err(_) => {
                warn!(log, "a stream did not say its name in time");
                return;
            }
        };
        let waiter = self.expected().remove(&id);
        match waiter {
            Some(waiter) => {
                // The process may have been removed in this moment; the socket is then closed.
                let _ = waiter.send(socket);
            }
            None => warn!(log, "nobody awaits this stream"; "stream" => %id),
        }
    }

    fn expected(&self) -> MutexGuard<'_, HashMap<StreamId, oneshot::Sender<Socket>>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Expected {
    /// The stream's id.
    pub fn id(&self) -> StreamId {
        self.id
    }

    /// The connection, once it is there; nothing if it was not made within `deadline`.
    pub async fn connected(mut self, deadline: Duration) -> Option<Socket> {
        timeout(deadline, &mut self.socket).await.ok()?.ok()
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.streams.expected().remove(&self.id);
    }
}
