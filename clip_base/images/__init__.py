"""Images and videos: decoding, forms in memory, preprocessing."""
