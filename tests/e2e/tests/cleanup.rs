//! Pods come and go, and leave nothing.

use std::thread;

use mayu_e2e::host::Traces;
use mayu_e2e::{BUSYBOX, Container, counted, how_many};

/// containerd keeps the namespace's directory, which the first container makes.
fn warm_up() {
    Container::sh(&[], "true").success();
}

/// Fifty of them, or as many as the environment says.
#[test]
fn pods_one_after_another_leave_nothing() {
    let pods = how_many("MAYU_TEST_PODS", 50);
    warm_up();
    let before = Traces::now();
    for number in counted(pods, "pods") {
        let outcome =
            Container::run(BUSYBOX, &[], &["sh", "-c", &format!("echo {number}; exit {}", number % 3)]);
        assert_eq!((outcome.code, outcome.text()), (number % 3, number.to_string()), "{}", outcome.stderr);
    }
    // containerd is to have as many descriptors as after a few.
    before.assert_restored(50);
}

#[test]
fn eight_pods_at_once() {
    warm_up();
    let before = Traces::now();
    thread::scope(|scope| {
        let pods: Vec<_> = (0..8)
            .map(|number| {
                scope.spawn(move || {
                    let container = Container::idle(&[]);
                    let text = container.script(&format!("echo {number} > /tmp/file; cat /tmp/file"));
                    (number, text, container)
                })
            })
            .collect();
        // All of them run before the first one goes.
        let pods: Vec<_> = pods.into_iter().map(|pod| pod.join().unwrap()).collect();
        for (number, text, container) in pods {
            assert_eq!(text, number.to_string());
            assert_eq!(container.script("cat /tmp/file"), number.to_string());
            container.remove();
        }
    });
    before.assert_restored(8);
}
