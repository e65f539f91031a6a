# The baseline of Kubernetes' Pod Security Standards, as a runtime sees it: what is known to widen privileges is denied.
# https://kubernetes.io/docs/concepts/security/pod-security-standards/#baseline
#
# Of its controls, HostProcess is one of Windows, and host ports, and the hosts of probes and hooks, do not reach a runtime.
# Without a value and "Unconfined" are the same to a runtime for seccomp and AppArmor, and the baseline allows the first.
package mayu.baseline

# Where a kubelet and containerd keep the files of pods, unless they were told otherwise.
kubelet := "/var/lib/kubelet"

containerd := {"/run/containerd", "/var/lib/containerd"}

# What containerd gives to every container. NET_RAW is in it, and is not for pods to add; the two look the same here.
capabilities := {
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
	"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

selinux_types := {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}

safe_sysctls := {
	"kernel.shm_rmid_forced",
	"net.ipv4.ip_local_port_range",
	"net.ipv4.ip_local_reserved_ports",
	"net.ipv4.ip_unprivileged_port_start",
	"net.ipv4.ping_group_range",
	"net.ipv4.tcp_fin_timeout",
	"net.ipv4.tcp_keepalive_intvl",
	"net.ipv4.tcp_keepalive_probes",
	"net.ipv4.tcp_keepalive_time",
	"net.ipv4.tcp_syncookies",
}

# Of what kubelets mask, that which all their versions do.
masked_paths := {
	"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/sys/firmware",
}

# The process that is to run, of a container or of an exec, and where it stands in the request.
process := input.spec.process

process := input.process

place := "spec.process" if input.spec.process

place := "process" if input.process

deny contains {
	"rule": "host namespaces",
	"field": "spec.linux.namespaces",
	"value": kind,
	"message": "a pod has one of its own of these",
} if {
	input.request == "container"
	some kind in {"ipc", "network", "pid"}
	not kind in {namespace.type | some namespace in input.spec.linux.namespaces}
}

# To a runtime, a privileged container is one that may write to /sys and has every capability, which is the next rule.
deny contains {
	"rule": "privileged containers",
	"field": sprintf("spec.mounts[%s].options", [mount.destination]),
	"value": object.get(mount, "options", []),
	"message": "/sys is read-only in a container that is not privileged",
} if {
	some mount in input.spec.mounts
	mount.type == "sysfs"
	not "ro" in mount.options
}

deny contains {
	"rule": "capabilities",
	"field": sprintf("%s.capabilities", [place]),
	"value": more,
	"message": "more than the baseline allows",
} if {
	more := {capability | some set in process.capabilities; some capability in set} - capabilities
	count(more) > 0
}

deny contains {
	"rule": "hostPath volumes",
	"field": sprintf("spec.mounts[%s].source", [mount.destination]),
	"value": mount.source,
	"message": "a path of the host that is no volume of this pod",
} if {
	some mount in input.spec.mounts
	of_host(mount)
	not of_pod(mount.source)
}

of_host(mount) if mount.type == "bind"

of_host(mount) if startswith(mount.source, "/")

of_host(mount) if {
	some option in mount.options
	option in {"bind", "rbind"}
}

of_pod(source) if {
	some directory in directories
	startswith(source, directory)
	not ".." in split(source, "/")
}

directories contains sprintf("%s/pods/%s/", [kubelet, input.pod.uid]) if input.pod.uid != ""

directories contains sprintf("%s/io.containerd.grpc.v1.cri/%s/%s/", [root, kind, input.pod.id]) if {
	input.pod.id != ""
	some root in containerd
	some kind in {"sandboxes", "image-volumes"}
}

directories contains sprintf("%s/io.containerd.grpc.v1.cri/containers/%s/volumes/", [root, input.container.id]) if {
	input.container.id != ""
	some root in containerd
}

deny contains {
	"rule": "AppArmor",
	"field": sprintf("%s.apparmorProfile", [place]),
	"value": process.apparmorProfile,
	"message": "the profile has to be the runtime's or one of the host's",
} if {
	process.apparmorProfile == "unconfined"
}

deny contains {
	"rule": "SELinux",
	"field": sprintf("%s.selinuxLabel", [place]),
	"value": process.selinuxLabel,
	"message": sprintf("user and role are the runtime's, and the type one of %v", [selinux_types]),
} if {
	process.selinuxLabel != ""
	not usual_label(process.selinuxLabel)
}

usual_label(label) if {
	parts := split(label, ":")
	parts[0] in {"", "system_u"}
	parts[1] in {"", "system_r"}
	parts[2] in selinux_types
}

deny contains {
	"rule": "/proc mount type",
	"field": "spec.linux.maskedPaths",
	"value": object.get(input, ["spec", "linux", "maskedPaths"], []),
	"message": sprintf("%v are not masked", [open]),
} if {
	input.request == "container"
	open := masked_paths - {path | some path in input.spec.linux.maskedPaths}
	count(open) > 0
}

deny contains {
	"rule": "sysctls",
	"field": sprintf("%s.%s", [field, name]),
	"value": value,
	"message": "not one of the safe ones",
} if {
	some field, sysctls in {
		"pod.sysctls": object.get(input, ["pod", "sysctls"], {}),
		"spec.linux.sysctl": object.get(input, ["spec", "linux", "sysctl"], {}),
	}
	some name, value in sysctls
	not name in safe_sysctls
}
