#!/usr/bin/env bash
# Problem 1: bash hw2_1.sh <output_dir>   generates 1,000 digits, 0_001.png ... 9_100.png
script=${BASH_SOURCE:-$0}  # or a link to it
while to=$(readlink "$script"); do case $to in /*) script=$to ;; *) script=$(dirname "$script")/$to ;; esac; done
exec python3 "$(dirname "$script")/p1_ddpm/inference.py" "$@"
