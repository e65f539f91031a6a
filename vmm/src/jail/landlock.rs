//! What the jailed process may do with files: a second wall, for whoever finds a way around the first one.
//!
//! The root directory holds the share and `/proc` already, and the network namespace is empty. Landlock says it again in
//! other words: nothing but the share is opened, nothing is executed, no block device is made, no control of a device is
//! touched, no port is used, and no process outside is signalled or reached by an abstract socket.

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, PathBeneath, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
};
use rustix::fd::AsFd;

/// The newest rules that are asked for: those of Linux 6.12. An older kernel enforces what it knows.
const NEWEST: ABI = ABI::V6;

/// Restricts the calling thread, and those that it starts, to the files below `share`. Says how much of it this kernel
/// enforces.
///
/// # Errors
/// The kernel has Landlock, and refuses.
pub(super) fn restrict(share: impl AsFd) -> Result<RulesetStatus, RulesetError> {
    let enforced = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .add_rule(PathBeneath::new(share, in_the_share()))?
        .restrict_self()?;
    Ok(enforced.ruleset)
}

/// What virtio-fs does for guests. Whiteouts of overlayfs are character devices; others cannot be made in the jail.
fn in_the_share() -> BitFlags<AccessFs> {
    AccessFs::from_all(NEWEST) & !(AccessFs::Execute | AccessFs::MakeBlock | AccessFs::IoctlDev)
}
