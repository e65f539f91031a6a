package mayu.function_test

import data.mayu.function

good := {
	"request": "container",
	"namespace": "k8s.io",
	"pod": {"id": "p1", "namespace": "functions", "name": "hello-0", "uid": "u1", "sysctls": {}},
	"container": {"id": "c1", "name": "user-container"},
	"image": "registry.example/hello@sha256:0123",
	"size": {"vcpus": 2, "memory_mib": 1024},
	"spec": {
		"process": {"args": ["/hello"], "user": {"uid": 1000, "gid": 1000}, "noNewPrivileges": true},
		"root": {"path": "rootfs", "readonly": true},
		"mounts": [],
		"linux": {
			"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "network"}],
			"maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/sys/firmware"],
			"seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
		},
	},
}

# The rules that a request is against.
against(request) := rules if {
	denials := function.deny with input as request
	rules := {denial.rule | some denial in denials}
}

test_a_function_is_allowed if {
	against(good) == set()
	against({"request": "pod", "pod": good.pod, "size": good.size}) == set()
	against({"request": "resize", "pod": good.pod, "size": good.size}) == set()
}

test_what_is_restricted_is_denied if {
	against(object.union(good, {"spec": {"process": {"user": {"uid": 0}}}})) == {"running as non-root"}
}

test_read_only_root if {
	against(object.union(good, {"spec": {"root": {"readonly": false}}})) == {"read-only root"}
	silent := object.union(object.remove(good.spec, ["root"]), {"root": {"path": "rootfs"}})
	against(object.union(object.remove(good, ["spec"]), {"spec": silent})) == {"read-only root"}
}

test_devices if {
	disk := {"path": "/dev/xvda", "type": "b", "major": 8, "minor": 0}
	against(object.union(good, {"spec": {"linux": {"devices": [disk]}}})) == {"devices"}
}

test_no_exec if {
	request := {"request": "exec", "pod": good.pod, "container": good.container, "process": good.spec.process, "size": good.size}
	against(request) == {"no exec"}
}

test_size if {
	every kind in ["pod", "container", "resize"] {
		against(object.union(good, {"request": kind, "size": {"vcpus": 3}})) == {"size"}
		against(object.union(good, {"request": kind, "size": {"memory_mib": 1025}})) == {"size"}
	}
}
