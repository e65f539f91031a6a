//! Streams through containerd's streaming server, by WebSocket: the protocol `v4.channel.k8s.io`, in which the first byte of
//! a message is the number of its channel (k8s.io/apimachinery, `util/remotecommand`, and k8s.io/kubelet, `pkg/cri/streaming`).

use std::io::ErrorKind;
use std::net::TcpStream;

use serde_json::Value;
use tungstenite::client::IntoClientRequest;
use tungstenite::{Error, Message, WebSocket, client};

use crate::PATIENCE;

const PROTOCOL: &str = "v4.channel.k8s.io";

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// A program's streams.
pub struct Session {
    channels: Channels,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// What a program has written when it was over, and how it ended.
#[derive(Debug)]
pub struct Finished {
    /// Its standard output, or what its terminal showed.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Its exit code.
    pub code: i64,
}

/// A connection to a port.
pub struct Forward {
    channels: Channels,
}

struct Channels(WebSocket<TcpStream>);

impl Channels {
    fn open(url: &str) -> Self {
        let address = url.strip_prefix("http://").expect("an address of the streaming server");
        let host = address.split('/').next().expect("a host");
        let stream = TcpStream::connect(host).expect("the streaming server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut request = format!("ws://{address}").into_client_request().expect("a request");
        request.headers_mut().insert("Sec-WebSocket-Protocol", PROTOCOL.parse().expect("a header"));
        let (socket, _) = client(request, stream).expect("the streaming server speaks WebSocket");
        Self(socket)
    }

    fn send(&mut self, channel: u8, bytes: &[u8]) {
        let message = [&[channel], bytes].concat();
        self.0.send(Message::Binary(message.into())).expect("the stream is open");
    }

    /// The next message that says something; none at the end.
    fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            match self.0.read() {
                Ok(Message::Binary(message)) => match &message[..] {
                    [channel, bytes @ ..] if !bytes.is_empty() => return Some((*channel, bytes.to_vec())),
                    _ => {}
                },
                Ok(Message::Close(_))
                | Err(Error::ConnectionClosed | Error::AlreadyClosed | Error::Protocol(_)) => {
                    return None;
                }
                Err(Error::Io(error)) if error.kind() == ErrorKind::ConnectionReset => return None,
                Ok(_) => {}
                Err(error) => panic!("the stream broke: {error}"),
            }
        }
    }
}

impl Session {
    pub(super) fn open(url: &str) -> Self {
        Self { channels: Channels::open(url), stdout: Vec::new(), stderr: Vec::new() }
    }

    /// Types something.
    pub fn write(&mut self, text: &str) {
        self.channels.send(STDIN, text.as_bytes());
    }

    /// Changes the size of the terminal.
    pub fn resize(&mut self, width: u16, height: u16) {
        let size = format!("{{\"Width\":{width},\"Height\":{height}}}");
        self.channels.send(RESIZE, size.as_bytes());
    }

    /// Reads until standard output has said something.
    ///
    /// # Panics
    /// The program ends before.
    pub fn read_until(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.stdout).contains(text) {
            let (channel, bytes) = self.channels.receive().expect("the program runs");
            self.keep(channel, &bytes);
        }
    }

    /// Reads to the end.
    ///
    /// # Panics
    /// It ends without a word about how the program did.
    pub fn finish(mut self) -> Finished {
        loop {
            let (channel, bytes) = self.channels.receive().expect("a status before the end");
            if channel == STATUS {
                return self.finished(&bytes);
            }
            self.keep(channel, &bytes);
        }
    }

    fn keep(&mut self, channel: u8, bytes: &[u8]) {
        match channel {
            STDOUT => self.stdout.extend_from_slice(bytes),
            STDERR => self.stderr.extend_from_slice(bytes),
            other => panic!("channel {other}: {}", String::from_utf8_lossy(bytes)),
        }
    }

    /// The status is Kubernetes' `Status` object, with the exit code as a cause of failure.
    fn finished(self, status: &[u8]) -> Finished {
        let status: Value = serde_json::from_slice(status).expect("a status");
        let code = match status["status"].as_str() {
            Some("Success") => 0,
            _ => {
                let causes = status["details"]["causes"].as_array().expect("causes of the failure");
                let code = causes.iter().find(|cause| cause["reason"] == "ExitCode").expect("an exit code");
                code["message"].as_str().and_then(|text| text.parse().ok()).expect("a number")
            }
        };
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Finished { stdout: text(&self.stdout), stderr: text(&self.stderr), code }
    }
}

impl Forward {
    pub(super) fn open(url: &str) -> Self {
        let mut channels = Channels::open(url);
        // Data and error channel both begin with the port.
        for _ in 0..2 {
            channels.receive().expect("the port");
        }
        Self { channels }
    }

    /// Sends something to the port.
    pub fn write(&mut self, bytes: &[u8]) {
        self.channels.send(0, bytes);
    }

    /// The next bytes from the port; an error in containerd's words; none at the end.
    pub fn read(&mut self) -> Option<Result<Vec<u8>, String>> {
        let (channel, bytes) = self.channels.receive()?;
        Some(if channel == 0 { Ok(bytes) } else { Err(String::from_utf8_lossy(&bytes).into_owned()) })
    }
}
