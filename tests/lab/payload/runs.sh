# shellcheck shell=bash
# Sourced by the measurements of single runs, after measurements.sh: `ctr run` and `ctr task exec`, and what the shim logs of them.

log=/results/containerd.log
number=0

# `ctr run … true` with the runtime $1. Sets $elapsed, $began and $ended (microseconds), and $id to the container's.
time_run() {
    id=bench-$((++number))
    began=${EPOCHREALTIME/./}
    ctr run --rm --runtime "$1" "$image" "$id" true
    ended=${EPOCHREALTIME/./}
    elapsed=$((ended - began))
}

# The same with mayu, kept with its stages. The pod goes on from a template, or boots: that is $1.
keep_run() {
    local origin=$1 name=$2 from_template=false ready stage milliseconds
    time_run "$mayu"
    ! logged 'the pod goes on from a template' > /dev/null || from_template=true
    [[ $from_template-$origin = true-template || $from_template-$origin = false-booted ]] ||
        { echo "$id: to have been $origin, but from a template: $from_template"; return 1; }
    keep "run mayu, $name" "$elapsed"
    ready=$(logged 'VM is up' | jq .ready_us)
    keep "answers, $name" "$ready"
    tell_stages > /tmp/stages
    while IFS='|' read -r stage milliseconds; do
        keep "stage, $name: $stage" "$milliseconds"
    done < /tmp/stages
}

# The last line in which the shim of $id logged $1.
logged() {
    grep -F '{"msg":' "$log" | jq -cn --arg id "$id" --arg msg "$1" \
        '[inputs | select(.sandbox == $id and .msg == $msg)][-1] // ("not logged: \($msg)\n" | halt_error)' 2> /dev/null
}

# Where the time of the run of $id went, in milliseconds, the resolution of the log.
tell_stages() {
    grep -F '{"msg":' "$log" | jq -rn --arg id "$id" --argjson began "$((began / 1000))" --argjson ended "$((ended / 1000))" '
        [inputs | select(.sandbox == $id)] as $lines
        | def line($msg): [$lines[] | select(.msg == $msg)][-1];
          def at($msg): line($msg).time * 1000 | round;
          line("VM is up") as $up
        | (at("VM is up") - ($up.ready_us / 1000 | floor)) as $spawned
        | ($up.vmm_us / 1000 | floor) as $vmm
        | { serves: (at("shim started") - $began),
            create: ($spawned - at("shim started")),
            vmm: $vmm,
            guest: (at("VM is up") - $spawned - $vmm),
            container: (at("container created") - at("VM is up")),
            end: (at("the VM is gone") - at("container created")),
            rest: ($ended - at("the VM is gone")),
            all: ($ended - $began) }
        | to_entries[] | "\(.key)|\(.value)"'
}
stages=(serves create vmm guest container end rest all)

# `ctr task exec … true` in the container $1. Sets $elapsed, in microseconds.
time_exec() {
    local began=${EPOCHREALTIME/./}
    ctr task exec --exec-id "exec-$((++number))" "$1" true
    elapsed=$((${EPOCHREALTIME/./} - began))
}
