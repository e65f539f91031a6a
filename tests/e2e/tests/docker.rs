//! docker, with mayu by its name.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use mayu_e2e::host::{process_status, processes_named};
use mayu_e2e::shim::eventually;
use mayu_e2e::{BUSYBOX, Outcome, PATIENCE, ctr, run, runtime};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// docker's daemon, on the containerd that is there. It ends with the test, and its containers with it.
struct Daemon(Child);

impl Daemon {
    fn start() -> Self {
        let log =
            std::fs::File::create("/results/dockerd.log").or_else(|_| std::fs::File::create("/dev/null"));
        let log = log.unwrap();
        let daemon = Command::new("dockerd")
            .args([
                "--containerd",
                "/run/containerd/containerd.sock",
                "--exec-opt",
                "native.cgroupdriver=cgroupfs",
            ])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let daemon = Self(daemon);
        let started = Instant::now();
        while docker(&["version"]).code != 0 {
            assert!(started.elapsed() < PATIENCE, "dockerd does not come up");
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        let archive = tempfile::NamedTempFile::new().unwrap();
        let path = archive.path().to_str().unwrap();
        run(&mut ctr(["images", "export", path, BUSYBOX])).success();
        docker(&["load", "-i", path]).success();
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let left = docker(&["ps", "-aq"]).text();
        for id in left.lines() {
            docker(&["rm", "-f", id]);
        }
        let _ = kill(Pid::from_raw(i32::try_from(self.0.id()).unwrap()), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

#[track_caller]
fn docker(arguments: &[&str]) -> Outcome {
    run(Command::new("docker").args(arguments))
}

/// `docker run` with mayu; what it says.
#[track_caller]
fn docker_run(flags: &[&str], command: &[&str]) -> String {
    let runtime = runtime();
    let arguments = [&["run", "--runtime", &runtime], flags, &[BUSYBOX], command].concat();
    docker(&arguments).success().text()
}

fn get(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn what_people_do_with_docker_works() {
    let _daemon = Daemon::start();
    runs_a_command();
    let web = serves_a_published_port();
    runs_a_second_program(&web);
    tells_what_it_says_and_uses(&web);
    stops(&web);
    keeps_limits();
    has_a_terminal();
    restarts();
    assert!(processes_named("mayu-vmm").is_empty(), "containers that are gone have no VM");
}

fn runs_a_command() {
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let guest = docker_run(&["--rm"], &["uname", "-r"]);
    assert_ne!(guest, host.trim());
    assert_eq!(docker_run(&["--rm", "--network", "none"], &["sh", "-c", "ls /sys/class/net"]), "lo");
    let code = docker(&["run", "--rm", "--runtime", &runtime(), BUSYBOX, "sh", "-c", "exit 7"]).code;
    assert_eq!(code, 7);
}

fn serves_a_published_port() -> String {
    let files = tempfile::tempdir().unwrap();
    std::fs::write(files.path().join("index.html"), "from a volume").unwrap();
    let volume = format!("{}:/www:ro", files.path().display());
    let script = "echo serving; exec httpd -f -p 80 -h /www";
    let web = docker_run(&["-d", "-p", "8080:80", "-v", &volume], &["sh", "-c", script]);
    let address = docker(&["inspect", "-f", "{{.NetworkSettings.IPAddress}}", &web]).success().text();
    eventually("it serves by its address", || {
        get(&format!("{address}:80")).is_ok_and(|answer| answer.ends_with("from a volume"))
    });
    eventually("it serves by the published port", || {
        get("127.0.0.1:8080").is_ok_and(|answer| answer.ends_with("from a volume"))
    });
    // It stays until the container is gone.
    std::mem::forget(files);
    web
}

fn runs_a_second_program(web: &str) {
    let addresses = docker(&["exec", web, "ip", "-4", "addr", "show", "eth0"]).success().text();
    let address = docker(&["inspect", "-f", "{{.NetworkSettings.IPAddress}}", web]).success().text();
    assert!(addresses.contains(&address), "{addresses}");
    assert_eq!(docker(&["exec", web, "sh", "-c", "exit 5"]).code, 5);
    let gateway = docker(&["inspect", "-f", "{{.NetworkSettings.Gateway}}", web]).success().text();
    docker(&["exec", web, "ping", "-c", "1", &gateway]).success();
}

fn tells_what_it_says_and_uses(web: &str) {
    assert_eq!(docker(&["logs", web]).success().text(), "serving");
    let usage =
        docker(&["stats", "--no-stream", "--format", "{{.MemUsage}}|{{.PIDs}}", web]).success().text();
    let (memory, pids) = usage.split_once('|').unwrap();
    assert!(!memory.starts_with("0B"), "{usage}");
    assert_ne!(pids, "0", "{usage}");
    let top = docker(&["top", web]);
    assert!(top.code == 0 || top.stderr.contains("ps"), "{}", top.stderr);
}

fn stops(web: &str) {
    docker(&["stop", "-t", "1", web]).success();
    let state = docker(&["inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", web]).success().text();
    assert!(["exited 137", "exited 143"].contains(&state.as_str()), "{state}");
    docker(&["start", web]).success();
    eventually("it serves again", || {
        get("127.0.0.1:8080").is_ok_and(|answer| answer.ends_with("from a volume"))
    });
    docker(&["rm", "-f", web]).success();
}

fn keeps_limits() {
    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max; nproc; exec sleep infinity";
    // docker allows no more CPUs than the host has, and the lab has one.
    let flags = ["-d", "--memory", "64m", "--cpus", "0.5"];
    let limited = docker_run(&flags, &["sh", "-c", script]);
    eventually("it tells its limits", || {
        docker(&["logs", &limited]).success().text() == "67108864\n50000 100000\n1"
    });
    let vmm = &processes_named("mayu-vmm")[0];
    assert_ne!(process_status(vmm.pid, "Uid").split('\t').next(), Some("0"));
    docker(&["update", "--memory", "96m", "--memory-swap", "96m", &limited]).success();
    let changed = docker(&["exec", &limited, "cat", "/sys/fs/cgroup/memory.max"]).success().text();
    assert_eq!(changed, (96 << 20).to_string());
    docker(&["rm", "-f", &limited]).success();
}

fn has_a_terminal() {
    // docker's client wants a terminal of its own for -t, which script(1) gives it.
    let runtime = runtime();
    let command = format!("docker run --rm -it --runtime {runtime} {BUSYBOX} sh -c 'tty; stty size'");
    let shown = run(Command::new("script").args(["-qec", &command, "/dev/null"])).success().text();
    assert!(shown.contains("/dev/pts/") || shown.contains("/dev/console"), "{shown}");
}

fn restarts() {
    let name = "restarting";
    docker_run(&["-d", "--name", name, "--restart", "on-failure:2"], &["sh", "-c", "exit 3"]);
    eventually("it has been restarted twice", || {
        docker(&["inspect", "-f", "{{.RestartCount}} {{.State.Status}}", name]).success().text() == "2 exited"
    });
    docker(&["rm", "-f", name]).success();
}
