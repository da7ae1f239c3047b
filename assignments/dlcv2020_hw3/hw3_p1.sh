#!/usr/bin/env bash
# Problem 1: bash hw3_p1.sh <OUT.png>   writes one picture of 32 faces by the variational autoencoder
script=${BASH_SOURCE:-$0}  # or a link to it
while to=$(readlink "$script"); do case $to in /*) script=$to ;; *) script=$(dirname "$script")/$to ;; esac; done
exec python3 "$(dirname "$script")/../../p4_vae/inference.py" --grid "$@"
