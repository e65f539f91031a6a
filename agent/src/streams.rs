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

#[cfg(test)]
mod tests {
    use slog::{Discard, o};
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixStream;

    use super::*;

    fn log() -> Logger {
        Logger::root(Discard, o!())
    }

    const SOON: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_connection_reaches_who_expects_it() {
        let streams = Arc::new(Streams::default());
        let expected = streams.expect(StreamId(7)).unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&[0, 0, 0, 0, 0, 0, 0, 7, b'x']).await.unwrap();

        streams.deliver(Socket::new(theirs), &log()).await;

        let mut socket = expected.connected(SOON).await.unwrap();
        assert_eq!(socket.read_u8().await.unwrap(), b'x');
        assert!(streams.expected().is_empty());
    }

    #[tokio::test]
    async fn an_unknown_stream_is_closed() {
        let streams = Arc::new(Streams::default());
        let expected = streams.expect(StreamId(7)).unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_u64(8).await.unwrap();

        streams.deliver(Socket::new(theirs), &log()).await;

        assert_eq!(ours.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(streams.expected().len(), 1);
        drop(expected);
    }

    #[tokio::test]
    async fn a_stream_is_expected_until_nobody_waits() {
        let streams = Arc::new(Streams::default());
        let expected = streams.expect(StreamId(7)).unwrap();
        assert!(matches!(streams.expect(StreamId(7)), Err(Error::InvalidRequest(_))));

        drop(expected);

        assert!(streams.expect(StreamId(7)).is_ok());
    }

    #[tokio::test]
    async fn a_stream_that_does_not_come_is_given_up() {
        let streams = Arc::new(Streams::default());
        let expected = streams.expect(StreamId(7)).unwrap();

        assert!(expected.connected(Duration::ZERO).await.is_none());

        assert!(streams.expected().is_empty());
    }

    #[tokio::test]
    async fn the_table_is_bounded() {
        let streams = Arc::new(Streams::default());
        let all: Vec<_> = (0..MAX_EXPECTED as u64).map(|id| streams.expect(StreamId(id)).unwrap()).collect();

        let one_more = streams.expect(StreamId(u64::MAX));

        assert!(matches!(one_more, Err(Error::TooMany { .. })));
        drop(all);
    }
}
