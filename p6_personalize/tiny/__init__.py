"""A small CLIP and a small latent diffusion pipeline of scenes, which prove the chapter where nothing is downloaded."""
