"""Where image-text pairs come from: readers of what people have, and a synthetic dataset for others."""
