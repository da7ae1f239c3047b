#!/usr/bin/env bash
# Problem 2: bash hw2_2.sh <noise_dir> <output_dir> <UNet.pt>   draws one face for each noise file, 00.pt -> 00.png
set -euo pipefail
root=$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# glibc hands every large buffer back to the system and clears it anew; keeping them is faster on a CPU.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000
exec python3 "$root/p2_ddim/inference.py" "$@"
