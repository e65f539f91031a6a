//! Bad input: a clear error, and nothing left of it.

use std::fs;

use mayu_e2e::configuration::{CONFIG, Configuration};
use mayu_e2e::host::Traces;
use mayu_e2e::spec::Bundle;
use mayu_e2e::{BUSYBOX, Container, run};
use serde_json::json;

/// Runs a container that must fail, sees that nothing is left, and returns the error.
#[track_caller]
fn refusal(bundle: &Bundle) -> String {
    let before = Traces::now();
    let error = bundle.run().failure();
    before.assert_restored(1);
    error
}

#[track_caller]
fn assert_mentions(error: &str, words: &[&str]) {
    for word in words {
        assert!(error.contains(word), "no {word:?} in: {error}");
    }
}

#[test]
fn a_missing_kernel_or_image_is_named() {
    for (key, file) in [("kernel", "/nowhere/vmlinux"), ("image", "/nowhere/guest.erofs")] {
        let _configuration = Configuration::set("vm", key, &format!("{file:?}"));
        assert_mentions(&refusal(&Bundle::sh("true")), &[file, "No such file"]);
    }
}

#[test]
fn a_corrupt_kernel_is_told_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("vmlinux");
    fs::write(&kernel, vec![0x5a; 1 << 20]).unwrap();
    let _configuration = Configuration::set("vm", "kernel", &format!("{:?}", kernel.display().to_string()));
    assert_mentions(&refusal(&Bundle::sh("true")), &["kernel", "ELF"]);
}

#[test]
fn a_bad_configuration_is_told_with_key_and_line() {
    let _configuration = Configuration::with(|text| {
        format!("# first line\n{}", text.replacen("[vm]", "[vm]\nmemroy_mib = 12", 1))
    });
    let line =
        fs::read_to_string(CONFIG).unwrap().lines().position(|line| line.starts_with("memroy")).unwrap() + 1;
    assert_mentions(&refusal(&Bundle::sh("true")), &[CONFIG, "memroy_mib", &format!("line {line}")]);
}

#[test]
fn memory_out_of_bounds_is_refused() {
    for (memory, word) in [("32", "64"), ("60000", "MiB")] {
        let _configuration = Configuration::set("vm", "memory_mib", memory);
        assert_mentions(&refusal(&Bundle::sh("true")), &["memory", memory, word]);
    }
}

#[test]
fn profiles_of_the_host_are_refused_where_the_operator_wants_that() {
    let mut bundle = Bundle::sh("echo runs");
    bundle.spec["process"]["selinuxLabel"] = json!("system_u:system_r:svirt_t:s0");
    assert_eq!(bundle.run().success().text(), "runs");
    let _policy = Configuration::set("security", "host_profiles", "\"refuse\"");
    assert_mentions(&refusal(&bundle), &["SELinux label", "svirt_t", "security.host_profiles"]);
}

#[test]
fn a_guest_that_never_reports_in_fails_with_the_end_of_its_console() {
    let _arguments = Configuration::set("vm", "kernel_args", "\"init=/nonexistent\"");
    let _deadline = Configuration::set("timeouts", "boot", "20");
    assert_mentions(&refusal(&Bundle::sh("true")), &["/nonexistent"]);
}

#[test]
fn no_kvm_is_told_with_what_to_do() {
    struct Restore;
    impl Drop for Restore {
        fn drop(&mut self) {
            fs::rename("/dev/kvm.away", "/dev/kvm").unwrap();
        }
    }
    fs::rename("/dev/kvm", "/dev/kvm.away").unwrap();
    let _restore = Restore;
    assert_mentions(&refusal(&Bundle::sh("true")), &["/dev/kvm"]);
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let mut bundle = Bundle::sh("");
    bundle.spec["process"]["args"] = json!(["/bin/no-such-program"]);
    assert_mentions(&refusal(&bundle), &["/bin/no-such-program"]);
}

#[test]
fn a_user_that_is_not_there_is_refused() {
    // Names are ctr's business, which looks them up in the image; the runtime sees numbers alone.
    let before = Traces::now();
    let error = Container::run(BUSYBOX, &["--user", "no-such-user"], &["true"]).failure();
    assert_mentions(&error, &["user"]);
    before.assert_restored(1);
}

#[test]
fn a_bind_mount_of_nothing_is_named() {
    let mut bundle = Bundle::sh("true");
    let mount = json!({ "destination": "/data", "type": "bind", "source": "/nowhere/data", "options": ["rbind", "ro"] });
    bundle.mount(mount);
    assert_mentions(&refusal(&bundle), &["/nowhere/data", "o such file"]);
}

#[test]
fn a_second_container_of_the_same_id_is_refused_and_the_first_lives() {
    let container = Container::idle(&[]);
    let error = run(&mut container.run_command(&[], BUSYBOX, &["true"])).failure();
    assert_mentions(&error, &["already exists"]);
    assert_eq!(container.script("echo alive"), "alive");
}

#[test]
fn the_shim_refuses_ids_that_are_paths() {
    let error = shim_start("../../etc", std::path::Path::new("/tmp"));
    assert_mentions(&error, &["../../etc"]);
}

#[test]
fn a_bundle_path_that_is_too_long_for_a_socket_does_no_harm() {
    // The shim's own socket is named after a digest. What matters is that it starts, or says why not.
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(120)).join("e".repeat(120));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("config.json"), Bundle::sh("true").spec.to_string()).unwrap();
    let before = Traces::now();
    let outcome = shim_command("deep", &deep, "start");
    if outcome.code == 0 {
        assert_mentions(&outcome.text(), &["unix://"]);
        shim_command("deep", &deep, "delete").success();
        for process in
            mayu_e2e::host::processes().iter().filter(|process| process.command.contains("-id deep"))
        {
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(process.pid.cast_signed()),
                nix::sys::signal::SIGKILL,
            )
            .unwrap();
        }
        let address = outcome.text();
        let socket = address.split("unix://").nth(1).unwrap().split('"').next().unwrap();
        drop(fs::remove_file(socket.trim()));
    } else {
        assert_mentions(&outcome.stderr, &["too long"]);
    }
    before.assert_restored(1);
}

#[test]
fn a_malformed_spec_is_told_with_the_place() {
    // containerd would not pass this on: the bundle is written by hand, and the shim asked directly.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let container = Container::idle(&[]);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{ \"ociVersion\": \"1.2.0\", \"process\": 5 }").unwrap();
    let error = runtime.block_on(async {
        let shim = mayu_e2e::shim::connect(&container).await;
        let request = containerd_shim_protos::api::CreateTaskRequest {
            id: "malformed".to_owned(),
            bundle: dir.path().display().to_string(),
            ..Default::default()
        };
        shim.create(mayu_e2e::shim::patiently(), &request).await.unwrap_err()
    });
    assert_mentions(&error.to_string(), &["config.json", "line 1"]);
    assert_eq!(container.script("echo alive"), "alive");
}

fn shim_command(id: &str, bundle: &std::path::Path, action: &str) -> mayu_e2e::Outcome {
    let address = "/run/containerd/containerd.sock";
    let mut command = std::process::Command::new("containerd-shim-mayu-v2");
    command
        .args([
            "-namespace",
            "default",
            "-id",
            id,
            "-address",
            address,
            "-publish-binary",
            "/usr/bin/containerd",
        ])
        .arg("-bundle")
        .arg(bundle)
        .arg(action)
        .env("TTRPC_ADDRESS", format!("{address}.ttrpc"))
        .env("GRPC_ADDRESS", address)
        .env("MAX_SHIM_VERSION", "2")
        .current_dir(bundle);
    run(&mut command)
}

fn shim_start(id: &str, bundle: &std::path::Path) -> String {
    shim_command(id, bundle, "start").failure()
}
