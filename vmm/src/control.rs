//! The shim's requests, the answers, and what the shim is told without having asked.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use mayu_vmm_api::{
    CONTROL_FD, Error as ProtocolError, Event, ExitReason, Message, Reply, Request, VmConfig, receive, send,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::epoll::EventSet;

use crate::error::{Error, Result};
use crate::event_loop::Registrar;
use crate::machine::Machine;

/// What comes with [`Request::Build`], in the order of its descriptors.
pub struct Resources {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The guest's kernel.
    pub kernel: File,
    /// The guest's root filesystem.
    pub image: File,
    /// The directory that virtio-fs shares.
    pub share: OwnedFd,
    /// The write end of the console's pipe.
    pub console: OwnedFd,
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
    registrar: Option<Registrar>,
    waiting: VecDeque<(Message, Vec<OwnedFd>)>,
    outgoing: Receiver<(Message, Vec<OwnedFd>)>,
    sender: Sender<(Message, Vec<OwnedFd>)>,
    /// The outgoing packets are stuck, and the event loop tells when they are not.
    stuck: bool,
}

impl Control {
    /// Takes the socket that the shim has left at [`CONTROL_FD`]. To be called once.
    ///
    /// # Errors
    /// There is none.
    pub fn inherit() -> Result<Self> {
        // SAFETY: only asks whether the descriptor exists.
        let borrowed = unsafe { BorrowedFd::borrow_raw(CONTROL_FD) };
        fcntl(borrowed, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
            .map_err(|errno| Error::ControlSocket(errno.into()))?;
        // SAFETY: the descriptor exists, and nothing else in this process knows of it.
        Ok(Self::new(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) }))
    }

    fn new(socket: OwnedFd) -> Self {
        let (sender, outgoing) = mpsc::channel();
        Self {
            socket,
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
    pub fn receive_build(&self) -> Result<(u64, VmConfig, Resources)> {
        let (message, fds) = receive(&self.socket).map_err(Error::Control)?;
        let Message::Request {
            id,
            body: Request::Build(config),
        } = message
        else {
            return Err(Error::FirstRequest);
        };
        let [kvm, kernel, image, share, console] =
            <[OwnedFd; 5]>::try_from(fds).map_err(|fds| Error::Descriptors {
                operation: "build the machine",
                expected: 5,
                received: fds.len(),
            })?;
        let resources = Resources {
            kvm,
            kernel: kernel.into(),
            image: image.into(),
            share,
            console,
        };
        Ok((id, config, resources))
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
            if let Verdict::End(reason) = self.carry_out(machine, id, request, fds)? {
                return Ok(Verdict::End(reason));
            }
        }
    }

    fn carry_out(
        &mut self,
        machine: &mut Machine,
        id: u64,
        request: Request,
        fds: Vec<OwnedFd>,
    ) -> Result<Verdict> {
        let outcome = match request {
            Request::Build(_) => Err(Error::BuiltTwice),
            Request::Resume => machine.resume(),
            Request::Pause => machine.pause(),
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
            Request::AttachBlock { slot, read_only } => only(request.name(), fds)
                .and_then(|file| machine.attach_block(slot, file.into(), read_only)),
            Request::DetachBlock { slot } => machine.detach_block(slot),
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
        self.answer(id, outcome.map_err(|error| error.to_string()))?;
        Ok(Verdict::Continue)
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

fn reply(id: u64, outcome: std::result::Result<(), String>) -> Message {
    let body = match outcome {
        Ok(()) => Reply::Ok,
        Err(reason) => Reply::Error { reason },
    };
    Message::Reply { id, body }
}

/// The one descriptor that a request has to carry.
fn only(operation: &'static str, fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    <[OwnedFd; 1]>::try_from(fds)
        .map(|[fd]| fd)
        .map_err(|fds| Error::Descriptors {
            operation,
            expected: 1,
            received: fds.len(),
        })
}
