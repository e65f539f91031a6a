//! Policy as code: what a pod may be, said in [Rego](https://www.openpolicyagent.org/docs/policy-language).
//!
//! The shim makes a [`Request`] of everything that it knows about a pod, a container, an exec or a change of limits, and asks the
//! [`Policy`] before it acts. A policy is one file of package `mayu`, or of one below it, with a set `deny`; each element is a
//! [`Denial`]. `docs/policy.md` is the page for those who write them, and [`suite`] runs their tests.
//!
//! ```
//! use mayu_policy::{Kind, Policy, Request};
//!
//! let policy = Policy::parse(
//!     r#"
//!     package mayu
//!     deny contains {"rule": "size", "field": "size.vcpus", "value": input.size.vcpus, "message": "two are enough"} if {
//!         input.size.vcpus > 2
//!     }
//!     "#,
//!     "policy.rego".as_ref(),
//! )?;
//! let mut request = Request { request: Kind::Pod, ..Request::default() };
//! assert!(policy.decide(&request)?.is_empty());
//! request.size.vcpus = 4;
//! assert_eq!(policy.decide(&request)?[0].to_string(), "size: size.vcpus is 4: two are enough");
//! # Ok::<(), mayu_policy::Error>(())
//! ```

mod denial;
mod error;
mod policy;
mod request;
mod source;
pub mod suite;

pub use denial::{Denial, summary};
pub use error::{Error, Result};
pub use policy::Policy;
pub use request::{Container, Kind, Pod, Request, Size};
