//! Warm functions: machines that were saved while a pod's container ran in them, from which later pods like that one go on.
//!
//! A pod asks for it with annotations ([`Wish`]). The first one that does runs in a machine whose memory is a file. When it is
//! ready, its container stands still for a moment and the machine is saved ([`save`]). A later pod that is the same in everything
//! that its container can have read until then ([`Likeness`]) goes on from there, and its container begins where that one stood.

mod likeness;
mod record;
mod save;
mod store;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::annotations::{Annotations, SNAPSHOT, SNAPSHOT_ENV, SNAPSHOT_HOOK, SNAPSHOT_READY, shown};
use crate::{Error, Result};

pub use likeness::{Likeness, Parts};
pub use record::record;
pub use save::save;
pub use store::{Description, Making, Snapshot, Store};

/// The one thing that [`SNAPSHOT`] may say.
const WARM: &str = "warm";

/// What a pod says about the snapshot that is to be made of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// When it is made.
    pub ready: Ready,
    /// What runs in the container of a pod that goes on from it.
    pub hook: Option<String>,
    /// The names of variables that a pod may have otherwise, in order.
    pub may_differ: Vec<String>,
}

/// When a container is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ready {
    /// As soon as it listens on this TCP port.
    Port(u16),
    /// As soon as it has this file.
    File(PathBuf),
}

/// How a pod's guest comes up.
#[derive(Debug, Default)]
pub enum Start {
    /// As that of a pod that has asked for nothing: from a template, or it boots.
    #[default]
    Ordinary,
    /// It boots, in a machine that is to be saved.
    ToSave(Box<Making>),
    /// Where another one was saved.
    From(Box<Snapshot>),
}

impl Wish {
    /// Reads a pod's annotations. None where it asks for nothing.
    ///
    /// # Errors
    /// [`Error::Annotation`] for one that cannot be understood.
    pub fn read(annotations: &Annotations) -> Result<Option<Self>> {
        let get = |name: &'static str| annotations.get(name).map(|value| (name, value.as_str()));
        let refused = |(name, value): (&str, &str), expected: &str| Error::Annotation {
            name: name.into(),
            reason: format!("{:?} is not {expected}", shown(value)),
        };
        let details = [SNAPSHOT_READY, SNAPSHOT_HOOK, SNAPSHOT_ENV];
        let Some(snapshot) = get(SNAPSHOT) else {
            return match details.into_iter().find_map(get) {
                Some((name, _)) => Err(Error::Annotation {
                    name: name.into(),
                    reason: format!("it means nothing without {SNAPSHOT}: {WARM}"),
                }),
                None => Ok(None),
            };
        };
        if snapshot.1 != WARM {
            return Err(refused(snapshot, WARM));
        }
        let ready = get(SNAPSHOT_READY).ok_or_else(|| Error::Annotation {
            name: SNAPSHOT.into(),
            reason: format!("{SNAPSHOT_READY} has to say when the pod is ready: port:NUMBER or file:/PATH"),
        })?;
        let ready = Ready::parse(ready.1).ok_or_else(|| refused(ready, "port:NUMBER or file:/PATH"))?;
        let hook = get(SNAPSHOT_HOOK);
        if let Some(hook) = hook.filter(|(_, path)| !is_path(path)) {
            return Err(refused(hook, "the absolute path of a program"));
        }
        let names = get(SNAPSHOT_ENV).map_or("", |(_, names)| names).split(',').map(str::trim);
        let mut may_differ: Vec<String> = names.filter(|name| !name.is_empty()).map(Into::into).collect();
        may_differ.sort();
        Ok(Some(Self { ready, hook: hook.map(|(_, path)| path.into()), may_differ }))
    }
}

impl Ready {
    fn parse(text: &str) -> Option<Self> {
        match text.split_once(':')? {
            ("port", number) => number.parse().ok().filter(|port| *port != 0).map(Self::Port),
            ("file", path) => is_path(path).then(|| Self::File(path.into())),
            _ => None,
        }
    }
}

fn is_path(text: &str) -> bool {
    text.starts_with('/') && !text.contains('\0')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(annotations: &[(&str, &str)]) -> Result<Option<Wish>> {
        Wish::read(&annotations.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect())
    }

    #[test]
    fn what_a_pod_says_is_read() {
        assert_eq!(read(&[]).unwrap(), None);
        let all = [
            (SNAPSHOT, "warm"),
            (SNAPSHOT_READY, "port:8080"),
            (SNAPSHOT_HOOK, "/app/restored"),
            (SNAPSHOT_ENV, "POD_NAME, POD_IP,"),
        ];
        let wish = Wish {
            ready: Ready::Port(8080),
            hook: Some("/app/restored".into()),
            may_differ: vec!["POD_IP".into(), "POD_NAME".into()],
        };
        assert_eq!(read(&all).unwrap(), Some(wish));
        let file = read(&[(SNAPSHOT, "warm"), (SNAPSHOT_READY, "file:/tmp/ready")]).unwrap().unwrap();
        assert_eq!((file.ready, file.hook), (Ready::File("/tmp/ready".into()), None));
    }

    #[test]
    fn what_cannot_be_understood_is_named() {
        let ready = (SNAPSHOT_READY, "port:80");
        let table = [
            (&[(SNAPSHOT, "cold"), ready][..], SNAPSHOT, "\"cold\" is not warm"),
            (&[(SNAPSHOT, "warm")], SNAPSHOT, "snapshot-ready has to say when"),
            (&[(SNAPSHOT, "warm"), (SNAPSHOT_READY, "port:0")], SNAPSHOT_READY, "\"port:0\""),
            (&[(SNAPSHOT, "warm"), (SNAPSHOT_READY, "file:ready")], SNAPSHOT_READY, "\"file:ready\""),
            (&[(SNAPSHOT, "warm"), (SNAPSHOT_READY, "soon")], SNAPSHOT_READY, "\"soon\""),
            (&[(SNAPSHOT, "warm"), ready, (SNAPSHOT_HOOK, "reload")], SNAPSHOT_HOOK, "\"reload\""),
            (&[ready], SNAPSHOT_READY, "means nothing without io.mayu.snapshot"),
        ];
        for (annotations, name, words) in table {
            let message = read(annotations).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(words), "{message}");
        }
    }
}
