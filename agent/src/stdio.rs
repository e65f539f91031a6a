//! The standard streams of a process: pipes or a terminal on its side, one stream to the shim for each on
//! the other, and the copying in between.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use mayu_agent_api::StreamId;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, fchown, pipe2};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, yield_now};
use tokio::time::{Instant, timeout, timeout_at};
use ttrpc::asynchronous::transport::Socket;

use crate::error::{Error, Result};
use crate::streams::{Expected, Streams};
use crate::sys;

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
    /// What is copied to and from, for as long as it is: the process is to learn that nobody reads its output any more, or that its input
    /// has ended.
    sink: Weak<Sender>,
    stdout: Weak<Source>,
    stderr: Weak<Source>,
}

/// The agent's end of an output.
struct Source {
    pipe: Receiver,
    /// Whether something that was read has not been written to its stream yet.
    carries: AtomicBool,
}

/// A second descriptor of each of the agent's ends that was still in use, with which they outlive their copies.
#[derive(Default)]
pub struct Parked {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
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
    /// belong to `user` (and group), the process's, or it could not open /dev/stdout.
    ///
    /// # Errors
    ///
    /// `System` where the kernel refuses.
    pub fn pipes(&self, user: (u32, u32)) -> Result<(Ends, ChildStdio)> {
        let mut ends = Ends::default();
        let output = |wanted: &str| -> Result<(Option<Receiver>, OwnedFd)> {
            if wanted.is_empty() {
                return Ok((None, null()?));
            }
            let (read, write) = owned_pipe(user)?;
            let read = Receiver::from_owned_fd(read).map_err(Error::io("watch a pipe"))?;
            Ok((Some(read), write))
        };
        let stdin = if self.stdin.is_empty() {
            null()?
        } else {
            let (read, write) = owned_pipe(user)?;
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
    /// Starts copying between the streams and the process. A stream to which the process has nothing is closed, and so is an input without
    /// a stream; output without one is read and thrown away.
    pub fn copy(self, ends: Ends) -> Copies {
        let mut copies = Copies::default();
        if let (Some(socket), Some(sink)) = (self.stdin, ends.stdin) {
            let sink = Arc::new(sink);
            copies.sink = Arc::downgrade(&sink);
            copies.stdin = Some(tokio::spawn(copy_input(socket, sink, Arc::clone(&copies.close_stdin))));
        }
        copies.stdout = copies.copy_output(self.stdout, ends.stdout);
        copies.stderr = copies.copy_output(self.stderr, ends.stderr);
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
    fn copy_output(&mut self, socket: Option<Socket>, pipe: Option<Receiver>) -> Weak<Source> {
        let Some(pipe) = pipe else { return Weak::new() };
        let source = Arc::new(Source { pipe, carries: AtomicBool::new(false) });
        let watched = Arc::downgrade(&source);
        self.outputs.push(tokio::spawn(copy_output(source, socket)));
        watched
    }

    /// Whether an output may still carry something.
    pub fn are_open(&self) -> bool {
        self.outputs.iter().any(|output| !output.is_finished())
    }

    /// Whether all that a process has printed, if it prints nothing more, has been written to its streams.
    ///
    /// # Errors
    ///
    /// `System` where the kernel does not tell.
    pub fn are_drained(&self) -> Result<bool> {
        for source in [&self.stdout, &self.stderr].into_iter().filter_map(Weak::upgrade) {
            // In this order: what is read is carried from before it has left the pipe.
            let left = sys::readable_bytes(source.pipe.as_fd()).map_err(Error::system("look into a pipe"))?;
            if left > 0 || source.carries.load(Ordering::SeqCst) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Second descriptors of the process's pipes.
    ///
    /// # Errors
    ///
    /// `Io` where there are too many.
    pub fn park(&self) -> Result<Parked> {
        let duplicate =
            |end: Option<io::Result<OwnedFd>>| end.transpose().map_err(Error::io("duplicate a pipe"));
        let output = |source: &Weak<Source>| {
            duplicate(source.upgrade().map(|source| source.pipe.as_fd().try_clone_to_owned()))
        };
        Ok(Parked {
            stdin: duplicate(self.sink.upgrade().map(|sink| sink.as_fd().try_clone_to_owned()))?,
            stdout: output(&self.stdout)?,
            stderr: output(&self.stderr)?,
        })
    }

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

impl Parked {
    /// The ends of pipes again.
    ///
    /// # Errors
    ///
    /// `Io` where they cannot be watched.
    pub fn into_ends(self) -> Result<Ends> {
        let source = |end: Option<OwnedFd>| end.map(Receiver::from_owned_fd).transpose();
        let ends = || -> io::Result<Ends> {
            Ok(Ends {
                stdin: self.stdin.map(Sender::from_owned_fd).transpose()?,
                stdout: source(self.stdout)?,
                stderr: source(self.stderr)?,
            })
        };
        ends().map_err(Error::io("watch a pipe"))
    }
}

/// Copies until the shim ends its stream or nobody reads any more; or, once `close` is notified, until all has
/// been copied that had arrived.
async fn copy_input(mut socket: Socket, sink: Arc<Sender>, close: Arc<Notify>) {
    let mut buffer = Vec::with_capacity(BUFFER_SIZE);
    let mut closing = false;
    loop {
        buffer.clear();
        let read = if closing {
            // Lets the runtime look at the socket, so that what is there is found without waiting.
            yield_now().await;
            timeout(Duration::ZERO, socket.read_buf(&mut buffer)).await.unwrap_or(Ok(0))
        } else {
            tokio::select! {
                read = socket.read_buf(&mut buffer) => read,
                () = close.notified() => {
                    closing = true;
                    continue;
                }
            }
        };
        if !matches!(read, Ok(1..)) || write_all(&sink, &buffer).await.is_err() {
            return;
        }
    }
}

/// A shared pipe has no `AsyncWrite`.
async fn write_all(sink: &Sender, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        sink.writable().await?;
        match sink.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Copies until every writer has closed its end, then tells the shim so. Without a stream what is read is thrown away.
async fn copy_output(source: Arc<Source>, mut socket: Option<Socket>) {
    while source.pipe.readable().await.is_ok() {
        source.carries.store(true, Ordering::SeqCst);
        // Held only while there is something to copy: most streams are silent most of the time.
        let mut buffer = Vec::with_capacity(BUFFER_SIZE);
        loop {
            buffer.clear();
            match source.pipe.try_read_buf(&mut buffer) {
                Ok(0) => return finish_output(socket).await,
                Ok(_) => {
                    if let Some(socket) = &mut socket
                        && socket.write_all(&buffer).await.is_err()
                    {
                        return;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // EIO: the last process has closed its side of the terminal.
                Err(_) => return finish_output(socket).await,
            }
        }
        source.carries.store(false, Ordering::SeqCst);
    }
}

async fn finish_output(socket: Option<Socket>) {
    if let Some(mut socket) = socket {
        // The shim may have gone first.
        let _ = socket.shutdown().await;
    }
}

fn owned_pipe((uid, gid): (u32, u32)) -> Result<(OwnedFd, OwnedFd)> {
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::pty::openpty;
    use nix::unistd::{getegid, geteuid};
    use tokio::net::UnixStream;

    use super::*;

    fn own(request: &StdioRequest) -> (Ends, ChildStdio) {
        request.pipes((geteuid().as_raw(), getegid().as_raw())).unwrap()
    }

    fn all() -> StdioRequest {
        let stream = |number: u64| StreamId(number).to_string();
        StdioRequest { terminal: false, stdin: stream(1), stdout: stream(2), stderr: stream(3) }
    }

    fn connected() -> (ConnectedStdio, [UnixStream; 3]) {
        let (stdin, shim_stdin) = UnixStream::pair().unwrap();
        let (stdout, shim_stdout) = UnixStream::pair().unwrap();
        let (stderr, shim_stderr) = UnixStream::pair().unwrap();
        let connected = ConnectedStdio {
            stdin: Some(Socket::new(stdin)),
            stdout: Some(Socket::new(stdout)),
            stderr: Some(Socket::new(stderr)),
        };
        (connected, [shim_stdin, shim_stdout, shim_stderr])
    }

    fn writer(fd: OwnedFd) -> Sender {
        Sender::from_owned_fd(fd).unwrap()
    }

    fn reader(fd: OwnedFd) -> Receiver {
        Receiver::from_owned_fd(fd).unwrap()
    }

    #[tokio::test]
    async fn output_arrives_whole_and_ends_with_its_last_writer() {
        let (ends, [_stdin, stdout, stderr]) = own(&all());
        let (connected, [_shim_stdin, mut shim_stdout, mut shim_stderr]) = connected();
        let copies = connected.copy(ends);
        let data: Vec<u8> = (0..1_000_000_u32).map(|number| number as u8).collect();

        // More than the pipe and the socket hold: the writer is held back until the shim reads.
        let mut stdout = writer(stdout);
        let write = async {
            stdout.write_all(&data).await.unwrap();
            drop(stdout);
            drop(stderr);
        };
        let mut received = (Vec::new(), Vec::new());
        let ((), out, err) = tokio::join!(
            write,
            shim_stdout.read_to_end(&mut received.0),
            shim_stderr.read_to_end(&mut received.1)
        );

        assert_eq!((out.unwrap(), err.unwrap()), (data.len(), 0));
        assert!(received.0 == data);
        copies.finish(Duration::from_secs(60)).await;
    }

    #[tokio::test]
    async fn input_arrives_whole_and_ends_with_the_shims() {
        let (ends, [stdin, _stdout, _stderr]) = own(&all());
        let (connected, [mut shim_stdin, _shim_stdout, _shim_stderr]) = connected();
        let _copies = connected.copy(ends);
        let data: Vec<u8> = (0..1_000_000_u32).map(|number| number as u8).collect();

        let mut received = Vec::new();
        let mut stdin = reader(stdin);
        let write = async {
            shim_stdin.write_all(&data).await.unwrap();
            shim_stdin.shutdown().await.unwrap();
        };
        let ((), read) = tokio::join!(write, stdin.read_to_end(&mut received));

        assert_eq!(read.unwrap(), data.len());
        assert!(received == data);
    }

    #[tokio::test]
    async fn input_can_be_closed_after_what_has_arrived() {
        let (ends, [stdin, _stdout, _stderr]) = own(&all());
        let (connected, [mut shim_stdin, _shim_stdout, _shim_stderr]) = connected();
        shim_stdin.write_all(b"arrived").await.unwrap();
        let copies = connected.copy(ends);

        copies.close_stdin();

        let mut received = String::new();
        reader(stdin).read_to_string(&mut received).await.unwrap();
        assert_eq!(received, "arrived");
    }

    #[tokio::test]
    async fn input_that_nobody_reads_is_let_go() {
        let (ends, [stdin, _stdout, _stderr]) = own(&all());
        let (connected, [mut shim_stdin, _shim_stdout, _shim_stderr]) = connected();
        let _copies = connected.copy(ends);
        drop(stdin);

        shim_stdin.write_all(b"lost").await.unwrap();

        // The stream ends, which tells the shim.
        let mut nothing = Vec::new();
        let read = shim_stdin.read_to_end(&mut nothing).await;
        assert!(nothing.is_empty() && !matches!(read, Ok(1..)));
    }

    #[tokio::test]
    async fn output_is_drained_when_its_stream_has_all_of_it() {
        let (ends, [_stdin, stdout, _stderr]) = own(&all());
        let (connected, [_shim_stdin, mut shim_stdout, _shim_stderr]) = connected();
        let copies = connected.copy(ends);
        assert!(copies.are_drained().unwrap());

        // More than the stream holds, until the pipe is full.
        let stdout = writer(stdout);
        let mut written = 0;
        while let Ok(Ok(())) = timeout(Duration::from_millis(50), stdout.writable()).await {
            written += stdout.try_write(&[7; 4096]).unwrap_or(0);
        }
        assert!(!copies.are_drained().unwrap());

        let mut received = 0;
        while received < written {
            assert!(copies.are_open());
            received += shim_stdout.read(&mut [0; 4096]).await.unwrap();
        }
        while !copies.are_drained().unwrap() {
            yield_now().await;
        }
    }

    #[tokio::test]
    async fn parked_ends_outlive_the_shims() {
        let (ends, [stdin, stdout, stderr]) = own(&all());
        let (first, shim) = connected();
        let copies = first.copy(ends);
        let parked = copies.park().unwrap();
        drop((copies, shim));
        let (mut stdin, mut stdout) = (reader(stdin), writer(stdout));
        stdout.write_all(b"before").await.unwrap();

        let (second, [mut shim_stdin, mut shim_stdout, _shim_stderr]) = connected();
        let _copies = second.copy(parked.into_ends().unwrap());

        let mut received = [0; 6];
        shim_stdout.read_exact(&mut received).await.unwrap();
        assert_eq!(&received, b"before");
        shim_stdin.write_all(b"after").await.unwrap();
        shim_stdin.shutdown().await.unwrap();
        let mut text = String::new();
        stdin.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "after");
        drop(stderr);
    }

    #[tokio::test]
    async fn input_that_has_ended_is_not_parked() {
        let (ends, [stdin, _stdout, _stderr]) = own(&all());
        let (connected, [shim_stdin, _shim_stdout, _shim_stderr]) = connected();
        let copies = connected.copy(ends);
        drop(shim_stdin);
        reader(stdin).read_to_end(&mut Vec::new()).await.unwrap();

        let parked = copies.park().unwrap();

        assert!(parked.stdin.is_none() && parked.stdout.is_some() && parked.stderr.is_some());
    }

    #[tokio::test]
    async fn output_without_a_stream_is_thrown_away() {
        let (ends, [_stdin, stdout, _stderr]) = own(&all());
        let _copies = ConnectedStdio::default().copy(ends);

        // More than a pipe holds.
        writer(stdout).write_all(&vec![7; 1_000_000]).await.unwrap();
    }

    #[tokio::test]
    async fn a_shim_that_has_gone_lets_the_writer_know() {
        let (ends, [_stdin, stdout, _stderr]) = own(&all());
        let (connected, [_shim_stdin, shim_stdout, _shim_stderr]) = connected();
        drop(shim_stdout);
        let _copies = connected.copy(ends);

        let mut stdout = writer(stdout);
        let data = vec![0; 1_000_000];
        let result = stdout.write_all(&data).await;

        assert_eq!(result.unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn finishing_gives_up_on_what_the_shim_does_not_take() {
        let (ends, [_stdin, stdout, _stderr]) = own(&all());
        let (connected, [_shim_stdin, shim_stdout, _shim_stderr]) = connected();
        let copies = connected.copy(ends);

        copies.finish(Duration::ZERO).await;

        let mut stdout = writer(stdout);
        let data = vec![0; 1_000_000];
        assert_eq!(stdout.write_all(&data).await.unwrap_err().kind(), ErrorKind::BrokenPipe);
        drop(shim_stdout);
    }

    #[tokio::test]
    async fn a_terminal_is_copied_both_ways_and_ends_with_a_hang_up() {
        let pty = openpty(None, None).unwrap();
        let ends = Ends::of_terminal(&pty.master).unwrap();
        let (mut connected, [mut shim_stdin, mut shim_stdout, _]) = connected();
        connected.stderr = None;
        let copies = connected.copy(ends);
        shim_stdin.write_all(b"typed\n").await.unwrap();

        // The terminal echoes what is typed.
        let mut echo = [0; 7];
        shim_stdout.read_exact(&mut echo).await.unwrap();
        assert_eq!(&echo, b"typed\r\n");
        nix::unistd::write(&pty.slave, b"printed").unwrap();
        drop(pty.slave);

        let mut rest = String::new();
        shim_stdout.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "printed");
        copies.finish(Duration::from_secs(60)).await;
    }

    #[tokio::test]
    async fn a_stream_nobody_asked_for_is_dev_null() {
        let (ends, child) = own(&StdioRequest::default());

        assert!(ends.stdin.is_none() && ends.stdout.is_none() && ends.stderr.is_none());
        for fd in &child {
            let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
            assert_eq!(name, std::path::Path::new("/dev/null"));
        }
    }

    #[tokio::test]
    async fn only_stream_ids_are_expected() {
        let streams = Arc::new(Streams::default());
        let with = |request: StdioRequest| request.expect(&streams).map(drop);

        let fifo = StdioRequest { stdout: "/run/fifo".into(), ..StdioRequest::default() };
        let terminal = StdioRequest { terminal: true, stderr: "stream:9".into(), ..StdioRequest::default() };

        assert!(matches!(with(fifo), Err(Error::InvalidRequest(text)) if text.contains("/run/fifo")));
        assert!(matches!(with(terminal), Err(Error::InvalidRequest(_))));
        assert!(with(all()).is_ok());
    }

    #[tokio::test]
    async fn the_missing_stream_is_named() {
        let streams = Arc::new(Streams::default());
        let expected = StdioRequest { stderr: "stream:9".into(), ..StdioRequest::default() }.expect(&streams);

        let error = expected.unwrap().connected("container \"c\"", Duration::ZERO).await.err().unwrap();

        assert_eq!(error.to_string(), "stderr (stream:9) of container \"c\" was not connected within 0 s");
    }
}
