//! What a guest touches of its memory after it has gone on from where it was saved.

use serde::{Deserialize, Serialize};

/// Pages of guest memory, of 4 KiB, by their place in the file in which it was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// The first one's number.
    pub first: u32,
    /// How many, one after the other.
    pub count: u32,
    /// Whether the guest writes to them.
    pub written: bool,
}

/// What one machine has touched until the end of its first container, for those after it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// Until its agent answered. What it has only read then costs a guest no more than to have it mapped, and is left out.
    pub answer: Vec<Pages>,
    /// From then on: [`Request::Prefetch`](crate::Request::Prefetch) has it mapped before the guest runs into it.
    pub container: Vec<Pages>,
}

impl WorkingSet {
    /// As it is kept in a file, in postcard's format (<https://postcard.jamesmunns.com/wire-format>).
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn to_bytes(&self) -> std::io::Result<Vec<u8>> {
        postcard::to_stdvec(self).map_err(std::io::Error::other)
    }

    /// Reads what [`WorkingSet::to_bytes`] has written.
    ///
    /// # Errors
    /// It is something else.
    pub fn from_bytes(bytes: &[u8]) -> std::io::Result<Self> {
        postcard::from_bytes(bytes).map_err(std::io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_it_was_written_and_nothing_else_is() {
        let pages = |first, written| Pages { first, count: 3, written };
        let set = WorkingSet {
            answer: vec![pages(3, true)],
            container: vec![pages(7, true), pages(0, false), pages(90_000, true)],
        };
        let bytes = set.to_bytes().unwrap();
        assert_eq!(WorkingSet::from_bytes(&bytes).unwrap(), set);
        assert!(WorkingSet::from_bytes(&bytes[1..]).is_err());
        assert!(WorkingSet::from_bytes(&[0xff; 64]).is_err());
    }
}
