"""What people do with a CLIP and their own images: find them by words, sort them into classes."""
