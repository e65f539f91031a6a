//! What differs from one processor architecture to the next. Everything outside of this folder is the same on all.

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::{boot, cpuid, layout, state};
