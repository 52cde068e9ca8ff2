"""Where image-text pairs come from: readers of what people have, and a drawn world for others."""
