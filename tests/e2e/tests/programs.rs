//! Real programs, unmodified.

use mayu_e2e::shim::eventually;
use mayu_e2e::{Container, NGINX, PYTHON, REDIS};

#[test]
fn python_computes_and_what_it_writes_stays() {
    let container = Container::detached(PYTHON, &[], &["sleep", "infinity"]);
    let program = "import hashlib, json, math, os, sqlite3, threading
text = json.dumps({'factorial': math.factorial(20), 'digest': hashlib.sha256(b'mayu').hexdigest()})
os.makedirs('/var/lib/data')
open('/var/lib/data/result.json', 'w').write(text)
database = sqlite3.connect('/var/lib/data/data.db')
database.execute('create table t (n integer)')
database.executemany('insert into t values (?)', [(n,) for n in range(1000)])
database.commit()
results = []
threads = [threading.Thread(target=lambda n=n: results.append(n * n)) for n in range(10)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(sum(results))";
    assert_eq!(container.exec(&["python3", "-c", program]).success().text(), "285");

    let second = "import json, sqlite3
print(json.load(open('/var/lib/data/result.json'))['factorial'])
print(sqlite3.connect('/var/lib/data/data.db').execute('select sum(n) from t').fetchone()[0])";
    assert_eq!(container.exec(&["python3", "-c", second]).success().text(), "2432902008176640000\n499500");
}

#[test]
fn redis_serves_its_benchmark() {
    let container = Container::detached(REDIS, &[], &["redis-server", "--save", "", "--dir", "/tmp"]);
    eventually("redis answers", || container.exec(&["redis-cli", "ping"]).text() == "PONG");
    let outcome = container
        .exec(&["redis-benchmark", "-q", "-n", "500", "-c", "10", "-t", "set,get,lpush,lpop"])
        .success();
    for test in ["SET", "GET", "LPUSH", "LPOP"] {
        assert!(outcome.text().contains(&format!("{test}: ")), "{}", outcome.text());
    }
}

#[test]
fn nginx_serves_a_request() {
    let container = Container::detached(NGINX, &[], &["nginx", "-g", "daemon off;"]);
    let request = "exec 3<>/dev/tcp/127.0.0.1/80 && printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3";
    eventually("nginx answers", || {
        let outcome = container.exec(&["bash", "-c", request]);
        outcome.text().starts_with("HTTP/1.1 200 OK") && outcome.text().contains("nginx")
    });
}
