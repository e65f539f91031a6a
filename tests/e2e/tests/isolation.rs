//! The container is in a virtual machine, and not on the host.

use std::fs;

use mayu_e2e::host::{process_status, processes, processes_named};
use mayu_e2e::{Container, run};

#[test]
fn kernel_processor_memory_and_processes_are_the_guest_s() {
    let container = Container::idle(&[]);

    let host_kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(container.script("cat /proc/sys/kernel/osrelease"), host_kernel.trim());
    assert!(container.script("grep flags /proc/cpuinfo").contains(" hypervisor"));
    let kib = |text: &str| -> u64 { text.split_whitespace().nth(1).unwrap().parse().unwrap() };
    let guest_memory = kib(&container.script("grep MemTotal /proc/meminfo"));
    let host_memory = fs::read_to_string("/proc/meminfo").unwrap();
    let host_memory = kib(host_memory.lines().next().unwrap());
    assert!(guest_memory < host_memory / 2, "{guest_memory} KiB in the guest, {host_memory} KiB on the host");
    let listed = container.script("ps -o pid,comm");
    assert_eq!(listed.lines().count(), 3, "a header, the init and ps:\n{listed}");
}

#[test]
fn the_host_has_no_process_of_the_container() {
    let container = Container::unborn();
    let command = ["sleep", "98765"];
    run(&mut container.run_command(&["--detach"], mayu_e2e::BUSYBOX, &command)).success();
    assert!(container.script("ps").contains("sleep 98765"));
    let seen: Vec<_> = processes().into_iter().filter(|process| process.command == "sleep 98765").collect();
    assert_eq!(seen, []);
}

#[test]
fn the_vmm_is_unprivileged_and_in_namespaces_of_its_own() {
    let container = Container::idle(&[]);
    let vmm = container.pid();
    let name = fs::read_to_string(format!("/proc/{vmm}/comm")).unwrap();
    assert!(
        name.starts_with("mayu-vmm") || name.contains(container.id()),
        "the task's pid is the VMM's, not {name}'s"
    );

    let uids = process_status(vmm, "Uid");
    assert!(uids.split_whitespace().all(|uid| uid != "0"), "{uids}");
    // The bounding set matters only to an exec that gains privileges, which no_new_privs rules out.
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&process_status(vmm, set), 16).unwrap(), 0, "{set}");
    }
    assert_eq!(process_status(vmm, "NoNewPrivs"), "1");
    for namespace in ["mnt", "net", "ipc", "uts", "pid", "user"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&vmm.to_string()), of("self"), "{namespace}");
    }
}

#[test]
fn the_vmm_keeps_nothing_open_that_is_not_the_pod_s() {
    let container = Container::idle(&[]);
    let descriptors = fs::read_dir(format!("/proc/{}/fd", container.pid())).unwrap();
    let allowed = ["anon_inode:", "socket:", "pipe:", "/dev/kvm", "/dev/null", "/share", "/proc", "/memfd:"];
    for descriptor in descriptors.flatten() {
        let target = fs::read_link(descriptor.path()).unwrap().display().to_string();
        let of_the_guest = target.ends_with("vmlinux") || target.ends_with("guest.erofs");
        let of_the_pod = target == "/" || allowed.iter().any(|prefix| target.starts_with(prefix));
        assert!(of_the_guest || of_the_pod || target.contains(container.id()), "the VMM holds {target}");
    }
}

#[test]
fn one_shim_and_one_vmm_a_pod() {
    let before = (processes_named("containerd-shim-mayu-v2").len(), processes_named("mayu-vmm").len());
    let _container = Container::idle(&[]);
    let after = (processes_named("containerd-shim-mayu-v2").len(), processes_named("mayu-vmm").len());
    assert_eq!(after, (before.0 + 1, before.1 + 1));
}
