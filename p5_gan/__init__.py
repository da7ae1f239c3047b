"""Faces by a generative adversarial network (DLCV 2020 HW3, problem 2)."""
