//! One FUSE request in a descriptor chain.

use std::io::Write;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use virtio_queue::DescriptorChain;
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::QUEUE_SIZE;
use super::share::Share;
use crate::devices::virtio::chain::Chain;

/// The most that the driver may send or have sent in one request: 1 MiB of data, which is what the reply to INIT
/// tells it (`MAX_REQ_PAGES` of fuse-backend-rs), and the structs before it.
const MAX_REQUEST: usize = (1 << 20) + 4096;

/// The length of an answer that says nothing but whether there was an error.
const OUT_HEADER: u32 = size_of::<OutHeader>() as u32;

/// A request whose buffers lie in guest memory and are of a sane size. Their content is not checked yet, and may
/// change at any time: whoever reads it reads it once.
pub(super) struct Request<'a> {
    header: InHeader,
    reader: Reader<'a>,
    writer: VirtioFsWriter<'a>,
}

impl<'a> Request<'a> {
    /// None for a chain that breaks the rules of virtio, is too long, or has no FUSE header.
    pub(super) fn parse(
        memory: &'a GuestMemoryMmap,
        chain: DescriptorChain<&'a GuestMemoryMmap>,
    ) -> Option<Self> {
        Chain::walk(memory, chain.clone(), QUEUE_SIZE)?;
        let reader = Reader::from_descriptor_chain(memory, chain.clone()).ok()?;
        let writer = VirtioFsWriter::new(memory, chain).ok()?;
        if reader.available_bytes() > MAX_REQUEST || writer.available_bytes() > MAX_REQUEST {
            return None;
        }
        let header = reader.clone().read_obj().ok()?;
        Some(Self { header, reader, writer })
    }

    /// The user for whom the driver asks.
    pub(super) fn uid(&self) -> u32 {
        self.header.uid
    }

    /// The group for whom the driver asks.
    pub(super) fn gid(&self) -> u32 {
        self.header.gid
    }

    /// Has the request done, and says how many bytes were written to answer it. A request that makes no sense is
    /// refused, with as many bytes as the error says.
    pub(super) fn serve(self, server: &Server<Arc<Share>>) -> Result<u32, u32> {
        let mut refusal = self.writer.clone();
        let has_room = refusal.available_bytes() >= size_of::<OutHeader>();
        let destroys = self.header.opcode == Opcode::Destroy as u32;
        match server.handle_message(self.reader, self.writer.into(), None, None) {
            // fuse-backend-rs answers this request, but does not count the answer.
            Ok(_) if destroys && has_room => Ok(OUT_HEADER),
            Ok(written) => Ok(u32::try_from(written).unwrap_or(u32::MAX)),
            Err(_) => Err(refuse(&mut refusal, self.header.unique)),
        }
    }
}

/// Answers EINVAL, if there is room for an answer.
fn refuse(writer: &mut VirtioFsWriter<'_>, unique: u64) -> u32 {
    let header = OutHeader { len: OUT_HEADER, error: -libc::EINVAL, unique };
    writer.write_all(header.as_slice()).map_or(0, |()| OUT_HEADER)
}
