//! The `-info` flag: what containerd may know about the runtime before there is any pod.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::{Error, RUNTIME, Result};

/// Encodes a `RuntimeInfo`. `input` is what containerd writes to standard input: the runtime's options or nothing.
///
/// # Errors
/// [`Error::Protocol`] when the options are no protobuf message.
pub fn encode(input: &[u8]) -> Result<Vec<u8>> {
    let wrong = |error: protobuf::Error| Error::Protocol(format!("runtime options: {error}"));
    let options = if input.is_empty() {
        MessageField::none()
    } else {
        MessageField::some(Any::parse_from_bytes(input).map_err(wrong)?)
    };
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() };
    RuntimeInfo { name: RUNTIME.into(), version: MessageField::some(version), options, ..Default::default() }
        .write_to_bytes()
        .map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_names_itself_its_version_and_the_options_it_got() {
        let options = Any { type_url: "x".into(), value: vec![1], ..Default::default() };
        let info = encode(&options.write_to_bytes().unwrap()).unwrap();
        let info = RuntimeInfo::parse_from_bytes(&info).unwrap();
        assert_eq!((info.name.as_str(), info.version.version.as_str()), (RUNTIME, env!("CARGO_PKG_VERSION")));
        assert_eq!(info.options.type_url, "x");
        assert!(encode(&[]).is_ok());
        assert!(encode(&[0xff]).is_err());
    }
}
