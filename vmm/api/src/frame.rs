//! One packet, one message, and its descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::{Error, Message, Result};

/// The longest packet, in bytes. A machine's description is some hundred bytes.
pub const MAX_FRAME: usize = 64 * 1024;

/// The most descriptors that one packet carries.
pub const MAX_FDS: usize = 8;

/// The most descriptors that the kernel lets one packet carry: `SCM_MAX_FD` of its include/net/scm.h.
const SCM_MAX_FD: usize = 253;

/// Sends one message with its descriptors.
///
/// # Errors
/// [`Error::TooLarge`] before anything is sent; [`Error::Send`] with the kernel's reason, `WouldBlock` included.
pub fn send(socket: impl AsFd, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<()> {
    let frame = serde_json::to_vec(message).map_err(Error::Malformed)?;
    if frame.len() > MAX_FRAME {
        return Err(Error::TooLarge { limit: MAX_FRAME, unit: "bytes" });
    }
    if fds.len() > MAX_FDS {
        return Err(Error::TooLarge { limit: MAX_FDS, unit: "descriptors" });
    }
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &control[..0] } else { &control[..] };
    sendmsg::<()>(socket.as_fd().as_raw_fd(), &[IoSlice::new(&frame)], control, MsgFlags::MSG_NOSIGNAL, None)
        .map_err(|errno| Error::Send(errno.into()))?;
    Ok(())
}

/// Receives one message with its descriptors, which are close-on-exec.
///
/// # Errors
/// [`Error::Closed`] at end of stream, [`Error::Receive`] (`WouldBlock` included), or [`Error::TooLarge`] and
/// [`Error::Malformed`] for a packet that is not of this protocol; its descriptors are closed.
pub fn receive(socket: impl AsFd) -> Result<(Message, Vec<OwnedFd>)> {
    let mut frame = vec![0; MAX_FRAME];
    // Room for all that may come: of more than that the kernel hands over a part, and nobody hears which.
    let mut control = cmsg_space!([std::os::fd::RawFd; SCM_MAX_FD]);
    let mut parts = [IoSliceMut::new(&mut frame)];
    let received =
        recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)
            .map_err(|errno| match errno {
                Errno::ECONNRESET => Error::Closed,
                errno => Error::Receive(errno.into()),
            })?;
    let fds = take_descriptors(&received)?;
    let (length, flags) = (received.bytes, received.flags);
    if flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(Error::TooLarge { limit: MAX_FRAME, unit: "bytes" });
    }
    if fds.len() > MAX_FDS {
        return Err(Error::TooLarge { limit: MAX_FDS, unit: "descriptors" });
    }
    if length == 0 {
        return Err(Error::Closed);
    }
    let message = serde_json::from_slice(&frame[..length]).map_err(Error::Malformed)?;
    Ok((message, fds))
}

#[allow(unsafe_code)]
fn take_descriptors(received: &nix::sys::socket::RecvMsg<'_, '_, ()>) -> Result<Vec<OwnedFd>> {
    let mut fds = Vec::new();
    for message in received.cmsgs().map_err(|errno| Error::Receive(io::Error::from(errno)))? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just installed these descriptors for this call, and nobody else knows them.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(fds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Event, ExitReason, Request};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::fs::File;
    use std::io::{Read, Write};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn more_descriptors_than_there_may_be_are_refused_and_closed() {
        for count in [MAX_FDS + 1, SCM_MAX_FD] {
            let (a, b) = pair();
            let (reader, writer) = nix::unistd::pipe().unwrap();
            let many = vec![writer.as_raw_fd(); count];
            let parts = [IoSlice::new(b"{}")];
            let rights = [ControlMessage::ScmRights(&many)];
            sendmsg::<()>(a.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
            drop(writer);

            assert!(matches!(receive(&b), Err(Error::TooLarge { limit: MAX_FDS, .. })));

            assert_eq!(File::from(reader).read(&mut [0]).unwrap(), 0, "nobody holds the pipe any more");
        }
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (a, b) = pair();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let message = Message::Request { id: 7, body: Request::VsockConnect { port: 1025 } };

        send(&a, &message, &[writer.as_fd()]).unwrap();
        drop(writer);
        let (received, mut fds) = receive(&b).unwrap();

        assert_eq!(received, message);
        File::from(fds.remove(0)).write_all(b"through").unwrap();
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn a_closed_socket_is_told_apart_from_an_error() {
        let (a, b) = pair();
        drop(a);
        assert!(matches!(receive(&b), Err(Error::Closed)));
    }

    #[test]
    fn garbage_is_refused_and_its_descriptors_are_closed() {
        let (a, b) = pair();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let raw = [writer.as_raw_fd()];
        sendmsg::<()>(
            a.as_raw_fd(),
            &[IoSlice::new(b"{\"kind\":\"none\"}")],
            &[ControlMessage::ScmRights(&raw)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        drop(writer);

        assert!(matches!(receive(&b), Err(Error::Malformed(_))));

        let mut rest = Vec::new();
        assert_eq!(File::from(reader).read_to_end(&mut rest).unwrap(), 0);
    }

    #[test]
    fn an_oversized_message_is_not_sent() {
        let (a, _b) = pair();
        let reason = ExitReason::Failed("x".repeat(MAX_FRAME));
        let message = Message::Event { body: Event::Exited(reason) };
        assert!(matches!(send(&a, &message, &[]), Err(Error::TooLarge { .. })));
    }
}
