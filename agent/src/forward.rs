//! Connections to servers in the guest that listen on its loopback only: `kubectl port-forward`.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use slog::{Logger, debug, warn};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use ttrpc::asynchronous::transport::{Listener, Socket};

/// How many connections there may be at once.
const MAX_CONNECTIONS: usize = 256;
/// How long a connection may take to say which port it is for.
const PORT_DEADLINE: Duration = Duration::from_secs(30);
/// How long a server may take to accept; one whose backlog is full lets others wait.
const DIAL_DEADLINE: Duration = Duration::from_secs(30);

/// Takes the shim's connections to where they are to go.
pub struct Forwarder {
    free: Arc<Semaphore>,
    port_deadline: Duration,
    log: Logger,
}

impl Forwarder {
    /// One without connections.
    pub fn new(log: Logger) -> Self {
        Self { free: Arc::new(Semaphore::new(MAX_CONNECTIONS)), port_deadline: PORT_DEADLINE, log }
    }

    /// Forwards every connection until the listener ends. One too many is closed without an answer.
    pub async fn serve(self, mut listener: Listener) {
        while let Some(accepted) = listener.next().await {
            let socket = match accepted {
                Ok(socket) => socket,
                Err(error) => {
                    warn!(self.log, "cannot accept a connection to forward"; "error" => %error);
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&self.free).try_acquire_owned() else {
                warn!(self.log, "too many forwarded connections"; "limit" => MAX_CONNECTIONS);
                continue;
            };
            let (deadline, log) = (self.port_deadline, self.log.clone());
            tokio::spawn(async move {
                if let Err(error) = forward(socket, deadline).await {
                    debug!(log, "a forwarded connection broke"; "error" => %error);
                }
                drop(permit);
            });
        }
    }
}

async fn forward(mut socket: Socket, port_deadline: Duration) -> io::Result<()> {
    let port = timeout(port_deadline, socket.read_u16()).await??;
    match timeout(DIAL_DEADLINE, dial(port)).await.unwrap_or(Err(io::ErrorKind::TimedOut.into())) {
        Ok(mut server) => {
            socket.write_u8(0).await?;
            copy_bidirectional(&mut socket, &mut server).await?;
            Ok(())
        }
        Err(error) => {
            socket.write_u8(refusal(&error)).await?;
            socket.shutdown().await
        }
    }
}

async fn dial(port: u16) -> io::Result<TcpStream> {
    let stream = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(stream) => stream,
        Err(_) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await?,
    };
    // What the shim sends has been gathered to packets once already.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The error's number in one byte, which all that connect(2) returns fit into.
fn refusal(error: &io::Error) -> u8 {
    let fallback = if error.kind() == io::ErrorKind::TimedOut { libc::ETIMEDOUT } else { libc::EIO };
    error.raw_os_error().and_then(|number| u8::try_from(number).ok()).unwrap_or(fallback as u8)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use futures::stream;
    use slog::{Discard, o};
    use tokio::net::{TcpListener, UnixStream};
    use tokio::sync::mpsc;

    use super::*;

    const SOON: Duration = Duration::from_secs(60);

    async fn listen(address: impl Into<IpAddr>) -> (TcpListener, [u8; 2]) {
        let listener = TcpListener::bind((address.into(), 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port().to_be_bytes();
        (listener, port)
    }

    /// A forwarder, and what connects to it.
    fn start(limit: usize, port_deadline: Duration) -> mpsc::UnboundedSender<UnixStream> {
        let (connect, connections) = mpsc::unbounded_channel();
        let accept = |mut connections: mpsc::UnboundedReceiver<UnixStream>| async {
            connections.recv().await.map(|stream| (Ok(stream), connections))
        };
        let listener = Listener::new(stream::unfold(connections, accept));
        let log = Logger::root(Discard, o!());
        let forwarder = Forwarder { free: Arc::new(Semaphore::new(limit)), port_deadline, log };
        tokio::spawn(forwarder.serve(listener));
        connect
    }

    fn connect(forwarder: &mpsc::UnboundedSender<UnixStream>) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        forwarder.send(theirs).unwrap();
        ours
    }

    #[tokio::test]
    async fn what_is_sent_arrives_and_each_direction_ends_by_itself() {
        let (server, port) = listen(Ipv4Addr::LOCALHOST).await;
        let forwarder = start(1, SOON);
        let mut client = connect(&forwarder);
        let data: Vec<u8> = (0..5_000_000_u32).map(|number| (number % 251) as u8).collect();

        client.write_all(&port).await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), 0);
        let (mut accepted, _) = server.accept().await.unwrap();
        let serve = async {
            let mut received = Vec::new();
            accepted.read_to_end(&mut received).await.unwrap();
            // Its own direction is still open.
            accepted.write_all(&received).await.unwrap();
            accepted.shutdown().await.unwrap();
        };
        let ask = async {
            client.write_all(&data).await.unwrap();
            client.shutdown().await.unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            answer
        };

        let ((), answer) = tokio::join!(serve, ask);
        assert!(answer == data, "{} of {} bytes came back", answer.len(), data.len());
    }

    #[tokio::test]
    async fn a_server_may_end_first() {
        let (server, port) = listen(Ipv4Addr::LOCALHOST).await;
        let forwarder = start(1, SOON);
        let mut client = connect(&forwarder);
        client.write_all(&port).await.unwrap();
        let (mut accepted, _) = server.accept().await.unwrap();

        accepted.write_all(b"bye").await.unwrap();
        accepted.shutdown().await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"\0bye");

        client.write_all(b"still heard").await.unwrap();
        client.shutdown().await.unwrap();
        let mut heard = Vec::new();
        accepted.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"still heard");
    }

    #[tokio::test]
    async fn a_server_on_ipv6_only_is_reached() {
        let Ok(probe) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await else {
            eprintln!("SKIPPED: needs ::1");
            return;
        };
        drop(probe);
        let (server, port) = listen(Ipv6Addr::LOCALHOST).await;
        let forwarder = start(1, SOON);
        let mut client = connect(&forwarder);

        client.write_all(&port).await.unwrap();

        assert_eq!(client.read_u8().await.unwrap(), 0);
        server.accept().await.unwrap();
    }

    #[tokio::test]
    async fn a_refusal_is_told_and_the_connection_ends() {
        let (server, port) = listen(Ipv4Addr::LOCALHOST).await;
        drop(server);
        let forwarder = start(1, SOON);
        let mut client = connect(&forwarder);

        client.write_all(&port).await.unwrap();

        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, [libc::ECONNREFUSED as u8]);
    }

    #[tokio::test]
    async fn a_connection_that_names_no_port_is_closed() {
        let forwarder = start(8, Duration::ZERO);
        let mut silent = connect(&forwarder);
        assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);

        let forwarder = start(8, SOON);
        let mut cut_short = connect(&forwarder);
        cut_short.write_all(&[1]).await.unwrap();
        cut_short.shutdown().await.unwrap();
        assert_eq!(cut_short.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn one_too_many_is_closed_and_the_next_is_not() {
        let (server, port) = listen(Ipv4Addr::LOCALHOST).await;
        let forwarder = start(1, SOON);
        let mut first = connect(&forwarder);
        first.write_all(&port).await.unwrap();
        assert_eq!(first.read_u8().await.unwrap(), 0);
        let (accepted, _) = server.accept().await.unwrap();

        let mut second = connect(&forwarder);
        assert_eq!(second.read(&mut [0]).await.unwrap(), 0);

        drop((first, accepted));
        // Its place is free as soon as the forwarder has noticed.
        loop {
            let mut third = connect(&forwarder);
            if third.write_all(&port).await.is_ok() && third.read_u8().await.is_ok_and(|answer| answer == 0) {
                break;
            }
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn an_error_fits_into_a_byte() {
        assert_eq!(refusal(&io::Error::from_raw_os_error(libc::ENETUNREACH)), libc::ENETUNREACH as u8);
        assert_eq!(refusal(&io::ErrorKind::TimedOut.into()), libc::ETIMEDOUT as u8);
        assert_eq!(refusal(&io::Error::from_raw_os_error(512)), libc::EIO as u8);
        assert_eq!(refusal(&io::Error::other("x")), libc::EIO as u8);
    }
}
