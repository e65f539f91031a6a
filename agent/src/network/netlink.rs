//! What is asked of the kernel over rtnetlink(7).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteMetric};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};
use tokio::task::JoinHandle;

use super::plan::{HardwareAddress, Neighbour, Prefix, Route};

/// A connection to the kernel's network configuration, of the calling thread's network namespace.
pub struct Netlink {
    handle: Handle,
    connection: JoinHandle<()>,
}

/// An interface as the kernel knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number, which is its own for as long as it lives.
    pub index: u32,
    /// Its present name.
    pub name: String,
    /// Whether it is up.
    pub up: bool,
    /// The hardware address that its device came with (`IFLA_PERM_ADDRESS`).
    pub permanent_address: Option<HardwareAddress>,
    /// The bus of its device, and the device's name there.
    pub device: Option<(String, String)>,
}

impl Netlink {
    /// Connects, in the current runtime.
    ///
    /// # Errors
    ///
    /// Where there is no such socket to be had.
    pub fn connect() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    /// All interfaces.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub async fn links(&self) -> io::Result<Vec<Link>> {
        let links = self.handle.link().get().execute();
        links.map_ok(link).try_collect().await.map_err(io_error)
    }

    /// Changes one interface.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub async fn change_link(
        &self,
        index: u32,
        change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> io::Result<()> {
        let message = change(LinkUnspec::new_with_index(index)).build();
        self.handle.link().change(message).execute().await.map_err(io_error)
    }

    /// The addresses of all interfaces.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub async fn addresses(&self) -> io::Result<Vec<AddressMessage>> {
        self.handle.address().get().execute().try_collect().await.map_err(io_error)
    }

    /// Removes an address. Those of its network that the kernel counts as secondary go with it.
    ///
    /// # Errors
    ///
    /// What the kernel said, except that it was gone.
    pub async fn remove_address(&self, address: AddressMessage) -> io::Result<()> {
        let removed = self.handle.address().del(address).execute().await.map_err(io_error);
        unless(libc::EADDRNOTAVAIL, removed)
    }

    /// Gives an interface an address that works at once, and no routes for it but those of the local table.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub async fn add_address(&self, index: u32, prefix: Prefix) -> io::Result<()> {
        let mut flags = AddressFlags::Noprefixroute;
        // Nobody else on the link has it: it was the host's interface's, which has looked for duplicates.
        flags.set(AddressFlags::Nodad, prefix.ip.is_ipv6());
        let mut request = self.handle.address().add(index, prefix.ip, prefix.length);
        request.message_mut().attributes.push(AddressAttribute::Flags(flags));
        request.execute().await.map_err(io_error)
    }

    /// The routes of both families and all tables.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub async fn routes(&self) -> io::Result<Vec<RouteMessage>> {
        let mut routes = Vec::new();
        for family in
            [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
        {
            let found = self.handle.route().get(family).execute();
            routes.extend(found.try_collect::<Vec<_>>().await.map_err(io_error)?);
        }
        Ok(routes)
    }

    /// Removes a route.
    ///
    /// # Errors
    ///
    /// What the kernel said, except that it was gone.
    pub async fn remove_route(&self, route: RouteMessage) -> io::Result<()> {
        unless(libc::ESRCH, self.handle.route().del(route).execute().await.map_err(io_error))
    }

    /// Adds a route through the interface of this number.
    ///
    /// # Errors
    ///
    /// What the kernel said, except that there is the same one.
    pub async fn add_route(&self, index: Option<u32>, route: &Route) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewRoute(route_message(index, route)?);
        let mut request = NetlinkMessage::from(message);
        // With NLM_F_APPEND it is an error (EEXIST) only where all is the same; with NLM_F_EXCL, which rtnetlink's own request
        // has, another next hop of the same destination is one as well.
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
        let mut answers = self.handle.clone().request(request).map_err(io_error)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload {
                return unless(libc::EEXIST, Err(error.to_io()));
            }
        }
        Ok(())
    }

    /// Adds a neighbour that stays, or changes it to this.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub async fn add_neighbour(&self, index: u32, neighbour: &Neighbour) -> io::Result<()> {
        self.handle
            .neighbours()
            .add(index, neighbour.ip)
            .state(NeighbourState::Permanent)
            .link_layer_address(&neighbour.hardware_address.0)
            .replace()
            .execute()
            .await
            .map_err(io_error)
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        up: message.header.flags.contains(LinkFlags::Up),
        permanent_address: None,
        device: None,
    };
    let (mut bus, mut device) = (None, None);
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::PermAddress(bytes) => link.permanent_address = HardwareAddress::read(&bytes),
            LinkAttribute::ParentDevBusName(name) => bus = Some(name),
            LinkAttribute::ParentDevName(name) => device = Some(name),
            _ => {}
        }
    }
    link.device = bus.zip(device);
    link
}

fn route_message(index: Option<u32>, route: &Route) -> io::Result<RouteMessage> {
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(route.destination.ip, route.destination.length)
        .map_err(io::Error::other)?
        .table_id(route.table)
        .kind(route.kind.into())
        .scope(route.scope.into())
        .protocol(route.protocol.into());
    if let Some(index) = index {
        builder = builder.output_interface(index);
    }
    if let Some(gateway) = route.gateway {
        builder = builder.gateway(gateway).map_err(io::Error::other)?;
    }
    if let Some(source) = route.preferred_source {
        builder = builder.pref_source(source).map_err(io::Error::other)?;
    }
    if route.on_link {
        builder = builder.onlink();
    }
    let mut message = builder.build();
    if route.metric != 0 {
        message.attributes.push(RouteAttribute::Priority(route.metric));
    }
    if route.mtu != 0 {
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    Ok(message)
}

fn unless(errno: i32, result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(errno) => Ok(()),
        result => result,
    }
}

fn io_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(error) => error.to_io(),
        other => io::Error::other(other.to_string()),
    }
}
