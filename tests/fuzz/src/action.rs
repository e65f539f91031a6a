//! What a guest and its host do, as bytes that a fuzzer can change one by one: a tag and little-endian fields, from
//! front to back, so that what follows a change keeps its meaning.

use arbitrary::{Arbitrary, Result, Unstructured};

/// The longest payload of a chain's piece, in bytes.
const MAX_PAYLOAD: u16 = 0x7fff;

/// The most pieces of a chain.
const MAX_PIECES: u8 = 16;

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The driver does everything from reset to DRIVER_OK as it should, with those of these features that there are.
    Start(u64),
    /// It writes any of the registers, by the number of its word.
    WriteRegister(u8, u32),
    /// It reads so many bytes at an offset.
    Read(u16, u8),
    /// It makes a chain available in a queue.
    Chain(u8, Vec<Piece>),
    /// It writes something somewhere in an area that belongs to a queue.
    Write(u8, Area, u16, Vec<u8>),
    /// It says how many chains there are in a queue.
    SetAvailable(u8, u16),
    /// It kicks a queue.
    Kick(u8),
    /// The device works until it has nothing more to do.
    Run,
    /// The driver resets the device.
    Reset,
    /// The machine stops for a moment.
    PauseAndResume,
    /// Somebody on the host's side does something that has a number.
    Host(u8, Vec<u8>),
}

/// One descriptor of a chain, and what it points to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// A buffer with these bytes.
    Readable(Vec<u8>),
    /// A buffer of so many bytes, up to 64 MiB, for the device to write.
    Writable(u32),
    /// Anything: address, length, flags and next one.
    Wild(u64, u32, u16, u16),
    /// A table in which these descriptors are, as they are.
    Table(Vec<(u64, u32, u16, u16)>),
}

/// A place in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// The descriptor table.
    Table,
    /// The available ring.
    Available,
    /// The used ring.
    Used,
    /// Where the buffers are.
    Buffers,
}

impl Action {
    /// The steps that the whole of `input` stands for.
    pub fn decode(input: &[u8]) -> Vec<Self> {
        let mut input = Unstructured::new(input);
        let mut actions = Vec::new();
        while !input.is_empty()
            && let Ok(action) = input.arbitrary()
        {
            actions.push(action);
        }
        actions
    }

    /// The input that stands for these steps.
    ///
    /// # Panics
    /// One of them cannot be said.
    pub fn encode(actions: &[Self]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for action in actions {
            action.write_to(&mut bytes);
        }
        assert_eq!(Self::decode(&bytes), actions);
        bytes
    }

    fn write_to(&self, out: &mut Vec<u8>) {
        match self {
            Self::Start(features) => {
                out.push(0);
                out.extend(features.to_le_bytes());
            }
            Self::WriteRegister(register, value) => {
                out.extend([1, *register]);
                out.extend(value.to_le_bytes());
            }
            Self::Read(offset, length) => {
                out.push(2);
                out.extend(offset.to_le_bytes());
                out.push(*length);
            }
            Self::Chain(queue, pieces) => {
                out.extend([3, *queue, pieces.len() as u8]);
                pieces.iter().for_each(|piece| piece.write_to(out));
            }
            Self::Write(queue, area, offset, bytes) => {
                out.extend([4, *queue, *area as u8]);
                out.extend(offset.to_le_bytes());
                write_bytes(out, bytes);
            }
            Self::SetAvailable(queue, index) => {
                out.extend([5, *queue]);
                out.extend(index.to_le_bytes());
            }
            Self::Kick(queue) => out.extend([6, *queue]),
            Self::Run => out.push(7),
            Self::Reset => out.push(8),
            Self::PauseAndResume => out.push(9),
            Self::Host(what, bytes) => {
                out.extend([10, *what]);
                write_bytes(out, bytes);
            }
        }
    }
}

impl<'a> Arbitrary<'a> for Action {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u8::arbitrary(input)? % 11 {
            0 => Self::Start(input.arbitrary()?),
            1 => Self::WriteRegister(input.arbitrary()?, input.arbitrary()?),
            2 => Self::Read(input.arbitrary()?, input.arbitrary()?),
            3 => {
                let queue = input.arbitrary()?;
                let count = u8::arbitrary(input)? % (MAX_PIECES + 1);
                Self::Chain(queue, (0..count).map(|_| input.arbitrary()).collect::<Result<_>>()?)
            }
            4 => Self::Write(input.arbitrary()?, input.arbitrary()?, input.arbitrary()?, read_bytes(input)?),
            5 => Self::SetAvailable(input.arbitrary()?, input.arbitrary()?),
            6 => Self::Kick(input.arbitrary()?),
            7 => Self::Run,
            8 => Self::Reset,
            9 => Self::PauseAndResume,
            _ => Self::Host(input.arbitrary()?, read_bytes(input)?),
        })
    }
}

impl Piece {
    fn write_to(&self, out: &mut Vec<u8>) {
        match self {
            Self::Readable(bytes) => {
                out.push(0);
                write_bytes(out, bytes);
            }
            Self::Writable(length) => {
                out.push(1);
                out.extend(length.to_le_bytes());
            }
            Self::Wild(address, length, flags, next) => {
                out.push(2);
                write_descriptor(out, (*address, *length, *flags, *next));
            }
            Self::Table(descriptors) => {
                out.extend([3, descriptors.len() as u8]);
                descriptors.iter().for_each(|descriptor| write_descriptor(out, *descriptor));
            }
        }
    }
}

impl<'a> Arbitrary<'a> for Piece {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u8::arbitrary(input)? % 4 {
            0 => Self::Readable(read_bytes(input)?),
            1 => Self::Writable(u32::arbitrary(input)? % (64 << 20)),
            2 => Self::Wild(input.arbitrary()?, input.arbitrary()?, input.arbitrary()?, input.arbitrary()?),
            _ => {
                let count = u8::arbitrary(input)? % (MAX_PIECES + 1);
                Self::Table((0..count).map(|_| input.arbitrary()).collect::<Result<_>>()?)
            }
        })
    }
}

impl<'a> Arbitrary<'a> for Area {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u8::arbitrary(input)? % 4 {
            0 => Self::Table,
            1 => Self::Available,
            2 => Self::Used,
            _ => Self::Buffers,
        })
    }
}

fn write_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    let length = u16::try_from(bytes.len()).expect("a payload is short");
    out.extend(length.to_le_bytes());
    out.extend(bytes);
}

fn read_bytes(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let length = usize::from(u16::arbitrary(input)? % (MAX_PAYLOAD + 1));
    Ok(input.bytes(length.min(input.len()))?.to_vec())
}

fn write_descriptor(out: &mut Vec<u8>, (address, length, flags, next): (u64, u32, u16, u16)) {
    out.extend(address.to_le_bytes());
    out.extend(length.to_le_bytes());
    out.extend(flags.to_le_bytes());
    out.extend(next.to_le_bytes());
}
