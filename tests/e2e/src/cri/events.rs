//! The events of CRI, as a kubelet follows them.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{ContainerEventResponse, GetEventsRequest};
use tonic::Status;
use tonic::transport::Endpoint;

use super::ENDPOINT;

/// Follows the events from soon on, in a thread of its own: containerd does not tell when it has begun.
pub fn events() -> Receiver<ContainerEventResponse> {
    let (sender, events) = channel();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        // The stream ends with containerd, or with whoever reads it.
        if let Err(status) = runtime.block_on(follow(&sender)) {
            eprintln!("the stream of events ended: {status}");
        }
    });
    events
}

async fn follow(sender: &Sender<ContainerEventResponse>) -> Result<(), Status> {
    let channel = Endpoint::from_static(ENDPOINT).connect().await.expect("containerd serves CRI");
    let mut client = RuntimeServiceClient::new(channel);
    let mut stream = client.get_container_events(GetEventsRequest {}).await?.into_inner();
    while let Some(event) = stream.message().await? {
        if sender.send(event).is_err() {
            return Ok(());
        }
    }
    Ok(())
}
