//! `mayu-vmm`: the process that holds one microVM. The shim starts it; nobody else needs to.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use landlock::RulesetStatus;
use mayu_vmm::builder::{self, FIRST_DEVICE, Parts, SHARE_TAG};
use mayu_vmm::control::{Beginning, Control, Resources, Verdict};
use mayu_vmm::devices::virtio::fs::Fs;
use mayu_vmm::error::Result;
use mayu_vmm::event_loop::EventLoop;
use mayu_vmm::jail::{self, Side};
use mayu_vmm::log::{self, RateLimit};
use mayu_vmm::machine::Machine;
use mayu_vmm::seccomp::{Confinement, Kind, Purpose};
use mayu_vmm::snapshot::{self, Snapshot};
use mayu_vmm_api::{CGROUP_ARGUMENT, Event, ExitReason, VmConfig};
use slog::{Logger, error, info, o, warn};

/// Numbers of the event loop's subscribers, up to the first device's.
const CONTROL: u16 = 0;
const VCPUS: u16 = 1;

fn main() -> ExitCode {
    let started = Instant::now();
    let argument = std::env::args().nth(1);
    if argument.as_deref() == Some("--version") {
        println!("mayu-vmm {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let log = log::to_stderr();
    let request = Control::inherit(argument.as_deref() == Some(CGROUP_ARGUMENT))
        .and_then(|mut control| Ok((control.receive_build()?, control)));
    let (log, outcome) = match request {
        Ok(((id, config, resources), control)) => {
            let log = log.new(o!("sandbox" => config.sandbox_id.clone()));
            let outcome = run(id, &config, resources, control, started, &log);
            (log, outcome)
        }
        Err(error) => (log, Err(error)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(log, "the VMM cannot go on"; "error" => %error);
            ExitCode::FAILURE
        }
    }
}

/// Builds the machine that was asked for, answers, and runs it to its end.
fn run(
    id: u64,
    config: &VmConfig,
    resources: Resources,
    mut control: Control,
    started: Instant,
    log: &Logger,
) -> Result<()> {
    let mut events = EventLoop::new()?;
    let (mut machine, landlock) = match prepare(config, resources, &mut control, &events, started, log) {
        Ok(Some(prepared)) => prepared,
        Ok(None) => return Ok(()),
        Err(error) => {
            control.answer(id, Err(error.to_string()))?;
            return Err(error);
        }
    };
    control.watch(events.registrar(CONTROL))?;
    machine.watch_exits(&events.registrar(VCPUS))?;
    control.answer(id, Ok(()))?;
    info!(log, "machine built";
        "vcpus" => config.vcpus, "memory_mib" => config.memory_mib, "landlock" => ?landlock);
    let outcome = serve(&mut machine, &mut control, &mut events, log);
    // Its threads end with the process. To wait for them first could take long: a file system of the host may hold one.
    std::mem::forget(machine);
    outcome
}

/// Enters the jail and builds the machine there. `None` means that this is the process that stays outside.
fn prepare(
    config: &VmConfig,
    resources: Resources,
    control: &mut Control,
    events: &EventLoop,
    started: Instant,
    log: &Logger,
) -> Result<Option<(Machine, RulesetStatus)>> {
    builder::check(config)?;
    let announce = |pid: nix::unistd::Pid| control.announce(Event::Started { pid: pid.as_raw() });
    let landlock = match jail::enter(resources.share, resources.cgroup, config.uid, announce)? {
        Side::Outside => return Ok(None),
        Side::Inside { landlock } => landlock,
    };
    jail::bound_memory(config.max_memory_mib)?;
    let confinement = Confinement::seccomp(match resources.beginning {
        Beginning::Template { .. } => Purpose::Save,
        Beginning::Kernel(_) | Beginning::Saved { .. } => Purpose::Run,
    })?;
    let fs = Fs::new(SHARE_TAG, jail::SHARE.as_ref(), &confinement)?;
    jail::drop_capabilities()?;
    let parts = Parts {
        kvm: resources.kvm,
        image: resources.image,
        console: resources.console,
        fs,
        on_accept: control.acceptor(),
        started,
        confinement: confinement.clone(),
    };
    let machine = match resources.beginning {
        Beginning::Kernel(kernel) => builder::build(config, kernel, None, parts, events)?,
        Beginning::Template { kernel, memory } => {
            builder::build(config, kernel, Some(&memory), parts, events)?
        }
        Beginning::Saved { state, memory, working_set } => {
            let working_set = working_set.and_then(|file| snapshot::read_working_set(file, log));
            builder::restore(config, &Snapshot::read(state)?, &memory, working_set, parts, events)?
        }
    };
    confinement.enter(Kind::EventLoop)?;
    Ok(Some((machine, landlock)))
}

/// Runs the machine until its guest, the shim or a failure ends it.
fn serve(machine: &mut Machine, control: &mut Control, events: &mut EventLoop, log: &Logger) -> Result<()> {
    let mut device_failures = RateLimit::new(8, Duration::from_secs(10));
    let reason = loop {
        match turn(machine, control, events, log, &mut device_failures) {
            Ok(Verdict::Continue) => {}
            Ok(Verdict::End(reason)) => break reason,
            Ok(Verdict::Orphaned) => {
                info!(log, "the shim has ended, and so does the machine");
                return Ok(());
            }
            Err(error) => break ExitReason::Failed(error.to_string()),
        }
    };
    let dropped = machine.finish_console();
    let mut errors = machine.status().device_errors;
    errors.retain(|_, count| *count != 0);
    info!(log, "machine ended";
        "reason" => ?reason, "console_bytes_dropped" => dropped, "device_errors" => ?errors);
    control.finish(reason)
}

/// One turn of the event loop.
fn turn(
    machine: &mut Machine,
    control: &mut Control,
    events: &mut EventLoop,
    log: &Logger,
    device_failures: &mut RateLimit,
) -> Result<Verdict> {
    for ready in events.wait()? {
        let verdict = match ready.owner {
            CONTROL => control.process(machine)?,
            VCPUS => machine.exit_reason().map_or(Verdict::Continue, Verdict::End),
            owner => {
                let device = usize::from(owner - FIRST_DEVICE);
                if let Some((name, error)) = machine.process(device, ready.event)
                    && let Some(suppressed) = device_failures.admit(Instant::now())
                {
                    warn!(log, "device failure";
                        "device" => name, "error" => %error, "suppressed" => suppressed);
                }
                Verdict::Continue
            }
        };
        if verdict != Verdict::Continue {
            return Ok(verdict);
        }
    }
    control.flush()?;
    Ok(Verdict::Continue)
}
