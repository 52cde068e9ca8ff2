"""Basics of all other parts: errors, progress, precision, devices, processes."""
