#!/usr/bin/env bash
# Problem 4: bash hw3_p4.sh <TEST_DIR> usps <PRED.csv>   writes the digit of every image in a folder, by AdaMatch;
# of USPS (from SVHN), or of mnistm (from USPS) or svhn (from MNIST-M)
script=${BASH_SOURCE:-$0}  # or a link to it
while to=$(readlink "$script"); do case $to in /*) script=$to ;; *) script=$(dirname "$script")/$to ;; esac; done
exec python3 "$(dirname "$script")/../../p3_dann/inference.py" --assignment 2020 --method adamatch "$@"
