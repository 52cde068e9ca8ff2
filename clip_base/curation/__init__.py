"""A balanced subset of image-text pairs, chosen by what their texts say (arXiv 2103.00020, section 2.2)."""
