# shellcheck shell=bash disable=SC2154 # variables of mayu-node, which sources this
# The handler `mayu` in containerd's configuration, without harm to anything else in it.
#
# How files that configure the same plugin are merged differs from release to release: 1.7 lets the last file win; 2.x
# merges, but ignores what a file of an older configuration version says of CRI beside one of a newer version. So nothing
# is taken for granted. A change is kept only if containerd itself, asked for its settings with `containerd config dump`,
# has all the settings that it had, and the handler. Two kinds of change are tried:
#
#   a drop-in, conf.d/mayu.toml, which is read where the main file imports it (since 2.2 also where there is no main file);
#   a block at the end of the main file, between two lines that mark it.
#
# Removing either gives back the bytes that were there.

handler=io.containerd.mayu.v2
dropin=${containerd_config%/*}/conf.d/mayu.toml
owned='# The handler of mayu, kept by mayu-node.' # the first line of a drop-in that is not somebody else's
begin='# BEGIN mayu' end='# END mayu'

# Exists from before a change until containerd runs with it, with a copy of what was changed. A reboot, after which
# containerd has read its files anyway, clears it.
change=$host/run/mayu-node

# Refuses what this script has not been made for. Nothing has been changed yet.
check_containerd() {
    local version
    version=$(on_host containerd --version) || die "there is no containerd on this node"
    [[ $version =~ [[:space:]]v?([0-9]+)\.([0-9]+)\. ]] || die "cannot tell the version of containerd from '$version'"
    local major=${BASH_REMATCH[1]} minor=${BASH_REMATCH[2]}
    ((major == 2 || (major == 1 && minor >= 7))) || die "containerd is $major.$minor; mayu needs 1.7 or 2.x"
    say "containerd is $major.$minor"
    [[ ! -L $host$containerd_config ]] ||
        die "$containerd_config is a symbolic link: add the handler by hand (docs/kubernetes.md)"
    [[ -e $change ]] || cri_is_loaded ||
        die "containerd's CRI plugin is not loaded on this node; \`ctr plugins ls\` and containerd's log tell why"
}

cri_is_loaded() {
    on_host ctr plugins list | awk '$1 == "io.containerd.grpc.v1" && $2 == "cri" { status = $NF }
                                    END { exit status != "ok" }'
}

# containerd's settings as it sees them itself; with an argument, those that this main file would give.
settings() {
    if [[ -z ${1:-} && ! -e $host$containerd_config ]]; then
        # 1.7 dumps nothing where there is no file.
        on_host containerd config dump 2> /dev/null || on_host containerd config default
    else
        on_host containerd --config "${1:-$containerd_config}" config dump
    fi
}

# Of settings, all but the handler, and but the list of the files that they come from.
others() { awk '/^ *\[/ { ours = /\.containerd\.runtimes\.mayu[].]/ } !ours && NF && !/^imports = /'; }

# Whether settings have the handler.
have_handler() {
    awk -v handler="$handler" '
        /^ *\[/ { ours = /^ *\[plugins\..io\.containerd\.(grpc\.v1\.cri|cri\.v1\.runtime).\.containerd\.runtimes\.mayu\]$/ }
        ours && $1 == "runtime_type" && index($3, handler) == 2 { found = 1 }
        END { exit !found }'
}

# Of settings, the tables of all runtimes.
runtime_tables() { awk '/^ *\[/ { runtime = /\.containerd\.runtimes\./ } runtime'; }

# The version that a configuration file says it has; nothing where it says none, which means 1.
config_version() { awk -F'[ \t]*=[ \t]*' '/^[ \t]*\[/ { exit } $1 ~ /^[ \t]*version$/ { print $2 + 0; exit }' "$@"; }

# The handler's table for a file of this configuration version, from the examples.
table() {
    awk '/^\[/ { ours = /\.runtimes\.mayu\]$/ } ours && NF' \
        "$tree$prefix/share/doc/mayu/containerd/containerd-$(($1 > 2 ? 2 : 1)).toml"
}

# Replaces a file of the host with standard input, in one step. Owner and mode stay.
replace() {
    mkdir -p "${1%/*}"
    [[ ! -e $1 ]] || cp --attributes-only --preserve=all -- "$1" "$1.mayu-new"
    cat > "$1.mayu-new"
    sync -- "$1.mayu-new"
    mv -f -- "$1.mayu-new" "$1"
}

has_dropin() {
    local line=''
    [[ -e $host$dropin ]] && read -r line < "$host$dropin"
    [[ $line = "$owned" ]]
}

# Sets $before and $after to what is around the block in the main file, and $created to whether there was no file before
# the block; fails where there is no block. The line break before the block belongs to it, so that a file which does not
# end in one gets none for good.
around_block() {
    local text='' rest
    [[ -e $host$containerd_config ]] || return 1
    IFS= read -r -d '' text < "$host$containerd_config" || true
    if [[ $text = "$begin"$'\n'* ]]; then
        created=yes before='' rest=${text#"$begin"$'\n'}
    else
        created='' before=${text%%$'\n'"$begin"$'\n'*}
        [[ $before != "$text" ]] || return 1
        rest=${text#"$before"$'\n'"$begin"$'\n'}
    fi
    after=${rest#*"$end"$'\n'}
    [[ $after != "$rest" ]]
}

# Removes a directory of the host if it is empty, and then its parent in the same way, up to /etc/containerd's.
remove_empty() {
    local directory=$1
    while [[ $directory = "${containerd_config%/*}"* ]]; do
        [[ ! -d $host$directory ]] || rmdir -- "$host$directory" 2> /dev/null || return 0
        directory=${directory%/*}
    done
}

# Takes the drop-in and the block out of the host's files.
take_out() {
    local created before after
    if has_dropin; then
        rm -- "$host$dropin"
        remove_empty "${dropin%/*}"
    fi
    around_block || return 0
    if [[ -n $created && -z $after ]]; then
        rm -- "$host$containerd_config"
        remove_empty "${containerd_config%/*}"
        return
    fi
    # Such a block also holds the version of what somebody has added behind it.
    [[ -z $created ]] || before="version = $(config_version "$host$containerd_config")"$'\n'
    printf '%s' "$before$after" | replace "$host$containerd_config"
}

# Notes that a change is under way, with a copy of what is to be changed.
begin_change() {
    local file
    rm -rf "$change.new"
    mkdir -m 700 "$change.new"
    for file in "$containerd_config" "$dropin"; do
        [[ ! -e $host$file ]] || cp --preserve=all -- "$host$file" "$change.new/"
    done
    mv -T "$change.new" "$change"
}

take_back() {
    local file
    for file in "$containerd_config" "$dropin"; do
        if [[ -e $change/${file##*/} ]]; then
            replace "$host$file" < "$change/${file##*/}"
        else
            rm -f -- "$host$file"
        fi
    done
    remove_empty "${dropin%/*}"
}

# Gives the handler to containerd, which finish_change then restarts.
add_handler() {
    local version base
    if settings | have_handler && handler_is_current; then
        say "containerd has the handler"
        return
    fi
    begin_change
    take_out
    base=$(settings) || give_up "containerd cannot read its configuration"
    if have_handler <<< "$base"; then
        say "containerd has the handler from elsewhere"
        return
    fi
    version=$(if [[ -e $host$containerd_config ]]; then cat "$host$containerd_config"; else echo "$base"; fi | config_version)
    ((${version:-1} >= 2)) ||
        give_up "$containerd_config is of configuration version 1; \`containerd config migrate\` prints one of version 2"
    add_dropin "$version" "$base" || add_block "$version" "$base" ||
        give_up "containerd takes no handler without losing other settings: add it by hand (docs/kubernetes.md)"
}

give_up() {
    take_back
    rm -rf "$change"
    die "$*"
}

# Whether the handler is there as this version of mayu wants it, or by somebody else's hand.
handler_is_current() {
    local version wanted created before after
    if has_dropin; then
        version=$(config_version "$host$dropin")
        wanted=$(dropin_text "${version:-1}")
        [[ $(< "$host$dropin") = "$wanted" ]]
    elif around_block; then
        version=$(config_version "$host$containerd_config")
        wanted=$(table "${version:-1}")
        [[ $(< "$host$containerd_config") = *"$wanted"* ]]
    fi
}

dropin_text() {
    echo "$owned"
    echo "version = $1"
    echo
    table "$1"
}

# add_dropin VERSION BASE: adds a drop-in to what gives the settings BASE.
add_dropin() {
    [[ ! -e $host$dropin ]] || return 1
    dropin_text "$1" | replace "$host$dropin"
    if is_fit "$2"; then
        say "added the handler in $dropin"
        return
    fi
    rm -f -- "$host$dropin"
    rmdir --ignore-fail-on-non-empty -- "$host${dropin%/*}"
    return 1
}

# add_block VERSION BASE: adds a block to what gives the settings BASE. 1.7 has runc only as long as no runtime is named,
# so there it may have to be named too.
add_block() {
    local main=$host$containerd_config candidate=$containerd_config.mayu-candidate lead=$'\n' head='' tables
    [[ -e $main ]] || lead='' head="version = $1"$'\n\n'
    mkdir -p "${main%/*}"
    for tables in "$(table "$1")" "$(table "$1"; echo; runtime_tables <<< "$2")"; do
        rm -f -- "$host$candidate"
        [[ ! -e $main ]] || cp --preserve=all -- "$main" "$host$candidate"
        printf '%s%s\n%s%s\n%s\n' "$lead" "$begin" "$head" "$tables" "$end" >> "$host$candidate"
        if is_fit "$2" "$candidate"; then
            sync -- "$host$candidate"
            mv -fT -- "$host$candidate" "$main"
            say "added the handler at the end of $containerd_config"
            return
        fi
    done
    rm -- "$host$candidate"
    return 1
}

# is_fit BASE [FILE]: whether the settings of the main file, or of this one in its place, are BASE and the handler.
is_fit() {
    local settings
    settings=$(settings "${2:-}" 2> /dev/null) || return 1
    have_handler <<< "$settings" && [[ $(others <<< "$settings") = "$(others <<< "$1")" ]]
}

remove_handler() {
    local created before after
    has_dropin || around_block || return 0
    begin_change
    take_out
    settings > /dev/null || give_up "containerd cannot read its configuration without mayu's part"
    say "took the handler out of containerd's configuration"
}

# Restarts containerd if a change of its configuration is under way, also one of a run that was interrupted. Where
# containerd does not come back, neither does the change stay.
finish_change() {
    [[ -e $change ]] || return 0
    if restart_containerd; then
        rm -rf "$change"
        return
    fi
    say "containerd does not come back with its new configuration; putting the old one back"
    take_back
    restart_containerd || hold "containerd does not come back with its old configuration either"
    rm -rf "$change"
    hold "containerd did not start with its new configuration; it runs with the old one"
}

restart_containerd() {
    local deadline
    say "restarting $containerd_unit"
    on_host systemctl restart "$containerd_unit" || return 1
    deadline=$((SECONDS + containerd_timeout))
    until cri_is_loaded; do
        ((SECONDS < deadline)) || return 1
        sleep 1
    done
}
