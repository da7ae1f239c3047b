"""Problem 1: digits by diffusion."""
