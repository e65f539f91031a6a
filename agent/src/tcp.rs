//! Who listens on TCP ports of the guest, and which of its connections lead out of it.

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockaddrStorage;
use procfs::ProcError;
use procfs::net::{TcpNetEntry, TcpState};

use crate::error::{Error, Result};

/// A socket of the guest.
#[derive(Debug)]
pub struct Socket {
    local: SocketAddr,
    remote: SocketAddr,
    state: TcpState,
}

/// Whether somebody listens on `port`, at whatever address.
///
/// # Errors
///
/// `Sockets` where the kernel's table cannot be read.
pub fn listens(port: u16) -> Result<bool> {
    Ok(sockets()?.iter().any(|socket| socket.listens_on(port)))
}

/// The socket of a connection with another host, if there is one.
///
/// # Errors
///
/// `Sockets` where the kernel's table cannot be read.
pub fn foreign_connection() -> Result<Option<Socket>> {
    Ok(sockets()?.into_iter().find(Socket::leads_out))
}

/// The socket of a connection of which no interface has the address any more, if there is one: the guest has become another one since. The
/// kernel accepts connections for whoever listens, so one may have come at the last moment before the machine was saved.
///
/// # Errors
///
/// `Sockets` where the kernel's table cannot be read, `System` where it does not tell the addresses.
pub fn stale_connection() -> Result<Option<Socket>> {
    let addresses = getifaddrs().map_err(Error::system("list the guest's addresses"))?;
    let own: HashSet<IpAddr> = addresses.filter_map(|interface| ip(&interface.address?)).collect();
    Ok(sockets()?.into_iter().find(|socket| socket.is_stale(&own)))
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|address| address.ip().into());
    v4.or_else(|| address.as_sockaddr_in6().map(|address| address.ip().into()))
}

fn sockets() -> Result<Vec<Socket>> {
    let of_ipv6 = match procfs::net::tcp6() {
        // A kernel without IPv6 has no such file.
        Err(ProcError::NotFound(_)) => Ok(Vec::new()),
        entries => entries,
    };
    let entries =
        procfs::net::tcp().map_err(Error::Sockets)?.into_iter().chain(of_ipv6.map_err(Error::Sockets)?);
    Ok(entries.map(Socket::from).collect())
}

impl Socket {
    fn new(local: SocketAddr, remote: SocketAddr, state: TcpState) -> Self {
        // A socket of IPv6 has connections of IPv4 as well.
        let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        Self { local: plain(local), remote: plain(remote), state }
    }

    fn listens_on(&self, port: u16) -> bool {
        self.state == TcpState::Listen && self.local.port() == port
    }

    /// A connection of the guest with itself has two ends that are both here, by a loopback address or by one of the guest's own. What
    /// is in TIME_WAIT belongs to no process any more.
    fn leads_out(&self) -> bool {
        let open = !matches!(self.state, TcpState::Listen | TcpState::TimeWait | TcpState::Close);
        let [local, remote] = [self.local.ip(), self.remote.ip()];
        open && !local.is_loopback() && !remote.is_loopback() && local != remote
    }

    /// A connection with another host that was made when the guest had another address than its `own` ones.
    fn is_stale(&self, own: &HashSet<IpAddr>) -> bool {
        self.leads_out() && !own.contains(&self.local.ip())
    }
}

impl From<TcpNetEntry> for Socket {
    fn from(entry: TcpNetEntry) -> Self {
        Self::new(entry.local_address, entry.remote_address, entry.state)
    }
}

impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.local, self.remote)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, TcpListener, TcpStream};

    use super::*;

    fn socket(local: &str, remote: &str, state: TcpState) -> Socket {
        Socket::new(local.parse().unwrap(), remote.parse().unwrap(), state)
    }

    #[test]
    fn a_listener_is_found_by_its_port_alone() {
        for address in ["0.0.0.0:80", "127.0.0.1:80", "[::]:80", "[::1]:80", "10.0.0.2:80"] {
            let listener = socket(address, "0.0.0.0:0", TcpState::Listen);
            assert!(listener.listens_on(80), "{address}");
            assert!(!listener.listens_on(8080), "{address}");
        }
        assert!(!socket("10.0.0.2:80", "10.0.0.9:5000", TcpState::Established).listens_on(80));
    }

    #[test]
    fn a_connection_with_another_host_leads_out_until_it_is_over() {
        let at = |state| socket("10.0.0.2:80", "10.0.0.9:5000", state).leads_out();
        for state in [
            TcpState::Established,
            TcpState::SynSent,
            TcpState::SynRecv,
            TcpState::NewSynRecv,
            TcpState::FinWait1,
            TcpState::FinWait2,
            TcpState::CloseWait,
            TcpState::LastAck,
            TcpState::Closing,
        ] {
            let text = format!("{state:?}");
            assert!(at(state), "{text}");
        }
        for state in [TcpState::Listen, TcpState::TimeWait, TcpState::Close] {
            let text = format!("{state:?}");
            assert!(!at(state), "{text}");
        }
    }

    #[test]
    fn a_connection_of_the_guest_with_itself_does_not_lead_out() {
        for (local, remote) in [
            ("127.0.0.1:80", "127.0.0.1:5000"),
            ("127.0.0.1:80", "127.3.0.1:5000"),
            ("127.0.0.1:80", "10.0.0.2:5000"),
            ("[::1]:80", "[::1]:5000"),
            ("[::ffff:127.0.0.1]:80", "[::ffff:127.0.0.1]:5000"),
            ("10.0.0.2:80", "10.0.0.2:5000"),
            ("[::ffff:10.0.0.2]:80", "10.0.0.2:5000"),
        ] {
            assert!(!socket(local, remote, TcpState::Established).leads_out(), "{local} {remote}");
        }
        for (local, remote) in
            [("10.0.0.2:80", "10.0.0.3:80"), ("[::ffff:10.0.0.2]:80", "[::ffff:10.0.0.3]:80")]
        {
            assert!(socket(local, remote, TcpState::Established).leads_out(), "{local} {remote}");
        }
    }

    #[test]
    fn a_connection_is_stale_where_its_address_is_not_the_guests_any_more() {
        let own = ["127.0.0.1", "10.0.0.7"].map(|address| address.parse().unwrap()).into();
        let stale = |local, state| socket(local, "10.0.0.9:5000", state).is_stale(&own);
        for (local, expected) in
            [("10.0.0.2:80", true), ("[::ffff:10.0.0.2]:80", true), ("10.0.0.7:80", false)]
        {
            assert_eq!(stale(local, TcpState::Established), expected, "{local}");
        }
        assert!(!stale("10.0.0.2:80", TcpState::TimeWait));
    }

    #[test]
    fn a_connection_is_told_by_its_addresses() {
        let entry = socket("[::ffff:10.0.0.2]:80", "[::ffff:10.0.0.9]:5000", TcpState::Established);

        assert_eq!(entry.to_string(), "10.0.0.2:80 to 10.0.0.9:5000");
    }

    #[test]
    fn the_kernels_table_is_read() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let _connection = TcpStream::connect(listener.local_addr().unwrap()).unwrap();

        assert!(listens(port).unwrap());
        drop(listener);
        assert!(!listens(port).unwrap());
        if let Ok(listener) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) {
            assert!(listens(listener.local_addr().unwrap().port()).unwrap());
        }
    }
}
