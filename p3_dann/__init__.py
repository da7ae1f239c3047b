"""Problem 3: a digit classifier adapted from one domain to another."""
