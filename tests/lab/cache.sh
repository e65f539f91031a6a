# shellcheck shell=bash
# Sourced by the lab's build scripts: a cache of built folders, named after what they are built from.

lab_cache=${MAYU_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mayu}/lab

say() { printf 'lab: %s\n' "$*" >&2; }

# cached_folder NAME KEY BUILD: prints the folder $lab_cache/NAME-KEY. When it is absent, the function BUILD
# is called with a new folder to fill, which takes that name only once it is complete. Callers that want the
# same folder at the same time wait for one build.
cached_folder() {
    local folder=$lab_cache/$1-$2 started=$SECONDS lock
    mkdir -p "$lab_cache"
    exec {lock}>"$lab_cache/$1.lock"
    flock --nonblock "$lock" || { say "waiting for another build of $1"; flock "$lock"; }
    if [[ ! -d $folder ]]; then
        say "building $1 (kept in $folder)"
        rm -rf "$folder.partial"
        mkdir "$folder.partial"
        "$3" "$folder.partial" >&2
        mv "$folder.partial" "$folder"
        say "built $1 in $((SECONDS - started)) s"
    fi
    exec {lock}>&-
    # What no one has asked for in a month goes.
    touch "$folder"
    find "$lab_cache" -maxdepth 1 -name "$1-*" -mtime +30 -exec rm -rf {} +
    printf '%s\n' "$folder"
}

# key_of FILE...: a short hash of the files' contents.
key_of() { cat -- "$@" | sha256sum | cut -c1-16; }
