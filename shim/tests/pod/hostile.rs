//! An agent that lies, talks nonsense, or does not stop talking.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, KillRequest};
use futures::future::join_all;
use nix::sys::signal::{Signal, kill as signal};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, pipe};
use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tokio::time::timeout;
use ttrpc::Code;

use crate::host::Host;
use crate::{code, cx, delete, exec, shutdown, start, wait};

/// What is sent in place of the answer to Start, by the name of the behaviour.
pub const NONSENSE: [&str; 7] =
    ["oversized", "endless", "wrong-stream", "malformed", "wrong-type", "garbage", "hang-up"];

/// A frame of ttrpc: its length, its stream, its type and its flags, and what it carries
/// (<https://github.com/containerd/ttrpc/blob/main/PROTOCOL.md>).
fn frame(length: u32, stream: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    [&length.to_be_bytes()[..], &stream.to_be_bytes(), &[kind, 0], payload].concat()
}

fn nonsense(behaviour: &str, stream: u32) -> Vec<u8> {
    const RESPONSE: u8 = 2;
    match behaviour {
        "oversized" => frame(5 << 20, stream, RESPONSE, &vec![0; 5 << 20]),
        "endless" => frame(u32::MAX, stream, RESPONSE, &[0; 4096]),
        "wrong-stream" => frame(2, stream + 1000, RESPONSE, &[0x12, 0]),
        "malformed" => frame(64, stream, RESPONSE, &[0xff; 64]),
        "wrong-type" => frame(2, stream, 77, &[0x12, 0]),
        "garbage" => (0..100_000u32).map(|number| ((number * 7919) >> 8) as u8).collect(),
        _ => Vec::new(),
    }
}

/// Puts itself between the shim and an agent that is as it should be, until the shim asks for the start of a process.
pub fn interpose(shim: UnixStream, behaviour: &str) -> UnixStream {
    let (agent, ours) = UnixStream::pair().unwrap();
    let behaviour = behaviour.to_owned();
    tokio::spawn(async move {
        let (mut from_shim, to_shim) = shim.into_split();
        let (mut from_agent, mut to_agent) = ours.into_split();
        let to_shim = Arc::new(Mutex::new(to_shim));
        let shared = to_shim.clone();
        tokio::spawn(async move {
            while let Some(answer) = read_frame(&mut from_agent).await {
                shared.lock().await.write_all(&answer).await.unwrap();
            }
        });
        while let Some(request) = read_frame(&mut from_shim).await {
            // The method is the second field of a request, a text.
            if !request.windows(7).any(|bytes| bytes == b"\x12\x05Start") {
                to_agent.write_all(&request).await.unwrap();
                continue;
            }
            let stream = u32::from_be_bytes(request[4..8].try_into().unwrap());
            let mut shim = to_shim.lock().await;
            // It may have enough of it half way.
            let _ = shim.write_all(&nonsense(&behaviour, stream)).await;
            if behaviour == "hang-up" {
                shim.shutdown().await.unwrap();
                return;
            }
        }
    });
    agent
}

async fn read_frame(stream: &mut OwnedReadHalf) -> Option<Vec<u8>> {
    let mut frame = vec![0; 10];
    stream.read_exact(&mut frame).await.ok()?;
    let length = u32::from_be_bytes(frame[..4].try_into().unwrap());
    frame.resize(10 + length as usize, 0);
    stream.read_exact(&mut frame[10..]).await.ok()?;
    Some(frame)
}

#[tokio::test]
async fn nonsense_in_place_of_an_answer_fails_the_request_and_nothing_else() {
    let attempts = NONSENSE.map(|behaviour| async move {
        let Some(host) = Host::new(behaviour).await else { return };
        host.task.create(cx(), &host.container("c", &["sleep"])).await.unwrap();

        let (code, message) = code(start(&host.task, "c", "").await);

        let expected = [Code::DEADLINE_EXCEEDED, Code::INTERNAL, Code::INVALID_ARGUMENT];
        assert!(expected.contains(&code), "{behaviour}: {code:?} {message}");
        assert!(!message.is_empty() && message.len() < 8192, "{behaviour}: {} bytes", message.len());
        host.pod.tear_down().await;
        host.assert_nothing_left();
    });
    join_all(attempts).await;
}

#[tokio::test]
async fn an_agent_that_never_answers_costs_one_deadline() {
    let Some(host) = Host::new("quick").await else { return };
    host.task.create(cx(), &host.container("c", &["never"])).await.unwrap();

    let (late, message) = code(start(&host.task, "c", "").await);

    assert_eq!(late, Code::DEADLINE_EXCEEDED);
    assert!(message.contains("5 s"), "{message}");
    host.pod.tear_down().await;
    host.assert_nothing_left();
}

/// Its connections stay open, and nobody asks for anything.
#[tokio::test]
async fn a_guest_that_stands_still_is_ended() {
    let Some(host) = Host::new("quick").await else { return };
    host.task.create(cx(), &host.container("c", &["sleep"])).await.unwrap();
    start(&host.task, "c", "").await.unwrap();

    signal(Pid::from_raw(host.vmm()), Signal::SIGSTOP).unwrap();

    assert_eq!(wait(&host.task, "c", "").await, 137);
    assert_eq!(delete(&host.task, "c", "").await.unwrap(), 137);
    shutdown(&host).await;
}

/// A hundred thousand ends of processes that live, that are not there, and that are somebody else's.
#[tokio::test]
async fn a_flood_of_events_is_bounded_and_each_end_is_told_once() {
    let Some(mut host) = Host::new("").await else { return };
    host.task.create(cx(), &host.container("d", &["sleep"])).await.unwrap();
    host.task.create(cx(), &host.container("c", &["flood"])).await.unwrap();
    let tasks = Handle::current().metrics().num_alive_tasks();
    start(&host.task, "c", "").await.unwrap();

    assert_eq!(wait(&host.task, "c", "").await, 0);

    let more = Handle::current().metrics().num_alive_tasks().saturating_sub(tasks);
    assert!(more < 64, "{more} tasks");
    for container in ["c", "d"] {
        wait(&host.task, container, "").await;
        delete(&host.task, container, "").await.unwrap();
    }
    shutdown(&host).await;
    let mut topics = Vec::new();
    while let Ok(topic) = timeout(Duration::from_millis(200), host.event()).await {
        topics.push(topic);
    }
    let count = |wanted: &str| topics.iter().filter(|topic| topic.starts_with(wanted)).count();
    assert_eq!((count("/tasks/exit c"), count("/tasks/exit d")), (1, 1));
    assert!((1..100).contains(&count("/tasks/oom")), "{} events of a lack of memory", count("/tasks/oom"));
}

#[tokio::test]
async fn a_pid_and_an_exit_status_may_be_any_number() {
    let Some(host) = Host::new("").await else { return };
    host.task.create(cx(), &host.container("c", &["lie"])).await.unwrap();
    start(&host.task, "c", "").await.unwrap();
    assert_eq!(wait(&host.task, "c", "").await, u32::MAX);
    assert_eq!(delete(&host.task, "c", "").await.unwrap(), u32::MAX);
    shutdown(&host).await;
}

#[tokio::test]
async fn output_without_end_waits_for_its_reader_and_its_container_can_be_killed() {
    let Some(host) = Host::new("").await else { return };
    let stdout = host.fifo("stdout");
    let mut reader = pipe::OpenOptions::new().open_receiver(&stdout).unwrap();
    let request = CreateTaskRequest { stdout, ..host.container("c", &["yes"]) };
    host.task.create(cx(), &request).await.unwrap();
    start(&host.task, "c", "").await.unwrap();
    let mut some = [0; 4096];
    reader.read_exact(&mut some).await.unwrap();

    // Nobody reads any more; other requests are served as ever.
    host.task.exec(cx(), &exec("c", "e", &["exit", "3"])).await.unwrap();
    start(&host.task, "c", "e").await.unwrap();
    assert_eq!(wait(&host.task, "c", "e").await, 3);
    let kill = KillRequest { id: "c".into(), signal: 9, ..Default::default() };
    host.task.kill(cx(), &kill).await.unwrap();
    assert_eq!(wait(&host.task, "c", "").await, 137);
    delete(&host.task, "c", "").await.unwrap();
    shutdown(&host).await;
}

#[tokio::test]
async fn thousands_of_connections_are_closed() {
    let Some(host) = Host::new("connections").await else { return };
    host.task.create(cx(), &host.container("c", &["exit", "0"])).await.unwrap();
    let files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    start(&host.task, "c", "").await.unwrap();
    wait(&host.task, "c", "").await;
    assert!(files() < 512, "{} files", files());
    delete(&host.task, "c", "").await.unwrap();
    shutdown(&host).await;
}
