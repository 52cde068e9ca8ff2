"""The synthetic dataset: generated scenes with captions, boxes and masks."""
