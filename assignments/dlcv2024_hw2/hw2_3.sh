#!/usr/bin/env bash
# Problem 3: bash hw2_3.sh <input.json> <output_dir> [<CHECKPOINT> --embeds <FILE> ...]   draws 25 images a prompt; without
# a checkpoint by the tiny pipeline
script=${BASH_SOURCE:-$0}  # or a link to it
while to=$(readlink "$script"); do case $to in /*) script=$to ;; *) script=$(dirname "$script")/$to ;; esac; done
exec python3 "$(dirname "$script")/../../p6_personalize/inference.py" "$@"
