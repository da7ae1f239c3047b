#!/usr/bin/env bash
# Problem 3: bash hw2_3.sh <test_dir> <pred_csv>   writes the digit of every image in a folder to a CSV file
script=${BASH_SOURCE:-$0}  # or a link to it
while to=$(readlink "$script"); do case $to in /*) script=$to ;; *) script=$(dirname "$script")/$to ;; esac; done
exec python3 "$(dirname "$script")/p3_dann/inference.py" "$@"
