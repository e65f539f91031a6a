use std::io;

/// What can go wrong between the shim and the VMM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The packet could not be sent.
    #[error("cannot send on the VMM control socket: {0}")]
    Send(#[source] io::Error),
    /// The packet could not be received.
    #[error("cannot receive on the VMM control socket: {0}")]
    Receive(#[source] io::Error),
    /// The other process closed the socket, which it does only by ending.
    #[error("the VMM control socket is closed: the other process has ended")]
    Closed,
    /// A packet was longer than a frame may be, or carried more descriptors than one may.
    #[error("a frame on the VMM control socket is too large (more than {limit} {unit})")]
    TooLarge {
        /// The limit that was exceeded.
        limit: usize,
        /// What it counts.
        unit: &'static str,
    },
    /// The packet is not a message of this protocol.
    #[error("malformed frame on the VMM control socket: {0}")]
    Malformed(#[source] serde_json::Error),
    /// The VMM could not do what it was asked.
    #[error("VMM: {operation}: {reason}")]
    Refused {
        /// The request that was refused.
        operation: &'static str,
        /// The VMM's own words.
        reason: String,
    },
    /// The VMM did not answer in time.
    #[error("VMM: {operation}: no answer within {seconds} s")]
    Timeout {
        /// The request that was not answered.
        operation: &'static str,
        /// The deadline, in seconds.
        seconds: u64,
    },
}

/// The result of an exchange with the VMM.
pub type Result<T> = std::result::Result<T, Error>;
