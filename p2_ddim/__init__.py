"""Problem 2: faces from noise files by DDIM."""
