//! Pods that go on from a template: they are whole pods, share no secret, and a template that is of no use harms none.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mayu_e2e::configuration::Configuration;
use mayu_e2e::mount::HostMount;
use mayu_e2e::shim::eventually;
use mayu_e2e::template::{DIRECTORY, current, is_used_by, mayu_template};
use mayu_e2e::{Container, PYTHON, counted, how_many};

/// How often a maker is killed, each time a little later.
const KILLS: u32 = 10;

/// Done to an open file of a template.
type Damage = fn(&File);

/// The directories of those that are whole.
fn templates() -> Vec<PathBuf> {
    let entries = fs::read_dir(DIRECTORY).unwrap().map(|entry| entry.unwrap().path());
    let is_number = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().parse::<u64>().is_ok();
    entries.filter(is_number).collect()
}

fn is_from_template(container: &Container) -> bool {
    is_used_by(container.pid())
}

#[test]
fn a_pod_goes_on_from_the_template_and_has_the_host_s_clock() {
    let path = current();
    let name = path.file_name().unwrap().to_str().unwrap();
    let line = mayu_template(&["list"]).success().text();
    assert!(
        line.lines().any(|line| line.starts_with(name) && line.ends_with("pods start from it")),
        "{line}"
    );

    let container = Container::idle(&[]);

    assert!(is_from_template(&container));
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let inside: u64 = container.script("date +%s").parse().unwrap();
    assert!(inside.abs_diff(seconds) <= 5, "{inside} there, {seconds} here");
    container.remove();
    let _configuration = Configuration::set("template", "enabled", "false");
    let container = Container::idle(&[]);
    assert!(!is_from_template(&container));
    container.remove();
}

/// How often the thread that runs the guest had to wait for a page.
fn faults(container: &Container) -> u64 {
    let threads =
        fs::read_dir(format!("/proc/{}/task", container.pid())).unwrap().map(|task| task.unwrap().path());
    let mut stats = threads.map(|thread| fs::read_to_string(thread.join("stat")).unwrap());
    let stat = stats.find_map(|stat| Some(stat.split_once("(vcpu0) ")?.1.to_owned())).unwrap();
    // `minflt` of proc_pid_stat(5), which has number 10; the state is 3.
    stat.split(' ').nth(7).unwrap().parse().unwrap()
}

#[test]
fn a_template_in_huge_pages_is_mapped_in_huge_pages() {
    let directory = tempfile::tempdir_in("/run").unwrap();
    let _pages = HostMount::tmpfs(directory.path(), "huge=always,mode=700");
    let path = directory.path().to_str().unwrap();
    let _configuration = Configuration::set("template", "directory", &format!("{path:?}"));
    mayu_template(&["create"]).success();

    let container = Container::idle(&[]);
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", container.pid())).unwrap();
    container.remove();

    assert!(smaps.contains(path), "the pod has booted");
    // proc_pid_smaps(5).
    let mut mapped = smaps.lines().filter_map(|line| line.strip_prefix("ShmemPmdMapped:"));
    assert!(mapped.any(|kib| kib.trim() != "0 kB"), "{smaps}");
}

#[test]
fn what_a_container_touches_is_there_before_it_does() {
    let path = current().join("working-set");
    let known = fs::read(&path).unwrap();
    let faults_of_a_pod = || {
        let container = Container::idle(&[]);
        assert!(is_from_template(&container));
        let faults = faults(&container);
        container.remove();
        faults
    };

    let prefetched = faults_of_a_pod();
    // Without what is known of it, and with a wrong word of it, a pod starts as well.
    fs::write(&path, "nothing").unwrap();
    let not = faults_of_a_pod();
    fs::write(&path, known).unwrap();

    assert!(prefetched * 3 < not * 2, "{prefetched} faults, {not} without");
}

#[test]
fn no_two_pods_from_one_template_share_a_secret() {
    current();
    let secrets = "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id
        head -c 16 /dev/urandom | od -An -tx1
        sed -n 's/-.*\\[stack\\]//p' /proc/self/maps";
    let mut seen = HashSet::new();
    for pod in counted(how_many("MAYU_TEST_CLONES", 50), "pods") {
        let container = Container::idle(&[]);
        assert!(is_from_template(&container));
        let secrets = container.script(secrets);
        assert_eq!(secrets.lines().count(), 4, "{secrets}");
        for secret in secrets.lines() {
            assert!(seen.insert(secret.to_owned()), "pod {pod} has the secret {secret} of another one");
        }
        container.remove();
    }
}

/// With which numbers TCP begins three connections, each of which is the same one in every pod, without what the time adds to a number: one
/// for each 64 ns (`secure_tcp_seq` in net/core/secure_seq.c).
const SEQUENCE_NUMBERS: &str = r#"
import socket, struct, time
packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
packets.bind(("lo", 0))
for port in 40001, 40002, 40003:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind(("127.0.0.1", port))
    now = time.time_ns()
    client.connect_ex(("127.0.0.1", 9))
    source = number = 0
    while source != port:
        tcp = packets.recv(100)[14 + 20:]
        source, number = struct.unpack(">HxxI", tcp[:8])
    print((number - (now >> 6)) % 2**32)
    client.close()
"#;

/// Whether these are of the same secret: then nothing makes a difference but the time between two lines of the program, seconds at most.
fn are_alike(one: &[u32], other: &[u32]) -> bool {
    const SECONDS: u32 = (3_000_000_000_u64 >> 6) as u32;
    let distance = |(one, other): (&u32, &u32)| one.wrapping_sub(*other).min(other.wrapping_sub(*one));
    one.iter().zip(other).map(distance).all(|distance| distance < SECONDS)
}

#[test]
fn no_two_pods_from_one_template_begin_a_connection_alike() {
    current();
    let numbers = |container: &Container| -> Vec<u32> {
        let text = container.exec(&["python3", "-c", SEQUENCE_NUMBERS]).success().text();
        text.lines().map(|line| line.parse().unwrap()).collect()
    };
    let mut seen: Vec<Vec<u32>> = Vec::new();
    for pod in 0..8 {
        let container = Container::detached(PYTHON, &[], &["sleep", "infinity"]);
        assert!(is_from_template(&container));
        let of_this = numbers(&container);
        assert_eq!(of_this.len(), 3);
        let again = numbers(&container);
        assert!(are_alike(&of_this, &again), "one secret is seen as such: {of_this:?}, {again:?}");
        assert!(
            !seen.iter().any(|other| are_alike(other, &of_this)),
            "pod {pod} has the secret of another one"
        );
        seen.push(of_this);
        container.remove();
    }
}

#[test]
fn a_damaged_template_is_refused_and_the_pod_boots() {
    let damages: [(&str, Damage); 3] = [
        ("state", |state| state.write_all_at(b"x", state.metadata().unwrap().len() / 2).unwrap()),
        ("state", |state| state.set_len(100).unwrap()),
        ("memory", |memory| memory.set_len(memory.metadata().unwrap().len() - 4096).unwrap()),
    ];
    for (name, damage) in damages {
        let template = current();
        damage(&File::options().write(true).open(template.join(name)).unwrap());

        let container = Container::idle(&[]);

        assert!(!is_from_template(&container), "{name}");
        assert!(!template.exists(), "{name}");
        container.remove();
    }
    current();
}

#[test]
fn damage_is_found_by_looking_for_it() {
    let template = current();
    let good = mayu_template(&["verify"]).success().text();
    assert!(good.contains("its agent answered"), "{good}");

    // The first page of a guest's kernel, at 16 MiB, is not empty.
    File::options()
        .write(true)
        .open(template.join("memory"))
        .unwrap()
        .write_all_at(b"damage", 16 << 20)
        .unwrap();

    let outcome = mayu_template(&["verify", template.file_name().unwrap().to_str().unwrap()]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.text().contains("its memory is damaged"), "{}", outcome.text());
    mayu_template(&["delete", template.file_name().unwrap().to_str().unwrap()]).success();
    assert!(!template.exists());
    current();
}

#[test]
fn whoever_finds_none_has_one_made_for_the_next() {
    fs::remove_dir_all(current()).unwrap();
    let _configuration = Configuration::set("template", "on_demand", "true");

    let first = Container::idle(&[]);
    assert!(!is_from_template(&first));
    eventually("a template is made", || !templates().is_empty());
    let second = Container::idle(&[]);
    assert!(is_from_template(&second));

    // It is one more machine, and the template's is gone.
    first.remove();
    second.remove();
    eventually("its maker is gone", || mayu_template(&["create"]).text().starts_with("template"));
}

#[test]
fn a_maker_that_is_killed_leaves_what_was_there() {
    let before = current();
    let _configuration = Configuration::set("vm", "kernel_args", "\"mayu.debug\"");
    for kill in 0..KILLS {
        let mut maker = Command::new("mayu").args(["template", "create"]).spawn().unwrap();
        sleep(Duration::from_millis(400) * kill);
        maker.kill().unwrap();
        maker.wait().unwrap();

        for template in templates() {
            let name = template.file_name().unwrap().to_str().unwrap();
            mayu_template(&["verify", name]).success();
        }
        assert!(before.exists());
    }
    let made = current();
    assert_ne!(made, before);
    assert_eq!(templates().len(), 2);
    let container = Container::idle(&[]);
    assert!(is_from_template(&container));
    container.remove();
    mayu_template(&["delete", made.file_name().unwrap().to_str().unwrap()]).success();
}
