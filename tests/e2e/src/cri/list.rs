//! What CRI lists, and what it says of itself.

use k8s_cri::v1::{
    Container, ContainerFilter, ContainerStats, ListContainerStatsRequest, ListContainersRequest,
    ListMetricDescriptorsRequest, ListPodSandboxRequest, ListPodSandboxStatsRequest, MetricDescriptor,
    PodSandbox, PodSandboxFilter, PodSandboxStats, RuntimeFeatures, StatusRequest,
};
use tonic::Status;

use super::Pod;

impl Pod {
    /// The pods that fit a filter, this one and others.
    ///
    /// # Panics
    /// containerd does not answer.
    pub fn list_pods(&mut self, filter: PodSandboxFilter) -> Vec<PodSandbox> {
        let request = ListPodSandboxRequest { filter: Some(filter) };
        let call = self.cri.client.list_pod_sandbox(request);
        self.cri.runtime.block_on(call).expect("a list").into_inner().items
    }

    /// The containers that fit a filter, of this pod and of others.
    ///
    /// # Panics
    /// containerd does not answer.
    pub fn list_containers(&mut self, filter: ContainerFilter) -> Vec<Container> {
        let request = ListContainersRequest { filter: Some(filter) };
        let call = self.cri.client.list_containers(request);
        self.cri.runtime.block_on(call).expect("a list").into_inner().containers
    }

    /// What this containerd has that others have not. A kubelet asks it before it uses such a thing.
    ///
    /// # Panics
    /// containerd does not answer.
    pub fn features(&mut self) -> RuntimeFeatures {
        let call = self.cri.client.status(StatusRequest { verbose: false });
        self.cri.runtime.block_on(call).expect("a status").into_inner().features.unwrap_or_default()
    }

    /// What all pods use.
    ///
    /// # Panics
    /// containerd does not answer.
    pub fn list_pod_stats(&mut self) -> Vec<PodSandboxStats> {
        let call = self.cri.client.list_pod_sandbox_stats(ListPodSandboxStatsRequest::default());
        self.cri.runtime.block_on(call).expect("a list").into_inner().stats
    }

    /// What all containers use.
    ///
    /// # Panics
    /// containerd does not answer.
    pub fn list_stats(&mut self) -> Vec<ContainerStats> {
        let call = self.cri.client.list_container_stats(ListContainerStatsRequest::default());
        self.cri.runtime.block_on(call).expect("a list").into_inner().stats
    }

    /// The metrics that this containerd tells of pods and containers.
    ///
    /// # Errors
    /// containerd's answer.
    pub fn metric_descriptors(&mut self) -> Result<Vec<MetricDescriptor>, Status> {
        let call = self.cri.client.list_metric_descriptors(ListMetricDescriptorsRequest {});
        Ok(self.cri.runtime.block_on(call)?.into_inner().descriptors)
    }
}
