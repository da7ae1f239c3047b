#!/usr/bin/env bash
# Lab 6: bash lab6.sh <output_dir> [--data_dir DIR]   generates a scene for each list of test.json and new_test.json
script=${BASH_SOURCE:-$0}  # or a link to it
while to=$(readlink "$script"); do case $to in /*) script=$to ;; *) script=$(dirname "$script")/$to ;; esac; done
exec python3 "$(dirname "$script")/../../p7_clevr/inference.py" "$@"
