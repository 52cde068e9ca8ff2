"""RegionCLIP's published files (arXiv 2112.09106): what is in them, and the same in our forms and back."""
