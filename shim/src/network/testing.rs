//! Network namespaces and what a CNI plugin would make in them.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth};
use slog::{Logger, o};

use super::links::HardwareAddress;
use super::namespace::{Inside, NetworkNamespace, io_error};
use super::tap;
use crate::Result;

pub(super) const ETH0: HardwareAddress = [0x0a, 0, 0, 0, 0, 1];

/// Milliseconds after which something that was to arrive has not.
const PATIENCE: u16 = 20_000;

/// A network namespace with nothing in it but lo, which is down.
pub(super) struct TestNamespace {
    pub namespace: NetworkNamespace,
    file: File,
}

impl TestNamespace {
    /// None without the privilege, which the test then says.
    pub fn new() -> Option<Self> {
        Self::with_log(&Logger::root(slog::Discard, o!()))
    }

    pub fn with_log(log: &Logger) -> Option<Self> {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).map(|()| File::open("/proc/thread-self/ns/net").unwrap())
        });
        let Ok(file) = made.join().unwrap() else {
            eprintln!("SKIPPED: needs root: network namespaces");
            return None;
        };
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let namespace = NetworkNamespace::open(&path, log).unwrap();
        Some(Self { namespace, file })
    }

    pub async fn inside<T, W, F>(&self, work: W) -> T
    where
        T: Send + 'static,
        W: FnOnce(Inside) -> F + Send + 'static,
        F: Future<Output = Result<T>>,
    {
        self.namespace.inside(work).await.unwrap()
    }

    /// Makes an interface; false where the kernel has none of its kind.
    pub async fn add_link(&self, message: LinkMessage) -> bool {
        self.inside(|inside| async move {
            match inside.netlink.link().add(message).execute().await {
                Ok(()) => Ok(true),
                Err(error) => {
                    let error = io_error(error);
                    eprintln!("no such interface: {error}");
                    Ok(false)
                }
            }
        })
        .await
    }

    /// A veth pair that is up, one end here, without IPv6 addresses of the kernel's, and one in `other`.
    pub async fn veth(&self, name: &'static str, address: HardwareAddress, other: &Self, peer: &str) {
        assert!(self.add_link(LinkVeth::new(name, peer).address(address.into()).build()).await);
        let index = self.index(name).await;
        self.inside(move |inside| async move { tap::keep_quiet(&inside, index, name).await }).await;
        self.set_link(LinkUnspec::new_with_index(index).up()).await;
        self.give(peer, other).await;
    }

    /// Moves an interface to `other`, where it is brought up.
    pub async fn give(&self, name: &str, other: &Self) {
        self.set_link(LinkUnspec::new_with_name(name).setns_by_fd(other.file.as_raw_fd())).await;
        other.set_link(LinkUnspec::new_with_name(name).up()).await;
    }

    pub async fn set_link(&self, link: LinkMessageBuilder<LinkUnspec>) {
        let message = link.build();
        self.inside(|inside| async move {
            inside.netlink.link().set(message).execute().await.map_err(inside.failed("set", "link"))
        })
        .await;
    }

    pub async fn link(&self, name: &'static str) -> Option<LinkMessage> {
        let links = self.inside(|inside| async move {
            let dump = inside.netlink.link().get().execute();
            inside.dump("links", 100, dump, Some).await
        });
        let named = |attribute: &LinkAttribute| *attribute == LinkAttribute::IfName(name.into());
        links.await.into_iter().find(|message| message.attributes.iter().any(named))
    }

    pub async fn index(&self, name: &'static str) -> u32 {
        self.link(name).await.unwrap().header.index
    }

    /// Gives an interface an address that is usable at once.
    pub async fn add_address(&self, name: &'static str, ip: &str, length: u8) {
        self.add_address_with(name, ip, length, AddressAttribute::Flags(AddressFlags::Nodad)).await;
    }

    pub async fn add_address_with(
        &self,
        name: &'static str,
        ip: &str,
        length: u8,
        attribute: AddressAttribute,
    ) {
        let (index, ip) = (self.index(name).await, ip.parse().unwrap());
        self.inside(move |inside| async move {
            let mut request = inside.netlink.address().add(index, ip, length);
            request.message_mut().attributes.push(attribute);
            request.execute().await.map_err(inside.failed("add", "address"))
        })
        .await;
    }

    pub async fn add_route(&self, message: RouteMessage) {
        self.inside(|inside| async move {
            inside.netlink.route().add(message).execute().await.map_err(inside.failed("add", "route"))
        })
        .await;
    }

    pub async fn add_neighbour(&self, name: &'static str, ip: &str, address: HardwareAddress) {
        let (index, ip) = (self.index(name).await, ip.parse().unwrap());
        self.inside(move |inside| async move {
            let request = inside.netlink.neighbours().add(index, ip).link_layer_address(&address).replace();
            request.execute().await.map_err(inside.failed("add", "neighbour"))
        })
        .await;
    }
}

/// Whether `descriptor` has something to read before the test's patience ends.
pub(super) fn readable(descriptor: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::from(PATIENCE)) == Ok(1)
}
