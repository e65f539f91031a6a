//! The way of a pod's network into its VM.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mayu_agent_api::FORWARD_PORT;
use mayu_agent_api::sandbox::ConfigureNetworkRequest;
use mayu_vmm_api::{Request, VmmClient};
use slog::{Logger, debug, warn};

use super::connect;
use crate::agent::Agent;
use crate::network::{self, NetworkNamespace, PortForwarding};
use crate::pod_spec::PodSpec;
use crate::{Error, Result};

/// What CNI has made for the pod before there was a VM.
#[derive(Debug)]
pub(super) struct Given {
    namespace: NetworkNamespace,
    network: network::Network,
    log: Logger,
}

/// The network of a running VM.
#[derive(Debug)]
pub(super) enum Network {
    /// The pod was given no namespace. The VMM's own becomes the pod's if somebody sets it up before the first start.
    Unknown,
    /// The guest has what is in the namespace.
    Wired {
        network: network::Network,
        /// Held, so that it outlives its path.
        _namespace: NetworkNamespace,
        /// None where the host cannot do it.
        _forwarding: Option<PortForwarding>,
    },
    /// The VM is gone.
    Gone,
}

impl Given {
    /// Reads what is in the pod's network namespace, if it was given one.
    ///
    /// # Errors
    /// As [`NetworkNamespace::open`] and [`NetworkNamespace::network`].
    pub(super) async fn find(spec: &PodSpec, log: &Logger) -> Result<Option<Self>> {
        let Some(path) = &spec.network else { return Ok(None) };
        let namespace = NetworkNamespace::open(path, log)?;
        let network = namespace.network().await?;
        Ok(Some(Self { namespace, network, log: log.clone() }))
    }

    /// How many network slots the machine needs.
    pub(super) fn interfaces(&self) -> usize {
        self.network.interfaces()
    }

    /// Connects the machine to the namespace.
    ///
    /// # Errors
    /// As [`attach`].
    pub(super) async fn wire(self, client: &Arc<VmmClient>, deadline: Duration) -> Result<Network> {
        let Self { namespace, network, log } = self;
        attach(&namespace, &network, client).await?;
        let vmm = client.clone();
        let dial = move || {
            let vmm = vmm.clone();
            async move { connect(&vmm, FORWARD_PORT).await }
        };
        let forwarding = match PortForwarding::start(&namespace, dial, deadline).await {
            Ok(forwarding) => Some(forwarding),
            Err(error) => {
                warn!(log, "ports of the pod's loopback are not forwarded"; "error" => error.to_string());
                None
            }
        };
        Ok(Network::Wired { network, _namespace: namespace, _forwarding: forwarding })
    }
}

impl Network {
    /// Looks into the VMM's own namespace, and connects the machine to what is there.
    ///
    /// # Errors
    /// [`Error::Machine`] for more interfaces than the machine has slots, or as [`Given::wire`].
    pub(super) async fn adopt(vmm: u32, client: &VmmClient, agent: &Agent, log: &Logger) -> Result<Self> {
        let namespace = NetworkNamespace::open(Path::new(&format!("/proc/{vmm}/ns/net")), log)?;
        let network = namespace.network().await?;
        if network.interfaces() > 1 {
            return Err(Error::Machine(format!(
                "{} network interfaces were made after the VM, which has a slot for one",
                network.interfaces()
            )));
        }
        if !network.is_empty() {
            debug!(log, "the VM gets the network that was made after it");
            attach(&namespace, &network, client).await?;
            agent.configure_network(network.request()).await?;
        }
        Ok(Self::Wired { network, _namespace: namespace, _forwarding: None })
    }

    /// What the agent is told.
    pub(super) fn request(&self) -> ConfigureNetworkRequest {
        match self {
            Self::Wired { network, .. } => network.request(),
            Self::Unknown | Self::Gone => ConfigureNetworkRequest::default(),
        }
    }
}

/// Makes a TAP device for each interface and puts it into the slot of the same number.
async fn attach(namespace: &NetworkNamespace, network: &network::Network, client: &VmmClient) -> Result<()> {
    for (slot, tap) in (0..).zip(namespace.connect(network).await?) {
        client.request(Request::AttachNet { slot }, &[tap.as_fd()]).await?;
    }
    Ok(())
}
