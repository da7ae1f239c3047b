#!/usr/bin/env bash
# Lab 6: bash lab6.sh <output_dir> [--data_dir DIR]   a scene for each list of test.json and new_test.json
set -euo pipefail
script=${BASH_SOURCE[0]}
while [[ -L $script ]]; do  # a link to this file
    target=$(readlink -- "$script")
    [[ $target == /* ]] && script=$target || script=$(dirname -- "$script")/$target
done
root=$(unset CDPATH && cd -- "$(dirname -- "$script")/../.." && pwd)
exec python3 "$root/p7_clevr/inference.py" "$@"
