//! The shim's part, played by a test: starts `mayu-vmm`, talks to it, and reads the guest's console.

#![allow(dead_code)]

pub mod network;
pub mod payload;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt as _, FdMapping};
use mayu_vmm_api::{
    CONTROL_FD, Event, ExitReason, Message, RateLimit, Reply, Request, VmConfig, receive, send,
};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::sys::time::TimeVal;

/// How long the VMM may be silent. Generous: a software processor may be the one that runs it.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Says loudly that a test did not run, and why: past the test harness, which hides what a passing test prints.
pub fn skip(reason: &str) {
    let _ = writeln!(std::io::stderr(), "\nSKIPPED: {reason}\n");
}

/// Why no machine can be run here, if none can.
pub fn no_kvm() -> Option<String> {
    let error = File::options().read(true).write(true).open("/dev/kvm").err()?;
    Some(format!("needs KVM: /dev/kvm: {error}"))
}

/// Why a process cannot be started here, if it cannot: it needs to be root to confine itself.
pub fn unable() -> bool {
    let root = nix::unistd::geteuid().is_root();
    let reason = no_kvm().or((!root).then(|| "needs root".to_owned()));
    reason.inspect(|reason| skip(reason)).is_some()
}

/// An image of one page, with nothing on it.
pub fn image() -> File {
    let image = tempfile::tempfile().unwrap();
    image.set_len(4096).unwrap();
    image
}

/// A file named by an environment variable.
fn file_from_environment(variable: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os(variable).ok_or(format!("needs the environment variable {variable}"))?;
    match Path::new(&path).is_file() {
        true => Ok(path.into()),
        false => Err(format!("needs {variable} to name a file, not {}", path.display())),
    }
}

/// The kernel and the image of a Linux guest, which the environment names, or nothing where none can boot.
pub fn guest_files() -> Option<(File, File)> {
    let open = |variable| Ok::<_, String>(File::open(file_from_environment(variable)?).unwrap());
    let files = open("MAYU_TEST_KERNEL").and_then(|kernel| Ok((kernel, open("MAYU_TEST_IMAGE")?)));
    match (no_kvm(), files) {
        (None, Ok(files)) => Some(files),
        (Some(reason), _) | (None, Err(reason)) => {
            skip(&reason);
            None
        }
    }
}

/// The guest of `tests/hostile-guest`, which the environment names, or nothing where none can run.
pub fn hostile_guest() -> Option<PathBuf> {
    let guest = file_from_environment("MAYU_TEST_HOSTILE_GUEST");
    match no_kvm().map_or(guest, Err) {
        Ok(guest) => Some(guest),
        Err(reason) => {
            skip(&reason);
            None
        }
    }
}

/// How long a machine is under attack, in seconds.
pub fn hostile_seconds() -> u64 {
    std::env::var("MAYU_TEST_HOSTILE_SECONDS").map_or(20, |seconds| seconds.parse().unwrap())
}

/// A machine's description that fits any test.
pub fn config() -> VmConfig {
    VmConfig {
        sandbox_id: "test".into(),
        vcpus: 1,
        max_vcpus: 1,
        memory_mib: 64,
        max_memory_mib: 64,
        net_slots: 1,
        guest_cid: 3,
        kernel_args: String::new(),
        host_ports: vec![1024],
        uid: 65_534,
        net_limit: RateLimit::default(),
        block_limit: RateLimit::default(),
        made_of: BTreeMap::new(),
    }
}

/// A file that may become the memory of a machine.
pub fn memory_file(config: &VmConfig) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(u64::from(config.memory_mib) << 20).unwrap();
    file
}

/// A file, opened to be read.
pub fn read_only(file: &File) -> File {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}

/// A running `mayu-vmm`, which dies with this value.
pub struct Vmm {
    process: Child,
    socket: OwnedFd,
    console: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
    next_id: u64,
    /// Messages that came while another was waited for.
    early: Vec<(Message, Vec<OwnedFd>)>,
}

impl Vmm {
    /// Starts it, and has it build a machine. An error is the VMM's own.
    pub fn build(config: VmConfig, kernel: &File, image: &File, share: &Path) -> (Self, Result<(), String>) {
        Self::begin(Request::Build(config), [kernel, image], share, &[])
    }

    /// Starts it, with the descriptors of the first request: `/dev/kvm` and `files`, for [`Request::Restore`] then the first of
    /// `extra`, the share and the console, and then those of `extra` that are left.
    pub fn begin(
        request: Request,
        files: [&File; 2],
        share: &Path,
        extra: &[BorrowedFd<'_>],
    ) -> (Self, Result<(), String>) {
        let (console_reader, console) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let mut vmm = Self::spawn(console_reader.into());
        let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
        let share = File::open(share).unwrap();
        let mut fds = vec![kvm.as_fd(), files[0].as_fd(), files[1].as_fd(), share.as_fd(), console.as_fd()];
        let before = usize::from(matches!(request, Request::Restore(_)));
        fds.splice(3..3, extra[..before].iter().copied());
        fds.extend(&extra[before..]);
        let id = vmm.send(request, &fds);
        drop(console);
        let outcome = vmm.reply(id);
        (vmm, outcome)
    }

    fn spawn(mut console: File) -> Self {
        // The machine's process is re-parented when the one that is spawned here ends.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let patience = TimeVal::new(PATIENCE.as_secs() as i64, 0);
        setsockopt(&ours, sockopt::ReceiveTimeout, &patience).unwrap();
        let program = std::env::var_os("MAYU_TEST_VMM").unwrap_or(env!("CARGO_BIN_EXE_mayu-vmm").into());
        let process = Command::new(program)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .fd_mappings(vec![FdMapping { parent_fd: theirs, child_fd: CONTROL_FD }])
            .unwrap()
            .spawn()
            .unwrap();
        let output = Arc::new(Mutex::new(Vec::new()));
        let shared = output.clone();
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = console.read(&mut buffer) {
                shared.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        Self { process, socket: ours, console: output, reader: Some(reader), next_id: 1, early: vec![] }
    }

    /// What the guest has printed so far.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.console.lock().unwrap()).into_owned()
    }

    /// Waits until the guest has printed something.
    pub fn wait_for_console(&self, text: &str) {
        let started = Instant::now();
        while !self.console().contains(text) {
            assert!(started.elapsed() < PATIENCE, "{text:?} is not in {:?}", self.console());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What the guest has printed, once it is gone.
    pub fn whole_console(&mut self) -> String {
        self.reader.take().unwrap().join().unwrap();
        self.console()
    }

    /// Sends a request and waits for its answer.
    pub fn request(&mut self, request: Request, fds: &[OwnedFd]) -> Result<(), String> {
        let fds: Vec<_> = fds.iter().map(OwnedFd::as_fd).collect();
        let id = self.send(request, &fds);
        self.reply(id)
    }

    /// Asks for the machine's counters.
    pub fn status(&mut self) -> mayu_vmm_api::Status {
        let id = self.send(Request::Status, &[]);
        match self.wait(|message| matches!(message, Message::Reply { id: its, .. } if *its == id)) {
            (Message::Reply { body: Reply::Status(status), .. }, _) => status,
            other => panic!("no status but {other:?}"),
        }
    }

    /// Waits for a connection of the guest to a host port.
    pub fn accept(&mut self, port: u32) -> OwnedFd {
        let wanted = Message::Event { body: Event::VsockAccepted { port } };
        self.wait(|message| *message == wanted).1.remove(0)
    }

    /// Waits for the pid of the machine's process.
    pub fn pid(&mut self) -> i32 {
        match self.wait(|message| matches!(message, Message::Event { body: Event::Started { .. } })).0 {
            Message::Event { body: Event::Started { pid } } => pid,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for the machine's end.
    pub fn exit(&mut self) -> ExitReason {
        match self.wait(|message| matches!(message, Message::Event { body: Event::Exited(_) })).0 {
            Message::Event { body: Event::Exited(reason) } => reason,
            other => panic!("{other:?}"),
        }
    }

    /// Sends bytes that need not be a message.
    pub fn send_raw(&self, bytes: &[u8]) {
        nix::sys::socket::send(self.socket.as_raw_fd(), bytes, MsgFlags::empty()).unwrap();
    }

    /// Another descriptor of this end of the control socket.
    pub fn control_socket(&self) -> OwnedFd {
        self.socket.try_clone().unwrap()
    }

    /// Closes the control socket, as a shim does that dies.
    pub fn hang_up(self) {}

    /// Waits until the process has closed its end of the control socket.
    pub fn wait_for_end(&mut self) {
        loop {
            match self.receive() {
                Ok(_) => {}
                Err(mayu_vmm_api::Error::Closed) => return,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The next message. A socket with a time-out gives up waiting when its thread is stopped and goes on (signal(7)).
    fn receive(&self) -> Result<(Message, Vec<OwnedFd>), mayu_vmm_api::Error> {
        loop {
            match receive(&self.socket) {
                Err(mayu_vmm_api::Error::Receive(error)) if error.kind() == ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn send(&mut self, body: Request, fds: &[BorrowedFd<'_>]) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        send(&self.socket, &Message::Request { id, body }, fds).unwrap();
        id
    }

    fn reply(&mut self, id: u64) -> Result<(), String> {
        match self.wait(|message| matches!(message, Message::Reply { id: its, .. } if *its == id)).0 {
            Message::Reply { body: Reply::Ok, .. } => Ok(()),
            Message::Reply { body: Reply::Error { reason }, .. } => Err(reason),
            other => panic!("{other:?}"),
        }
    }

    fn wait(&mut self, wanted: impl Fn(&Message) -> bool) -> (Message, Vec<OwnedFd>) {
        if let Some(position) = self.early.iter().position(|(message, _)| wanted(message)) {
            return self.early.remove(position);
        }
        loop {
            let (message, fds) = self.receive().unwrap_or_else(|error| {
                panic!("{error}; the machine said:\n{:?}\n{}", self.early, self.console())
            });
            if wanted(&message) {
                return (message, fds);
            }
            self.early.push((message, fds));
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.process.wait();
    }
}
