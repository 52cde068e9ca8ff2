"""RegionCLIP's published files (arXiv 2112.09106): reading, and conversion to our formats and back."""
