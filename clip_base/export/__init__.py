"""CLIP in other programs: converted weights, tokenizer files, graphs."""
