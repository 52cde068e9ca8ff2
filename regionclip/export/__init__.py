"""Pseudo-labels and detectors for other programs."""
