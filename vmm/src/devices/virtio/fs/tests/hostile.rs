//! What no driver sends.

use fuse_backend_rs::abi::fuse_abi::{GetxattrIn, IoctlIn, Opcode, ROOT_ID, SetxattrIn};
use libc::{EINVAL, ENOMEM, ENOSYS, ENOTTY, O_RDWR};
use proptest::prelude::*;

use super::*;
use crate::devices::virtio::testing::{LOW_MEMORY, NEEDS_RESET, NEXT, WRITE};

impl Client {
    /// Sends a request with a header that does not tell its length. FORGET and its like are not answered.
    fn send_lie(&mut self, opcode: u32, length: u32, body: &[u8]) -> Answer {
        let header = InHeader { len: length, ..self.header(opcode, ROOT_ID, body.len()) };
        match self.send(REQUESTS, &[header.as_slice(), body].concat(), BUFFER).as_slice() {
            [] => Ok(Vec::new()),
            reply => self.parse(reply),
        }
    }

    /// Makes a chain available that cannot be answered: it has to come back untouched, and count as an error.
    fn assert_returned(&mut self, chain: &[Descriptor]) {
        let errors = self.errors();
        assert!(self.send_chain(REQUESTS, chain).is_empty());
        assert_eq!(self.errors(), errors + 1);
        self.assert_serving();
    }
}

#[test]
fn unknown_requests_are_not_implemented() {
    let mut client = Client::mounted();

    for opcode in [0, 7, 19, 47, 50, 51, 52, 4096, u32::MAX] {
        let length = size_of::<InHeader>() as u32;
        assert_eq!(client.send_lie(opcode, length, &[]), Err(ENOSYS), "{opcode}");
    }
    // What the driver has to do itself.
    for opcode in [Opcode::Getlk, Opcode::Setlk, Opcode::Setlkw] {
        assert_eq!(client.call(opcode, ROOT_ID, &[&[0; 48]]), Err(ENOSYS));
    }
    for opcode in [Opcode::Access, Opcode::Bmap, Opcode::Poll, Opcode::NotifyReply] {
        assert_eq!(client.call(opcode, ROOT_ID, &[&[0; 64]]), Err(ENOSYS));
    }
    client.assert_serving();
}

#[test]
fn a_memory_window_does_not_exist() {
    let mut client = Client::mounted();

    for opcode in [Opcode::SetupMapping, Opcode::RemoveMapping] {
        assert_eq!(client.call(opcode, ROOT_ID, &[&[0xff; 64]]), Err(EINVAL));
    }
    client.assert_serving();
}

#[test]
fn half_a_header_is_no_request() {
    let mut client = Client::mounted();

    for length in [0, 1, 8, 39] {
        let chain = [Descriptor::readable(client.request, length), Descriptor::writable(client.reply, 128)];
        client.assert_returned(&chain);
    }
}

#[test]
fn a_header_that_lies_of_its_length() {
    let mut client = Client::mounted();

    for opcode in 1..=50 {
        for length in [0, 1, 39, 41, 60, 1 << 20, u32::MAX] {
            let answer = client.send_lie(opcode, length, b"name\0");
            assert!(
                answer.is_err() || opcode == Opcode::Statfs as u32 || answer == Ok(vec![]),
                "{opcode} {length}"
            );
        }
    }
    client.init().unwrap();
    client.assert_serving();
}

#[test]
fn sizes_that_no_reply_has_room_for() {
    let mut client = Client::mounted();
    let (entry, open) = client.create(ROOT_ID, "data", O_RDWR, 0o644).unwrap();
    let directory = client.open_directory(ROOT_ID).unwrap();

    assert_eq!(client.read_directory(ROOT_ID, directory, 0, u32::MAX).err(), Some(ENOMEM));
    assert!(client.read(entry.nodeid, open.fh, 0, u32::MAX).is_err());
    assert!(client.read(entry.nodeid, open.fh, u64::MAX, 1).is_err());
    assert_eq!(client.read_directory(ROOT_ID, directory, u64::MAX, 4096).err(), Some(EINVAL));
    for opcode in [Opcode::Getxattr, Opcode::Listxattr] {
        let size = GetxattrIn { size: u32::MAX, padding: 0 };
        let _ = client.call(opcode, ROOT_ID, &[size.as_slice(), b"user.none\0"]);
    }
    client.assert_serving();
}

#[test]
fn counts_that_no_request_has_room_for() {
    let mut client = Client::mounted();

    let ioctl = IoctlIn { in_size: u32::MAX, ..Default::default() };
    assert_eq!(client.call(Opcode::Ioctl, ROOT_ID, &[ioctl.as_slice()]), Err(ENOTTY));
    for count in [2, 70_000, u32::MAX] {
        let errors = client.errors();
        let request = [count.to_le_bytes().as_slice(), &[0; 20]].concat();
        let header = client.header(Opcode::BatchForget as u32, 0, request.len());
        assert!(client.send(HIGH_PRIORITY, &[header.as_slice(), &request].concat(), 0).is_empty());
        assert_eq!(client.errors(), errors + 1);
    }
    let set = SetxattrIn { size: u32::MAX, flags: 0 };
    let answer = client.call(Opcode::Setxattr, ROOT_ID, &[set.as_slice(), b"user.x\0value"]);
    assert_eq!(answer, Err(EINVAL));
    client.assert_serving();
}

#[test]
fn a_reply_that_has_no_room() {
    let mut client = Client::mounted();
    let handle = client.open_directory(ROOT_ID).unwrap();

    for opcode in 1..=50 {
        // What ends the session has no reply to speak of.
        if opcode == Opcode::Destroy as u32 || opcode == Opcode::Init as u32 {
            continue;
        }
        for room in [0, 1, 15, 16, 17] {
            let header = client.header(opcode, ROOT_ID, 72);
            let body = [handle.to_le_bytes().as_slice(), &[0; 64]].concat();
            let reply = client.send(REQUESTS, &[header.as_slice(), &body].concat(), room);
            assert!(reply.len() <= room, "{opcode}");
        }
    }
    client.assert_serving();
}

#[test]
fn requests_larger_than_agreed_are_returned() {
    let mut client = Client::mounted();
    let header = client.header(Opcode::Statfs as u32, ROOT_ID, 0);
    client.driver.write(client.request, header.as_slice());
    let (request, reply) = (client.request, client.reply);

    // The same guest memory many times over.
    let input: Vec<_> = (0..5).map(|_| Descriptor::readable(request, 1 << 20)).collect();
    client.assert_returned(&input);
    let mut output = vec![Descriptor::readable(request, 40)];
    output.extend((0..5).map(|_| Descriptor::writable(reply, 1 << 20)));
    client.assert_returned(&output);
}

#[test]
fn broken_chains_are_returned() {
    let mut client = Client::mounted();
    let header = client.header(Opcode::Statfs as u32, ROOT_ID, 0);
    client.driver.write(client.request, header.as_slice());
    let request = Descriptor::readable(client.request, 40);
    let reply = Descriptor::writable(client.reply, 128);

    client.assert_returned(&[reply, request]);
    client.assert_returned(&[request, Descriptor::writable(LOW_MEMORY, 128)]);
    client.assert_returned(&[Descriptor::readable(u64::MAX - 10, 40), reply]);
    client.assert_returned(&[request, Descriptor { flags: NEXT | WRITE, next: 9999, ..reply }]);
}

#[test]
fn a_chain_that_bites_its_tail_is_returned() {
    let mut client = Client::mounted();
    let errors = client.errors();
    client.driver.write(client.request, &[0; 40]);
    let queue = &mut client.driver.queues[1];
    queue.write_descriptor(700, Descriptor { address: client.request, length: 40, flags: NEXT, next: 700 });

    queue.publish(700);
    let used = client.driver.exchange(REQUESTS, 1);

    assert_eq!((used[0].head, used[0].length), (700, 0));
    assert_eq!(client.errors(), errors + 1);
    client.assert_serving();
}

#[test]
fn an_impossible_ring_breaks_the_device_until_it_is_reset() {
    let mut client = Client::mounted();

    client.driver.queues[1].set_avail_index(5000);
    client.driver.kick(REQUESTS);
    client.driver.run_until_broken();
    assert_ne!(client.driver.status() & NEEDS_RESET, 0);

    client.driver.start(0);
    client.init().unwrap();
    client.assert_serving();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn anything_at_all_is_survived(
        requests in prop::collection::vec(
            (0..55_u32, 0..6_u64, any::<u16>(), prop::collection::vec(any::<u8>(), 0..200), 0..300_usize),
            1..60,
        )
    ) {
        let mut client = Client::mounted();
        for (opcode, node, lie, body, room) in requests {
            let mut header = client.header(opcode, node, body.len());
            if lie < 1000 {
                header.len = u32::from(lie);
            }
            let reply = client.send(REQUESTS, &[header.as_slice(), &body].concat(), room);
            prop_assert!(reply.len() <= room);
        }
        client.init().unwrap();
        client.assert_serving();
    }

    #[test]
    fn random_bytes_are_survived(
        requests in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..60)
    ) {
        let mut client = Client::mounted();
        for request in requests {
            client.send(REQUESTS, &request, 128);
        }
        client.init().unwrap();
        client.assert_serving();
    }
}
