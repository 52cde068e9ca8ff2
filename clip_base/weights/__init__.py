"""Weights files: our own format (`native`), published ones (`reading`), and loading by name (`load`)."""
