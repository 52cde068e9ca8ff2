"""Images and videos: decoding, input types, preprocessing."""
