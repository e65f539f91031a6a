//! What the shim is to be told: exits and out-of-memory kills, in the order in which they happened.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use mayu_agent_api::sandbox::{Event, OutOfMemory, ProcessExit, event};
use tokio::sync::Notify;

use crate::reaper::Exit;

/// How many events wait for a subscriber at most; past it the oldest are lost.
const MAX_BACKLOG: usize = 16 * 1024;

/// The backlog of events and its one subscriber.
#[derive(Default)]
pub struct Events {
    backlog: Mutex<Backlog>,
    changed: Notify,
}

#[derive(Default)]
struct Backlog {
    events: VecDeque<Event>,
    /// Sequence number of the oldest event in `events`.
    first: u64,
    /// Counts subscribers; only the latest is served.
    subscriber: u64,
}

/// The right to read events, until somebody else subscribes.
pub struct Subscription {
    number: u64,
}

impl Events {
    /// Reports that an init process (empty `exec_id`) or an exec has ended.
    pub fn exited(&self, container_id: &str, exec_id: &str, pid: u32, exit: Exit) {
        self.push(event::Event::Exit(ProcessExit {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            pid,
            exit_status: exit.status,
            exited_at_ns: nanoseconds(exit.at),
            ..ProcessExit::default()
        }));
    }

    /// Reports that the kernel has killed processes of a container that was out of memory.
    pub fn out_of_memory(&self, container_id: &str) {
        self.push(event::Event::Oom(OutOfMemory {
            container_id: container_id.to_owned(),
            ..OutOfMemory::default()
        }));
    }

    /// Makes the caller the subscriber, in place of any other.
    pub fn subscribe(&self) -> Subscription {
        let mut backlog = self.backlog();
        backlog.subscriber += 1;
        let number = backlog.subscriber;
        drop(backlog);
        self.changed.notify_waiters();
        Subscription { number }
    }

    /// The oldest event and its sequence number, once there is one; nothing when another has subscribed. The
    /// event stays until it is [acknowledged](Self::acknowledge).
    pub async fn next(&self, subscription: &Subscription) -> Option<(u64, Event)> {
        loop {
            // Registered before looking, or a change in between would go unnoticed.
            let changed = self.changed.notified();
            {
                let backlog = self.backlog();
                if backlog.subscriber != subscription.number {
                    return None;
                }
                if let Some(event) = backlog.events.front() {
                    return Some((backlog.first, event.clone()));
                }
            }
            changed.await;
        }
    }

    /// Forgets the event of this number, which has been delivered.
    pub fn acknowledge(&self, number: u64) {
        let mut backlog = self.backlog();
        if backlog.first == number && backlog.events.pop_front().is_some() {
            backlog.first += 1;
        }
    }

    fn push(&self, event: event::Event) {
        let mut backlog = self.backlog();
        if backlog.events.len() == MAX_BACKLOG {
            backlog.events.pop_front();
            backlog.first += 1;
        }
        backlog.events.push_back(Event { event: Some(event), ..Event::default() });
        drop(backlog);
        self.changed.notify_waiters();
    }

    fn backlog(&self) -> MutexGuard<'_, Backlog> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nanoseconds since the Unix epoch; 0 for a clock that is before it, as a guest's is until it is configured.
pub fn nanoseconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).ok().and_then(|since| u64::try_from(since.as_nanos()).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn exit(status: u32) -> Exit {
        Exit { status, at: UNIX_EPOCH + std::time::Duration::from_nanos(5) }
    }

    /// What is there without waiting.
    fn ready<T>(future: impl Future<Output = T>) -> Option<T> {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    fn take(events: &Events, subscription: &Subscription) -> Option<event::Event> {
        let (number, event) = ready(events.next(subscription))??;
        events.acknowledge(number);
        event.event
    }

    #[test]
    fn what_happened_before_the_subscription_comes_in_order() {
        let events = Events::default();
        events.out_of_memory("c");
        events.exited("c", "e", 7, exit(137));

        let subscription = events.subscribe();

        let Some(event::Event::Oom(oom)) = take(&events, &subscription) else { panic!("no oom") };
        assert_eq!(oom.container_id, "c");
        let Some(event::Event::Exit(exit)) = take(&events, &subscription) else { panic!("no exit") };
        let fields = (
            exit.container_id.as_str(),
            exit.exec_id.as_str(),
            exit.pid,
            exit.exit_status,
            exit.exited_at_ns,
        );
        assert_eq!(fields, ("c", "e", 7, 137, 5));
        assert!(ready(events.next(&subscription)).is_none());
    }

    #[test]
    fn an_event_that_was_not_delivered_comes_again() {
        let events = Events::default();
        events.out_of_memory("c");
        let first = events.subscribe();
        let seen = ready(events.next(&first));
        assert!(matches!(seen, Some(Some(_))));

        let second = events.subscribe();

        assert!(matches!(ready(events.next(&first)), Some(None)), "the first was superseded");
        assert!(take(&events, &second).is_some());
    }

    #[test]
    fn a_waiting_subscriber_is_woken() {
        let events = Events::default();
        let subscription = events.subscribe();
        let mut waiting = pin!(events.next(&subscription));
        let mut context = Context::from_waker(Waker::noop());
        assert!(waiting.as_mut().poll(&mut context).is_pending());

        events.out_of_memory("c");

        assert!(waiting.as_mut().poll(&mut context).is_ready());
    }

    #[test]
    fn the_backlog_is_bounded_and_loses_the_oldest() {
        let events = Events::default();
        for number in 0..=MAX_BACKLOG {
            events.out_of_memory(&number.to_string());
        }

        let subscription = events.subscribe();

        let Some(event::Event::Oom(oldest)) = take(&events, &subscription) else { panic!("no oom") };
        assert_eq!(oldest.container_id, "1");
        assert_eq!(events.backlog().events.len(), MAX_BACKLOG - 1);
    }

    #[test]
    fn a_lost_event_cannot_be_acknowledged_in_place_of_another() {
        let events = Events::default();
        events.out_of_memory("first");
        let subscription = events.subscribe();
        let (number, _) = ready(events.next(&subscription)).unwrap().unwrap();
        for _ in 0..MAX_BACKLOG {
            events.out_of_memory("later");
        }

        events.acknowledge(number);

        assert_eq!(events.backlog().events.len(), MAX_BACKLOG);
    }
}
