//! The threads that serve the driver's requests.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use fuse_backend_rs::api::server::Server;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EpollEvent;

use super::gate::{Gate, Work};
use super::identity::Identity;
use super::request::Request;
use super::session::{KickedQueue, QueueResult, Session};
use super::share::Share;
use crate::devices::virtio::Health;
use crate::error::Result;
use crate::seccomp::{Confinement, Kind};
use crate::thread;

/// One thread that serves requests.
struct Worker {
    gate: Arc<Gate>,
    server: Arc<Server<Arc<Share>>>,
    identity: Identity,
}

/// Starts a worker with the capabilities that the calling thread has now.
///
/// # Errors
/// There is no thread to be had, or it cannot act for others.
pub(super) fn spawn(
    gate: &Arc<Gate>,
    server: &Arc<Server<Arc<Share>>>,
    confinement: &Confinement,
) -> Result<JoinHandle<()>> {
    let (gate, server) = (Arc::clone(gate), Arc::clone(server));
    let run = move |identity| Worker { gate, server, identity }.run();
    thread::spawn("virtio-fs".into(), Kind::Fs, confinement, Identity::of_this_thread, run)
}

impl Worker {
    fn run(mut self) {
        while let Some(work) = self.gate.wait() {
            match work {
                Work::Requests(session) => {
                    self.serve(&session);
                    self.gate.leave(session);
                }
                Work::Errand(errand) => errand(),
            }
        }
    }

    /// Serves until the gate asks to stop, or the driver breaks a queue.
    fn serve(&mut self, session: &Session) {
        let mut events = [EpollEvent::default(); 4];
        while !self.gate.is_stopping() && !session.health.is_broken() {
            let ready = match session.epoll.wait(-1, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(_) => return session.give_up(),
            };
            for event in events.iter().take(ready) {
                let number = usize::try_from(event.data()).unwrap_or(usize::MAX);
                let Some(queue) = session.queues.get(number) else {
                    continue;
                };
                if self.drain(session, queue).is_err() {
                    session.give_up();
                }
            }
        }
    }

    /// Serves all that is in one queue.
    fn drain(&mut self, session: &Session, queue: &KickedQueue) -> QueueResult<()> {
        let memory = session.memory.memory();
        while !self.gate.is_stopping() && !session.health.is_broken() {
            let Some(next) = queue.next_request(&memory)? else {
                break;
            };
            if next.more {
                // This request may block; another worker goes on with the next one.
                queue.kick();
            }
            let head = next.chain.head_index();
            let written = self.answer(&session.health, &memory, next.chain);
            if queue.finish(&memory, head, written)? {
                session.interrupt();
            }
        }
        Ok(())
    }

    /// Answers one request, and says how many bytes were written.
    fn answer<'a>(
        &mut self,
        health: &Health,
        memory: &'a GuestMemoryMmap,
        chain: DescriptorChain<&'a GuestMemoryMmap>,
    ) -> u32 {
        let Some(request) = Request::parse(memory, chain) else {
            health.count_error();
            return 0;
        };
        self.identity.assume(request.uid(), request.gid());
        request.serve(&self.server).unwrap_or_else(|refused| {
            health.count_error();
            refused
        })
    }
}
