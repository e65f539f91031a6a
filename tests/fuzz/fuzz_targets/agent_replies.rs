//! What an agent says: its announcement, its answers, its events, and anything else on its connection.

#![no_main]

use std::time::Duration;

use arbitrary::Unstructured;
use containerd_shim_protos::api::{PidsRequest, StateRequest};
use libfuzzer_sys::fuzz_target;
use mayu_fuzz::{open_files, plant, runtime};
use mayu_shim::agent::{Agent, read_hello};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;
use ttrpc::context::Context;

/// By the runtime's clock, which goes on whenever there is nothing else to do.
const DEADLINE: Duration = Duration::from_secs(5);

/// More than any message to the user has, in bytes.
const MAX_MESSAGE: usize = 8192;

/// Types of messages, and the flag of a stream's end (ttrpc's PROTOCOL.md).
const RESPONSE: u8 = 2;
const DATA: u8 = 3;

/// One thing that the agent says.
#[derive(Clone, Debug)]
enum Step {
    /// Its announcement.
    Hello(Vec<u8>),
    /// An answer to the call of that number, whose payload this is.
    Payload(u8, Vec<u8>),
    /// An answer with its status.
    Answer(u8, Vec<u8>),
    /// An event, with its flags.
    Event(u8, Vec<u8>),
    /// Bytes that may be no message.
    Raw(Vec<u8>),
}

fuzz_target!(init: plant(seeds()), |input: &[u8]| {
    let steps = decode(input);
    let before = open_files();
    runtime().block_on(converse(steps));
    assert_eq!(open_files(), before);
});

async fn converse(steps: Vec<Step>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let agent = Agent::new(ours, DEADLINE);
    let mut fake = Fake { stream: theirs, later: Vec::new() };
    for step in steps {
        match step {
            Step::Hello(bytes) => check(read_hello(&mut bytes.as_slice()).await),
            Step::Payload(call, payload) => ask(&agent, &mut fake, call, &wrapped(&payload)).await,
            Step::Answer(call, response) => ask(&agent, &mut fake, call, &response).await,
            Step::Event(flags, payload) => fake.later.push((Some(flags), payload)),
            Step::Raw(bytes) => fake.later.push((None, bytes)),
        }
    }
    let (events, ()) = tokio::join!(agent.events(), fake.finish());
    if let Ok(mut events) = events {
        while let Ok(Some(_)) = events.recv().await {}
    }
    drop(fake);
    assert!(agent.health().await.is_err());
}

/// Makes a call, which the agent answers.
async fn ask(agent: &Agent, fake: &mut Fake, call: u8, response: &[u8]) {
    let (state, pids) = (StateRequest::default(), PidsRequest::default());
    match call % 4 {
        0 => check(tokio::join!(agent.health(), fake.answer(response)).0),
        1 => check(tokio::join!(agent.resize(2), fake.answer(response)).0),
        2 => {
            let call = agent.task("state", async |task| task.state(Context::default(), &state).await);
            check(tokio::join!(call, fake.answer(response)).0);
        }
        _ => {
            let call = agent.task("pids", async |task| task.pids(Context::default(), &pids).await);
            check(tokio::join!(call, fake.answer(response)).0);
        }
    }
}

/// What goes into a log and to the user is short, and nothing that moves a cursor.
fn check<T>(result: mayu_shim::Result<T>) {
    if let Err(error) = result {
        let message = error.to_string();
        assert!(message.len() <= MAX_MESSAGE, "{} bytes", message.len());
        assert!(!message.contains(|c: char| c.is_control() && c != '\n'), "{message:?}");
    }
}

/// The agent.
struct Fake {
    stream: UnixStream,
    /// What it says on the stream of events: bytes in a message with these flags, or as they are.
    later: Vec<(Option<u8>, Vec<u8>)>,
}

impl Fake {
    /// Answers the next request.
    async fn answer(&mut self, response: &[u8]) {
        if let Some(stream_id) = self.request().await {
            self.say(stream_id, RESPONSE, 0, response).await;
        }
    }

    /// Answers the next request with all events, and hangs up.
    async fn finish(&mut self) {
        let Some(stream_id) = self.request().await else {
            return;
        };
        for (flags, bytes) in std::mem::take(&mut self.later) {
            match flags {
                Some(flags) => self.say(stream_id, DATA, flags, &bytes).await,
                None => self.write(&bytes).await,
            }
        }
        // A shim that has hung up already has no need of it.
        let _ = self.stream.shutdown().await;
    }

    /// The number of the next request's stream; none where the shim has hung up, or asks for nothing.
    async fn request(&mut self) -> Option<u32> {
        let length = timeout(DEADLINE, self.stream.read_u32()).await.ok()?.ok()?;
        let stream_id = self.stream.read_u32().await.ok()?;
        let mut rest = vec![0; length as usize + 2];
        self.stream.read_exact(&mut rest).await.ok()?;
        Some(stream_id)
    }

    async fn say(&mut self, stream_id: u32, kind: u8, flags: u8, payload: &[u8]) {
        let mut message = (payload.len() as u32).to_be_bytes().to_vec();
        message.extend(stream_id.to_be_bytes());
        message.extend([kind, flags]);
        message.extend(payload);
        self.write(&message).await;
    }

    async fn write(&mut self, bytes: &[u8]) {
        // As above.
        let _ = self.stream.write_all(bytes).await;
    }
}

/// A ttrpc `Response` without a status: field 2 holds the payload.
fn wrapped(payload: &[u8]) -> Vec<u8> {
    let (low, high) = (payload.len() as u8 & 0x7f | 0x80, (payload.len() >> 7) as u16);
    let mut response = vec![0x12, low, high as u8 & 0x7f | 0x80, (high >> 7) as u8];
    response.extend(payload);
    response
}

fn decode(input: &[u8]) -> Vec<Step> {
    let mut input = Unstructured::new(input);
    let mut steps = Vec::new();
    while !input.is_empty()
        && let Ok((kind, length)) = input.arbitrary::<(u8, u16)>()
        && let Ok(bytes) = input.bytes(usize::from(length).min(input.len()))
    {
        let (kind, detail, bytes) = (kind % 5, kind / 5, bytes.to_vec());
        steps.push(match kind {
            0 => Step::Hello(bytes),
            1 => Step::Payload(detail, bytes),
            2 => Step::Answer(detail, bytes),
            3 => Step::Event(detail, bytes),
            _ => Step::Raw(bytes),
        });
    }
    steps
}

fn seeds() -> Vec<Vec<u8>> {
    let hello = format!("{{\"version\":\"{}\",\"kernel_us\":7,\"agent_us\":8}}\n", env!("CARGO_PKG_VERSION"));
    // Protobuf: strings of fields 1 and 2, a number of field 3 and one of field 5.
    let message = b"\x0a\x02c1\x12\x04exec\x18\x89\x01\x28\x2a".to_vec();
    let status = b"\x0a\x0b\x08\x05\x12\x07missing".to_vec();
    let exit = [b"\x0a\x0e".as_slice(), &message].concat();
    // A frame of four bytes for stream 1, and one that would be of 4 GiB.
    let frame = b"\0\0\0\x04\0\0\0\x01\x02\0\x12\x02\x0a\0".to_vec();
    let huge = b"\xff\xff\xff\xff\0\0\0\x01\x02\0more".to_vec();
    let encode = |steps: &[(u8, &[u8])]| {
        steps.iter().fold(Vec::new(), |mut bytes, (kind, payload)| {
            bytes.push(*kind);
            bytes.extend((payload.len() as u16).to_le_bytes());
            bytes.extend(*payload);
            bytes
        })
    };
    vec![
        encode(&[(0, hello.as_bytes()), (1, b"\x08\x07"), (6, b""), (11, &message), (16, &message)]),
        encode(&[(2, &status), (3, &exit), (3, b"\x12\x04\x0a\x02c1"), (8, b"")]),
        encode(&[(0, b"hello"), (3, &exit), (4, &frame), (4, &huge)]),
    ]
}
