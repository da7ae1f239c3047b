"""Faces by a variational autoencoder (DLCV 2020 HW3, problem 1)."""
