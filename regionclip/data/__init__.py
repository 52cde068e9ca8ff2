"""Annotations, categories, captions and batches of images."""
