#!/usr/bin/env bash
# Makes sure that every checkpoint listed in checkpoints.csv is there and intact.
#
#   bash hw2_download.sh             verifies, downloads what has an address, lists what is missing or damaged
#   bash hw2_download.sh --update    after a training: lists the checkpoints of this folder in checkpoints.csv anew
#                                    (lines with an address are written by hand and stay as they are)
set -euo pipefail
unset CDPATH

[ "${1:-}" != --help ] || { sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit; }
script=${BASH_SOURCE:-$0}  # or a link to it
while to=$(readlink "$script"); do case $to in /*) script=$to ;; *) script=$(dirname "$script")/$to ;; esac; done
cd "$(dirname "$script")"
manifest=checkpoints.csv

size() { wc -c < "$1" | tr -d ' '; }
sha256() { { sha256sum "$1" 2> /dev/null || shasum -a 256 "$1"; } | cut -d ' ' -f 1; }
intact() { [ -f "$1" ] && [ "$(size "$1")" = "$2" ] && [ "$(sha256 "$1")" = "$3" ]; }

if [ "${1:-}" = --update ]; then
    [ -w . ] || { echo "$PWD cannot be written to; --update is for a copy of yours" >&2; exit 2; }
    with_address=""
    [ ! -f "$manifest" ] || with_address="$(awk -F, 'NR > 1 && $4 != "in the repository"' "$manifest")"
    {
        echo "path,bytes,sha256,address"
        [ -z "$with_address" ] || echo "$with_address"
        for path in *.pth */checkpoints/{,*/,*/*/}*.{pt,pth,safetensors}; do
            [ -f "$path" ] || continue
            cut -d , -f 1 <<< "$with_address" | grep -qxF "$path" && continue
            echo "$path,$(size "$path"),$(sha256 "$path"),in the repository"
        done
    } > "$manifest.$$.partial"
    mv "$manifest.$$.partial" "$manifest"
    exit
elif [ $# -gt 0 ]; then
    echo "usage: bash hw2_download.sh [--update]" >&2
    exit 2
fi

[ -f "$manifest" ] || { echo "$manifest is missing; clone the repository again" >&2; exit 1; }
count=0
bad=()
while IFS=, read -r path bytes sha256 address || [ -n "$path" ]; do
    count=$((count + 1))
    intact "$path" "$bytes" "$sha256" && continue
    if [ "$address" != "in the repository" ]; then
        echo "downloading $path"
        partial="$path.$$.partial"  # of this run alone
        mkdir -p "$(dirname "$path")"
        if python3 -m gdown "$address" -O "$partial" && intact "$partial" "$bytes" "$sha256"; then
            mv "$partial" "$path"
            continue
        fi
        rm -f "$partial"
        bad+=("$path: not what was expected, or not to be had, from $address")
    elif [ -f "$path" ]; then
        bad+=("$path: damaged; 'git checkout -- $path' brings it back")
    else
        bad+=("$path: missing; 'git checkout -- $path' brings it back")
    fi
done < <(tail -n +2 "$manifest" | tr -d '\r')

if [ ${#bad[@]} -gt 0 ]; then
    echo "${#bad[@]} of $count checkpoints are missing or damaged:" >&2
    printf '  %s\n' "${bad[@]}" >&2
    exit 1
fi
echo "all $count checkpoints are there and intact"
