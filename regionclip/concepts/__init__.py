"""From captions to concepts and their text embeddings."""
