"""Matchers: they decide which regions of an image show which concepts."""
