//! The standard streams of a process: pipes or a terminal on its side, one stream to the shim for each on
//! the other, and the copying in between.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use mayu_agent_api::StreamId;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, fchown, pipe2};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};
use ttrpc::asynchronous::transport::Socket;

use crate::error::{Error, Result};
use crate::streams::{Expected, Streams};

/// How much is copied at once; the size of a pipe.
const BUFFER_SIZE: usize = 64 * 1024;

/// The standard streams a caller asks for, as containerd's requests name them.
#[derive(Clone, Debug, Default)]
pub struct StdioRequest {
    /// Whether a terminal takes the place of three pipes.
    pub terminal: bool,
    /// Empty, or the stream of the standard input.
    pub stdin: String,
    /// Empty, or the stream of the standard output.
    pub stdout: String,
    /// Empty, or the stream of the standard error.
    pub stderr: String,
}

/// The streams that the shim is going to connect for one process.
#[derive(Default)]
pub struct ExpectedStdio {
    stdin: Option<Expected>,
    stdout: Option<Expected>,
    stderr: Option<Expected>,
}

/// The streams that the shim has connected for one process.
#[derive(Default)]
pub struct ConnectedStdio {
    stdin: Option<Socket>,
    stdout: Option<Socket>,
    stderr: Option<Socket>,
}

/// The agent's ends of what a process has as its standard streams.
#[derive(Default)]
pub struct Ends {
    stdin: Option<Sender>,
    stdout: Option<Receiver>,
    stderr: Option<Receiver>,
}

/// The process's own standard streams: 0, 1 and 2.
pub type ChildStdio = [OwnedFd; 3];

/// The running copies of one process's streams.
#[derive(Default)]
pub struct Copies {
    stdin: Option<JoinHandle<()>>,
    close_stdin: Arc<Notify>,
    outputs: Vec<JoinHandle<()>>,
}

impl StdioRequest {
    /// Announces the streams to `streams`.
    ///
    /// # Errors
    ///
    /// `InvalidRequest` for what is no stream id, and for an error stream beside a terminal.
    pub fn expect(&self, streams: &Arc<Streams>) -> Result<ExpectedStdio> {
        if self.terminal && !self.stderr.is_empty() {
            return Err(Error::InvalidRequest("a terminal has no stderr of its own".into()));
        }
        let expect = |name: &str, text: &str| -> Result<Option<Expected>> {
            if text.is_empty() {
                return Ok(None);
            }
            let id: StreamId = text
                .parse()
                .map_err(|_| Error::InvalidRequest(format!("{name} is {text:?}, not a stream id")))?;
            streams.expect(id).map(Some)
        };
        Ok(ExpectedStdio {
            stdin: expect("stdin", &self.stdin)?,
            stdout: expect("stdout", &self.stdout)?,
            stderr: expect("stderr", &self.stderr)?,
        })
    }

    /// Makes the pipes of a process that has no terminal; a stream nobody asked for is /dev/null. The pipes
    /// belong to the process's user, or it could not open /dev/stdout.
    ///
    /// # Errors
    ///
    /// `System` where the kernel refuses.
    pub fn pipes(&self, uid: u32, gid: u32) -> Result<(Ends, ChildStdio)> {
        let mut ends = Ends::default();
        let output = |wanted: &str| -> Result<(Option<Receiver>, OwnedFd)> {
            if wanted.is_empty() {
                return Ok((None, null()?));
            }
            let (read, write) = owned_pipe(uid, gid)?;
            let read = Receiver::from_owned_fd(read).map_err(Error::io("watch a pipe"))?;
            Ok((Some(read), write))
        };
        let stdin = if self.stdin.is_empty() {
            null()?
        } else {
            let (read, write) = owned_pipe(uid, gid)?;
            ends.stdin = Some(Sender::from_owned_fd(write).map_err(Error::io("watch a pipe"))?);
            read
        };
        let (stdout_end, stdout) = output(&self.stdout)?;
        let (stderr_end, stderr) = output(&self.stderr)?;
        ends.stdout = stdout_end;
        ends.stderr = stderr_end;
        Ok((ends, [stdin, stdout, stderr]))
    }
}

impl ExpectedStdio {
    /// Waits until the shim has connected every stream of `process`.
    ///
    /// # Errors
    ///
    /// `MissingStream` with the first that was not connected within `deadline`.
    pub async fn connected(self, process: &str, deadline: Duration) -> Result<ConnectedStdio> {
        let until = Instant::now() + deadline;
        let connect = async |stream: &'static str, expected: Option<Expected>| {
            let Some(expected) = expected else { return Ok(None) };
            let id = expected.id().to_string();
            let left = until.saturating_duration_since(Instant::now());
            match expected.connected(left).await {
                Some(socket) => Ok(Some(socket)),
                None => Err(Error::MissingStream {
                    stream,
                    id,
                    process: process.to_owned(),
                    seconds: deadline.as_secs(),
                }),
            }
        };
        Ok(ConnectedStdio {
            stdin: connect("stdin", self.stdin).await?,
            stdout: connect("stdout", self.stdout).await?,
            stderr: connect("stderr", self.stderr).await?,
        })
    }
}

impl ConnectedStdio {
    /// Starts copying between the streams and the process.
    pub fn copy(self, ends: Ends) -> Copies {
        let mut copies = Copies::default();
        if let (Some(socket), Some(sink)) = (self.stdin, ends.stdin) {
            let close = Arc::clone(&copies.close_stdin);
            copies.stdin = Some(tokio::spawn(copy_input(socket, sink, close)));
        }
        for (socket, source) in [(self.stdout, ends.stdout), (self.stderr, ends.stderr)] {
            if let (Some(socket), Some(source)) = (socket, source) {
                copies.outputs.push(tokio::spawn(copy_output(source, socket)));
            }
        }
        copies
    }
}

impl Ends {
    /// The ends of a terminal, given its pty master.
    ///
    /// # Errors
    ///
    /// `System` or `Io` where the kernel refuses.
    pub fn of_terminal(master: &OwnedFd) -> Result<Self> {
        let flags = fcntl(master, FcntlArg::F_GETFL).map_err(Error::system("read the terminal's flags"))?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(master, FcntlArg::F_SETFL(flags)).map_err(Error::system("make the terminal non-blocking"))?;
        let duplicate = || master.try_clone().map_err(Error::io("duplicate the terminal"));
        // Unchecked: a pty master is not a pipe, but it is read, written and polled like one.
        Ok(Self {
            stdin: Some(
                Sender::from_owned_fd_unchecked(duplicate()?).map_err(Error::io("watch the terminal"))?,
            ),
            stdout: Some(
                Receiver::from_owned_fd_unchecked(duplicate()?).map_err(Error::io("watch the terminal"))?,
            ),
            stderr: None,
        })
    }
}

impl Copies {
    /// Closes the process's standard input once it has got what has arrived so far.
    pub fn close_stdin(&self) {
        self.close_stdin.notify_one();
    }

    /// Waits until all output has reached the shim, then ends what still copies.
    pub async fn finish(mut self, deadline: Duration) {
        let until = Instant::now() + deadline;
        for output in &mut self.outputs {
            if timeout_at(until, &mut *output).await.is_err() {
                output.abort();
            }
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for copy in self.stdin.iter().chain(&self.outputs) {
            copy.abort();
        }
    }
}

/// Copies until the shim ends its stream, `close` is notified or nobody reads any more.
async fn copy_input(mut socket: Socket, mut sink: Sender, close: Arc<Notify>) {
    let mut buffer = Vec::with_capacity(BUFFER_SIZE);
    loop {
        buffer.clear();
        // What has arrived goes first.
        let read = tokio::select! {
            biased;
            read = socket.read_buf(&mut buffer) => read,
            () = close.notified() => return,
        };
        if !matches!(read, Ok(1..)) || sink.write_all(&buffer).await.is_err() {
            return;
        }
    }
}

/// Copies until every writer has closed its end, then tells the shim so.
async fn copy_output(source: Receiver, mut socket: Socket) {
    while source.readable().await.is_ok() {
        // Held only while there is something to copy: most streams are silent most of the time.
        let mut buffer = Vec::with_capacity(BUFFER_SIZE);
        loop {
            buffer.clear();
            match source.try_read_buf(&mut buffer) {
                Ok(0) => return finish_output(socket).await,
                Ok(_) => {
                    if socket.write_all(&buffer).await.is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // EIO: the last process has closed its side of the terminal.
                Err(_) => return finish_output(socket).await,
            }
        }
    }
}

async fn finish_output(mut socket: Socket) {
    // The shim may have gone first.
    let _ = socket.shutdown().await;
}

fn owned_pipe(uid: u32, gid: u32) -> Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(Error::system("make a pipe"))?;
    // Both ends are one inode.
    fchown(read.as_fd(), Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
        .map_err(Error::system("give a pipe to the process's user"))?;
    Ok((read, write))
}

fn null() -> Result<OwnedFd> {
    open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).map_err(|errno: Errno| Error::File {
        operation: "open",
        path: "/dev/null".into(),
        source: io::Error::from(errno),
    })
}
