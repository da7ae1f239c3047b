"""Scenes with several labels: a conditional DDPM for i-CLEVR with classifier guidance."""
