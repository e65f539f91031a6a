//! What the fuzz targets have in common.
//!
//! A target decodes its input into steps, carries them out, and fails when a promise is broken. [`guest`] does so for
//! the devices, driven as by their own tests; `action` is what their inputs consist of.

#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::sync::Once;

mod action;
pub mod guest;

pub use action::{Action, Area, Piece};

/// The environment variable with the directory in which a target leaves its seeds before it starts.
const SEEDS: &str = "FUZZ_SEEDS";

/// Writes well-formed inputs to where the fuzzer will look for some, if anybody asks for them.
pub fn plant(seeds: impl IntoIterator<Item = Vec<u8>>) {
    let Some(directory) = std::env::var_os(SEEDS) else {
        return;
    };
    for (number, seed) in seeds.into_iter().enumerate() {
        fs::write(Path::new(&directory).join(format!("seed-{number}")), seed).unwrap();
    }
}

/// Runs what the shim is made of. Nobody waits for a deadline here: the clock goes on when there is nothing else to do.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap()
}

/// How many files this process has open.
pub fn open_files() -> usize {
    static FIRST: Once = Once::new();
    // The first runtime opens two for signals, for good.
    FIRST.call_once(|| drop(runtime()));
    fs::read_dir("/proc/self/fd").unwrap().count()
}
