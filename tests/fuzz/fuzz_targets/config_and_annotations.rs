//! The operator's configuration file, and what pods ask for by annotation.

#![no_main]

use std::path::Path;

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;
use mayu_fuzz::plant;
use mayu_shim::annotations::{self, ALL, Annotations, MEMORY_MIB, NET_BANDWIDTH, VCPUS};
use mayu_shim::config::{Config, Vm};
use mayu_shim::pod_spec::Limits;
use mayu_vmm_api::{MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};

/// The configuration file that is installed.
const SHIPPED: &str = include_str!("../../../config/config.toml");

/// More than any message to the user has, in bytes, beside what it repeats of a file that the operator wrote.
const MAX_MESSAGE: usize = 2048;

fuzz_target!(init: plant(seeds()), |input: &[u8]| {
    let mut input = Unstructured::new(input);
    let Ok((length, limits)) = input.arbitrary::<(u16, (Option<u64>, Option<u64>))>() else {
        return;
    };
    let limits = Limits { cpu_millis: limits.0, memory: limits.1 };
    let Ok(text) = input.bytes(usize::from(length).min(input.len())) else {
        return;
    };
    let asked = decode(&mut input);
    if let Ok(text) = std::str::from_utf8(text) {
        match Config::parse(text, Path::new("config.toml")) {
            Ok(config) => ask(&config, &asked, limits),
            Err(error) => assert!(error.to_string().len() <= MAX_MESSAGE + text.len()),
        }
    }
    // What the operator allows is all there is.
    let mut config = Config::default();
    config.annotations.allowed = ALL.map(str::to_owned).to_vec();
    ask(&config, &asked, limits);
});

/// Names and values of annotations, all of mayu's own.
fn decode(input: &mut Unstructured<'_>) -> Annotations {
    let mut asked = Annotations::new();
    while !input.is_empty()
        && let Ok((which, length)) = input.arbitrary::<(u8, u8)>()
        && let Ok(bytes) = input.bytes(usize::from(length).min(input.len()))
    {
        let text = String::from_utf8_lossy(bytes).into_owned();
        match which % 4 {
            0 => asked.insert(VCPUS.to_owned(), text),
            1 => asked.insert(MEMORY_MIB.to_owned(), text),
            2 => asked.insert(NET_BANDWIDTH.to_owned(), text),
            _ => asked.insert(format!("{}{text}", annotations::PREFIX), text),
        };
    }
    asked
}

/// Whatever a pod asks for, its VM is one that there can be.
fn ask(config: &Config, asked: &Annotations, limits: Limits) {
    check(&config.vm, limits);
    let mut changed = config.clone();
    match annotations::apply(&mut changed, asked) {
        Ok(()) => {
            assert!(asked.keys().all(|name| config.annotations.allowed.contains(name)));
            check(&changed.vm, limits);
        }
        Err(error) => assert!(error.to_string().len() <= MAX_MESSAGE),
    }
}

fn check(vm: &Vm, limits: Limits) {
    let size = limits.size(vm);
    for size in [size, size.largest(vm)] {
        assert!((vm.vcpus..=MAX_VCPUS).contains(&size.vcpus), "{size:?}");
        assert!((MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&size.memory_mib), "{size:?}");
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let encode = |text: &str, asked: &[(u8, &str)]| {
        let mut bytes = (text.len() as u16).to_le_bytes().to_vec();
        // No limits.
        bytes.extend([0, 0]);
        bytes.extend(text.bytes());
        for (which, value) in asked {
            bytes.extend([*which, value.len() as u8]);
            bytes.extend(value.bytes());
        }
        bytes
    };
    let every_key = "[vm]\nvmm = \"/v\"\nkernel = \"/k\"\nimage = \"/i\"\nkernel_args = \"quiet\"\nvcpus = 2\n\
        memory_mib = 512\nmax_vcpus = 8\nmax_memory_mib = 8192\nuid = 1000\n\
        [annotations]\nallowed = [\"io.mayu.vcpus\", \"io.mayu.memory-mib\"]\n\
        [security]\nhost_profiles = \"refuse\"\n\
        [timeouts]\nboot = 1\nrequest = 2\nstdio_drain = 3\nshutdown = 4\n";
    vec![
        encode(every_key, &[(0, "3"), (1, "1024")]),
        encode(SHIPPED, &[(2, "kernel"), (0, "0")]),
        encode("", &[(0, "33"), (1, "-1")]),
    ]
}
