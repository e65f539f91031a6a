package mayu.restricted_test

import data.mayu.restricted

# A container that keeps to the standard.
good := {
	"request": "container",
	"namespace": "k8s.io",
	"pod": {"id": "p1", "namespace": "shop", "name": "web-0", "uid": "u1", "sysctls": {}},
	"container": {"id": "c1", "name": "web"},
	"image": "docker.io/library/nginx:1.29",
	"size": {"vcpus": 1, "memory_mib": 256},
	"spec": {
		"process": {
			"args": ["nginx"],
			"user": {"uid": 1000, "gid": 1000},
			"noNewPrivileges": true,
			"capabilities": {"bounding": ["CAP_NET_BIND_SERVICE"], "effective": []},
		},
		"mounts": [volume("configmap"), volume("csi"), volume("empty-dir"), volume("projected"), volume("secret")],
		"linux": {
			"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "network"}],
			"maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/sys/firmware"],
			"seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
		},
	},
}

exec := {"request": "exec", "pod": good.pod, "container": good.container, "process": good.spec.process, "size": good.size}

volume(kind) := {
	"destination": sprintf("/%s", [kind]),
	"type": "bind",
	"source": sprintf("/var/lib/kubelet/pods/u1/volumes/kubernetes.io~%s/x", [kind]),
}

with_spec(part) := object.union(good, {"spec": part})

# The rules that a request is against.
against(request) := rules if {
	denials := restricted.deny with input as request
	rules := {denial.rule | some denial in denials}
}

test_what_is_good_is_allowed if {
	every request in [good, exec, {"request": "pod", "pod": good.pod, "size": good.size}] {
		against(request) == set()
	}
}

test_what_the_baseline_denies_is_denied if {
	mount := {"destination": "/host", "type": "bind", "source": "/etc"}
	against(with_spec({"mounts": [mount]})) == {"hostPath volumes"}
}

test_volume_types if {
	every kind in ["nfs", "iscsi", "glusterfs"] {
		against(with_spec({"mounts": [volume(kind)]})) == {"volume types"}
	}
	part := {"destination": "/part", "type": "bind", "source": "/var/lib/kubelet/pods/u1/volume-subpaths/data/web/0"}
	against(with_spec({"mounts": [part]})) == set()
}

test_privilege_escalation if {
	against(with_spec({"process": {"noNewPrivileges": false}})) == {"privilege escalation"}
	against(object.union(exec, {"process": {"noNewPrivileges": false}})) == {"privilege escalation"}
	silent := object.remove(good.spec.process, ["noNewPrivileges"])
	against(object.union(object.remove(exec, ["process"]), {"process": silent})) == {"privilege escalation"}
}

test_running_as_non_root if {
	against(with_spec({"process": {"user": {"uid": 0}}})) == {"running as non-root"}
	against(object.union(exec, {"process": {"user": {"uid": 0}}})) == {"running as non-root"}
	silent := object.remove(good.spec.process, ["user"])
	against(object.union(object.remove(exec, ["process"]), {"process": silent})) == {"running as non-root"}
}

test_seccomp if {
	spec := object.union(good.spec, {"linux": {"seccomp": null}})
	against(object.union(good, {"spec": spec})) == {"seccomp"}
	linux := object.remove(good.spec.linux, ["seccomp"])
	silent := object.union(object.remove(good.spec, ["linux"]), {"linux": linux})
	against(object.union(object.remove(good, ["spec"]), {"spec": silent})) == {"seccomp"}
}

test_capabilities if {
	every capability in ["CAP_CHOWN", "CAP_NET_RAW"] {
		against(with_spec({"process": {"capabilities": {"bounding": [capability]}}})) == {"capabilities"}
	}
}
