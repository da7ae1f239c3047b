#!/usr/bin/env bash
# Brings hw2_data/ into this folder.
#
#   bash get_dataset.sh               the course's zip; where that is gone, the public data sets behind it
#   bash get_dataset.sh SOURCE_DIR    no network: builds it from the public files in SOURCE_DIR
#                                     (python3 build_dataset.py --help lists them)
#
# What is in hw2_data/ already stays as it is.
set -euo pipefail
unset CDPATH

[ "${1:-}" != --help ] || { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit; }
[ $# -le 1 ] || { echo "usage: bash get_dataset.sh [SOURCE_DIR]" >&2; exit 2; }
source_dir=""
if [ $# -eq 1 ]; then
    if [ ! -d "$1" ]; then
        echo "get_dataset.sh: error: there is no folder '$1'; name the one that holds the public files" >&2
        exit 2
    fi
    source_dir="$(cd -- "$1" && pwd)"
fi
script=${BASH_SOURCE:-$0}  # or a link to it
while to=$(readlink "$script"); do case $to in /*) script=$to ;; *) script=$(dirname "$script")/$to ;; esac; done
cd "$(dirname "$script")"
partial="hw2_data/.$$.partial"  # this run's own; inside, so that moving a part is a rename wherever hw2_data/ lies
trap 'rm -rf "$partial"; rmdir hw2_data 2> /dev/null || true' EXIT
course_zip="https://drive.google.com/uc?id=1XUl4tqq3kKyWRe2lyHZ8s7U9yc_x3mWT"

incomplete() {  # the first domain that is not whole
    for domain in mnistm svhn usps; do
        for part in data train.csv val.csv; do
            [ -e "hw2_data/digits/$domain/$part" ] || { echo "hw2_data/digits/$domain"; return; }
        done
    done
}

has_face() {
    for part in noise GT UNet.pt; do
        [ -e "hw2_data/face/$part" ] || return 1
    done
}

from_course() {
    mkdir -p "$partial" || exit 2
    python3 -m gdown "$course_zip" -O "$partial/hw2_data.zip" || return 1
    python3 -m zipfile -e "$partial/hw2_data.zip" "$partial" || return 1
    root="$(find "$partial" -type d -name digits -not -path '*/__MACOSX/*' | head -n 1)"
    [ -n "$root" ] || return 1
    local parts=(digits/mnistm digits/svhn digits/usps face/noise face/GT face/UNet.pt)
    for part in "${parts[@]}"; do  # all or nothing: the zip's data are not to be mixed with another source's
        [ -e "$root/../$part" ] || return 1
    done
    mkdir -p hw2_data/digits hw2_data/face || exit 2
    for part in "${parts[@]}"; do
        [ -e "hw2_data/$part" ] || mv "$root/../$part" "hw2_data/$part" || exit 2
    done
}

if [ -z "$(incomplete)" ] && { [ -n "$source_dir" ] || has_face; }; then
    echo "hw2_data/ is complete already; nothing was changed"
elif [ -n "$source_dir" ]; then
    python3 build_dataset.py --source_dir "$source_dir" --data_dir hw2_data
    echo "hw2_data/digits/ was built from the public files in $source_dir"
elif from_course; then
    if [ -n "$(incomplete)" ]; then
        echo "get_dataset.sh: error: $(incomplete) was there already but is not whole; move it away and try again" >&2
        exit 2
    fi
    echo "what hw2_data/ lacked comes from the course's zip"
elif [ -z "$(incomplete)" ]; then
    echo "hw2_data/digits/ is complete already; hw2_data/face/ is only in the course's zip, which cannot be had"
else
    echo "the course's zip cannot be had; fetching the public data sets into public_data/ instead" >&2
    python3 build_dataset.py --source_dir public_data --data_dir hw2_data --download
    echo "hw2_data/digits/ was built from the public data sets (problem 2's hw2_data/face/ is only in the course's zip)"
fi
