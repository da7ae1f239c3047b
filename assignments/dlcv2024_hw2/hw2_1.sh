#!/usr/bin/env bash
# Problem 1: bash hw2_1.sh <output_dir>   generates 500 digits of MNIST-M and 500 of SVHN, mnistm/0_001.png ... 9_050.png
script=${BASH_SOURCE:-$0}  # or a link to it
while to=$(readlink "$script"); do case $to in /*) script=$to ;; *) script=$(dirname "$script")/$to ;; esac; done
root=$(dirname "$script")/../..
exec python3 "$root/p1_ddpm/inference.py" --checkpoint "$root/p1_ddpm/checkpoints/mnistm_svhn.pt" --steps 7 --guidance 3 --interval 300 950 "$@"
