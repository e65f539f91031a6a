//! `kubectl port-forward` to servers on the guest's own loopback.
//!
//! containerd enters the pod's network namespace and dials `localhost` there, but who listens does so inside the
//! guest. So a BPF program (`lookup`) gives every TCP connection to a loopback address of the namespace to a
//! socket of the shim, whose local address still tells which port was meant. The shim asks the agent for that port
//! ([`mayu_agent_api::FORWARD_PORT`]) and copies both ways. A connection that the guest refuses, or that is cut short,
//! ends with a reset, as it would without a machine in between.

use std::future::pending;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::LinkUnspec;
use slog::{Logger, debug, warn};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::links::LOOPBACK;
use super::lookup::LoopbackLookup;
use super::namespace::{Inside, NetworkNamespace, is_one_of};
use crate::error::system;
use crate::{Error, Result};

/// The most connections of a pod at a time; more wait to be accepted.
const MAX_CONNECTIONS: usize = 256;

/// How long nothing is accepted after that has failed, for want of descriptors or memory.
const BREATHER: Duration = Duration::from_millis(100);

const NO_BPF: &str =
    "; it needs Linux 5.9 with CONFIG_BPF_SYSCALL and CONFIG_NET_SOCK_MSG, CAP_BPF and CAP_NET_ADMIN";

/// Forwarding for one pod. When it is dropped, connections end with a reset and no new ones are taken.
#[derive(Debug)]
pub struct PortForwarding {
    // In this order: first nobody is sent to the sockets any more, then they are closed.
    _lookup: LoopbackLookup,
    _accepting: AbortOnDropHandle<()>,
}

/// Where connections arrive.
struct Listening {
    lookup: LoopbackLookup,
    ipv4: std::net::TcpListener,
    ipv6: Option<std::net::TcpListener>,
}

impl PortForwarding {
    /// Starts to take the connections to the loopback addresses of `namespace`. `connect` opens a stream to the
    /// agent's [`mayu_agent_api::FORWARD_PORT`]; it and the agent's answer together may take as long as `deadline`.
    ///
    /// # Errors
    /// [`Error::Network`], also where the kernel has no such programs or does not let the shim load one. The pod can do
    /// without.
    pub async fn start<C, F>(namespace: &NetworkNamespace, connect: C, deadline: Duration) -> Result<Self>
    where
        C: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = Result<UnixStream>> + Send + 'static,
    {
        let listening = namespace.inside(|inside| async move { listen(&inside).await }).await?;
        let Listening { lookup, ipv4, ipv6 } = listening;
        let watch =
            |socket| TcpListener::from_std(socket).map_err(system("watch a socket for port forwarding"));
        let ipv6 = ipv6.map(watch).transpose()?;
        let forwarder = Forwarder { connect, deadline, most: MAX_CONNECTIONS, log: namespace.log.clone() };
        let accepting = tokio::spawn(accept(watch(ipv4)?, ipv6, Arc::new(forwarder)));
        Ok(Self { _lookup: lookup, _accepting: AbortOnDropHandle::new(accepting) })
    }
}

/// Sockets on the loopback interface, which is brought up if nobody has. Their own ports mean nothing.
async fn listen(inside: &Inside) -> Result<Listening> {
    let up = LinkUnspec::new_with_index(LOOPBACK).up().build();
    inside.netlink.link().set(up).execute().await.map_err(inside.failed("bring up", "lo"))?;
    let listen = |address: SocketAddr| {
        let socket = std::net::TcpListener::bind(address)?;
        socket.set_nonblocking(true).map(|()| socket)
    };
    let failed = |error| inside.refused("listen on", "lo", error, "");
    let ipv4 = listen((Ipv4Addr::LOCALHOST, 0).into()).map_err(failed)?;
    let ipv6 = match listen((Ipv6Addr::LOCALHOST, 0).into()) {
        Ok(socket) => Some(socket),
        // The namespace does without IPv6.
        Err(error) if is_one_of(&[Errno::EAFNOSUPPORT, Errno::EADDRNOTAVAIL], &error) => None,
        Err(error) => return Err(failed(error)),
    };
    let lookup = LoopbackLookup::attach(inside.namespace.as_fd(), &ipv4, ipv6.as_ref());
    let lookup = lookup.map_err(|(operation, errno)| inside.refused(operation, "lo", errno, NO_BPF))?;
    Ok(Listening { lookup, ipv4, ipv6 })
}

/// What a connection needs.
struct Forwarder<C> {
    connect: C,
    deadline: Duration,
    /// As many at a time.
    most: usize,
    log: Logger,
}

/// Takes connections until it is dropped, and they with it.
async fn accept<C, F>(ipv4: TcpListener, ipv6: Option<TcpListener>, forwarder: Arc<Forwarder<C>>)
where
    C: Fn() -> F + Send + Sync + 'static,
    F: Future<Output = Result<UnixStream>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        let room = connections.len() < forwarder.most;
        let accepted = tokio::select! {
            Some(_) = connections.join_next() => continue,
            accepted = ipv4.accept(), if room => accepted,
            accepted = accept_from(ipv6.as_ref()), if room => accepted,
        };
        match accepted {
            Ok((client, _)) => {
                let forwarder = forwarder.clone();
                connections.spawn(async move { forwarder.forward(client).await });
            }
            Err(error) => {
                warn!(forwarder.log, "a forwarded connection was not taken"; "error" => error.to_string());
                sleep(BREATHER).await;
            }
        }
    }
}

async fn accept_from(listener: Option<&TcpListener>) -> io::Result<(TcpStream, SocketAddr)> {
    match listener {
        Some(listener) => listener.accept().await,
        None => pending().await,
    }
}

impl<C, F> Forwarder<C>
where
    C: Fn() -> F,
    F: Future<Output = Result<UnixStream>>,
{
    async fn forward(&self, mut client: TcpStream) {
        // Until both directions have ended in peace, closing it is a reset.
        let port = match client.set_zero_linger().and_then(|()| client.local_addr()) {
            Ok(address) => address.port(),
            Err(error) => {
                return debug!(self.log, "a forwarded connection is gone"; "error" => error.to_string());
            }
        };
        let failed = |error: String| {
            debug!(self.log, "a connection was not forwarded"; "port" => port, "error" => error);
        };
        let mut guest = match timeout(self.deadline, self.dial(port)).await {
            Ok(Ok(guest)) => guest,
            Ok(Err(error)) => return failed(error.to_string()),
            Err(_) => return failed(format!("no answer within {} s", self.deadline.as_secs_f32())),
        };
        if let Err(error) = copy_bidirectional(&mut client, &mut guest).await {
            return failed(error.to_string());
        }
        let off = libc::linger { l_onoff: 0, l_linger: 0 };
        if let Err(errno) = setsockopt(&client, sockopt::Linger, &off) {
            failed(errno.to_string());
        }
    }

    /// A connection to the port inside the guest.
    async fn dial(&self, port: u16) -> Result<UnixStream> {
        let mut guest = (self.connect)().await?;
        guest.write_u16(port).await.map_err(system("name a port to the agent"))?;
        match guest.read_u8().await.map_err(system("read the agent's answer to a port"))? {
            0 => Ok(guest),
            errno => {
                let source = Errno::from_raw(errno.into()).into();
                Err(Error::System { operation: "connect inside the guest", source })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use slog::o;
    use tokio::sync::mpsc;

    use super::super::testing::TestNamespace;
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// Streams that reach an agent which the test plays.
    fn agent() -> (impl Fn() -> std::future::Ready<Result<UnixStream>>, mpsc::UnboundedReceiver<UnixStream>) {
        let (sender, agent) = mpsc::unbounded_channel();
        let connect = move || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            sender.send(theirs).unwrap();
            std::future::ready(Ok(ours))
        };
        (connect, agent)
    }

    /// None where the test may not load BPF programs.
    async fn forward<C, F>(pod: &TestNamespace, connect: C, deadline: Duration) -> Option<PortForwarding>
    where
        C: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = Result<UnixStream>> + Send + 'static,
    {
        match PortForwarding::start(&pod.namespace, connect, deadline).await {
            Err(Error::Network { source, .. }) if source.kind() == ErrorKind::PermissionDenied => {
                eprintln!("SKIPPED: needs CAP_BPF: {source}");
                None
            }
            started => Some(started.unwrap()),
        }
    }

    async fn dial(pod: &TestNamespace, address: &str) -> io::Result<TcpStream> {
        let address: SocketAddr = address.parse().unwrap();
        let client = pod.inside(move |_| async move { Ok(std::net::TcpStream::connect(address)) }).await?;
        client.set_nonblocking(true)?;
        TcpStream::from_std(client)
    }

    async fn text(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<String> {
        let mut text = String::new();
        stream.read_to_string(&mut text).await.map(|_| text)
    }

    #[tokio::test]
    async fn every_port_of_every_loopback_address_leads_into_the_guest() {
        let Some(pod) = TestNamespace::new() else { return };
        let (connect, mut agent) = agent();
        let Some(_forwarding) = forward(&pod, connect, LONG).await else { return };
        for address in ["127.0.0.1:80", "127.1.2.3:65535", "[::1]:8080", "127.0.0.1:1"] {
            let mut client = dial(&pod, address).await.unwrap();
            let mut guest = agent.recv().await.unwrap();
            let port = address.parse::<SocketAddr>().unwrap().port();
            assert_eq!(guest.read_u16().await.unwrap(), port);
            guest.write_u8(0).await.unwrap();

            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            assert_eq!(text(&mut guest).await.unwrap(), "question");
            guest.write_all(b"answer").await.unwrap();
            drop(guest);
            assert_eq!(text(&mut client).await.unwrap(), "answer");
        }
    }

    #[tokio::test]
    async fn only_loopback_is_forwarded() {
        let Some(pod) = TestNamespace::new() else { return };
        let (connect, mut agent) = agent();
        let Some(_forwarding) = forward(&pod, connect, LONG).await else { return };
        pod.add_address("lo", "10.1.2.3", 32).await;
        pod.add_address("lo", "fd00::1", 128).await;
        for address in ["10.1.2.3:80", "[fd00::1]:80"] {
            let refused = async {
                loop {
                    match dial(&pod, address).await.unwrap_err().kind() {
                        // The kernel makes the route to a new IPv6 address a little later.
                        ErrorKind::NetworkUnreachable => tokio::task::yield_now().await,
                        kind => break kind,
                    }
                }
            };
            assert_eq!(timeout(LONG, refused).await.unwrap(), ErrorKind::ConnectionRefused, "{address}");
        }
        assert!(agent.try_recv().is_err());
    }

    #[tokio::test]
    async fn what_the_guest_refuses_is_reset() {
        let Some(pod) = TestNamespace::new() else { return };
        let (connect, mut agent) = agent();
        let Some(_forwarding) = forward(&pod, connect, LONG).await else { return };
        let mut client = dial(&pod, "127.0.0.1:80").await.unwrap();
        let mut guest = agent.recv().await.unwrap();
        guest.write_u8(Errno::ECONNREFUSED as u8).await.unwrap();
        assert_eq!(text(&mut client).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn an_agent_that_does_not_answer_in_time_is_given_up() {
        let Some(pod) = TestNamespace::new() else { return };
        let (connect, mut agent) = agent();
        let Some(_forwarding) = forward(&pod, connect, Duration::from_millis(50)).await else { return };
        let mut client = dial(&pod, "[::1]:80").await.unwrap();
        let _guest = agent.recv().await.unwrap();
        assert_eq!(text(&mut client).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn the_end_of_forwarding_ends_its_connections_and_takes_no_more() {
        let Some(pod) = TestNamespace::new() else { return };
        let (connect, mut agent) = agent();
        let Some(forwarding) = forward(&pod, connect, LONG).await else { return };
        let mut client = dial(&pod, "127.0.0.1:80").await.unwrap();
        let mut guest = agent.recv().await.unwrap();
        guest.read_u16().await.unwrap();
        guest.write_u8(0).await.unwrap();
        guest.write_all(b"x").await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), b'x');

        drop(forwarding);

        assert_eq!(text(&mut client).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(text(&mut guest).await.unwrap(), "");
        assert_eq!(dial(&pod, "127.0.0.1:80").await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }

    /// Forwards connections to a listener of the test's own namespace, `most` at a time.
    async fn listener(
        most: usize,
    ) -> (SocketAddr, mpsc::UnboundedReceiver<UnixStream>, AbortOnDropHandle<()>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (connect, agent) = agent();
        let log = Logger::root(slog::Discard, o!());
        let forwarder = Forwarder { connect, deadline: LONG, most, log };
        (address, agent, AbortOnDropHandle::new(tokio::spawn(accept(listener, None, Arc::new(forwarder)))))
    }

    #[tokio::test]
    async fn more_connections_than_allowed_wait_for_their_turn() {
        let (address, mut agent, _accepting) = listener(2).await;
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(TcpStream::connect(address).await.unwrap());
        }
        let mut guests = [agent.recv().await.unwrap(), agent.recv().await.unwrap()];
        for guest in &mut guests {
            assert_eq!(guest.read_u16().await.unwrap(), address.port());
            guest.write_u8(0).await.unwrap();
            guest.write_u8(7).await.unwrap();
        }
        for client in &mut clients[..2] {
            assert_eq!(client.read_u8().await.unwrap(), 7);
        }
        assert!(agent.try_recv().is_err());

        drop(guests);
        drop(clients.remove(0));

        assert_eq!(agent.recv().await.unwrap().read_u16().await.unwrap(), address.port());
    }

    #[tokio::test]
    async fn what_was_sent_before_the_end_arrives_after_it() {
        let (address, mut agent, _accepting) = listener(1).await;
        let mut client = TcpStream::connect(address).await.unwrap();
        client.shutdown().await.unwrap();
        let mut guest = agent.recv().await.unwrap();
        assert_eq!(guest.read_u16().await.unwrap(), address.port());
        guest.write_u8(0).await.unwrap();
        assert_eq!(text(&mut guest).await.unwrap(), "");
        let answer = "x".repeat(300_000);
        guest.write_all(answer.as_bytes()).await.unwrap();
        drop(guest);

        // The next has its turn when the first is closed.
        let _next = TcpStream::connect(address).await.unwrap();
        agent.recv().await.unwrap();

        assert!(text(&mut client).await.unwrap() == answer);
    }
}
