package mayu.baseline_test

import data.mayu.baseline

# A container as a kubelet and containerd make it where the manifest says nothing about security.
usual := {
	"request": "container",
	"namespace": "k8s.io",
	"pod": {"id": "p1", "namespace": "shop", "name": "web-0", "uid": "u1", "sysctls": {}},
	"container": {"id": "c1", "name": "web"},
	"image": "docker.io/library/nginx:1.29",
	"size": {"vcpus": 1, "memory_mib": 256},
	"spec": {
		"process": {
			"args": ["nginx"],
			"user": {"uid": 0, "gid": 0},
			"apparmorProfile": "cri-containerd.apparmor.d",
			"selinuxLabel": "system_u:system_r:container_t:s0:c4,c5",
			"capabilities": {
				"bounding": ["CAP_CHOWN", "CAP_NET_RAW", "CAP_SYS_CHROOT"],
				"effective": ["CAP_CHOWN", "CAP_NET_RAW", "CAP_SYS_CHROOT"],
			},
		},
		"mounts": [
			{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
			{"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]},
			bind("/etc/hosts", "/var/lib/kubelet/pods/u1/etc-hosts"),
			bind("/data", "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/data"),
			bind("/dev/shm", "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/p1/shm"),
			bind("/etc/hostname", "/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/p1/hostname"),
			bind("/var/db", "/var/lib/containerd/io.containerd.grpc.v1.cri/containers/c1/volumes/7"),
		],
		"linux": {
			"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "network", "path": "/proc/7/ns/net"}],
			"maskedPaths": [path | some path in baseline.masked_paths],
		},
	},
}

pod := {"request": "pod", "pod": {"id": "p1", "sysctls": {"net.ipv4.ip_unprivileged_port_start": "0"}}, "size": usual.size}

exec := {"request": "exec", "pod": usual.pod, "container": usual.container, "process": usual.spec.process, "size": usual.size}

resize := {"request": "resize", "pod": usual.pod, "container": usual.container, "resources": {}, "size": usual.size}

bind(destination, source) := {"destination": destination, "type": "bind", "source": source, "options": ["rbind", "rw"]}

# The usual container with another part of its spec.
with_spec(part) := object.union(usual, {"spec": part})

# The rules that a request is against.
against(request) := rules if {
	denials := baseline.deny with input as request
	rules := {denial.rule | some denial in denials}
}

test_what_is_usual_is_allowed if {
	every request in [usual, pod, exec, resize] {
		against(request) == set()
	}
}

test_host_namespaces if {
	every kind in ["ipc", "network", "pid"] {
		left := [namespace | some namespace in usual.spec.linux.namespaces; namespace.type != kind]
		against(with_spec({"linux": {"namespaces": left}})) == {"host namespaces"}
	}
	against({"request": "container"}) == {"host namespaces", "/proc mount type"}
}

test_privileged_containers if {
	every options in [{"options": ["rw"]}, {}] {
		sysfs := object.union({"destination": "/sys", "type": "sysfs", "source": "sysfs"}, options)
		against(with_spec({"mounts": [sysfs]})) == {"privileged containers"}
	}
}

test_capabilities if {
	every set in ["bounding", "effective", "permitted", "inheritable", "ambient"] {
		more := {"process": {"capabilities": {set: ["CAP_CHOWN", "CAP_SYS_ADMIN"]}}}
		against(with_spec(more)) == {"capabilities"}
		against(object.union(exec, more)) == {"capabilities"}
	}
}

test_the_denial_names_field_and_value if {
	request := with_spec({"process": {"capabilities": {"bounding": ["CAP_SYS_ADMIN", "CAP_BPF"]}}})
	denials := baseline.deny with input as request
	some denial in denials
	denial.field == "spec.process.capabilities"
	denial.value == {"CAP_BPF", "CAP_SYS_ADMIN"}
}

test_paths_of_the_host if {
	every source in [
		"/",
		"/etc",
		"/var/lib/kubelet/pods/u2/volumes/kubernetes.io~secret/theirs",
		"/var/lib/kubelet/pods/u1/../u2/volumes/kubernetes.io~secret/theirs",
		"/var/lib/kubelet/pods/u10/etc-hosts",
		"/run/containerd/io.containerd.grpc.v1.cri/sandboxes/p2/shm",
		"/run/containerd/containerd.sock",
		"../rootfs",
	] {
		against(with_spec({"mounts": [bind("/host", source)]})) == {"hostPath volumes"}
	}
	against(with_spec({"mounts": [{"destination": "/d", "type": "ext4", "source": "/dev/sda"}]})) == {"hostPath volumes"}
	every mount in [{"type": "none", "options": ["bind"]}, {"type": "none", "options": ["rbind"]}, {"type": "bind"}] {
		relative := object.union(mount, {"destination": "/d", "source": "x"})
		against(with_spec({"mounts": [relative]})) == {"hostPath volumes"}
	}
}

test_a_pod_without_a_name_has_no_paths if {
	nameless := object.union(usual, {"pod": {"uid": "", "id": ""}, "container": {"id": ""}})
	every source in [
		"/var/lib/kubelet/pods//u2/etc-hosts",
		"/run/containerd/io.containerd.grpc.v1.cri/sandboxes//p2/shm",
		"/var/lib/containerd/io.containerd.grpc.v1.cri/containers//volumes/7",
	] {
		against(object.union(nameless, {"spec": {"mounts": [bind("/x", source)]}})) == {"hostPath volumes"}
	}
}

test_apparmor if {
	against(with_spec({"process": {"apparmorProfile": "unconfined"}})) == {"AppArmor"}
	against(with_spec({"process": {"apparmorProfile": "of-my-own"}})) == set()
}

test_selinux if {
	every label in [
		"system_u:system_r:spc_t:s0",
		"user_u:system_r:container_t:s0",
		"system_u:user_r:container_t:s0",
		"container_t",
	] {
		against(with_spec({"process": {"selinuxLabel": label}})) == {"SELinux"}
	}
	every label in ["", "system_u:system_r:container_kvm_t:s0"] {
		against(with_spec({"process": {"selinuxLabel": label}})) == set()
	}
}

test_proc_mount_type if {
	every paths in [[], ["/proc/kcore"]] {
		against(with_spec({"linux": {"maskedPaths": paths}})) == {"/proc mount type"}
	}
}

test_sysctls if {
	unsafe := {"kernel.msgmax": "1"}
	against(with_spec({"linux": {"sysctl": unsafe}})) == {"sysctls"}
	against(object.union(pod, {"pod": {"sysctls": unsafe}})) == {"sysctls"}
	against(with_spec({"linux": {"sysctl": {"net.ipv4.tcp_syncookies": "1"}}})) == set()
}
