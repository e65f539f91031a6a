//! A process's stdin, stdout and stderr: FIFOs, files or a logger on containerd's side, vsock streams on the guest's.
//!
//! The semantics are those of `containerd-shim-runc-v2` (its `process/io.go`): FIFOs are held open at both ends, so
//! that a client may leave and another come; stdin ends only after `CloseIO`; a log URI of stdout takes both outputs.

mod logger;
mod uri;

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};
use tokio::fs::{self, OpenOptions};
use tokio::io::{AsyncWrite, AsyncWriteExt, BufReader, copy_buf};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::{Error, Result};
use logger::LoggerProcess;
use uri::Uri;

/// The size of a copy buffer, in bytes; also the default size of a pipe.
const BUFFER: usize = 64 * 1024;

/// What containerd names in Create and Exec. An empty name means that there is no such stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// A FIFO.
    pub stdin: String,
    /// A FIFO, a file, or a log URI.
    pub stdout: String,
    /// As stdout; empty with a terminal.
    pub stderr: String,
    /// Whether the process gets a pseudo-terminal.
    pub terminal: bool,
}

impl From<&CreateTaskRequest> for Endpoints {
    fn from(request: &CreateTaskRequest) -> Self {
        Self {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        }
    }
}

impl From<&ExecProcessRequest> for Endpoints {
    fn from(request: &ExecProcessRequest) -> Self {
        Self {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        }
    }
}

impl Endpoints {
    /// Which streams there are. What a terminal shows is one stream: a stderr that is named beside it stays unused, as with runc.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a log URI of an unknown kind.
    pub fn present(&self) -> Result<Present> {
        let (stdout, stderr) = match Uri::parse(&self.stdout)? {
            Uri::Binary { .. } | Uri::File(_) => (true, !self.terminal),
            Uri::Path => (!self.stdout.is_empty(), !self.terminal && !self.stderr.is_empty()),
        };
        Ok(Present { stdin: !self.stdin.is_empty(), stdout, stderr })
    }
}

type Sink = Box<dyn AsyncWrite + Send + Sync + Unpin>;

struct Stdin {
    reader: pipe::Receiver,
    /// While this is open there is a writer, so the reader sees no end although clients come and go.
    writer: pipe::Sender,
}

/// containerd's ends, opened.
#[derive(Default)]
pub struct Opened {
    stdin: Option<Stdin>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<LoggerProcess>,
}

/// The guest's ends, as many as there are opened ends on the other side.
#[derive(Debug, Default)]
pub struct Streams {
    /// Where stdin goes.
    pub stdin: Option<UnixStream>,
    /// Where stdout comes from.
    pub stdout: Option<UnixStream>,
    /// Where stderr comes from.
    pub stderr: Option<UnixStream>,
}

/// Which of the three streams a process has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Present {
    /// It has a stdin.
    pub stdin: bool,
    /// It has a stdout.
    pub stdout: bool,
    /// It has a stderr.
    pub stderr: bool,
}

impl Opened {
    /// Opens what containerd names, never waiting for anybody to open the other end. A logger is started and has
    /// `deadline` to say that it is ready.
    ///
    /// # Errors
    /// [`Error::OpenStdio`], [`Error::InvalidArgument`] for a URI of an unknown kind, [`Error::Spawn`].
    pub async fn open(endpoints: &Endpoints, id: &str, namespace: &str, deadline: Duration) -> Result<Self> {
        let mut opened = Self::default();
        match Uri::parse(&endpoints.stdout)? {
            Uri::Binary { program, arguments } => {
                let (logger, stdout, stderr) =
                    LoggerProcess::start(&program, &arguments, id, namespace, deadline).await?;
                opened.logger = Some(logger);
                opened.stdout = Some(Box::new(stdout));
                opened.stderr = (!endpoints.terminal).then(|| Box::new(stderr) as Sink);
            }
            Uri::File(path) => {
                let open =
                    || async { open_log_file(&path).await.map_err(failed("stdout", &endpoints.stdout)) };
                opened.stdout = Some(open().await?);
                opened.stderr = if endpoints.terminal { None } else { Some(open().await?) };
            }
            Uri::Path => {
                let outputs = [("stdout", &endpoints.stdout), ("stderr", &endpoints.stderr)];
                let [stdout, stderr] = outputs.map(|(name, path)| async move {
                    if path.is_empty() {
                        return Ok(None);
                    }
                    open_output(path).await.map(Some).map_err(failed(name, path))
                });
                opened.stdout = stdout.await?;
                opened.stderr = stderr.await?;
            }
        }
        // Last, with no wait behind it: a client whose input is short ends it as soon as this is open.
        if !endpoints.stdin.is_empty() {
            opened.stdin = Some(open_stdin(&endpoints.stdin).map_err(failed("stdin", &endpoints.stdin))?);
        }
        Ok(opened)
    }

    /// Copies between the two sides from now on.
    pub fn start(self, streams: Streams) -> Stdio {
        let (outputs, cancel) = (TaskTracker::new(), CancellationToken::new());
        let mut stdin_writer = None;
        if let (Some(stdin), Some(stream)) = (self.stdin, streams.stdin) {
            stdin_writer = Some(stdin.writer);
            tokio::spawn(cancel.clone().run_until_cancelled_owned(copy_in(stdin.reader, stream)));
        }
        for (sink, stream) in [(self.stdout, streams.stdout), (self.stderr, streams.stderr)] {
            if let (Some(sink), Some(stream)) = (sink, stream) {
                outputs.spawn(cancel.clone().run_until_cancelled_owned(copy_out(stream, sink)));
            }
        }
        outputs.close();
        Stdio { stdin_writer: Mutex::new(stdin_writer), outputs, cancel, logger: Mutex::new(self.logger) }
    }
}

/// The streams of a process while they are copied.
#[derive(Debug)]
pub struct Stdio {
    stdin_writer: Mutex<Option<pipe::Sender>>,
    outputs: TaskTracker,
    cancel: CancellationToken,
    logger: Mutex<Option<LoggerProcess>>,
}

impl Stdio {
    /// Lets stdin end as soon as no client has it open.
    pub fn close_stdin(&self) {
        self.stdin_writer.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Waits until both outputs have ended and are written.
    pub async fn drained(&self) {
        self.outputs.wait().await;
    }

    /// Ends all copying and the logger.
    pub fn close(&self) {
        self.close_stdin();
        self.cancel.cancel();
        if let Some(logger) = self.logger.lock().unwrap_or_else(PoisonError::into_inner).take() {
            tokio::spawn(logger.stop());
        }
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

fn failed(stream: &'static str, uri: &str) -> impl FnOnce(io::Error) -> Error {
    let uri = uri.to_string();
    move |source| Error::OpenStdio { stream, uri, source }
}

fn open_stdin(path: &str) -> io::Result<Stdin> {
    let reader = pipe::OpenOptions::new().open_receiver(path)?;
    // There is a reader now, so this does not fail with ENXIO.
    let writer = pipe::OpenOptions::new().open_sender(path)?;
    Ok(Stdin { reader, writer })
}

async fn open_output(path: &str) -> io::Result<Sink> {
    if fs::metadata(path).await?.file_type().is_fifo() {
        // Open for reading as well, so that writing does not fail while no client reads.
        return Ok(Box::new(pipe::OpenOptions::new().read_write(true).open_sender(path)?));
    }
    Ok(Box::new(OpenOptions::new().append(true).open(path).await?))
}

async fn open_log_file(path: &Path) -> io::Result<Sink> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).await?;
    }
    Ok(Box::new(OpenOptions::new().append(true).create(true).mode(0o644).open(path).await?))
}

/// Tells the guest of the end by closing one direction; the other stays until the guest has read everything and
/// closes its end.
async fn copy_in(reader: pipe::Receiver, mut stream: UnixStream) {
    let copied = copy_buf(&mut BufReader::with_capacity(BUFFER, reader), &mut stream).await;
    // Where the guest has closed its end already there is nobody to tell.
    if copied.is_ok() && stream.shutdown().await.is_ok() {
        let _ = stream.readable().await;
    }
}

async fn copy_out(stream: UnixStream, mut sink: Sink) {
    let _ = copy_buf(&mut BufReader::with_capacity(BUFFER, stream), &mut sink).await;
    let _ = sink.flush().await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use std::os::unix::fs::PermissionsExt;
    use tokio::io::AsyncReadExt;

    const DEADLINE: Duration = Duration::from_secs(10);

    struct Client {
        folder: tempfile::TempDir,
        endpoints: Endpoints,
    }

    fn client() -> Client {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let path = folder.path().join(name);
            mkfifo(&path, Mode::S_IRWXU).unwrap();
            path.display().to_string()
        };
        let endpoints =
            Endpoints { stdin: path("in"), stdout: path("out"), stderr: path("err"), terminal: false };
        Client { folder, endpoints }
    }

    /// Both sides of a process with all its streams: the copying, and what the guest holds.
    async fn start(endpoints: &Endpoints) -> (Stdio, Streams) {
        let opened = Opened::open(endpoints, "c", "ns", DEADLINE).await.unwrap();
        let present = endpoints.present().unwrap();
        let (mut ours, mut theirs) = (Streams::default(), Streams::default());
        if present.stdin {
            let (a, b) = UnixStream::pair().unwrap();
            (ours.stdin, theirs.stdin) = (Some(a), Some(b));
        }
        if present.stdout {
            let (a, b) = UnixStream::pair().unwrap();
            (ours.stdout, theirs.stdout) = (Some(a), Some(b));
        }
        if present.stderr {
            let (a, b) = UnixStream::pair().unwrap();
            (ours.stderr, theirs.stderr) = (Some(a), Some(b));
        }
        (opened.start(ours), theirs)
    }

    fn attach_reader(path: &str) -> pipe::Receiver {
        pipe::OpenOptions::new().open_receiver(path).unwrap()
    }

    #[tokio::test]
    async fn output_reaches_a_client_that_comes_after_another_has_left() {
        let client = client();
        let (stdio, mut guest) = start(&client.endpoints).await;
        let mut guest = guest.stdout.take().unwrap();
        let mut buffer = [0; 3];

        let mut first = attach_reader(&client.endpoints.stdout);
        guest.write_all(b"one").await.unwrap();
        first.read_exact(&mut buffer).await.unwrap();
        drop(first);
        guest.write_all(b"two").await.unwrap();
        let mut second = attach_reader(&client.endpoints.stdout);
        second.read_exact(&mut buffer).await.unwrap();

        assert_eq!(&buffer, b"two");
        drop(guest);
        assert_eq!(second.read(&mut buffer).await.unwrap(), 0);
        drop(stdio);
    }

    #[tokio::test]
    async fn stdin_ends_only_after_it_is_closed() {
        let client = client();
        let (stdio, mut guest) = start(&client.endpoints).await;
        let mut stdin = guest.stdin.take().unwrap();
        let attach = || pipe::OpenOptions::new().open_sender(&client.endpoints.stdin).unwrap();
        let mut buffer = [0; 3];

        attach().write_all(b"one").await.unwrap();
        stdin.read_exact(&mut buffer).await.unwrap();
        let mut second = attach();
        second.write_all(b"two").await.unwrap();
        stdin.read_exact(&mut buffer).await.unwrap();
        assert_eq!(&buffer, b"two");

        stdio.close_stdin();
        second.write_all(b"end").await.unwrap();
        drop(second);
        let mut rest = Vec::new();
        stdin.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"end");
    }

    #[tokio::test]
    async fn a_large_transfer_arrives_whole_and_drains() {
        let client = client();
        let (stdio, mut guest) = start(&client.endpoints).await;
        let sent: Vec<u8> = (0..5_000_000_u32).map(|n| (n % 251) as u8).collect();
        let mut reader = attach_reader(&client.endpoints.stdout);
        let mut stream = guest.stdout.take().unwrap();
        drop(guest.stderr.take());
        let (received, ()) = tokio::join!(
            async {
                let mut received = vec![0; sent.len()];
                reader.read_exact(&mut received).await.unwrap();
                received
            },
            async {
                stream.write_all(&sent).await.unwrap();
                drop(stream);
                stdio.drained().await;
            }
        );
        assert!(received == sent);
    }

    #[test]
    fn the_names_tell_which_streams_there_are() {
        assert_eq!(Endpoints::default().present().unwrap(), Present::default());
        let both =
            |stdout: &str, terminal| Endpoints { stdout: stdout.into(), terminal, ..Default::default() };
        let present = |stdin, stdout, stderr| Present { stdin, stdout, stderr };
        assert_eq!(both("file:///log", false).present().unwrap(), present(false, true, true));
        assert_eq!(both("file:///log", true).present().unwrap(), present(false, true, false));
        assert_eq!(both("/fifo", false).present().unwrap(), present(false, true, false));
        let stderr = |terminal| Endpoints { stderr: "/other".into(), ..both("/fifo", terminal) };
        assert_eq!(stderr(false).present().unwrap(), present(false, true, true));
        assert_eq!(stderr(true).present().unwrap(), present(false, true, false), "as CRI names it");
    }

    #[tokio::test]
    async fn what_cannot_be_opened_is_named() {
        let endpoints = Endpoints { stdout: "/nonexistent/out".into(), ..Default::default() };
        let error = Opened::open(&endpoints, "c", "ns", DEADLINE).await.err().unwrap();
        assert_eq!(
            error.to_string(),
            "open stdout \"/nonexistent/out\": No such file or directory (os error 2)"
        );
        let endpoints = Endpoints { stdin: "/dev/null".into(), ..Default::default() };
        assert!(Opened::open(&endpoints, "c", "ns", DEADLINE).await.is_err());
        let endpoints = Endpoints { stdout: "gopher://x".into(), ..Default::default() };
        assert!(matches!(
            Opened::open(&endpoints, "c", "ns", DEADLINE).await.err().unwrap(),
            Error::InvalidArgument(_)
        ));
    }

    #[tokio::test]
    async fn a_file_uri_appends_both_outputs() {
        let client = client();
        let path = client.folder.path().join("logs/both");
        let uri = format!("file://{}", path.display());
        let endpoints = Endpoints { stdout: uri.clone(), stderr: uri, ..Default::default() };
        for round in ["a", "b"] {
            let (stdio, mut guest) = start(&endpoints).await;
            guest.stdout.take().unwrap().write_all(round.as_bytes()).await.unwrap();
            guest.stderr.take().unwrap().write_all(round.as_bytes()).await.unwrap();
            stdio.drained().await;
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), "aabb");
    }

    #[tokio::test]
    async fn a_logger_gets_both_outputs_and_says_when_it_is_ready() {
        let client = client();
        let (script, log) = (client.folder.path().join("logger"), client.folder.path().join("log"));
        let text = format!(
            "#!/bin/sh\nexec >{}\necho $CONTAINER_NAMESPACE/$CONTAINER_ID $@\nexec 5>&-\ncat <&3\ncat <&4\necho end\n",
            log.display()
        );
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let uri = format!("binary://{}?key=a%20b", script.display());
        let endpoints = Endpoints { stdout: uri.clone(), stderr: uri, ..Default::default() };

        let (stdio, mut guest) = start(&endpoints).await;
        guest.stdout.take().unwrap().write_all(b"out\n").await.unwrap();
        guest.stderr.take().unwrap().write_all(b"err\n").await.unwrap();
        stdio.drained().await;
        let logger = stdio.logger.lock().unwrap().take().unwrap();
        logger.finished().await;

        assert_eq!(std::fs::read_to_string(log).unwrap(), "ns/c key a b\nout\nerr\nend\n");
    }
}
