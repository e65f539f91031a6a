# shellcheck shell=bash
# Sourced by the lab's build scripts, after cache.sh: Debian folders made from Debian's packages. Of the host only
# mmdebstrap and its keyring are used, none of its package sources.

mirror=${MAYU_DEBIAN_MIRROR:-http://deb.debian.org/debian}
# shellcheck disable=SC2154 # set by cache.sh
debs=$lab_cache/debs # downloaded packages, which outlive an interrupted build

# bootstrap FOLDER VARIANT PACKAGES [OPTION...]: fills the folder with trixie's packages, separated by commas, and
# what the variant of mmdebstrap adds. Documentation and translations are left out.
bootstrap() {
    local folder=$1 variant=$2 packages=$3
    shift 3
    mkdir -p "$debs"
    # shellcheck disable=SC2016
    mmdebstrap --mode=root --quiet --architectures=amd64 --format=directory \
        --variant="$variant" --include="$packages" \
        --aptopt='Acquire::Retries "3"' --aptopt='Acquire::Languages "none"' --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --skip=essential/unlink \
        --setup-hook='mkdir -p "$1/var/cache/apt/archives"' \
        --setup-hook="sync-in $debs /var/cache/apt/archives" \
        --customize-hook="sync-out /var/cache/apt/archives $debs" \
        "$@" trixie "$folder" "deb $mirror trixie main"
}
