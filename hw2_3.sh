#!/usr/bin/env bash
# Problem 3: bash hw2_3.sh <test_dir> <pred_csv>   writes the digit of every image in a folder to a CSV file
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
exec python3 "$root/p3_dann/inference.py" "$@"
