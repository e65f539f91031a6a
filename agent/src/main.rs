//! The guest agent's program: PID 1, or one of its helpers.

use std::process::ExitCode;

use mayu_agent::{init, launch, pause};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next();
    // It is PID 1 as well, of another namespace than the agent.
    if name.is_some_and(|name| name == pause::PROGRAM) {
        return pause::helper::main();
    }
    // What the kernel does not know of its command line becomes arguments of PID 1, to be ignored.
    if std::process::id() == 1 {
        return init::run();
    }
    let mut arguments = arguments.map(|argument| argument.to_string_lossy().into_owned());
    match (arguments.next().as_deref(), arguments.next()) {
        (Some(launch::HELPER_ARGUMENT), None) => launch::helper::main(),
        (Some("--version" | "-V"), None) => {
            println!("mayu-agent {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!(
                "mayu-agent is the init process of mayu's virtual machines: it boots the guest it runs in, so \
                 it starts only as PID 1. Use `mayu-agent --version` to see its version."
            );
            ExitCode::FAILURE
        }
    }
}
