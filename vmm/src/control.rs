//! The shim's requests, the answers, and what the shim is told without having asked.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use mayu_vmm_api::{
    CGROUP_FD, CONTROL_FD, Error as ProtocolError, Event, ExitReason, Message, Reply, Request, VmConfig,
    receive, send,
};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::epoll::EventSet;

use crate::error::{Error, Result};
use crate::event_loop::Registrar;
use crate::machine::Machine;

/// What a machine begins with.
pub enum Beginning {
    /// Its kernel: [`Request::Build`].
    Kernel(File),
    /// Its kernel, and a file for its memory: [`Request::BuildTemplate`].
    Template {
        /// The guest's kernel.
        kernel: File,
        /// What becomes the guest's memory.
        memory: File,
    },
    /// What another one has left: [`Request::Restore`].
    Saved {
        /// Its state.
        state: File,
        /// Its memory.
        memory: File,
        /// What another one like this has touched of it, if that is known.
        working_set: Option<File>,
    },
}

/// What comes with the first request.
pub struct Resources {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// Where it begins.
    pub beginning: Beginning,
    /// The guest's root filesystem.
    pub image: File,
    /// The directory that virtio-fs shares.
    pub share: OwnedFd,
    /// The write end of the console's pipe.
    pub console: OwnedFd,
    /// The directory of the machine's cgroup, if it has one.
    pub cgroup: Option<OwnedFd>,
}

/// Whether the event loop goes on.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It does.
    Continue,
    /// The machine ends, for this reason.
    End(ExitReason),
    /// The shim has ended, and nobody is left to be told.
    Orphaned,
}

/// Streams that the guest has connected to host ports and the shim has not taken yet. One more is closed at once.
const ACCEPT_BACKLOG: usize = 64;

/// How long the process waits for the shim to take what it still has to say, at its end.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// This process's end of the control socket.
pub struct Control {
    socket: OwnedFd,
    /// The machine's, until it is described.
    cgroup: Option<OwnedFd>,
    registrar: Option<Registrar>,
    waiting: VecDeque<(Message, Vec<OwnedFd>)>,
    outgoing: Receiver<(Message, Vec<OwnedFd>)>,
    sender: Sender<(Message, Vec<OwnedFd>)>,
    /// The outgoing packets are stuck, and the event loop tells when they are not.
    stuck: bool,
}

impl Control {
    /// Takes the socket that the shim has left at [`CONTROL_FD`] and, where one is expected, the cgroup at [`CGROUP_FD`],
    /// and closes what else it may have left open. To be called once, before the process opens anything.
    ///
    /// # Errors
    /// There is no such descriptor.
    pub fn inherit(has_cgroup: bool) -> Result<Self> {
        let control = take(CONTROL_FD)?;
        let cgroup = has_cgroup.then(|| take(CGROUP_FD)).transpose()?;
        let others = if has_cgroup { CGROUP_FD + 1 } else { CONTROL_FD + 1 };
        // SAFETY: nothing in this process has opened any of these descriptors.
        if unsafe { libc::close_range(others as libc::c_uint, libc::c_uint::MAX, 0) } != 0 {
            return Err(Error::ControlSocket(std::io::Error::last_os_error()));
        }
        Ok(Self { cgroup, ..Self::new(control) })
    }

    fn new(socket: OwnedFd) -> Self {
        let (sender, outgoing) = mpsc::channel();
        Self {
            socket,
            cgroup: None,
            registrar: None,
            waiting: VecDeque::new(),
            outgoing,
            sender,
            stuck: false,
        }
    }

    /// Waits for the machine's description, which has to be the first request, and returns the request's number.
    ///
    /// # Errors
    /// The shim has ended, or sends something else.
    pub fn receive_build(&mut self) -> Result<(u64, VmConfig, Resources)> {
        let (message, fds) = receive(&self.socket).map_err(Error::Control)?;
        let Message::Request { id, body: request } = message else {
            return Err(Error::FirstRequest);
        };
        let operation = request.name();
        let (config, kvm, beginning, image, share, console) = match request {
            Request::Build(config) => {
                let [kvm, kernel, image, share, console] = all(operation, fds)?;
                (config, kvm, Beginning::Kernel(kernel.into()), image, share, console)
            }
            Request::BuildTemplate(config) => {
                let [kvm, kernel, image, share, console, memory] = all(operation, fds)?;
                let beginning = Beginning::Template { kernel: kernel.into(), memory: memory.into() };
                (config, kvm, beginning, image, share, console)
            }
            Request::Restore(config) => {
                let mut fds = fds;
                let working_set = fds.split_off(fds.len().min(6)).pop().map(File::from);
                let [kvm, state, memory, image, share, console] = all(operation, fds)?;
                let beginning = Beginning::Saved { state: state.into(), memory: memory.into(), working_set };
                (config, kvm, beginning, image, share, console)
            }
            _ => return Err(Error::FirstRequest),
        };
        let cgroup = self.cgroup.take();
        Ok((id, config, Resources { kvm, beginning, image: image.into(), share, console, cgroup }))
    }

    /// Makes the socket part of the event loop.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn watch(&mut self, registrar: Registrar) -> Result<()> {
        fcntl(&self.socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(|errno| Error::ControlSocket(errno.into()))?;
        registrar.watch(&self.socket, EventSet::IN, 0)?;
        self.registrar = Some(registrar);
        Ok(())
    }

    /// Sends an event, now or as soon as the shim takes it.
    ///
    /// # Errors
    /// The shim has ended.
    pub fn announce(&mut self, event: Event) -> Result<()> {
        self.waiting.push_back((Message::Event { body: event }, vec![]));
        self.flush()
    }

    /// Answers a request, now or as soon as the shim takes it.
    ///
    /// # Errors
    /// The shim has ended.
    pub fn answer(&mut self, id: u64, outcome: std::result::Result<(), String>) -> Result<()> {
        self.waiting.push_back((reply(id, outcome), vec![]));
        self.flush()
    }

    /// What the socket device calls when the guest connects to a host port: the stream goes to the shim.
    pub fn acceptor(&self) -> Box<dyn FnMut(u32, OwnedFd) + Send> {
        let sender = self.sender.clone();
        Box::new(move |port, stream| {
            let body = Event::VsockAccepted { port };
            // The receiver lives as long as the machine does.
            let _ = sender.send((Message::Event { body }, vec![stream]));
        })
    }

    /// Carries out all requests that have arrived.
    ///
    /// # Errors
    /// The shim breaks the protocol.
    pub fn process(&mut self, machine: &mut Machine) -> Result<Verdict> {
        loop {
            let (id, request, fds) = match receive(&self.socket) {
                Ok((Message::Request { id, body }, fds)) => (id, body, fds),
                Ok(_) => return Err(Error::NotARequest),
                Err(ProtocolError::Closed) => return Ok(Verdict::Orphaned),
                Err(ProtocolError::Receive(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    return Ok(Verdict::Continue);
                }
                Err(error) => return Err(Error::Control(error)),
            };
            if let Verdict::End(reason) = self.carry_out(machine, id, &request, fds)? {
                return Ok(Verdict::End(reason));
            }
        }
    }

    fn carry_out(
        &mut self,
        machine: &mut Machine,
        id: u64,
        request: &Request,
        fds: Vec<OwnedFd>,
    ) -> Result<Verdict> {
        let outcome = match *request {
            Request::Build(_) | Request::BuildTemplate(_) | Request::Restore(_) => Err(Error::BuiltTwice),
            Request::Resume => machine.resume(),
            Request::Pause => machine.pause(),
            Request::Save => all(request.name(), fds)
                .and_then(|[state, memory]| machine.save_with_memory(state.into(), &memory.into())),
            Request::VsockConnect { port } => match only(request.name(), fds) {
                Ok(stream) => {
                    let sender = self.sender.clone();
                    let on_result = Box::new(move |outcome| {
                        let _ = sender.send((reply(id, outcome), vec![]));
                    });
                    machine.connect(stream, port, on_result);
                    return Ok(Verdict::Continue);
                }
                Err(error) => Err(error),
            },
            Request::AttachBlock { slot, read_only } => {
                only(request.name(), fds).and_then(|file| machine.attach_block(slot, file.into(), read_only))
            }
            Request::DetachBlock { slot } => machine.detach_block(slot),
            Request::AttachNet { slot } => {
                only(request.name(), fds).and_then(|tap| machine.attach_net(slot, tap.into()))
            }
            Request::Prefetch => machine.prefetch(),
            Request::StartVcpus { vcpus } => machine.start_vcpus(vcpus),
            Request::ResizeMemory { memory_mib } => machine.resize_memory(memory_mib),
            Request::Status => {
                let body = Reply::Status(machine.status());
                self.waiting.push_back((Message::Reply { id, body }, vec![]));
                return self.flush().map(|()| Verdict::Continue);
            }
            Request::Shutdown => {
                self.answer(id, Ok(()))?;
                return Ok(Verdict::End(ExitReason::Requested));
            }
        };
        let verdict = match &outcome {
            // Some vCPUs have obeyed and this one has not: nobody knows any more what runs.
            Err(error @ (Error::VcpuStuck { .. } | Error::VcpuGone { .. })) => {
                Verdict::End(ExitReason::Failed(error.to_string()))
            }
            _ => Verdict::Continue,
        };
        self.answer(id, outcome.map_err(|error| error.to_string()))?;
        Ok(verdict)
    }

    /// Sends what is waiting, until the shim takes no more.
    ///
    /// # Errors
    /// The shim has ended.
    pub fn flush(&mut self) -> Result<()> {
        while let Ok((message, fds)) = self.outgoing.try_recv() {
            let is_stream = !fds.is_empty();
            if !is_stream || self.waiting.iter().filter(|(_, fds)| !fds.is_empty()).count() < ACCEPT_BACKLOG {
                self.waiting.push_back((message, fds));
            }
        }
        while let Some((message, fds)) = self.waiting.front() {
            let borrowed: Vec<_> = fds.iter().map(OwnedFd::as_fd).collect();
            match send(&self.socket, message, &borrowed) {
                Ok(()) => {}
                Err(ProtocolError::Send(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    return self.set_stuck(true);
                }
                // The shim has too many descriptors in flight: the guest's connection is the one that gives way.
                Err(ProtocolError::Send(error))
                    if error.raw_os_error() == Some(libc::ETOOMANYREFS) && !fds.is_empty() => {}
                Err(error) => return Err(Error::Control(error)),
            }
            self.waiting.pop_front();
        }
        self.set_stuck(false)
    }

    /// Has the event loop tell when a full socket has room again.
    fn set_stuck(&mut self, stuck: bool) -> Result<()> {
        if let Some(registrar) = &self.registrar
            && self.stuck != stuck
        {
            let interest = match stuck {
                true => EventSet::IN | EventSet::OUT,
                false => EventSet::IN,
            };
            registrar.change(&self.socket, interest, 0)?;
            self.stuck = stuck;
        }
        Ok(())
    }

    /// Says why the machine has ended, after everything else that is still to be said. The shim gets a moment to
    /// take it; one that does not will see the end of the process.
    ///
    /// # Errors
    /// The shim has ended.
    pub fn finish(&mut self, reason: ExitReason) -> Result<()> {
        let deadline = Instant::now() + LAST_WORDS;
        self.announce(Event::Exited(reason))?;
        while !self.waiting.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let mut room = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut room, timeout) {
                Ok(0) => break,
                Ok(_) => self.flush()?,
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(Error::ControlSocket(errno.into())),
            }
        }
        Ok(())
    }
}

/// Takes a descriptor that the shim has left. Once for each number.
fn take(number: i32) -> Result<OwnedFd> {
    // SAFETY: only asks whether the descriptor exists.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|errno| Error::Inherited { number, source: errno.into() })?;
    // SAFETY: the descriptor exists, and nothing else in this process knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn reply(id: u64, outcome: std::result::Result<(), String>) -> Message {
    let body = match outcome {
        Ok(()) => Reply::Ok,
        Err(reason) => Reply::Error { reason },
    };
    Message::Reply { id, body }
}

/// The one descriptor that a request has to carry.
fn only(operation: &'static str, fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    all(operation, fds).map(|[fd]| fd)
}

/// All the descriptors that a request has to carry.
fn all<const EXPECTED: usize>(operation: &'static str, fds: Vec<OwnedFd>) -> Result<[OwnedFd; EXPECTED]> {
    fds.try_into().map_err(|fds: Vec<_>| Error::Descriptors {
        operation,
        expected: EXPECTED,
        received: fds.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use mayu_vmm_api::Event::VsockAccepted;
    use mayu_vmm_api::RateLimit;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::unix::net::UnixStream;

    use crate::event_loop::{EventLoop, Ready};

    /// A control socket in an event loop, and the shim's end of it.
    fn control() -> (Control, EventLoop, OwnedFd) {
        let (ours, shim) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        fcntl(&shim, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let events = EventLoop::new().unwrap();
        let mut control = Control::new(ours);
        control.watch(events.registrar(0)).unwrap();
        (control, events, shim)
    }

    fn stream() -> OwnedFd {
        UnixStream::pair().unwrap().0.into()
    }

    /// Everything that has reached the shim.
    fn received(shim: &OwnedFd) -> Vec<(Message, Vec<OwnedFd>)> {
        std::iter::from_fn(|| receive(shim).ok()).collect()
    }

    #[test]
    fn an_accepted_stream_goes_to_the_shim_with_its_port() {
        let (mut control, _events, shim) = control();
        control.acceptor()(1024, stream());
        control.flush().unwrap();
        let (message, fds) = received(&shim).remove(0);
        assert_eq!(message, Message::Event { body: VsockAccepted { port: 1024 } });
        assert_eq!(fds.len(), 1);
    }

    #[test]
    fn a_guest_that_connects_without_end_does_not_fill_the_memory_nor_displace_answers() {
        let (mut control, mut events, shim) = control();
        let mut accept = control.acceptor();
        // The socket takes some hundred packets before it is full.
        for _ in 0..4096 {
            accept(1024, stream());
            control.flush().unwrap();
        }
        assert!(control.stuck);
        assert_eq!(control.waiting.len(), ACCEPT_BACKLOG);
        control.answer(7, Ok(())).unwrap();
        assert_eq!(control.waiting.len(), ACCEPT_BACKLOG + 1);

        let mut messages = Vec::new();
        while control.stuck {
            messages.extend(received(&shim));
            assert!(matches!(events.wait().unwrap()[..], [Ready { owner: 0, .. }]));
            control.flush().unwrap();
        }
        messages.extend(received(&shim));
        let last = &messages.last().unwrap().0;
        assert_eq!(*last, Message::Reply { id: 7, body: Reply::Ok });
    }

    #[test]
    fn the_first_request_has_to_describe_the_machine_and_bring_its_descriptors() {
        let (mut control, _events, shim) = control();
        fcntl(&control.socket, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        let config = VmConfig {
            sandbox_id: "test".into(),
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: 64,
            max_memory_mib: 64,
            net_slots: 1,
            guest_cid: 3,
            kernel_args: String::new(),
            host_ports: vec![],
            uid: 1000,
            net_limit: RateLimit::default(),
            block_limit: RateLimit::default(),
            made_of: BTreeMap::new(),
        };
        let build = Message::Request { id: 1, body: Request::Build(config) };
        send(&shim, &Message::Request { id: 1, body: Request::Resume }, &[]).unwrap();
        send(&shim, &build, &[stream().as_fd()]).unwrap();
        assert!(matches!(control.receive_build(), Err(Error::FirstRequest)));
        assert!(matches!(control.receive_build(), Err(Error::Descriptors { received: 1, .. })));
    }

    #[test]
    fn the_last_word_is_the_reason_and_a_shim_that_is_gone_does_not_hold_it_up() {
        let (mut control, _events, shim) = control();
        control.finish(ExitReason::GuestReset).unwrap();
        let exited = Message::Event { body: Event::Exited(ExitReason::GuestReset) };
        assert_eq!(received(&shim).remove(0).0, exited);
        drop(shim);
        assert!(control.finish(ExitReason::GuestReset).is_err());
    }
}
