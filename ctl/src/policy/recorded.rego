
# What a container is, as far as this policy looks at it.
facts := {
	"image": object.get(input, "image", ""),
	"spec.process.args": object.get(input, ["spec", "process", "args"], []),
	"spec.process.cwd": object.get(input, ["spec", "process", "cwd"], ""),
	"spec.process.user": object.get(input, ["spec", "process", "user"], {}),
	"spec.process.capabilities": {set: sort(names) |
		some set, names in object.get(input, ["spec", "process", "capabilities"], {})
	},
	"spec.process.noNewPrivileges": object.get(input, ["spec", "process", "noNewPrivileges"], false),
	"spec.root.readonly": object.get(input, ["spec", "root", "readonly"], false),
	"spec.mounts": [part |
		some mount in object.get(input, ["spec", "mounts"], [])
		part := {
			"destination": mount.destination,
			"type": object.get(mount, "type", ""),
			"source": general(object.get(mount, "source", "")),
			"options": object.get(mount, "options", []),
		}
	],
	"spec.hooks": {point: paths |
		some point, hooks in object.get(input, ["spec", "hooks"], {})
		paths := [hook.path | some hook in hooks]
	},
	"spec.linux.devices": [device.path | some device in object.get(input, ["spec", "linux", "devices"], [])],
	"spec.linux.sysctl": object.get(input, ["spec", "linux", "sysctl"], {}),
	"spec.linux.maskedPaths": object.get(input, ["spec", "linux", "maskedPaths"], []),
	"spec.linux.readonlyPaths": object.get(input, ["spec", "linux", "readonlyPaths"], []),
	"spec.linux.seccomp.defaultAction": object.get(input, ["spec", "linux", "seccomp", "defaultAction"], ""),
}

# A path without what is different in every pod: identifiers, and what a kubelet and containerd choose at random.
general(path) := result if {
	identifiers := {
		"{pod.uid}": object.get(input, ["pod", "uid"], ""),
		"{pod.id}": object.get(input, ["pod", "id"], ""),
		"{container.id}": object.get(input, ["container", "id"], ""),
	}
	named := strings.replace_n({identifier: name | some name, identifier in identifiers; identifier != ""}, path)
	token := regex.replace(named, `/kube-api-access-[a-z0-9]{5}$`, "/kube-api-access-*")
	message := regex.replace(token, `/containers/([^/]+)/[0-9a-f]{8}$`, "/containers/$1/*")
	result := regex.replace(message, `/volumes/[0-9a-f]{64}$`, "/volumes/*")
}

deny contains {
	"rule": "recorded",
	"field": "container.name",
	"value": object.get(input, ["container", "name"], ""),
	"message": "the pod had no such container",
} if {
	input.request == "container"
	not containers[input.container.name]
}

deny contains {
	"rule": "recorded",
	"field": field,
	"value": facts[field],
	"message": sprintf("it was %v", [expected]),
} if {
	input.request == "container"
	some field, expected in containers[input.container.name]
	facts[field] != expected
}

deny contains {
	"rule": "recorded",
	"field": "pod.sysctls",
	"value": object.get(input, ["pod", "sysctls"], {}),
	"message": sprintf("they were %v", [sysctls]),
} if {
	input.request == "pod"
	object.get(input, ["pod", "sysctls"], {}) != sysctls
}

deny contains {
	"rule": "recorded",
	"field": "process.args",
	"value": object.get(input, ["process", "args"], []),
	"message": "nothing was run beside the containers",
} if {
	input.request == "exec"
}

deny contains {
	"rule": "recorded",
	"field": sprintf("size.%s", [field]),
	"value": input.size[field],
	"message": sprintf("it was %d", [largest]),
} if {
	some field, largest in size
	input.size[field] > largest
}
