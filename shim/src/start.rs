//! The `start` command: starts the pod's server, or finds it, and prints its address.
//!
//! There are two protocols (containerd's `pkg/shim` and `docs/runtime-v2.md`). containerd 2.3 and later writes
//! `BootstrapParams` to standard input and reads a `BootstrapResult`. Before, everything is in flags and environment,
//! standard input holds the runtime options or nothing, and the reply is JSON. 1.7 refuses a reply of a version above
//! 2 and 2.x does not; nothing in the request tells the two apart (both say `MAX_SHIM_VERSION=2`), so the reply is
//! version 2, whose Task service has the same messages.
//!
//! containerd reads standard output and standard error together, so nothing but the reply may be written.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult, any_is};
use containerd_shim::cgroup::set_cgroup_and_oom_score;
use containerd_shim::{Flags, StartOpts};
use containerd_shim_protos::shim::oci::Options;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::json;

use crate::error::{file, system};
use crate::{Error, Result, id, log, spec};

/// The environment variable with the address of containerd's event service.
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// The longest path of a Unix socket, in bytes: `sun_path` has 108 with the final zero (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// The most that is read from standard input, as in containerd.
const MAX_INPUT: u64 = 10 << 20;

/// The file in the bundle that holds the address, for `delete`.
pub const ADDRESS_FILE: &str = "address";

/// How containerd speaks to the `start` command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Flags and environment; the reply is JSON.
    Flags,
    /// Protobuf both ways.
    Bootstrap,
}

/// What containerd says, whichever way.
#[derive(Debug)]
pub struct Params {
    opts: StartOpts,
    protocol: Protocol,
}

/// Runs the command; gives the reply for standard output.
///
/// # Errors
/// The step that failed; then there is no server and no socket.
pub fn run(flags: &Flags) -> Result<Vec<u8>> {
    let mut input = Vec::new();
    io::stdin().lock().take(MAX_INPUT).read_to_end(&mut input).map_err(system("read standard input"))?;
    let params = parse(&input, flags, env::var(TTRPC_ADDRESS).unwrap_or_default())?;
    id::validate("container", &params.opts.id)?;
    let bundle = env::current_dir().map_err(system("ask for the working directory"))?;
    let sandbox_id = spec::sandbox_id(&bundle, &params.opts.id)?;
    let address = params.opts.socket_address(&sandbox_id);
    if let Some(listener) = bind(&address)? {
        let spawned = spawn_server(&params.opts, &bundle, listener);
        if spawned.is_err() {
            unlink_socket(socket_path(&address));
        }
        spawned?;
    }
    let path = bundle.join(ADDRESS_FILE);
    fs::write(&path, &address).map_err(file("write", path))?;
    reply(&address, params.protocol)
}

/// Understands what containerd says; `ttrpc_address` is from the environment.
///
/// # Errors
/// [`Error::Protocol`].
pub fn parse(input: &[u8], flags: &Flags, ttrpc_address: String) -> Result<Params> {
    let (mut opts, protocol) = match BootstrapParams::parse_from_bytes(input) {
        // Runtime options, an `Any`, decode as well, but then these two fields are something else.
        Ok(params)
            if !input.is_empty() && params.instance_id == flags.id && params.namespace == flags.namespace =>
        {
            (StartOpts::from(params), Protocol::Bootstrap)
        }
        _ => (legacy_opts(input, flags, ttrpc_address), Protocol::Flags),
    };
    opts.debug |= flags.debug;
    if opts.ttrpc_address.is_empty() {
        return Err(Error::Protocol(format!("containerd gives no {TTRPC_ADDRESS}")));
    }
    Ok(Params { opts, protocol })
}

fn legacy_opts(input: &[u8], flags: &Flags, ttrpc_address: String) -> StartOpts {
    let options = Any::parse_from_bytes(input).ok().filter(|any| !any.type_url.is_empty());
    StartOpts {
        id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        address: flags.address.clone(),
        publish_binary: flags.publish_binary.clone(),
        ttrpc_address,
        extensions: options.into_iter().collect(),
        ..Default::default()
    }
}

/// Encodes the reply.
///
/// # Errors
/// [`Error::Protocol`].
pub fn reply(address: &str, protocol: Protocol) -> Result<Vec<u8>> {
    match protocol {
        Protocol::Flags => {
            Ok(json!({"version": 2, "address": address, "protocol": "ttrpc"}).to_string().into_bytes())
        }
        Protocol::Bootstrap => BootstrapResult {
            version: 3,
            address: address.into(),
            protocol: "ttrpc".into(),
            ..Default::default()
        }
        .write_to_bytes()
        .map_err(|error| Error::Protocol(error.to_string())),
    }
}

/// Binds the pod's socket. None means that the pod's server is there already.
fn bind(address: &str) -> Result<Option<UnixListener>> {
    let failed = |source| Error::Socket { address: address.into(), source };
    let path = socket_path(address);
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        let reason = format!("the path is longer than {MAX_SOCKET_PATH} bytes");
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, reason)));
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(file("create", parent))?;
    }
    match UnixListener::bind(path) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            // Of a server that was killed.
            unlink_socket(path);
            UnixListener::bind(path).map(Some).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

/// The server gets the listening socket as its standard input, so no connection can come too early, and the log as
/// its standard error.
fn spawn_server(opts: &StartOpts, bundle: &Path, listener: UnixListener) -> Result<()> {
    let program = env::current_exe().map_err(system("ask for the shim's own path"))?;
    let log = log::open(bundle).map_or_else(|_| Stdio::null(), |file: File| file.into());
    let failed = |source| Error::Spawn { what: "the shim server".into(), source };
    let mut child = Command::new(program)
        .args(["-namespace", &opts.namespace, "-id", &opts.id, "-address", &opts.address])
        .args(opts.debug.then_some("-debug"))
        .env(TTRPC_ADDRESS, &opts.ttrpc_address)
        .current_dir(bundle)
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(failed)?;
    let confined = options(opts)
        .and_then(|options| {
            set_cgroup_and_oom_score(child.id(), &options.shim_cgroup).map_err(|error| error.to_string())
        })
        .map_err(|reason| failed(io::Error::other(reason)));
    if confined.is_err() {
        // It may have ended already.
        let _ = child.kill();
    }
    confined
}

/// The options of runc's runtime, of which the shim's cgroup means the same here.
fn options(opts: &StartOpts) -> std::result::Result<Options, String> {
    let Some(any) = opts.extensions.iter().find(|any| any_is::<Options>(any)) else {
        return Ok(Options::default());
    };
    Options::parse_from_bytes(&any.value).map_err(|error| error.to_string())
}

/// The path in a socket's address.
pub fn socket_path(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap_or(address))
}

/// Removes a socket; fine when it is gone.
pub fn unlink_socket(path: &Path) {
    let _ = fs::remove_file(path);
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim::bootstrap::Extension;

    fn flags() -> Flags {
        Flags {
            id: "c1".into(),
            namespace: "default".into(),
            address: "/run/containerd/containerd.sock".into(),
            ..Default::default()
        }
    }

    fn runc_options() -> Any {
        let options = Options { shim_cgroup: "/shims".into(), ..Default::default() };
        let value = options.write_to_bytes().unwrap();
        Any { type_url: "containerd.runc.v1.Options".into(), value, ..Default::default() }
    }

    #[test]
    fn containerd_before_2_3_uses_flags_and_gets_json_of_version_2() {
        for input in [vec![], runc_options().write_to_bytes().unwrap()] {
            let params = parse(&input, &flags(), "/run/ttrpc".into()).unwrap();
            assert_eq!(params.protocol, Protocol::Flags);
            assert_eq!(params.opts.ttrpc_address, "/run/ttrpc");
            assert_eq!(options(&params.opts).unwrap().shim_cgroup.is_empty(), input.is_empty());
        }
        let reply: serde_json::Value =
            serde_json::from_slice(&reply("unix:///run/s/1", Protocol::Flags).unwrap()).unwrap();
        assert_eq!(reply, json!({"version": 2, "address": "unix:///run/s/1", "protocol": "ttrpc"}));
    }

    #[test]
    fn containerd_2_3_uses_protobuf_and_gets_version_3() {
        let extension = Extension { value: Some(runc_options()).into(), ..Default::default() };
        let input = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "default".into(),
            containerd_ttrpc_address: "/run/ttrpc".into(),
            containerd_grpc_address: "/run/grpc".into(),
            socket_dir: Some("/run/sockets".into()),
            extensions: vec![extension],
            ..Default::default()
        };
        let params = parse(&input.write_to_bytes().unwrap(), &flags(), String::new()).unwrap();
        assert_eq!(params.protocol, Protocol::Bootstrap);
        assert!(params.opts.socket_address("c1").starts_with("unix:///run/sockets/"));
        assert_eq!(options(&params.opts).unwrap().shim_cgroup, "/shims");
        let reply = reply("unix:///x", Protocol::Bootstrap).unwrap();
        let reply = BootstrapResult::parse_from_bytes(&reply).unwrap();
        assert_eq!((reply.version, reply.protocol.as_str()), (3, "ttrpc"));
    }

    #[test]
    fn without_a_way_for_events_there_is_no_start() {
        let error = parse(&[], &flags(), String::new()).unwrap_err();
        assert_eq!(error.to_string(), "containerd gives no TTRPC_ADDRESS");
    }

    #[test]
    fn containerds_own_socket_path_fits_and_a_longer_one_says_so() {
        let params = parse(&[], &flags(), "/run/ttrpc".into()).unwrap();
        assert!(socket_path(&params.opts.socket_address("c1")).as_os_str().len() <= MAX_SOCKET_PATH);
        let message = bind(&format!("unix:///{}", "d".repeat(MAX_SOCKET_PATH))).unwrap_err().to_string();
        assert!(message.ends_with("the path is longer than 107 bytes"), "{message}");
    }

    #[test]
    fn a_living_server_is_used_and_a_dead_ones_socket_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let address = format!("unix://{}", folder.path().join("s").display());
        let first = bind(&address).unwrap();
        assert!(first.is_some());
        assert!(bind(&address).unwrap().is_none());
        drop(first);
        assert!(bind(&address).unwrap().is_some());
    }
}
