//! Keeps what libcontainer logs as errors. Its error values carry only the outermost reason across its
//! processes ("failed to prepare rootfs"); the one that helps ("mount /x: No such file") is in the log.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::error::{Error, Result};

/// The longest line kept, in bytes.
const MAX_LINE: usize = 1024;

/// Installs itself as the log of this process and those cloned from it; they share a pipe.
pub struct ErrorLog {
    read: File,
}

impl ErrorLog {
    /// Starts keeping errors.
    ///
    /// # Errors
    ///
    /// `System` without a pipe.
    pub fn install() -> Result<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(Error::system("make a pipe"))?;
        for end in [&read, &write] {
            // The log must never block what it is about.
            fcntl(end.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
                .map_err(Error::system("make a pipe non-blocking"))?;
        }
        // Fails only where one is installed already, which nobody does.
        let _ = tracing::subscriber::set_global_default(PipeSubscriber { write });
        Ok(Self { read: File::from(read) })
    }

    /// The first line kept, which is the innermost and most precise.
    pub fn first_line(mut self) -> Option<String> {
        let mut buffer = vec![0; MAX_LINE];
        let length = self.read.read(&mut buffer).ok()?;
        String::from_utf8_lossy(&buffer[..length]).lines().next().map(str::to_owned)
    }
}

struct PipeSubscriber {
    write: OwnedFd,
}

impl Subscriber for PipeSubscriber {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() == Level::ERROR
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let mut text = line.message;
        text.push_str(&line.fields);
        let mut text: String = text.replace('\n', " ").chars().take(MAX_LINE / 4).collect();
        text.push('\n');
        if let Ok(write) = self.write.try_clone() {
            // A full pipe holds enough.
            let _ = File::from(write).write_all(text.as_bytes());
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        // Spans are not enabled; any number will do.
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, ", {}: {value:?}", field.name())
        };
    }
}
