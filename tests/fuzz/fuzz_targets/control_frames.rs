//! Packets on the control socket between shim and VMM, either of which may have been taken over.

#![no_main]

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use mayu_fuzz::{open_files, plant, runtime};
use mayu_vmm_api::{
    Event, ExitReason, MAX_FDS, MAX_FRAME, Message, Reply, Request, Status, VmmClient, receive, send,
};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};

const DEADLINE: Duration = Duration::from_secs(5);

/// The most descriptors with a packet: two more than there may be.
const DESCRIPTORS: usize = MAX_FDS + 2;

fuzz_target!(init: plant(seeds()), |input: &[u8]| {
    let packets = decode(input);
    let before = open_files();
    to_either(&packets);
    to_the_shim(&packets);
    assert_eq!(open_files(), before);
});

/// Each packet's bytes and how many descriptors come with it.
fn decode(input: &[u8]) -> Vec<(usize, &[u8])> {
    let mut input = Unstructured::new(input);
    let packet = |input: &mut Unstructured<'_>| -> Result<(usize, usize)> {
        Ok((
            usize::from(input.arbitrary::<u8>()?) % (DESCRIPTORS + 1),
            usize::from(input.arbitrary::<u16>()?),
        ))
    };
    let mut packets = Vec::new();
    while !input.is_empty()
        && let Ok((descriptors, length)) = packet(&mut input)
        && let Ok(bytes) = input.bytes(length.min(input.len()))
    {
        packets.push((descriptors, bytes));
    }
    packets
}

/// What is understood can be said again, and is understood as the same.
fn to_either(packets: &[(usize, &[u8])]) {
    for &(descriptors, bytes) in packets {
        let (ours, theirs) = pair();
        put(&theirs, descriptors, bytes);
        let Ok((message, received)) = receive(&ours) else {
            continue;
        };
        assert_eq!(received.len(), descriptors);
        send(&theirs, &message, &[]).unwrap();
        assert_eq!(receive(&ours).unwrap().0, message);
    }
}

/// The shim's client gets all packets at once, and what it asks for comes to an end.
fn to_the_shim(packets: &[(usize, &[u8])]) {
    runtime().block_on(async {
        let (ours, theirs) = pair();
        let (client, mut events) = VmmClient::new(ours, DEADLINE).unwrap();
        packets.iter().for_each(|&(descriptors, bytes)| put(&theirs, descriptors, bytes));
        let (resumed, status) = tokio::join!(client.request(Request::Resume, &[]), client.status());
        for error in [resumed.err(), status.err()].into_iter().flatten() {
            assert!(error.to_string().len() <= 2 * MAX_FRAME);
        }
        drop(theirs);
        while events.recv().await.is_some() {}
        assert!(client.request(Request::Pause, &[]).await.is_err());
    });
}

fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
}

/// Sends a packet, or loses it where the socket is full.
fn put(socket: &OwnedFd, descriptors: usize, bytes: &[u8]) {
    let file = File::open("/dev/null").unwrap();
    let files = vec![file.as_raw_fd(); descriptors];
    let control = [ControlMessage::ScmRights(&files)];
    let control = if descriptors == 0 { &[] } else { &control[..] };
    let _ = sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None);
}

fn seeds() -> Vec<Vec<u8>> {
    // The numbers of the first requests that the client sends.
    let reply = |id, body| Message::Reply { id, body };
    let event = |body| Message::Event { body };
    let request = |body| Message::Request { id: 1, body };
    let error = Reply::Error { reason: "no such slot".into() };
    let status = Status { running: true, guest_entry_us: Some(7), ..Status::default() };
    let conversations = [
        vec![
            (0, event(Event::Started { pid: 7 })),
            (0, reply(1, Reply::Ok)),
            (0, reply(2, Reply::Status(status))),
        ],
        vec![(0, reply(1, error)), (1, event(Event::VsockAccepted { port: 1024 })), (0, reply(2, Reply::Ok))],
        vec![
            (0, event(Event::Exited(ExitReason::GuestReset))),
            (0, event(Event::Exited(ExitReason::Failed("KVM".into())))),
        ],
        vec![
            (1, request(Request::VsockConnect { port: 7 })),
            (1, request(Request::AttachBlock { slot: 1, read_only: true })),
        ],
        vec![(0, request(Request::ResizeMemory { memory_mib: 512 })), (9, request(Request::Shutdown))],
        vec![(5, request(Request::Build(serde_json::from_str(CONFIG).unwrap())))],
    ];
    let encode = |conversation: Vec<(u8, Message)>| {
        conversation.into_iter().fold(Vec::new(), |mut bytes, (descriptors, message)| {
            let text = serde_json::to_vec(&message).unwrap();
            bytes.push(descriptors);
            bytes.extend((text.len() as u16).to_le_bytes());
            bytes.extend(text);
            bytes
        })
    };
    conversations.into_iter().map(encode).collect()
}

/// A machine.
const CONFIG: &str = r#"{"sandbox_id": "pod", "vcpus": 1, "max_vcpus": 4, "memory_mib": 256, "max_memory_mib": 4096,
    "net_slots": 1, "guest_cid": 3, "kernel_args": "quiet", "host_ports": [1024], "uid": 64646,
    "net_limit": {"bandwidth": 1000, "operations": null, "burst_ms": 1000},
    "block_limit": {"bandwidth": null, "operations": 7, "burst_ms": 1}, "made_of": {"kernel": "6.12"}}"#;
