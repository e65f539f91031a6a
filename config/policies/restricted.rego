# Kubernetes' Pod Security Standards at their strictest, as a runtime sees them: the baseline, and current good practice.
# https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
package mayu.restricted

import data.mayu.baseline

# kubernetes.io~TYPE in a kubelet's directory of a pod. A claim shows as the volume that it is bound to, so those of drivers
# (csi) and of local volumes are allowed, and those of kubelet's own network file systems are not.
volume_types := {"configmap", "csi", "downward-api", "empty-dir", "local-volume", "projected", "secret"}

deny contains denial if some denial in baseline.deny

deny contains {
	"rule": "volume types",
	"field": sprintf("spec.mounts[%s].source", [mount.destination]),
	"value": mount.source,
	"message": sprintf("a volume has to be one of %v", [volume_types]),
} if {
	some mount in input.spec.mounts
	some kind in {"volumes", "volume-subpaths"}
	path := trim_prefix(mount.source, sprintf("%s/pods/%s/%s/", [baseline.kubelet, input.pod.uid, kind]))
	path != mount.source
	not usual_volume(kind, path)
}

usual_volume("volumes", path) if trim_prefix(split(path, "/")[0], "kubernetes.io~") in volume_types

# A part of a volume, whose type its path does not tell.
usual_volume("volume-subpaths", _) := true

deny contains {
	"rule": "privilege escalation",
	"field": sprintf("%s.noNewPrivileges", [baseline.place]),
	"value": false,
	"message": "allowPrivilegeEscalation has to be false",
} if {
	process := baseline.process
	not process.noNewPrivileges
}

deny contains {
	"rule": "running as non-root",
	"field": sprintf("%s.user.uid", [baseline.place]),
	"value": 0,
	"message": "runAsUser has to be another, and runAsNonRoot true",
} if {
	process := baseline.process
	object.get(process, ["user", "uid"], 0) == 0
}

deny contains {
	"rule": "seccomp",
	"field": "spec.linux.seccomp",
	"value": null,
	"message": "seccompProfile has to be RuntimeDefault or one of the host's",
} if {
	input.request == "container"
	object.get(input, ["spec", "linux", "seccomp"], null) == null
}

deny contains {
	"rule": "capabilities",
	"field": sprintf("%s.capabilities", [baseline.place]),
	"value": more,
	"message": "ALL have to be dropped, and only NET_BIND_SERVICE may be added",
} if {
	more := {name | some set in baseline.process.capabilities; some name in set} - {"CAP_NET_BIND_SERVICE"}
	count(more) > 0
}
