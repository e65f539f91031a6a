# shellcheck shell=bash
# Sourced by the measurements: rows of a Markdown table, which go to descriptor 3.

median() {
    sort -n | awk '{ value[NR] = $1 } END { print value[int((NR + 1) / 2)] }'
}

row() {
    local name=$1
    shift
    printf '| %s | %s | %s – %s |\n' "$name" "$(printf '%s\n' "$@" | median)" \
        "$(printf '%s\n' "$@" | sort -n | head -n 1)" "$(printf '%s\n' "$@" | sort -n | tail -n 1)" >&3
}
