//! `containerd-shim-mayu-v2`, as containerd runs it: `start`, `delete`, `-info`, `-v`, or no command for the server. As the server
//! runs it: `template`.

use std::io::{Read, Write};
use std::process::ExitCode;

use containerd_shim::{Flags, parse};
use mayu_shim::config::Config;
use mayu_shim::{Error, RUNTIME, Result, delete, info, log, serve, start, template};

/// Stack of the threads that mount and unmount, in bytes.
const BLOCKING_STACK: usize = 256 * 1024;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let result = parse(&arguments)
        .map_err(|error| Error::Protocol(error.to_string()))
        .and_then(|flags| run(&flags))
        .and_then(|reply| write(&reply));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{RUNTIME}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> Result<Vec<u8>> {
    if flags.version {
        return Ok(format!("{RUNTIME} {}\n", env!("CARGO_PKG_VERSION")).into_bytes());
    }
    if flags.info {
        return info::encode(&read_stdin()?);
    }
    if flags.action == "template" {
        return block_on(async {
            let log = log::logger(std::io::stderr(), "template", flags.debug);
            template::make(&Config::load()?, &log).await.map(drop)
        });
    }
    if flags.namespace.is_empty() {
        return Err(Error::Protocol("-namespace is missing".into()));
    }
    match flags.action.as_str() {
        "start" => start::run(flags),
        "delete" => delete::run(flags),
        "" => block_on(serve::run(flags)),
        other => Err(Error::Protocol(format!("unknown command {other:?}: it is one of start and delete"))),
    }
}

/// Runs to the end what has nothing to say on standard output.
fn block_on(work: impl Future<Output = Result<()>>) -> Result<Vec<u8>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_stack_size(BLOCKING_STACK)
        .build()
        .map_err(|source| Error::System { operation: "start the runtime", source })?;
    let done = runtime.block_on(work);
    // Threads that still wait for something, such as a disk, must not keep the process alive.
    runtime.shutdown_background();
    done.map(|()| Vec::new())
}

fn read_stdin() -> Result<Vec<u8>> {
    let mut input = Vec::new();
    std::io::stdin()
        .lock()
        .take(1 << 20)
        .read_to_end(&mut input)
        .map_err(|source| Error::System { operation: "read standard input", source })?;
    Ok(input)
}

fn write(reply: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(reply)
        .and_then(|()| stdout.flush())
        .map_err(|source| Error::System { operation: "write the reply", source })
}
