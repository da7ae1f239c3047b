#!/usr/bin/env bash
# Problem 2: bash hw2_2.sh <noise_dir> <output_dir> <UNet.pt>   generates one face for each noise file, 00.pt -> 00.png
script=${BASH_SOURCE:-$0}  # or a link to it
while to=$(readlink "$script"); do case $to in /*) script=$to ;; *) script=$(dirname "$script")/$to ;; esac; done
exec python3 "$(dirname "$script")/../../p2_ddim/inference.py" "$@"
