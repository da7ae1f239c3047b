#!/usr/bin/env bash
# Problem 2: bash hw3_p2.sh <OUT.png>   writes one picture of 32 faces by the generative adversarial network
script=${BASH_SOURCE:-$0}  # or a link to it
while to=$(readlink "$script"); do case $to in /*) script=$to ;; *) script=$(dirname "$script")/$to ;; esac; done
exec python3 "$(dirname "$script")/../../p5_gan/inference.py" --grid "$@"
