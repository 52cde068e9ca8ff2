"""Basics of all other parts: files, errors, progress, devices, processes."""
