#!/usr/bin/env bash
# Problem 2: bash hw2_2.sh <noise_dir> <output_dir> <UNet.pt>   draws one face for each noise file, 00.pt -> 00.png
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
exec python3 "$root/p2_ddim/inference.py" "$@"
