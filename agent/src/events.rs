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
