"""Export of CLIP to other programs: converted weights, tokenizer files, graphs."""
