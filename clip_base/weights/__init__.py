"""Weights in files: our own form (`native`), the published ones (`reading`), and how to get them (`load`)."""
