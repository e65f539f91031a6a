//! vCPUs: a thread for each that the guest may use, and a state machine that is driven over a channel.
//!
//! ```text
//!            Resume              Pause
//!  Created ─────────▶ Running ◀────────▶ Paused       Save is legal in Created and Paused
//!                        │       Resume
//!                        ▼ the guest resets, or KVM fails
//!                     Exited                          nothing is legal any more
//! ```

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering, fence};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{KvmRunWrapper, VcpuExit, VcpuFd};
use mayu_vmm_api::ExitReason;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable as _, SIGRTMIN, register_signal_handler};

use crate::arch::state::VcpuState;
use crate::bus::{AfterWrite, Bus};
use crate::error::{Error, Result};
use crate::seccomp::{Confinement, Kind};
use crate::thread;

/// Where a vCPU is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It has never run.
    Created,
    /// It executes guest code.
    Running,
    /// It stands between two instructions.
    Paused,
    /// It will never run again.
    Exited,
}

/// What a vCPU is told.
#[derive(Clone, Debug)]
enum Command {
    Resume,
    Pause,
    /// Answer with the state, which includes these MSRs.
    Save(Arc<[u32]>),
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Resume => "resume",
            Self::Pause => "pause",
            Self::Save(_) => "save",
        })
    }
}

impl State {
    /// The transition table: the state after a command, if the command is legal.
    fn after(self, command: &Command) -> Option<Self> {
        match (self, command) {
            (Self::Created | Self::Paused, Command::Resume) => Some(Self::Running),
            (Self::Running, Command::Pause) => Some(Self::Paused),
            (Self::Created | Self::Paused, Command::Save(_)) => Some(self),
            _ => None,
        }
    }
}

/// What all vCPUs of a machine have in common.
#[derive(Clone)]
pub struct Shared {
    /// What they reach outside of RAM.
    pub bus: Arc<Bus>,
    /// Where they say why they stopped for good.
    pub exits: ExitSender,
    /// When the first of them entered the guest.
    pub entered: Arc<OnceLock<Instant>>,
    /// What their threads may do.
    pub confinement: Confinement,
}

/// Wakes the event loop with the reason of the first exit.
#[derive(Clone)]
pub struct ExitSender {
    reasons: Sender<ExitReason>,
    event: Arc<EventFd>,
}

/// The event loop's end of [`ExitSender`].
pub struct ExitReceiver {
    reasons: Receiver<ExitReason>,
    event: Arc<EventFd>,
}

/// Makes the channel that vCPUs report their end on.
///
/// # Errors
/// No eventfd can be made.
pub fn exit_channel() -> Result<(ExitSender, ExitReceiver)> {
    let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::EventFd)?);
    let (sender, reasons) = mpsc::channel();
    Ok((ExitSender { reasons: sender, event: event.clone() }, ExitReceiver { reasons, event }))
}

impl ExitSender {
    fn send(&self, reason: ExitReason) {
        // The machine may be gone already, and the event that another vCPU wrote is as good as this one.
        let _ = self.reasons.send(reason);
        let _ = self.event.write(1);
    }
}

impl ExitReceiver {
    /// Readable once a vCPU has stopped for good.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Why the first one did, if any has.
    pub fn reason(&self) -> Option<ExitReason> {
        self.reasons.try_recv().ok()
    }
}

/// How long a vCPU may take to obey. It obeys at once, unless the host's kernel holds it.
const DEADLINE: Duration = Duration::from_secs(30);

/// The vCPUs of a machine. Dropping it ends their threads.
pub struct Vcpus {
    /// By index, as far as the guest may use them.
    handles: Vec<Handle>,
    /// The others, which have no threads.
    idle: VecDeque<VcpuFd>,
    run_size: usize,
    shared: Shared,
}

struct Handle {
    id: u8,
    commands: Option<Sender<Command>>,
    replies: Receiver<Result<Option<Box<VcpuState>>>>,
    /// A mapping of `kvm_run` beside the vCPU's own, for the flag that ends `KVM_RUN`.
    run: KvmRunWrapper,
    thread: Option<JoinHandle<()>>,
}

impl Vcpus {
    /// None of them has a thread yet. `run_size` is the length of KVM's `kvm_run` mapping.
    ///
    /// # Errors
    /// No signal handler can be installed.
    pub fn new(fds: Vec<VcpuFd>, run_size: usize, shared: Shared) -> Result<Self> {
        // The handler does nothing; that there is one is what makes the signal interrupt `KVM_RUN`.
        register_signal_handler(SIGRTMIN(), ignore).map_err(Error::kvm("handle the kick signal"))?;
        Ok(Self { handles: Vec::new(), idle: fds.into(), run_size, shared })
    }

    /// Starts threads until `count` vCPUs have one, as far as there are so many. The new ones do not run.
    ///
    /// # Errors
    /// No thread can be started, or `kvm_run` not be mapped.
    pub fn start(&mut self, count: u8) -> Result<()> {
        for id in self.started()..count {
            let Some(fd) = self.idle.pop_front() else { break };
            self.handles.push(Handle::start(id, fd, self.run_size, self.shared.clone())?);
        }
        Ok(())
    }

    /// How many have a thread.
    pub fn started(&self) -> u8 {
        self.handles.len() as u8
    }

    /// One that has no thread, if there is one. It is the last to get one.
    pub fn idle(&self) -> Option<&VcpuFd> {
        self.idle.back()
    }

    /// Lets those run that have a thread, from the one with this index on.
    ///
    /// # Errors
    /// One runs already or has exited.
    pub fn resume(&mut self, first: u8) -> Result<()> {
        self.command(first, &Command::Resume).map(drop)
    }

    /// Stops all of them between two instructions.
    ///
    /// # Errors
    /// One does not run, or does not stop in time.
    pub fn pause(&mut self) -> Result<()> {
        self.command(0, &Command::Pause).map(drop)
    }

    /// Reads the state of all of them, also of those without a thread.
    ///
    /// # Errors
    /// One runs or has exited, or KVM refuses.
    pub fn save(&mut self, msrs: Vec<u32>) -> Result<Vec<VcpuState>> {
        let msrs: Arc<[u32]> = msrs.into();
        let replies = self.command(0, &Command::Save(msrs.clone()))?;
        let started = replies.into_iter().flatten().map(|state| Ok(*state));
        started.chain(self.idle.iter().map(|fd| VcpuState::save(fd, &msrs))).collect()
    }

    /// Sends first and then waits, so that all obey at the same time. The first refusal counts.
    fn command(&mut self, first: u8, command: &Command) -> Result<Vec<Option<Box<VcpuState>>>> {
        let handles = self.handles.get_mut(usize::from(first)..).unwrap_or_default();
        for handle in &mut *handles {
            handle.send(command);
        }
        let replies: Vec<_> = handles.iter().map(Handle::reply).collect();
        replies.into_iter().collect()
    }
}

impl Handle {
    fn start(id: u8, fd: VcpuFd, run_size: usize, shared: Shared) -> Result<Self> {
        let run = KvmRunWrapper::mmap_from_fd(&fd, run_size).map_err(Error::kvm("map a vCPU's kvm_run"))?;
        let (commands, received) = mpsc::channel();
        let (sender, replies) = mpsc::channel();
        let confinement = shared.confinement.clone();
        let vcpu = Vcpu { id, fd, state: State::Created, commands: received, replies: sender, shared };
        let name = format!("vcpu{id}");
        let thread = thread::spawn(name, Kind::Vcpu, &confinement, || Ok(()), |()| vcpu.serve())?;
        Ok(Self { id, commands: Some(commands), replies, run, thread: Some(thread) })
    }

    fn send(&mut self, command: &Command) {
        if let Some(commands) = &self.commands {
            // A thread that is gone cannot answer either, and that is what the caller will see.
            let _ = commands.send(command.clone());
        }
        // One that is told to resume waits for that and does nothing else.
        if !matches!(command, Command::Resume) {
            self.kick();
        }
    }

    fn reply(&self) -> Result<Option<Box<VcpuState>>> {
        match self.replies.recv_timeout(DEADLINE) {
            Ok(reply) => reply,
            Err(RecvTimeoutError::Timeout) => {
                Err(Error::VcpuStuck { id: self.id, seconds: DEADLINE.as_secs() })
            }
            Err(RecvTimeoutError::Disconnected) => Err(Error::VcpuGone { id: self.id }),
        }
    }

    /// Has the vCPU look for commands: the flag makes the next `KVM_RUN` return at once, and the signal the
    /// present one (Documentation/virt/kvm/api.rst, `immediate_exit`).
    fn kick(&mut self) {
        // SAFETY: the pointer is to a byte of a live mapping that KVM and the vCPU's thread share; the latter reads
        // and writes it through another mapping, so that no Rust reference to it exists.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut self.run.as_mut_ref().immediate_exit) };
        flag.store(1, Ordering::SeqCst);
        if let Some(thread) = &self.thread {
            // It fails only for a thread that has ended.
            let _ = thread.kill(SIGRTMIN());
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // The closed channel is the command to end.
        self.commands = None;
        self.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A vCPU inside its thread.
struct Vcpu {
    id: u8,
    fd: VcpuFd,
    state: State,
    commands: Receiver<Command>,
    replies: Sender<Result<Option<Box<VcpuState>>>>,
    shared: Shared,
}

/// What comes after one `KVM_RUN`.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Run,
    Look,
    Exit(ExitReason),
}

impl Vcpu {
    /// Obeys until the other end of the channel is closed.
    fn serve(mut self) {
        loop {
            if self.state == State::Running {
                self.run_until_kicked();
            }
            let command = match self.state {
                State::Running => self.commands.try_recv(),
                _ => self.commands.recv().map_err(|_| TryRecvError::Disconnected),
            };
            match command {
                Ok(command) => {
                    let reply = self.obey(&command);
                    if self.replies.send(reply).is_err() {
                        return;
                    }
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return,
            }
        }
    }

    fn obey(&mut self, command: &Command) -> Result<Option<Box<VcpuState>>> {
        self.state = self.state.after(command).ok_or_else(|| Error::VcpuCommand {
            id: self.id,
            command: command.to_string(),
            state: self.state,
        })?;
        match command {
            Command::Resume => Ok(None),
            Command::Pause => {
                // So that a guest's watchdog does not take the pause for a hang. A guest without the clock has none.
                let _ = self.fd.kvmclock_ctrl();
                Ok(None)
            }
            Command::Save(msrs) => VcpuState::save(&self.fd, msrs).map(|state| Some(Box::new(state))),
        }
    }

    fn run_until_kicked(&mut self) {
        self.shared.entered.get_or_init(Instant::now);
        loop {
            match self.run() {
                Next::Run => {}
                Next::Look => return,
                Next::Exit(reason) => {
                    self.state = State::Exited;
                    self.shared.exits.send(reason);
                    return;
                }
            }
        }
    }

    fn run(&mut self) -> Next {
        let failed = |id: u8, what: String| Next::Exit(ExitReason::Failed(format!("vCPU {id}: {what}")));
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => match self.shared.bus.write_port(port, data) {
                AfterWrite::Continue => Next::Run,
                AfterWrite::Reset => Next::Exit(ExitReason::GuestReset),
            },
            Ok(VcpuExit::IoIn(port, data)) => {
                self.shared.bus.read_port(port, data);
                Next::Run
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.shared.bus.read_memory(address, data);
                Next::Run
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.shared.bus.write_memory(address, data);
                Next::Run
            }
            Ok(VcpuExit::Intr) => Next::Run,
            Ok(VcpuExit::Hlt) => Next::Exit(ExitReason::GuestReset),
            Ok(VcpuExit::Shutdown) => failed(self.id, "triple fault".into()),
            Ok(VcpuExit::FailEntry(reason, cpu)) => failed(
                self.id,
                format!("the processor refused to enter the guest: reason {reason:#x} on host CPU {cpu}"),
            ),
            Ok(VcpuExit::InternalError) => {
                let detail = self.internal_error();
                failed(self.id, detail)
            }
            Ok(exit) => {
                let exit = format!("{exit:?}");
                failed(self.id, format!("unexpected exit {exit}"))
            }
            Err(error) => match error.errno() {
                libc::EINTR => {
                    self.fd.set_kvm_immediate_exit(0);
                    // Whoever sets the flag has sent a command before. If the flag set now is lost to the line above,
                    // the command must be seen by the look into the channel that follows.
                    fence(Ordering::SeqCst);
                    Next::Look
                }
                libc::EAGAIN => Next::Run,
                _ => failed(self.id, format!("KVM_RUN: {error}")),
            },
        }
    }

    fn internal_error(&mut self) -> String {
        // SAFETY: the exit reason says that this member of the union is the one that KVM has filled.
        let error = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let data = &error.data[..error.data.len().min(error.ndata as usize)];
        format!("KVM cannot go on: internal error {}, data {data:#x?}", error.suberror).replace('\n', "")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_transition_table_is_complete() {
        use State::*;
        let save = Command::Save(Arc::new([]));
        let table = [
            (Created, Some(Running), None, Some(Created)),
            (Running, None, Some(Paused), None),
            (Paused, Some(Running), None, Some(Paused)),
            (Exited, None, None, None),
        ];
        for (state, resume, pause, saved) in table {
            assert_eq!(state.after(&Command::Resume), resume, "{state:?}");
            assert_eq!(state.after(&Command::Pause), pause, "{state:?}");
            assert_eq!(state.after(&save), saved, "{state:?}");
        }
    }

    #[test]
    fn the_first_reason_is_the_one_that_counts_and_wakes_the_loop() {
        let (sender, receiver) = exit_channel().unwrap();
        assert_eq!(receiver.reason(), None);
        sender.send(ExitReason::GuestReset);
        sender.send(ExitReason::Requested);
        assert_eq!(receiver.event().read().unwrap(), 2);
        assert_eq!(receiver.reason(), Some(ExitReason::GuestReset));
    }
}
