"""Proposers: they return scored boxes for images."""
