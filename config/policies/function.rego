# For functions of people whom nobody knows: what `restricted` allows, in an image that stays as it is, without devices,
# without a way in, and no larger than this.
package mayu.function

import data.mayu.restricted

max_vcpus := 2

max_memory_mib := 1024

deny contains denial if some denial in restricted.deny

deny contains {
	"rule": "read-only root",
	"field": "spec.root.readonly",
	"value": false,
	"message": "readOnlyRootFilesystem has to be true",
} if {
	input.request == "container"
	not input.spec.root.readonly
}

deny contains {
	"rule": "devices",
	"field": "spec.linux.devices",
	"value": device.path,
	"message": "a function has none",
} if {
	some device in input.spec.linux.devices
}

# Probes and hooks that run a command are denied with it.
deny contains {
	"rule": "no exec",
	"field": "process.args",
	"value": object.get(input, ["process", "args"], []),
	"message": "nothing is run beside a function",
} if {
	input.request == "exec"
}

deny contains {
	"rule": "size",
	"field": sprintf("size.%s", [field]),
	"value": input.size[field],
	"message": sprintf("more than %d", [largest]),
} if {
	some field, largest in {"vcpus": max_vcpus, "memory_mib": max_memory_mib}
	input.size[field] > largest
}
