# shellcheck shell=bash
# Sourced by the measurements of memory: what a process has of its own, and what of its guest's.

# The mappings of the guest's memory in a VMM: the template's file, and one without a file for what may be plugged in later, which has
# its exact size in steps of 128 MiB (vmm/src/memory.rs). `memory_kib` fails unless it finds just these.
templates=(/var/lib/mayu/templates/[0-9]*)
template_memory=${templates[0]}/memory
growth_kib=$(jq '.machine | ((.max_memory_mib - .memory_mib) / 128 | ceil) * 131072' "${templates[0]}/description.json")

# memory_kib own|guest PID FIELD GUEST_MAPPINGS: the sum of a field of smaps ("Pss:", "Private_.*:") in KiB, over the mappings of the guest's
# memory or over all others. There have to be so many mappings of the guest's.
memory_kib() {
    awk -v of="$1" -v field="^$3$" -v expected="$4" -v template="$template_memory" -v growth="$growth_kib" '
        /^[0-9a-f]+-[0-9a-f]+ / { file = $6; guest = file == template; found += guest }
        $1 == "Size:" && file == "" && $2 == growth { guest = 1; ++found }
        $1 ~ field { sum[guest ? "guest" : "own"] += $2 }
        END {
            if (found != expected) { print "mappings of guest memory: " found ", not " expected > "/dev/stderr"; exit 1 }
            print sum[of] + 0
        }' "/proc/$2/smaps"
}

# With all of the guest's memory that it has touched.
whole_pss_kib() {
    awk '$1 == "Pss:" { print $2 }' "/proc/$1/smaps_rollup"
}
