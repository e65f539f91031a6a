//! containerd's events: published in order, kept while containerd is away.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim::event::Event;
use containerd_shim::util::convert_to_any;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::MessageField;
use slog::{Logger, debug, warn};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use ttrpc::context::Context;

/// Events that are kept while containerd is away. An event is some hundred bytes.
const CAPACITY: usize = 4096;

/// How long containerd has for taking one event.
const DEADLINE: Duration = Duration::from_secs(10);

/// The pause before the first retry; it doubles up to [`MAX_PAUSE`].
const MIN_PAUSE: Duration = Duration::from_millis(50);

/// The longest pause before a retry.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// The way to containerd's event service. One at a time and in order: an event is repeated until containerd has taken
/// it, so one whose answer was lost with the connection may arrive twice.
#[derive(Clone, Debug)]
pub struct Events {
    namespace: String,
    queue: Arc<Queue>,
}

#[derive(Debug)]
struct Queue {
    /// The front one is being sent.
    waiting: Mutex<VecDeque<Envelope>>,
    changed: Notify,
    log: Logger,
}

impl Events {
    /// Publishes to containerd at `address`, its ttrpc socket. Must be called inside a tokio runtime.
    pub fn new(address: &str, namespace: &str, log: Logger) -> Self {
        let queue = Arc::new(Queue { waiting: Mutex::default(), changed: Notify::new(), log });
        let path = address.strip_prefix("unix://").unwrap_or(address);
        tokio::spawn(send_all(queue.clone(), format!("unix://{path}")));
        Self { namespace: namespace.into(), queue }
    }

    /// Puts an event in line. When more wait than may, the oldest is lost.
    pub fn publish(&self, event: impl Event) {
        let topic = event.topic();
        let event = match convert_to_any(Box::new(event)) {
            Ok(event) => event,
            Err(error) => {
                warn!(self.queue.log, "event cannot be encoded"; "topic" => topic, "error" => error.to_string());
                return;
            }
        };
        let envelope = Envelope {
            timestamp: MessageField::some(SystemTime::now().into()),
            namespace: self.namespace.clone(),
            topic,
            event: MessageField::some(event),
            ..Default::default()
        };
        self.queue.push(envelope);
    }

    /// Waits until everything is sent, for at most `deadline`.
    pub async fn flush(&self, deadline: Duration) {
        let empty = async {
            loop {
                let changed = self.queue.changed.notified();
                if self.queue.front().is_none() {
                    break;
                }
                changed.await;
            }
        };
        if timeout(deadline, empty).await.is_err() {
            warn!(self.queue.log, "events are lost: containerd does not take them");
        }
    }
}

impl Queue {
    fn push(&self, envelope: Envelope) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() == CAPACITY {
            waiting.pop_front();
            warn!(self.log, "the oldest event is lost: containerd is away for too long");
        }
        waiting.push_back(envelope);
        self.changed.notify_waiters();
    }

    fn front(&self) -> Option<Envelope> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).front().cloned()
    }

    fn pop(&self) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        self.changed.notify_waiters();
    }
}

async fn send_all(queue: Arc<Queue>, address: String) {
    let mut client = None;
    let mut pause = MIN_PAUSE;
    loop {
        let changed = queue.changed.notified();
        let Some(envelope) = queue.front() else {
            changed.await;
            continue;
        };
        let topic = envelope.topic.clone();
        match send(&mut client, &address, envelope).await {
            Ok(()) => debug!(queue.log, "event published"; "topic" => topic),
            Err(ttrpc::Error::RpcStatus(status)) => {
                // containerd has seen it and does not want it; it would not want it later either.
                warn!(queue.log, "event refused"; "topic" => topic, "reason" => status.message);
            }
            Err(error) => {
                debug!(queue.log, "event delayed"; "topic" => topic, "reason" => error.to_string());
                client = None;
                sleep(pause).await;
                pause = (pause * 2).min(MAX_PAUSE);
                continue;
            }
        }
        pause = MIN_PAUSE;
        queue.pop();
    }
}

async fn send(client: &mut Option<EventsClient>, address: &str, envelope: Envelope) -> ttrpc::Result<()> {
    let client = match client {
        Some(client) => client,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
    match timeout(DEADLINE, client.forward(Context::default(), &request)).await {
        Ok(answer) => answer.map(drop),
        Err(_) => Err(ttrpc::Error::Others("containerd does not answer".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::events::task::{TaskExit, TaskStart};
    use containerd_shim_protos::shim_async::{self, create_events};
    use protobuf::Message;
    use tokio::sync::mpsc;
    use ttrpc::r#async::{Server, TtrpcContext};

    struct Containerd(mpsc::UnboundedSender<Envelope>);

    #[async_trait]
    impl shim_async::Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let envelope = request.envelope.unwrap();
            if envelope.topic == "/tasks/oom" {
                let status = ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, "no");
                return Err(ttrpc::Error::RpcStatus(status));
            }
            self.0.send(envelope).unwrap();
            Ok(Empty::new())
        }
    }

    async fn containerd(address: &str) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut server = Server::new()
            .bind(address)
            .unwrap()
            .register_service(create_events(Arc::new(Containerd(sender))));
        server.start().await.unwrap();
        (server, receiver)
    }

    fn start(pid: u32) -> TaskStart {
        TaskStart { container_id: "c".into(), pid, ..Default::default() }
    }

    fn log() -> Logger {
        Logger::root(slog::Discard, slog::o!())
    }

    #[tokio::test]
    async fn events_keep_their_order_topic_and_namespace() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ttrpc").display().to_string();
        let (_server, mut received) = containerd(&format!("unix://{path}")).await;
        let events = Events::new(&path, "ns", log());
        events.publish(start(1));
        events.publish(TaskExit { container_id: "c".into(), exit_status: 7, ..Default::default() });

        let first = received.recv().await.unwrap();
        assert_eq!((first.topic.as_str(), first.namespace.as_str()), ("/tasks/start", "ns"));
        let second = received.recv().await.unwrap();
        assert_eq!(second.topic, "/tasks/exit");
        let event = second.event.unwrap();
        assert_eq!(event.type_url, "containerd.events.TaskExit");
        assert_eq!(TaskExit::parse_from_bytes(&event.value).unwrap().exit_status, 7);
    }

    #[tokio::test]
    async fn what_happens_while_containerd_is_away_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let address = format!("unix://{}", folder.path().join("ttrpc").display());
        let events = Events::new(&address, "ns", log());
        for pid in 0..10 {
            events.publish(start(pid));
        }
        tokio::task::yield_now().await;
        let (_server, mut received) = containerd(&address).await;
        for pid in 0..10 {
            let event = received.recv().await.unwrap().event.unwrap();
            assert_eq!(TaskStart::parse_from_bytes(&event.value).unwrap().pid, pid);
        }
        events.flush(Duration::from_secs(10)).await;
    }

    #[tokio::test]
    async fn a_refused_event_does_not_hold_up_the_next() {
        use containerd_shim_protos::events::task::TaskOOM;
        let folder = tempfile::tempdir().unwrap();
        let address = format!("unix://{}", folder.path().join("ttrpc").display());
        let (_server, mut received) = containerd(&address).await;
        let events = Events::new(&address, "ns", log());
        events.publish(TaskOOM::default());
        events.publish(start(1));
        assert_eq!(received.recv().await.unwrap().topic, "/tasks/start");
    }

    #[tokio::test]
    async fn an_absence_without_end_costs_bounded_memory() {
        let events = Events::new("/nonexistent/ttrpc", "ns", log());
        for pid in 0..CAPACITY as u32 + 5 {
            events.publish(start(pid));
        }
        assert_eq!(events.queue.waiting.lock().unwrap().len(), CAPACITY);
        let oldest = events.queue.front().unwrap().event.unwrap();
        assert_eq!(TaskStart::parse_from_bytes(&oldest.value).unwrap().pid, 5);
    }
}
