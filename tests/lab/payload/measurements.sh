# shellcheck shell=bash
# Sourced by the parts of `make bench`, which run in the lab in exact mode, where the clock counts instructions: one nanosecond
# each. What a part measures goes to descriptor 3 as a row of a table for people, and to /results/measurements.jsonl for
# scripts/bench-report. Everything else that is written goes to the standard error output.

set -euo pipefail
exec 3>&1 1>&2

image=docker.io/mayu/busybox:test
mayu=io.containerd.mayu.v2
# shellcheck disable=SC2034
runc=io.containerd.runc.v2

# measured NAME UNIT SAMPLE...: a measurement, whose samples are numbers.
measured() {
    local name=$1 unit=$2 sorted
    shift 2
    (($#)) || { echo "nothing was measured of: $name"; return 1; }
    jq -cn --arg name "$name" --arg unit "$unit" '{ $name, $unit, samples: ($ARGS.positional | map(tonumber)) }' --args -- "$@" \
        >> /results/measurements.jsonl
    sorted=$(printf '%s\n' "$@" | sort -n)
    printf '| %s | %s %s | %s – %s |\n' "$name" "$(sed -n "$((($# + 1) / 2))p" <<< "$sorted")" "$unit" \
        "$(head -n 1 <<< "$sorted")" "$(tail -n 1 <<< "$sorted")" >&3
}

# Samples that are kept for later, by name.
declare -A kept=()
keep() {
    kept[$1]+=" $2"
}

# measured_kept UNIT NAME...: what was kept under these names.
measured_kept() {
    local unit=$1 name samples
    shift
    for name in "$@"; do
        read -r -a samples <<< "${kept[$name]:-}"
        measured "$name" "$unit" "${samples[@]}"
    done
}

heading() {
    printf '\n### %s\n\n| what | median | range |\n| --- | --- | --- |\n' "$1" >&3
}

# Starts the pod $1 with a container that idles. Sets $elapsed, in microseconds.
start_pod() {
    local began=${EPOCHREALTIME/./}
    ctr run --detach --runtime "${2:-$mayu}" "$image" "$1" sleep infinity
    elapsed=$((${EPOCHREALTIME/./} - began))
}

# Fails where the container of the pod $1 does not run in a guest.
check_pod() {
    local answer
    answer=$(ctr task exec --exec-id check "$1" sh -c 'echo "$((6 * 7)) $(uname -r)"')
    [[ $answer = '42 '*-mayu ]] || { echo "the pod $1 answers: $answer"; return 1; }
}

remove_pod() {
    ctr task kill --signal KILL "$1"
    # Its own exit code is the container's. What it has not deleted, the container cannot be removed with.
    ctr task delete --force "$1" > /dev/null 2>&1 || true
    ctr container rm "$1"
}

# Has pods go on from a template, or boot: true or false.
use_template() {
    sed -i "/^\[template\]/,/^\[/s/^enabled = .*/enabled = $1/" /etc/mayu/config.toml
}

shim_of() {
    pgrep -f "containerd-shim-mayu-v2.* -id $1( |\$)"
}

vmm_of() {
    ctr task ls | awk -v id="$1" '$1 == id { print $2 }'
}
