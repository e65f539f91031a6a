//! `function-times ROUNDS`: how long it is from the request for a pod until a function in it has answered correctly: where the function begins
//! in it (cold), and where the pod goes on from a snapshot (warm). Prints a line for each: `cold` or `warm`, microseconds.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a measurement that fails is to stop")]

use std::collections::HashMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use k8s_cri::v1::{LinuxPodSandboxConfig, PodSandboxConfig};
use mayu_e2e::PYTHON;
use mayu_e2e::cri::{Cri, Pod, container, pod_config};

/// Fills a table of 50 million numbers, 200 MB, from a generator, and tells one of them.
const FUNCTION: &str = r#"
import array, http.server, json, random
generator, table = random.Random(7), array.array("I")
for _ in range(50): table.frombytes(generator.randbytes(4_000_000))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"answer": table[12_345_678]}).encode()
        self.send_response(200); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer(("", 8080), Handler).serve_forever()
"#;

/// The number at that place.
const ANSWER: &str = "1280246380";

/// How long a connection that is not accepted yet is not tried again for.
const PAUSE: Duration = Duration::from_millis(2);

fn main() {
    let rounds: u32 = std::env::args().nth(1).expect("a number of rounds").parse().expect("a number");
    let mut first = run(true).0;
    while !fs::read_dir("/var/lib/mayu/snapshots").is_ok_and(|mut all| {
        all.any(|entry| entry.is_ok_and(|entry| entry.path().join("description.json").exists()))
    }) {
        sleep(Duration::from_millis(100));
    }
    first.remove().expect("the pod is removed");
    // The first of each fills caches and makes directories.
    for round in 0..=rounds {
        for (name, warm) in [("cold", false), ("warm", true)] {
            let (mut pod, took) = run(warm);
            pod.remove().expect("the pod is removed");
            if round > 0 {
                println!("{name} {}", took.as_micros());
            }
        }
    }
}

fn run(warm: bool) -> (Pod, Duration) {
    let cri = Cri::connect(&[PYTHON]);
    let annotations = [("io.mayu.snapshot", "warm"), ("io.mayu.snapshot-ready", "port:8080")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let annotations = if warm { HashMap::from(annotations) } else { HashMap::new() };
    let config = PodSandboxConfig { annotations, ..pod_config(LinuxPodSandboxConfig::default()) };
    let began = Instant::now();
    let mut pod = cri.run(config).expect("a pod");
    pod.run_container(container("function", PYTHON, &["python3", "-c", FUNCTION])).expect("a container");
    let address = pod.address();
    while !answers(address) {
        sleep(PAUSE);
    }
    (pod, began.elapsed())
}

fn answers(address: IpAddr) -> bool {
    let ask = || {
        let mut stream = TcpStream::connect(SocketAddr::new(address, 8080))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    };
    ask().is_ok_and(|answer: String| answer.contains(ANSWER))
}
