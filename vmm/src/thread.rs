//! Threads, each of a kind that says what it may do.

use std::io;
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};

use crate::error::{Error, Result};
use crate::seccomp::{Confinement, Kind};

/// Starts a thread, and returns when it is confined. `prepare` is what it still may do before that; `run` is its work.
///
/// # Errors
/// There is no thread to be had, or it cannot get ready.
pub fn spawn<T>(
    name: String,
    kind: Kind,
    confinement: &Confinement,
    prepare: impl FnOnce() -> io::Result<T> + Send + 'static,
    run: impl FnOnce(T) + Send + 'static,
) -> Result<JoinHandle<()>> {
    let (ready, started) = mpsc::channel();
    let confinement = confinement.clone();
    let failed = move |source| Error::Thread { kind, source };
    let serve = move || {
        let prepared = prepare().map_err(failed).and_then(|prepared| {
            confinement.enter(kind)?;
            Ok(prepared)
        });
        // Whoever starts it waits.
        match prepared {
            Ok(prepared) => {
                let _ = ready.send(Ok(()));
                run(prepared);
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        }
    };
    let thread = Builder::new().name(name).spawn(serve).map_err(failed)?;
    started.recv().unwrap_or_else(|_| Err(failed(io::ErrorKind::BrokenPipe.into())))?;
    Ok(thread)
}
