"""CLIP zero-shot classification, and textual inversion of concepts for Stable Diffusion."""
